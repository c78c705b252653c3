#!/usr/bin/env bash
# The rows of a DTensor are dealt out evenly to ranks. F.mse_loss of them is right, and its gradient is as many times too large
# as there are ranks: twice on two, three times on three, with loss.backward() and full_tensor().backward() alike. So it is for
# huber_loss, smooth_l1_loss and binary_cross_entropy, a critic's losses among them, and in the weights
# of a layer below. ((x - y) ** 2).mean(), l1_loss, binary_cross_entropy_with_logits and sums have the right one. A step
# of Adam does not depend on the size of a gradient; clipping, SGD and a sum with another loss, as policy and critic have, do.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/losses.py" <<'PYTHON'
import sys

import torch
import torch.distributed
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def squares(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return ((values - wanted) ** 2).mean()


GROWS = [F.mse_loss, F.huber_loss, F.smooth_l1_loss, F.binary_cross_entropy]
RIGHT = [squares, F.l1_loss, F.binary_cross_entropy_with_logits]


def rank(own: int, ranks: int, place: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=own, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(0)
    hidden, layer = torch.rand(6, 3, generator=generator), torch.rand(3, 1, generator=generator) / 3
    wanted = (torch.rand(6, 1, generator=generator) > 0.5).float()
    for loss in GROWS + RIGHT:
        whole = layer.clone().requires_grad_()
        alone = loss(hidden @ whole, wanted)
        alone.backward()
        for gathered in (False, True):
            shared = distribute_tensor(layer, mesh, [Replicate()]).requires_grad_()
            values = distribute_tensor(hidden, mesh, [Shard(0)]) @ shared
            assert len(values.to_local()) * ranks == 6
            dealt = loss(values, distribute_tensor(wanted, mesh, [Shard(0)]))
            whole_loss = dealt.full_tensor()
            assert abs(whole_loss - alone) < 1e-6
            (whole_loss if gathered else dealt).backward()
            gradient = shared.grad.full_tensor()
            times = gradient / whole.grad
            assert torch.allclose(times, torch.full((3, 1), float(ranks if loss in GROWS else 1)), atol=1e-4), times
        if own == 0:
            print(f"{ranks} ranks, {loss.__name__}: loss {alone:.4f} and {whole_loss:.4f},", end=" ")
            print(f"gradient {whole.grad.norm():.4f} and {gradient.norm():.4f}", flush=True)
    # By hand: the gradient of the mean of squares.
    error = hidden @ layer - wanted
    by_hand = 2 * hidden.T @ error / 6
    whole = layer.clone().requires_grad_()
    F.mse_loss(hidden @ whole, wanted).backward()
    assert torch.allclose(whole.grad, by_hand, atol=1e-6)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
    for ranks in (2, 3):
        torch.multiprocessing.spawn(rank, (ranks, f"{sys.argv[1]}-{ranks}"), nprocs=ranks)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/losses.py" "$folder/meeting"
