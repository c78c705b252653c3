#!/usr/bin/env bash
# RWKV in transformers decodes one row rightly from its state. With several rows in a batch a decode step mixes them: its
# logits are those of no row's own text, so that sampling in batches draws from another distribution.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

assert transformers.__version__ == "5.23.0", transformers.__version__
torch.manual_seed(0)
config = RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=2)
model = RwkvForCausalLM(config).eval()
ids = torch.randint(3, 60, (3, 9))


def gap(rows: torch.Tensor) -> float:
    """Logits of the last token, by a step from the state and by a forward over the whole text."""
    whole = model(input_ids=rows, use_cache=False).logits[:, -1]
    state = model(input_ids=rows[:, :-1], use_cache=True).state
    step = model(input_ids=rows[:, -1:], state=state, use_cache=True).logits[:, -1]
    return float((step - whole).abs().max())


with torch.no_grad():
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.15)
    one, three = gap(ids[:1]), gap(ids)
print(f"one row: {one:.1e}, three rows: {three:.1e}")
assert one < 1e-4 and three > 0.1, (one, three)
PYTHON
