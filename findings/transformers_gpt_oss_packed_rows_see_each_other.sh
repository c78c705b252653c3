#!/usr/bin/env bash
# In transformers packed rows are kept apart by position ids that begin anew: Llama, Qwen3, Gemma 3 give the second example
# exactly what it gets alone. gpt-oss, called in the same way, lets it see the first: its logits change, without a word.
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
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}
kinds = {
    "llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 32},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32},
}
first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11, 12, 13]])
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
seen = {}
for kind, more in kinds.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
        alone = model(input_ids=second, use_cache=False).logits
        row = torch.cat([first, second], 1)
        packed = model(input_ids=row, position_ids=positions, use_cache=False).logits[:, 4:]
    seen[kind] = float((alone - packed).abs().max())
    print(f"{kind:12} packed behind another example, logits differ by {seen[kind]:.1e}")
assert max(gap for kind, gap in seen.items() if kind != "gpt_oss") < 1e-5, seen
assert seen["gpt_oss"] > 0.1, seen
PYTHON
