"""Sampling with the cache that a model makes itself (`accel.own_cache`): its rows are equally far.

Rows of several prompts start at the length of the shortest. A row whose prompt goes on is given its own
tokens, a step each, while the others draw. So nothing is padded, and the state of a recurrence has read what
the row says and nothing else. A token more that way costs a step; rows are put together only where that is
fewer steps than to sample them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from keel.accel.own_cache import OwnCache
from keel.rollout.drawn import Asked, Drawn, completions_of, last_given
from keel.rollout.sampling import pick
from keel.types import Completion


def sample(asked: Asked, batch_size: int) -> list[Completion]:
    """One completion a prompt, in order; `batch_size` rows at a time. A common start is read once. To be
    called without gradient."""
    drawn = Drawn.open(asked.draws, asked.stop_ids, asked.stop_texts)
    for group in groups(asked.prompts, batch_size, asked.sampling.max_new_tokens):
        _sample_group(asked, group, drawn)
    return completions_of(asked.prompts, drawn, asked.limits)


def groups(prompts: Sequence[Sequence[int]], batch_size: int, new: int) -> Iterator[list[int]]:
    """The numbers of prompts that are sampled together: at most `batch_size`, none longer than the shortest
    by `new` or more, since a group of its own would take as many steps. Equal ones side by side."""
    group: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i)):
        if group and (len(group) == batch_size or len(prompts[i]) - len(prompts[group[0]]) >= new):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _sample_group(asked: Asked, group: list[int], drawn: Drawn) -> None:
    """Sample some prompts; the first of the group is the shortest."""
    device, prompts = asked.draws.device, [asked.prompts[i] for i in group]
    cache, logits, source = _begun(asked, prompts)
    given = torch.zeros(len(group), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = torch.tensor(prompt)
    given, rows = given.to(device), torch.tensor(group, device=device)
    lengths, read = torch.tensor([*map(len, prompts)], device=device), len(prompts[0])
    while True:
        # 1. rows whose prompt is read draw a token; the others are given the next of their own
        due = (lengths <= read).nonzero().flatten()
        made = read - lengths[due]
        newest = given[:, read].clone() if read < given.shape[1] else given[:, 0].clone()
        chosen, logp = pick(logits[due], asked.draws[rows[due], made], asked.sampling)
        newest[due] = chosen
        last = last_given(asked.seen, source)[due] if asked.seen else None
        drawn.put((rows[due], made), chosen, logp, last)
        # 2. rows that have ended leave
        count = (read - lengths + 1).clamp(min=0)
        ended = drawn.ended(rows, newest, count, due) & (lengths <= read)
        going = (~ended & (count < asked.limits[rows])).nonzero().flatten()
        if not len(going):
            return
        if len(going) < len(rows):
            cache.pick(going)
            rows, newest, given, lengths = rows[going], newest[going], given[going], lengths[going]
        # 3. and the rest take a step
        logits, source = cache.step(newest), None
        asked.work.computed += len(rows)
        asked.work.passes += 1
        read += 1


def _begun(asked: Asked, prompts: Sequence[Sequence[int]]) -> tuple[OwnCache, Tensor, Tensor]:
    """Rows read up to the length of the shortest, where they begin alike once: the cache, (n, V) logits, and
    (n,) which of those read each row is."""
    starts = [tuple(prompt[: len(prompts[0])]) for prompt in prompts]
    distinct = list(dict.fromkeys(starts))
    source = torch.tensor([distinct.index(start) for start in starts], device=asked.draws.device)
    cache = OwnCache(asked.model)
    logits = cache.read(torch.tensor(distinct, device=asked.draws.device))
    asked.work.computed += len(distinct) * len(prompts[0])
    asked.work.passes += 1
    if len(distinct) < len(prompts):
        cache.pick(source)
    return cache, logits[source], source
