"""Random weights from seeds of their own, so that nothing that came before can change them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with a global seed of its own and leave the caller's random state untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        yield


def seed_head(head: nn.Linear, seed: int) -> None:
    """Initialise a head from its own seed, so that nothing before it can change it."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        values = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
        head.weight.copy_(values.to(head.weight))
        if head.bias is not None:
            head.bias.zero_()
