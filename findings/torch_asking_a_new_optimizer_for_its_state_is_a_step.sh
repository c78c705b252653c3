#!/usr/bin/env bash
# torch.distributed.checkpoint's `get_optimizer_state_dict` (and `get_state_dict`) makes the state of an optimiser that has none yet
# by stepping it with gradients of zero and a learning rate of zero. Weights stay as they are, but the step counts: AdamW takes the
# first real gradient for its second, and moves by 0.744 of its learning rate where it would have moved by all of it. A checkpoint
# written before the first step, or asking just to know what loading will need, changes the training that follows.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

assert torch.__version__.startswith("2.13.0"), torch.__version__


def first_move(*, asked: bool) -> float:
    """What the first step does to a weight whose gradient is 2."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    before = model.weight.detach().clone()
    if asked:
        state = get_optimizer_state_dict(model, optimizer)
        print("steps taken by an optimiser that was never stepped:", state["state"]["weight"]["step"].item())
        assert state["state"]["weight"]["step"].item() == 1
        assert torch.equal(model.weight, before)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return (model.weight - before)[0, 0].item()


never, asked = first_move(asked=False), first_move(asked=True)
print(f"the first step moves a weight by {never:.4f}; by {asked:.4f} where its state was asked for before")
assert abs(never + 0.1) < 1e-6 and abs(asked + 0.0744) < 1e-4
PYTHON
