"""The gradient of a step, whose rows were dealt out to the ranks: the sum over all of them.

Each loss is divided by the count of the whole step, not of a rank's share, so gradients add up; a mean over
ranks, as torch's DDP takes it, would weigh a rank with few tokens like one with many. Here a model is not
wrapped: after the last backward of a step its gradients are summed, in buckets that hold many of them. What
was left out for that: torch's overlap of the sum with the backward.

Under FSDP2 (`sharded`) the backward sums them itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keel.distributed import group

BUCKET = 1 << 25  # bytes of gradients in one collective


def all_reduced() -> bool:
    """Whether gradients of this run are summed over ranks here, after the backward."""
    return group.size() > 1 and not group.is_sharded()


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the sum over ranks; all ranks end with the same bytes.

    A rank without rows, or whose rows do not reach a weight, adds zeros. A weight that no rank reaches keeps
    no gradient, so that an optimiser passes it by, as on one rank.
    """
    if not all_reduced() or not parameters:
        return
    for parameter in _reached(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        with group.talking():
            torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _reached(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those that have a gradient on some rank."""
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    has = has.to(parameters[0].device)
    with group.talking():
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
    return [p for p, reached in zip(parameters, has.tolist(), strict=True) if reached]


def _buckets(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Neighbours of one dtype and device, of some `BUCKET` bytes together."""
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (gradient.dtype, gradient.device)
        if bucket and (not alike or held + size > BUCKET):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += size
    if bucket:
        yield bucket


def same_weights(model: nn.Module) -> None:
    """Give every rank the first one's weights and buffers, whatever it had read or drawn."""
    if group.size() == 1:
        return
    with torch.no_grad():
        for tensor in _tensors(model):
            whole = tensor.detach().contiguous()
            group.send(whole)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)
    group.agree("the weights that training starts from", checksum(model))


def checksum(model: nn.Module, *, trained: bool = False) -> int:
    """A number of the bytes of the weights; 0 for a process alone, which has nobody to agree with. trained:
    only of those that training changes."""
    total = 0
    if group.size() == 1:
        return total
    for tensor in _tensors(model, trained=trained):
        plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total = zlib.crc32(plain.numpy(), total)
    return total


def _tensors(model: nn.Module, *, trained: bool = False) -> list[Any]:
    """Parameters and buffers, each once; trained: parameters that want a gradient."""
    if trained:
        return [p for p in model.parameters() if p.requires_grad]
    return [t for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values() if t.numel()]
