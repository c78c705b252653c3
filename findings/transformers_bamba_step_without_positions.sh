#!/usr/bin/env bash
# A decode step with a cache and no position ids: Llama, and other hybrids, count on from the length of the cache. Bamba
# begins at position 0 again, and its logits are wrong. With position ids they are right.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

assert transformers.__version__ == "5.23.0", transformers.__version__
sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}
mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
kinds = {
    "llama": {},
    "granitemoehybrid": {**mamba, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
                         "num_experts_per_tok": 1, "shared_intermediate_size": 32, "position_embedding_type": "rope"},
    "bamba": {**mamba, "attn_layer_indices": [1]},
}
ids, seen = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1)), {}
for kind, more in kinds.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        gaps = []
        for given in ({}, {"position_ids": torch.tensor([[8]])}):
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            step = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, **given).logits[:, -1]
            gaps.append(float((step - whole).abs().max()))
    seen[kind] = gaps
    print(f"{kind:18} without position ids {gaps[0]:.1e}, with {gaps[1]:.1e}")
assert all(max(gaps) < 1e-4 for kind, gaps in seen.items() if kind != "bamba"), seen
assert seen["bamba"][0] > 1e-2 and seen["bamba"][1] < 1e-4, seen
PYTHON
