#!/usr/bin/env bash
# torch's Adam and AdamW keep their state in the dtype of the weights. In bfloat16 a second moment times 0.999 rounds to the
# same number, so that it never falls: after one gradient of 1 and 9,999 of 0 it is what it was after the first step, in
# float32 1/22,000 of that. One large gradient thus holds a weight's steps down for good: at a steady 0.01 they are 0.33 of
# the learning rate in place of 1. For-loop, foreach and fused alike. (Weights are put back to 0, where no step is lost in
# their own rounding.) Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
STEPS, LR, BETA = 10_000, 1e-3, 0.999


def after(dtype: torch.dtype, later: float, way: str) -> tuple[float, float, float]:
    """The second moment after a gradient of 1, that after STEPS steps whose others were `later`, and the last step as a
    share of the learning rate."""
    weight = torch.nn.Parameter(torch.zeros(16, dtype=dtype))
    chosen = {"foreach": way == "foreach", "fused": way == "fused"}
    optimizer = torch.optim.AdamW([weight], lr=LR, betas=(0.9, BETA), weight_decay=0, **chosen)
    moments = []
    for step in range(STEPS):
        weight.grad = torch.full_like(weight, 1.0 if step == 0 else later)
        with torch.no_grad():
            weight.zero_()
        optimizer.step()
        moments.append(optimizer.state[weight]["exp_avg_sq"][0].item())
    return moments[0], moments[-1], -weight[0].item() / LR


def exact(later: float) -> tuple[float, float]:
    """The last second moment and step by the sums themselves."""
    second = (1 - BETA) * (BETA ** (STEPS - 1) + later**2 * (1 - BETA ** (STEPS - 1)) / (1 - BETA))
    first = 0.1 * 0.9 ** (STEPS - 1) + later * (1 - 0.9 ** (STEPS - 1))
    return second, first / ((second / (1 - BETA**STEPS)) ** 0.5 + 1e-8)


for later in (0.0, 0.01):
    print(f"one gradient of 1, then {STEPS - 1} of {later}: by hand v {exact(later)[0]:.3g}, step {exact(later)[1]:.3f} lr")
    for way in ("loop", "foreach", "fused"):
        for dtype in (torch.float32, torch.bfloat16):
            start, end, step = after(dtype, later, way)
            print(f"  {way:7} {str(dtype):15} v after the first step {start:.3g}, at the end {end:.3g}; last step {step:.3f} lr")
            if dtype is torch.bfloat16:
                assert end == start > 9e-4, (start, end)
                assert later == 0 or 0.3 < step < 0.34, step
            else:
                assert abs(end / exact(later)[0] - 1) < 0.01, (end, exact(later))
                assert abs(step - exact(later)[1]) < 0.01, (step, exact(later))
PYTHON
