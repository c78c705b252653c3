"""What a phase of a run costs at least: FLOP and bytes by the model's own sizes, whatever computes them.

A token is multiplied with every weight (2 FLOP each; 2001.08361), and attends to the tokens before it (4 FLOP
for each channel of the heads in each layer). A pass over the model reads its weights once, and a backward
reads them again and reads and writes their gradients. A step of sampling reads the keys and values of the
tokens before it. Left out is what is small beside these or could be kept out of memory: norms, activations,
draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keel.models.device_info import forward_flops
from keel.models.load import size_of

# numbers for each weight, in its precision: its gradient, read and written; and a step of AdamW, with weight
# and both moments read and written, the gradient read for the step, and once more for its norm
GRADIENT, ADAMW = 2.0, 8.0


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Of one phase."""

    token: float = 0.0  # FLOP of a useful token, by the weights
    pair: float = 0.0  # FLOP of a token that attends to another one
    passed: float = 0.0  # bytes of one pass over the model
    pair_bytes: float = 0.0  # bytes of a pair, where keys and values come from a cache

    def __add__(self, other: PhaseCost) -> PhaseCost:
        """Of two models that read the same tokens."""
        return PhaseCost(
            self.token + other.token,
            self.pair + other.pair,
            self.passed + other.passed,
            self.pair_bytes + other.pair_bytes,
        )


def forward_cost(model: nn.Module, dtype: torch.dtype) -> PhaseCost:
    """Of reading rows of tokens. dtype: that matrices are multiplied in."""
    token, heads = forward_flops(model), _heads(model)
    return PhaseCost(token, 4.0 * heads[0], token / 2 * dtype.itemsize)


def train_cost(model: nn.Module, dtype: torch.dtype, *, adapters: bool) -> PhaseCost:
    """Of forward and backward, which is two forwards, or one where no weight but an adapter's has a
    gradient."""
    once, passes = forward_cost(model, dtype), 2 if adapters else 3
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    trained = sum(size_of(p) * p.element_size() for p in matrices)
    return PhaseCost(passes * once.token, 3 * once.pair, 2 * once.passed + GRADIENT * trained)


def decode_cost(model: nn.Module, dtype: torch.dtype) -> PhaseCost:
    """Of sampling with a cache: a pass is one step of all rows, a pair one that a new token attends to."""
    once, heads = forward_cost(model, dtype), _heads(model)
    return PhaseCost(once.token, once.pair, once.passed, heads[1] * dtype.itemsize)


def optimizer_cost(parameters: Sequence[nn.Parameter]) -> PhaseCost:
    """Of a step of AdamW on all of them, each once; where weights are cut over ranks, on this one's part."""
    return PhaseCost(passed=ADAMW * sum(_here(p) for p in {*parameters} if p.requires_grad))


def _here(parameter: Any) -> int:
    """Bytes of a parameter that lie on this rank."""
    part = getattr(parameter, "to_local", None)  # of a DTensor
    return size_of(parameter if part is None else part()) * parameter.element_size()


def _heads(model: Any) -> tuple[float, float]:
    """Channels of the queries, and of keys and values together, over all layers; 0 where the config does not
    say."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int)):
        return 0.0, 0.0
    one = getattr(config, "head_dim", None) or width // heads
    of_cache = getattr(config, "num_key_value_heads", None) or heads
    return float(layers * heads * one), 2.0 * layers * of_cache * one
