"""The responses of an update as several ranks have sampled and scored them, put together again.

Prompts are dealt out, all samples of one to the same rank. Each rank samples and scores its own and asks the
rewards about them; then all of them have all rows, in the order of the prompts. What follows (the sum of the
rewards, shaping, advantages, whitening, metrics, β, the monitor) is computed on every rank from the same
numbers, and needs no word between them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from keel.distributed import group
from keel.rollout.score_responses import Scored
from keel.types import Completion, Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sampled:
    """Some responses, scored by every model."""

    prompts: tuple[Prompt, ...]  # of each response
    completions: tuple[Completion, ...]
    scored: Scored
    from_sampler: bool  # whether log π are the numbers that the tokens were drawn with


@dataclass(frozen=True, slots=True)
class Dealt:
    """The prompts of this rank."""

    prompts: list[int]  # their numbers among all
    rows: list[int]  # the numbers of their responses among all
    of: int  # responses there are

    def repeated(self, prompts: Sequence[T]) -> list[T]:
        """The prompt of each response, of all prompts."""
        samples = len(self.rows) // max(1, len(self.prompts))
        return [prompts[number] for number in self.prompts for _ in range(samples)]


def deal(prompts: Sequence[Hashable], samples: int) -> Dealt:
    """This rank's share of prompts with `samples` responses each; all of them for a process alone. Prompts
    that are equal go to one rank."""
    equal: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        equal.setdefault(prompt, []).append(number)
    numbers = list(equal.values())
    shares = group.deal([len(some) for some in numbers], group.size())
    mine = sorted(number for i in shares[group.rank()] for number in numbers[i])
    rows = [prompt * samples + number for prompt in mine for number in range(samples)]
    return Dealt(mine, rows, len(prompts) * samples)


def together(dealt: Dealt, made: Sampled | None, pad_id: int) -> Sampled:
    """The responses of all ranks. made: those of this one; None where it had no prompts."""
    parts_of_ranks = group.gathered_late((dealt.rows, made))
    found = [(rows, sampled) for rows, sampled in parts_of_ranks if sampled is not None]
    if len(found) == 1:
        return found[0][1]
    parts = [sampled for _, sampled in found]
    order = torch.tensor([row for rows, _ in found for row in rows]).argsort().tolist()
    return Sampled(
        tuple(_picked([part.prompts for part in parts], order)),
        tuple(_picked([part.completions for part in parts], order)),
        _scored([part.scored for part in parts], order, pad_id),
        all(part.from_sampler for part in parts),
    )


def _scored(parts: Sequence[Scored], order: Sequence[int], pad_id: int) -> Scored:
    """All rows, padded to one width."""

    def column(name: str) -> Tensor:
        tensors: list[Tensor] = [getattr(part, name) for part in parts]
        width = max(tensor.shape[-1] for tensor in tensors)
        if tensors[0].dim() > 1:
            behind = pad_id if name == "ids" else 0
            tensors = [
                torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=behind)
                for tensor in tensors
            ]
        return torch.cat(tensors)[list(order)]

    return Scored(**{field.name: column(field.name) for field in fields(Scored)})


def _picked(columns: Sequence[Sequence[T]], order: Sequence[int]) -> list[T]:
    """The values of all parts, put in order."""
    whole = [value for column in columns for value in column]
    return [whole[i] for i in order]
