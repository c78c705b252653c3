"""One token from logits, and the probability it was drawn with; what engines check before they draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keel.accel.patches import enabled
from keel.algorithms.masked import at_least_float32
from keel.errors import UsageError
from keel.models.load import context_length
from keel.rollout.protocol import Rows
from keel.types import Sampling

LEAST = 2**14  # tokens of a vocabulary from which it pays to sum blocks of them, and to look into one
RANKED, LARGE = (
    512,
    2**14,
)  # likeliest tokens that are ranked first, of vocabularies of so many tokens or more
AT_ONCE = 2**20  # probabilities that are made at a time, so that they stay in the cache


def check_context(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
) -> None:
    """UsageError where one of (N,) prompts and its response cannot fit the model's context. limits: (N,) the
    most tokens of each response; None: max_new_tokens."""
    context, new = context_length(model.config), limits or [sampling.max_new_tokens] * len(prompts)
    length, most = max(((len(p), n) for p, n in zip(prompts, new, strict=True)), key=sum)
    if context is not None and length + most > context:
        raise UsageError(
            f"a prompt of {length} tokens and max_new_tokens {most} exceed the model's context of {context}"
        )


def uniform_draws(count: int, sampling: Sampling, seed: int, rows: Rows | None = None) -> Tensor:
    """(count, max_new_tokens) numbers in [0, 1), float64: a row's own, whatever else is sampled with it.
    rows: which of all rows of the seed these are."""
    generator = torch.Generator().manual_seed(seed)
    all_rows = count if rows is None else rows.of
    draws = torch.rand(all_rows, sampling.max_new_tokens, dtype=torch.float64, generator=generator)
    return draws if rows is None else draws[list(rows.numbers)]


def pick(logits: Tensor, draws: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(B, V) logits and (B,) uniform draws in [0, 1) → (B,) tokens, by the inverse of the cumulative
    distribution, and (B,) the log of the probability that each had (0 for greedy, which leaves no choice).
    Rows of the embeddings that stand for no token of the tokenizer (`sampling.vocab`) have none.

    The cumulative sum is taken in float64: float32 would lose the tail of a large vocabulary. On a CPU it is
    taken over blocks of tokens, and over the tokens of one block (`_by_blocks`).
    """
    logits = at_least_float32(logits[:, : sampling.vocab])
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), dtype=logits.dtype, device=logits.device)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    logits = _cut(logits, sampling)
    on_cpu = logits.device.type == "cpu" and logits.dtype == torch.float32
    if on_cpu and logits.shape[-1] >= LEAST and enabled("token_blocks"):
        return _by_blocks(logits, draws)
    logp = logits.log_softmax(dim=-1)
    cumulative = logp.exp().cumsum(dim=-1, dtype=torch.float64)
    tokens = (
        torch.searchsorted(cumulative, draws[:, None].double() * cumulative[:, -1:], right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )
    return tokens, logp.gather(-1, tokens[:, None]).squeeze(-1)


def _by_blocks(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """As `pick`, of (B, V) float32 logits, a few rows at a time. The cumulative sum in float64 over V tokens
    takes ten times as long as their softmax, and memory for all of it as long again. Here each block of
    tokens is summed in float32, the sums are accumulated in float64, and so are the tokens of the block that
    the draw falls into. A block's sum is off by some 1e-7 of itself, so that only a draw that is as near to
    the border of a token may fall on its other side."""
    rows, tokens = max(1, AT_ONCE // logits.shape[-1], torch.get_num_threads()), logits.shape[-1]
    p = torch.empty(min(rows, len(logits)), tokens)
    size = 1 << tokens.bit_length() // 2  # of a block: about the root, so that there are as many
    blocks, within = -(-tokens // size), torch.arange(size)
    whole = tokens // size * size
    chosen, logp = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        n = len(logits[part])
        torch.softmax(logits[part], dim=-1, out=p[:n])
        sums = torch.zeros(n, blocks, dtype=torch.float64)
        sums[:, : tokens // size] = p[:n, :whole].unflatten(1, (-1, size)).sum(dim=-1)
        if whole < tokens:
            sums[:, -1] = p[:n, whole:].sum(dim=-1)
        upto = sums.cumsum(dim=-1)
        target = draws[part, None].double() * upto[:, -1:]
        block = torch.searchsorted(upto, target, right=True).clamp_(max=blocks - 1)
        # how far into the block, as a share of it
        mass = sums.gather(-1, block)
        share = ((target - upto.gather(-1, block) + mass) / mass).clamp_(0, 1 - 2**-52)
        index = block * size + within
        inside = p[:n].gather(-1, index.clamp(max=tokens - 1)).masked_fill_(index >= tokens, 0)
        inside = inside.cumsum(dim=-1, dtype=torch.float64)
        place = torch.searchsorted(inside, share * inside[:, -1:], right=True).clamp_(max=size - 1)
        token = (block * size + place).clamp_(max=tokens - 1)
        chosen[part], logp[part] = token.squeeze(-1), p[:n].gather(-1, token).squeeze(-1).log_()
    return chosen, logp


def _cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits with those of tokens that may not be drawn at −∞: top-k first, then nucleus, then
    min-p."""
    if sampling.top_k:
        worst = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, float("-inf"))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p:
        logp = logits.log_softmax(dim=-1)
        least = logp.amax(dim=-1, keepdim=True) + torch.tensor(sampling.min_p).log()
        logits = logits.masked_fill(logp < least, float("-inf"))
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits with those at −∞ before which likelier tokens have a mass of `top_p`. On a CPU the
    likeliest of a large vocabulary are ranked first, which takes a small part of the time to sort all; rows
    of which they do not have that mass are sorted."""
    whole, on_cpu = logits.shape[-1], logits.device.type == "cpu"
    if not (on_cpu and whole >= LEAST and enabled("token_blocks")):
        ranked, index = logits.sort(dim=-1, descending=True)
        return _upto(logits, ranked, index, ranked.softmax(dim=-1), top_p)[0]
    ranked, index = logits.topk(RANKED, dim=-1)
    found, enough = _upto(logits, ranked, index, (ranked - logits.logsumexp(-1, keepdim=True)).exp(), top_p)
    if not bool(enough.all()):
        rows = (~enough).nonzero().flatten()
        ranked, index = logits[rows].sort(dim=-1, descending=True)
        found[rows] = _upto(logits[rows], ranked, index, ranked.softmax(dim=-1), top_p)[0]
    return found


def _upto(logits: Tensor, ranked: Tensor, index: Tensor, mass: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """As `_nucleus`, of (B, k) tokens `index`, the likeliest first, with their logits and probabilities; and
    (B,) whether no other token belongs to it."""
    cut = mass.cumsum(dim=-1) - mass >= top_p
    kept = torch.full_like(logits, float("-inf"))
    return kept.scatter_(-1, index, ranked.masked_fill(cut, float("-inf"))), cut[:, -1]
