#!/usr/bin/env bash
# torch's fused optimisers change weights without raising their version counter. Autograd's guard against weights that were
# changed between forward and backward is silent then: the plain and the foreach optimiser make backward raise, the fused
# one lets it return the gradient of the new weights for the loss of the old ones.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
seen = {}
for name, options in {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
    weight, x = torch.nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    loss = (weight * x * weight).sum()
    optimizer = torch.optim.AdamW([weight], lr=0.5, **options)
    weight.grad, before = torch.ones(3), weight._version
    optimizer.step()
    try:
        loss.backward()
        gradient = round(x.grad[0].item(), 3)
    except RuntimeError:
        gradient = "raised"
    seen[name] = (weight._version - before > 0, gradient)
    print(f"{name}: version counter moved: {seen[name][0]}, gradient of x (1.0 is right): {gradient}")
assert seen == {"plain": (True, "raised"), "foreach": (True, "raised"), "fused": (False, 0.245)}, seen
PYTHON
