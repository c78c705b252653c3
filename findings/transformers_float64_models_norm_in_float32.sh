#!/usr/bin/env bash
# A transformers model in float64 is not one: the RMS norms of Llama and its kin (Mistral, Qwen 2 and 3, Gemma, Phi 3) cast
# their input to float32 and back, so that two ways of computing the same that agree to 1e-15 in GPT-2 agree to some 1e-8 in them.
# A test that compares gradients in float64, to tell a wrong factor from rounding, sees rounding of a single-precision model.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

assert version("transformers") == "5.23.0"
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
configs = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": LlamaConfig(**size),
    "mistral": MistralConfig(**size, num_key_value_heads=4),
    "qwen3": Qwen3Config(**size, num_key_value_heads=4, head_dim=8),
}

def exact(norm: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What the norm's formula gives in the dtype of the states."""
    if isinstance(norm, torch.nn.LayerNorm):
        return torch.nn.functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    mean_square = (states * states).mean(-1, keepdim=True)
    return norm.weight * states / torch.sqrt(mean_square + norm.variance_epsilon)


for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        as_it_is = model(ids).logits
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.forward = lambda states, norm=module: exact(norm, states)
        in_float64 = model(ids).logits
    gap = float((as_it_is - in_float64).abs().max() / in_float64.abs().max())
    print(f"{name}: logits {as_it_is.dtype}, away from the same with norms in float64: {gap:.0e}")
    assert as_it_is.dtype == torch.float64
    assert gap < 1e-14 if name == "gpt2" else 1e-9 < gap < 1e-6, (name, gap)
PYTHON
