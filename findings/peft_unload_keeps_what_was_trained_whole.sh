#!/usr/bin/env bash
# `unload()` of peft is to give the base model back, without the adapter. Modules that were trained as a whole
# (`modules_to_save`: a head, embeddings, a classifier's score) stay the trained ones: the model that comes back is neither the
# base nor what was trained. `disable_adapter()` uses the base's. Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

assert version("peft") == "0.21.2"


def off_the_base(modules: list[str] | None) -> tuple[float, float]:
    """By how much the largest log-probability differs from the base's after a step of training: with the adapter
    disabled, and with it unloaded."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    ids = torch.arange(9)[None]
    logp = lambda model: model(input_ids=ids).logits.log_softmax(-1).detach()  # noqa: E731
    before = logp(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with model.disable_adapter():
        disabled = (logp(model) - before).abs().max().item()
    return disabled, (logp(model.unload()) - before).abs().max().item()


for modules in (None, ["lm_head"]):
    disabled, unloaded = off_the_base(modules)
    print(f"modules_to_save={modules}: off the base by {disabled:.4f} nats disabled, {unloaded:.4f} unloaded")
    assert disabled < 1e-5, disabled
    assert (unloaded > 0.1) if modules else (unloaded < 1e-5), unloaded
PYTHON
