#!/usr/bin/env bash
# The tokens of a DTensor are dealt out evenly to ranks, and some labels are masked with -100, as a prompt's are.
# F.cross_entropy then takes on each rank the mean over its own tokens and averages those means: of four tokens on two
# ranks, one of them masked, the loss is 1.937 where it is 2.066, and a rank with nothing but masked tokens makes it NaN.
# Gradients are right all the while: what is wrong is the loss that is logged, compared and turned into a perplexity. reduction="sum"
# divided by the count is right.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/losses.py" <<'PYTHON'
import math
import sys

import torch
import torch.distributed
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 2, 1, 2])


def rank(own: int, place: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=own, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    each = -LOGITS.log_softmax(-1)[range(4), LABELS]
    for masked, expected in (([], 1.6093), ([0], 1.9373), ([0, 1], math.nan)):
        labels = LABELS.clone()
        labels[masked] = -100
        whole = LOGITS.clone().requires_grad_()
        alone = F.cross_entropy(whole, labels)
        alone.backward()
        rows = distribute_tensor(LOGITS, mesh, [Shard(0)]).requires_grad_()
        wanted = distribute_tensor(labels, mesh, [Shard(0)])
        dealt = F.cross_entropy(rows, wanted).full_tensor()
        dealt.backward()
        total = F.cross_entropy(rows, wanted, reduction="sum").full_tensor()
        by_hand = each[labels != -100].mean().item()
        if own == 0:
            print(f"masked {masked}: by hand {by_hand:.4f}, one rank {alone:.4f}, dealt out {dealt:.4f}", flush=True)
        assert abs(alone - by_hand) < 1e-5 and abs(total / (4 - len(masked)) - by_hand) < 1e-5
        assert torch.allclose(rows.grad.full_tensor(), whole.grad)
        assert torch.allclose(dealt, torch.tensor(expected), atol=1e-4, equal_nan=True)
    # What it is in place of the loss: the mean of two means.
    assert abs((each[1] + each[2:].mean()) / 2 - 1.9373) < 1e-4 and abs(each[1:].mean() - 2.0659) < 1e-4
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
    torch.multiprocessing.spawn(rank, (sys.argv[1],), nprocs=2)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/losses.py" "$folder/meeting"
