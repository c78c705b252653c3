#!/usr/bin/env bash
# add_weighted_adapter of peft gives an adapter combined of rank-stabilised ones (use_rslora) the factor sqrt(r) on top: one
# adapter with weight 1 becomes 2.83 times itself at rank 8, however it is combined. Plain LoRA comes out unchanged.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

assert version("peft") == "0.21.2"
warnings.simplefilter("ignore")
RANK = 8


def strength(rslora: bool, way: str) -> float:
    """How many times the one adapter the combination of it alone is."""
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = LoraConfig(
        r=RANK, lora_alpha=16, use_rslora=rslora, target_modules=["q_proj"], init_lora_weights=False
    )
    model = get_peft_model(LlamaForCausalLM(small), config, adapter_name="one")
    model.add_weighted_adapter(["one"], [1.0], "combined", combination_type=way)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    one, combined = layer.get_delta_weight("one"), layer.get_delta_weight("combined")
    times = (combined.norm() / one.norm()).item()
    assert torch.allclose(combined, times * one, atol=1e-4)
    return times


for way in ("linear", "cat", "svd"):
    plain, stabilised = strength(False, way), strength(True, way)
    print(f"{way}: LoRA {plain:.3f} times itself, rank-stabilised {stabilised:.3f} times")
    assert abs(plain - 1) < 1e-3, plain
    assert abs(stabilised - RANK**0.5) < 1e-3, stabilised
PYTHON
