#!/usr/bin/env bash
# Within one torch.autocast region a weight that learns is cast once. An in-place change of it, an optimiser's step
# included, is invisible to every later forward of the region: it still multiplies with the weights from before.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
torch.manual_seed(0)
layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
with torch.autocast("cpu", torch.bfloat16):
    first = layer(x)
    first.float().sum().backward()
    optimizer.step()
    inside = layer(x)
with torch.autocast("cpu", torch.bfloat16):
    outside = layer(x)
print("same output after the step, inside the region:", torch.equal(first, inside))
print("same output after the step, in a new region:", torch.equal(first, outside))
assert torch.equal(first, inside) and not torch.equal(first, outside)
PYTHON
