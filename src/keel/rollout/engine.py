"""Sampling. One protocol, so that another engine can take this one's place; token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from keel.models.load import context_length
from keel.types import Completion, Sampling, StopReason, UsageError


class Engine(Protocol):
    """Anything that continues prompts."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """One completion a prompt, in order. The same arguments give the same tokens."""
        ...


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int = 64,
) -> list[Completion]:
    """Sample with a key–value cache; rows that have ended leave the batch.

    stop_ids: the EOS id first, then those of the stop strings. Each row draws its own random numbers, so what
    else is in the batch does not change what it is given. UsageError if a prompt and its response cannot fit
    the context.
    """
    limit = context_length(model.config)
    longest = max(len(prompt) for prompt in prompts)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise UsageError(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} exceed the model's context of {limit}"
        )
    draws = torch.rand(
        len(prompts),
        sampling.max_new_tokens,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[Completion | None] = [None] * len(prompts)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            done = _decode(model, [prompts[i] for i in part], draws[part], sampling, stop_ids, pad_id)
            for index, completion in zip(part, done, strict=True):
                completions[index] = completion
    return [done for done in completions if done is not None]


def text_of(tokenizer: Any, completion: Completion) -> str:
    """The response as a reader sees it: without the token that ended it."""
    ids = completion.ids if completion.stop_reason == "length" else completion.ids[:-1]
    return tokenizer.decode(list(ids), skip_special_tokens=True)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode, and back: in training mode a model with gradient checkpointing keeps no cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    sampling: Sampling,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[Completion]:
    """One batch. Only in here prompts are padded on the left, so that all rows write the same cache column."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(list(stop_ids), device=device)
    draws = draws.to(device)
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    reasons: list[StopReason] = ["length"] * len(prompts)
    alive = torch.arange(len(prompts), device=device)
    cache = None
    for t in range(sampling.max_new_tokens):
        # 1. logits of the newest position of every row that is still going
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise UsageError(
                f"a {type(model).__name__} keeps no key–value cache, so it cannot be sampled from here"
            )
        # 2. one token each
        chosen, logp = pick(output.logits[:, -1], draws[alive, t], sampling)
        for row, token, value in zip(alive.tolist(), chosen.tolist(), logp.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(value)
        # 3. rows whose token is a stop leave, the stop token with them
        ended = torch.isin(chosen, stops)
        for row, token in zip(alive[ended].tolist(), chosen[ended].tolist(), strict=True):
            reasons[row] = "eos" if token == stop_ids[0] else "stop"
        if bool(ended.all()):
            break
        if bool(ended.any()):
            going = (~ended).nonzero().flatten()
            cache.batch_select_indices(going)
            alive, chosen, mask, positions = alive[going], chosen[going], mask[going], positions[going]
        # 4. the token becomes the next input
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [
        Completion(tuple(prompt), tuple(ids), reason, tuple(logp))
        for prompt, ids, reason, logp in zip(prompts, tokens, reasons, logps, strict=True)
    ]


def pick(logits: Tensor, draws: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(B, V) logits and (B,) uniform draws → (B,) tokens, by the inverse of the cumulative distribution, and (B,) the
    log of the probability that each had (0 for greedy, which leaves no choice)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    logits = logits.double() / sampling.temperature
    if sampling.top_k:
        worst = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, float("-inf"))
    if sampling.top_p < 1:
        ranked, index = logits.sort(dim=-1, descending=True)
        mass = ranked.softmax(dim=-1)
        cut = mass.cumsum(dim=-1) - mass >= sampling.top_p
        logits = torch.empty_like(logits).scatter_(-1, index, ranked.masked_fill(cut, float("-inf")))
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    tokens = (
        torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()
