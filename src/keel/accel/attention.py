"""Sequences of different lengths without padding: one row of all their tokens for everything that a model
computes token by token, and rows side by side, padded, for attention alone (padding-free batches; 2412.13663
has the unpadding of encoders).

A model is given one row of tokens and a mask that stands for the rows. torch's attention, as transformers
calls it, lays queries, keys and values out by it and takes from the result what is no padding. Whether a
model hands that mask on as it is, is tried out on it once (`prefixes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_ROWS = "keel_rows"  # the name under which a mask carries what it stands for


@dataclass(frozen=True, slots=True)
class Rows:
    """T tokens as R rows of W, the rest of which is padding."""

    rows: int
    width: int
    where: Tensor  # (T,) each token's place in the flattened (R, W), ascending
    source: Tensor  # (R·W,) the token at each place; 0 at padding
    padding: Tensor  # (P,) places without a token
    mask: Tensor | None  # (R, 1, W, W), additive; None: each token sees those before it in its row

    @staticmethod
    def of(where: Tensor, rows: int, width: int, mask: Tensor | None, device: torch.device) -> Rows:
        """where: on the CPU; all else on `device`."""
        source, free = torch.zeros(rows * width, dtype=torch.long), torch.ones(rows * width, dtype=torch.bool)
        source[where], free[where] = torch.arange(len(where)), False
        padding = free.nonzero().squeeze(1)
        return Rows(rows, width, where.to(device), source.to(device), padding.to(device), mask)

    def laid_out(self, x: Tensor) -> Tensor:
        """(1, T, …) → (R, W, …); at padding, which nobody sees, the first token's."""
        laid: Any = _LaidOut.apply(x.flatten(0, 1), self)
        return laid.view(self.rows, self.width, *x.shape[2:])

    def taken(self, x: Tensor) -> Tensor:
        """(R, W, …) → (1, T, …)."""
        taken: Any = _Taken.apply(x.flatten(0, 1), self)
        return taken[None]


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.rows.where), None


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.rows.source).index_fill_(0, ctx.rows.padding, 0), None


def mask_for(rows: Rows, dtype: torch.dtype) -> Tensor:
    """What a model is given as attention mask: (1, 1, 1, 1), by its shape one that transformers hands on as
    it is."""
    mask = torch.zeros(1, 1, 1, 1, dtype=dtype, device=rows.where.device)
    setattr(mask, _ROWS, rows)
    return mask


def rows_of(mask: Tensor | None) -> Rows | None:
    """The rows that a mask stands for, if it is one of these."""
    return getattr(mask, _ROWS, None)


def register() -> None:
    """Have transformers' modules attend by what is here, where they attend by torch's kernels."""
    AttentionInterface.register("sdpa", attend)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention by torch's kernels, (B, H, S, D) → (B, S, H, D), on whatever rows the mask
    stands for.

    On a CPU in bfloat16 torch's backward is six times slower than in float32, so that float32 is used there
    where several positions ask at once (as they do in training).
    """
    if query.device.type == "cpu" and query.shape[2] > 1 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            query, key, value = (x.float() for x in (query, key, value))
            return attend(module, query, key, value, attention_mask, **more)
    rows = rows_of(attention_mask)
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    laid = [rows.laid_out(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
    query, key, value = laid
    return rows.taken(sdpa_attention_forward(module, query, key, value, rows.mask, **more)[0]), None
