#!/usr/bin/env bash
# Leaving peft's disable_adapter() makes adapters learn that were frozen before it. An adapter loaded for inference, or
# frozen by hand as part of a reference or a reward model, takes gradients after the first look at the base model.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import peft
from transformers import LlamaConfig, LlamaForCausalLM

assert peft.__version__ == "0.21.2"
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
folder = sys.argv[1] + "/adapter"
peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), peft.LoraConfig(r=4)).save_pretrained(folder)
model = peft.PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**sizes)), folder)  # is_trainable=False
learning = lambda: sum(parameter.requires_grad for parameter in model.parameters())
before = learning()
with model.disable_adapter():
    within = learning()
after = learning()
print(f"parameters that learn: {before} before, {within} within, {after} after disable_adapter()")
assert (before, within, after) == (0, 0, 8), (before, within, after)
PYTHON
