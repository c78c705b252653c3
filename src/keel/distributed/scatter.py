"""Sums of gradients of which each rank keeps its part, on the CPU.

gloo makes them by an all-reduce: every rank gets the whole sum, of a copy of all that it gave, and throws
most of it away. Here each part goes to the rank that keeps it and nowhere else: half the bytes, and no copy.
(NCCL does so itself.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


class SumByParts(ReduceScatter):
    """FSDP2's way to sum gradients over ranks, part by part. A part is the sum in the same order at every
    call, so that two runs end with the same bytes."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what is sent, or kept."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Fill this rank's (n,) part with the sum over ranks of that part of their (ranks · n,) gradients."""
        from torch import distributed

        size, own = distributed.get_world_size(group), distributed.get_rank(group)
        parts = input_tensor.chunk(size)
        output_tensor.copy_(parts[own])
        came = torch.empty_like(output_tensor)
        for step in range(1, size):
            to, source = (own + step) % size, (own - step) % size
            sending = distributed.isend(parts[to], group=group, group_dst=to)
            distributed.recv(came, group=group, group_src=source)
            assert sending is not None
            sending.wait()
            output_tensor += came
