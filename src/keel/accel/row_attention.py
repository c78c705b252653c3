"""Attention of one new token a row, over each row's own columns, in float32 on the CPU.

torch's kernel multiplies a row's keys, one head after the other, by a call of MKL each, which for the 50 or
100 tokens of a short response takes longer than reading them; and it reads a rectangle, so that a young row
is read from an older one's first column on, under a mask. Here the scores are products of pairs of rows, as
the gradient of `embedding_bag`'s weights is, and the weighted sum of values is an `embedding_bag`: both are
given the list of rows of memory to read, which is each row's own tokens and no others, in any order of the
slots. 64 rows of 40 to 60 tokens and 4 heads take 0.65 to 0.8 of the time.

What it costs: two lists as long as all tokens, made once a step. Left out: few rows, which stay in the cache,
and long responses, both of which torch's kernel reads faster; heads that share keys and values, where its
products are products of matrices; other precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keel.accel.kv_slots import Slots
from keel.accel.patches import difference, enabled, refuse, tried

LEAST = 16  # rows
MOST = 256  # columns


class Spans:
    """Which rows of memory each query reads: those of a layer's (slots, H, columns, D) keys and values as
    (slots · H · columns, D)."""

    def __init__(self, starts: Tensor, column: int, heads: int, columns: int) -> None:
        """starts: (n,) each row's first column; column: the newest one."""
        starts = starts.repeat_interleave(heads)  # (n · H,) queries
        lengths = column + 1 - starts
        low = int(starts.min())
        self._width = column + 1 - low
        self._offsets = lengths.cumsum(0) - lengths
        self._query = torch.repeat_interleave(lengths)  # of each pair of a query and a token
        queries, within = torch.arange(len(starts)), torch.arange(len(self._query))
        self._tokens = (queries * columns + starts - self._offsets)[self._query] + within
        # where the pair stands in (n · H, width)
        self._places = (queries * self._width + starts - low - self._offsets)[self._query] + within
        self._scores = torch.full((len(starts) * self._width,), float("-inf"))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(n, H, D) queries, a layer's keys and values → (n, H · D)."""
        ops: Any = torch.ops.aten  # looked for here, so that a torch without them fails the trial alone
        products = ops._embedding_bag_per_sample_weights_backward.default
        sums, width = ops._embedding_bag_forward_only.default, q.shape[-1]
        flat = (q if scale == 1 else q * scale).reshape(-1, width)
        scores = products(flat, keys.view(-1, width), self._tokens, self._offsets, self._query, 0)
        square = self._scores.index_copy_(0, self._places, scores).view(-1, self._width)
        weights = square.softmax(dim=-1).view(-1).index_select(0, self._places)
        summed, *_ = sums(values.view(-1, width), self._tokens, self._offsets, False, 0, False, weights)
        return summed.view(len(q), -1)


def spans_of(slots: Slots, heads: int) -> Spans | None:
    """The spans of a step of all rows in slots; None where torch's kernel is better. heads: of queries."""
    if not slots.layers or len(slots) < LEAST or slots.column - slots.low >= MOST:
        return None
    keys = slots.layers[0].k
    plain = keys.dtype == torch.float32 and keys.device.type == "cpu" and keys.shape[1] == heads
    if not plain or not enabled("row_attention") or _differs() is not None:
        return None
    return Spans(slots.starts, slots.column, heads, keys.shape[2])


class Look(NamedTuple):
    """What the newest tokens of all rows look at, made once a step: each row's own tokens, or, where torch's
    kernel is better, blocks of rows under a mask."""

    spans: Spans | None
    blocks: Sequence[tuple[slice, slice, Tensor | None]]  # rows, columns, mask

    @classmethod
    def of(cls, slots: Slots, heads: int) -> Look:
        spans = spans_of(slots, heads)
        if spans is not None:
            return cls(spans, ())
        mask = slots.mask()
        own = [
            None if mask is None else mask[rows, None, None, low - slots.low :]
            for rows, low in slots.blocks()
        ]
        columns = [(rows, slice(low, slots.column + 1)) for rows, low in slots.blocks()]
        return cls(None, [(*where, seen) for where, seen in zip(columns, own, strict=True)])

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(n, H, D) queries, a layer's keys and values → (n, H · D)."""
        if self.spans is not None:
            return self.spans.attend(q, keys, values, scale)
        # the heads that share keys and values are as many queries to them
        n, shared = len(q), q.reshape(len(q), keys.shape[1], -1, q.shape[-1]).to(keys.dtype)
        found = [
            scaled_dot_product_attention(
                shared[rows], keys[rows, :, columns], values[rows, :, columns], attn_mask=own, scale=scale
            )
            for rows, columns, own in self.blocks
        ]
        return (found[0] if len(found) == 1 else torch.cat(found)).reshape(n, -1)


@cache
def _differs() -> str | None:
    """torch's kernel against the one here, for rows of several lengths. Of torch, not of a model: once."""

    def trial() -> str | None:
        rows, heads, columns, width = 3, 2, 7, 16
        q, k, v = (
            torch.linspace(-2, 3 + n, rows * heads * size * width).sin().view(rows, heads, size, width)
            for n, size in ((1, 1), (2, columns), (3, columns))
        )
        starts, column = torch.tensor([2, 0, 5]), 5
        seen = torch.arange(column + 1) >= starts[:, None]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            theirs = scaled_dot_product_attention(
                q, k[:, :, : column + 1], v[:, :, : column + 1], attn_mask=seen[:, None, None], scale=0.3
            )
            ours = Spans(starts, column, heads, columns).attend(q[:, :, 0], k, v, 0.3)
        return difference("attended values", ours, theirs.reshape(rows, -1))

    why = tried(trial)
    if why is not None:
        refuse("row_attention", "torch", why)
    return why
