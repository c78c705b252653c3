"""Attention of sequences that begin alike, in float32 on the CPU: what they have in common asks once, and
each sequence's own tokens look at the common start and at themselves.

Side by side in one row, behind their common start, eight samples of 24 tokens and a prompt of 32 are 224
tokens, and a kernel that is given a mask computes all 224² scores, most of them of tokens that do not see
each other. Here the common starts are short causal rows, and the rest are rows of a sequence's own tokens,
whose keys are those of the whole sequence: 8 · 24 · 56 scores and 32². They are batched products with a
softmax between them, as one step of autograd, which for rows of up to some hundred tokens takes less time
than torch's kernel (flash attention) takes for the same scores. Rows of similar length are a part of their
own; all parts are gathered, and brought back, in one operation.

What it costs: probabilities are kept for the backward, which flash attention makes again, so long rows go by
torch's kernel, sequence by sequence. Left out: dropout, caps on scores, and gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from keel.accel.patches import enabled

AT_MOST = 512  # tokens of a row
KEPT_AT_MOST = 2**24  # bytes of probabilities of one layer
SHORTER, FEW = 0.625, 4  # rows shorter by this are a part of their own, if there are so many
# what a kernel may be given, and is not known here
LEFT_OUT = ("softcap", "position_bias", "cache", "s_aux")

_Row = tuple[Sequence[int], Sequence[int]]  # tokens that ask, and those before them that they see, too


@dataclass(frozen=True, slots=True)
class Part:
    """B rows of Q queries and K keys, all of them among T tokens."""

    queries: Tensor  # (B, Q) the token at each place; -1 at padding
    keys: Tensor  # (B, K) likewise
    hidden: Tensor  # (B or 1, 1, Q, K) 0 where a key is seen, else -∞; padding sees something, too

    @staticmethod
    def of(rows: Sequence[_Row]) -> Part:
        asking, length = max(len(own) for own, _ in rows), max(len(own) + len(before) for own, before in rows)
        queries = torch.tensor([[*own, *[-1] * (asking - len(own))] for own, _ in rows])
        whole = [[*before, *own] for own, before in rows]
        keys = torch.tensor([[*row, *[-1] * (length - len(row))] for row in whole])
        starts = torch.tensor([len(before) for _, before in rows])
        starts = starts[:1] if bool((starts == starts[0]).all()) else starts
        last = starts[:, None] + torch.arange(asking)
        seen = torch.arange(length) <= last[..., None]
        return Part(queries, keys, torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None])

    @property
    def size(self) -> tuple[int, int, int]:
        """B, Q, K."""
        rows, asking = self.queries.shape
        return rows, asking, self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class Places:
    """Where rows of all parts stand, for H heads and H' heads of keys: a part's rows as (B, H, Q), the parts
    one after the other."""

    queries: Tensor  # (N,) into the flattened (T, H)
    keys: Tensor  # (M,) into the flattened (T, H')
    back: Tensor  # (T · H,) into the N: where each token's heads are
    padding: Tensor  # those of the N that are padding


@dataclass(frozen=True, slots=True)
class Branches:
    """T tokens of which each asks in one of the parts."""

    parts: tuple[Part, ...]
    _places: dict[tuple[int, int], Places] = field(default_factory=dict)

    @staticmethod
    def of(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Branches:
        """groups: of each the tokens that its sequences have in common, and those of each of its own."""
        starts: list[_Row] = [(common, ()) for common, _ in groups if common]
        own: list[_Row] = [(row, common) for common, rows in groups for row in rows if row]
        own.sort(key=lambda row: -len(row[0]))
        parts: list[list[_Row]] = [starts] if starts else []
        begun = 0  # where the last part begins
        for i, (row, _) in enumerate(own):
            if i == 0 or (len(row) < SHORTER * len(own[begun][0]) and min(len(own) - i, i - begun) >= FEW):
                parts.append([])
                begun = i
            parts[-1].append(own[i])
        return Branches(tuple(map(Part.of, parts)))

    def scores(self) -> int:
        """Pairs of a query and a key that are computed for a head."""
        return sum(rows * asking * length for rows, asking, length in (part.size for part in self.parts))

    def are_short(self, heads: int, itemsize: int) -> bool:
        """Whether rows, and the probabilities that so many heads keep, are no longer than allowed. itemsize:
        bytes of a number."""
        longest = max(part.size[2] for part in self.parts)
        return longest <= AT_MOST and itemsize * heads * self.scores() <= KEPT_AT_MOST

    def places(self, heads: int, shared: int) -> Places:
        """For so many heads of queries and of keys."""
        if (heads, shared) not in self._places:
            queries = torch.cat([_by_head(part.queries, heads) for part in self.parts])
            keys = torch.cat([_by_head(part.keys, shared) for part in self.parts])
            real = (queries >= 0).nonzero()[:, 0]
            back = torch.empty_like(real).index_copy_(0, queries.index_select(0, real), real)
            padding = (queries < 0).nonzero()[:, 0]
            self._places[heads, shared] = Places(queries.clamp_(min=0), keys.clamp_(min=0), back, padding)
        return self._places[heads, shared]


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """(B, N) tokens as (B · H · N,) places in the flattened (T, H); negative where a token is."""
    return torch.where(
        tokens[:, None] < 0, -1, tokens[:, None] * heads + torch.arange(heads)[:, None]
    ).flatten()


def fits(module: nn.Module, query: Tensor, branches: Branches | None, more: dict[str, Any]) -> bool:
    """Whether attention of (1, H, T, D) queries is computed here."""
    if branches is None or not enabled("branch_attention") or query.device.type != "cpu":
        return False
    if query.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    if more.get("dropout") or any(more.get(name) is not None for name in LEFT_OUT):
        return False
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return causal is True and branches.are_short(query.shape[1], query.element_size())


def branch_attend(query: Tensor, key: Tensor, value: Tensor, branches: Branches, scale: float) -> Tensor:
    """(1, H, T, D) queries, (1, H', T, D) keys and values → (1, T, H, D); what `fits` says yes to."""
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    attended: Any = _Attention.apply(*flat, branches, scale)
    return attended[None]


class _Kept(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    branches: Branches
    scale: float


class _Attention(torch.autograd.Function):
    """P = softmax(scale · Q Kᵀ + mask), O = P V, part by part. With G the gradient of O: dV = Pᵀ G,
    dP = G Vᵀ, dS = P (dP − Σ P dP), dQ = scale · dS K, dK = scale · dSᵀ Q. q: (T, H, D); k, v: (T, H', D)."""

    @staticmethod
    def forward(ctx: _Kept, q: Tensor, k: Tensor, v: Tensor, branches: Branches, scale: float) -> Tensor:
        at = branches.places(q.shape[1], k.shape[1])
        queries, keys, values = (_rows(x, i) for x, i in ((q, at.queries), (k, at.keys), (v, at.keys)))
        attended, kept = queries.new_empty(len(queries), v.shape[2]), list[Tensor]()
        queries.mul_(scale)
        of_each = (
            _cut(x, branches, k.shape[1], x is keys or x is values) for x in (queries, keys, values, attended)
        )
        for part, ask, look, give, out in zip(branches.parts, *of_each, strict=True):
            scores = torch.bmm(ask, look.transpose(1, 2))
            scores.view(len(part.queries), -1, *part.size[1:]).add_(part.hidden)
            kept.append(torch.softmax(scores, dim=-1))
            torch.bmm(kept[-1], give, out=out)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.branches, ctx.scale = branches, scale
        return attended.index_select(0, at.back).view(*q.shape[:2], v.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        branches, shared = ctx.branches, k.shape[1]
        at = branches.places(q.shape[1], shared)
        pull = _rows(gradients[0], at.queries).index_fill_(0, at.padding, 0)
        queries, keys, values = (_rows(x, i) for x, i in ((q, at.queries), (k, at.keys), (v, at.keys)))
        queries.mul_(ctx.scale)
        made = [torch.empty_like(x) for x in (queries, keys, values)]
        asked = (_cut(x, branches, shared) for x in (queries, pull, made[0]))
        looked = (_cut(x, branches, shared, True) for x in (keys, values, *made[1:]))
        for p, ask, g, of_q, look, give, of_k, of_v in zip(kept, *asked, *looked, strict=True):
            torch.bmm(p.transpose(1, 2), g, out=of_v)
            of_p = torch.bmm(g, give.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_p, p, -1, p.dtype)
            torch.bmm(of_scores, look, out=of_q)
            torch.bmm(of_scores.transpose(1, 2), ask, out=of_k)
        of_q = made[0].index_select(0, at.back).mul_(ctx.scale).view_as(q)
        of_k, of_v = (
            torch.zeros(x.shape[0] * shared, x.shape[2], dtype=x.dtype).index_add_(0, at.keys, of).view_as(x)
            for x, of in ((k, made[1]), (v, made[2]))
        )
        return of_q, of_k, of_v, None, None


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """(T, H, D) at places of the flattened (T, H)."""
    return x.reshape(-1, x.shape[-1]).index_select(0, places)


def _cut(x: Tensor, branches: Branches, shared: int, of_keys: bool = False) -> list[Tensor]:
    """Rows of all parts, part by part, as (B · H', H/H' · Q or K, D): heads that share keys are one after the
    other."""
    sizes = [
        (rows, length if of_keys else asking) for rows, asking, length in (p.size for p in branches.parts)
    ]
    heads = len(x) // sum(rows * length for rows, length in sizes)
    parts = x.split([rows * heads * length for rows, length in sizes])
    return [part.view(rows * shared, -1, x.shape[-1]) for part, (rows, _) in zip(parts, sizes, strict=True)]
