"""What the loops share: how many steps, which rows, when to evaluate, when to stop, how to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from keel.algorithms.control import schedule
from keel.config import Supervised, Training
from keel.data.batches import by_length, derive_seed
from keel.distributed import group
from keel.models import optim

T = TypeVar("T")

SAMPLES_KEPT = 4  # episodes written to samples.jsonl when an update is sampled


def total_steps(config: Supervised, rows: int) -> int:
    """Optimiser steps: epochs × rows / batch_size, rounded up, or max_steps if that is fewer."""
    steps = math.ceil(config.epochs * rows / config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def lr_scale(config: Training, step: int, steps: int) -> float:
    """Share of the peak learning rate at step `step` (from 0) of `steps`."""
    return schedule(step, steps, round(config.warmup * steps), config.schedule, config.lr_floor)


def optimizer_for(config: Training, *groups: tuple[Sequence[nn.Module], float]) -> torch.optim.AdamW:
    """AdamW over groups of modules, each with its own peak learning rate, with the config's settings."""
    return optim.adamw(groups, betas=config.betas, weight_decay=config.weight_decay)


def micro_batches(rows: Sequence[T], size: int | None) -> Iterator[Sequence[T]]:
    """The rows in parts of `size`; all at once for None."""
    for start in range(0, len(rows), size or len(rows)):
        yield rows[start : start + (size or len(rows))]


def forward_rows(config: Training) -> dict[str, int | None]:
    """What goes into one forward without gradient, where the config does not say: a whole batch."""
    whole = config.batch_size if config.micro_tokens is None else None
    return {"micro_batch": config.rows_at_once or whole, "micro_tokens": config.micro_tokens}


def forward_parts(config: Training, sizes: Sequence[int]) -> list[list[int]]:
    """Indices of rows of so many tokens, in parts of similar length for forwards without gradient."""
    limits = forward_rows(config)
    return by_length(sizes, limits["micro_batch"], limits["micro_tokens"])


def parts_of(
    config: Training,
    rows: Sequence[T],
    size: Callable[[T], int],
    start: Callable[[T], Hashable] | None = None,
) -> list[list[T]]:
    """The rows of a step in micro-batches of similar length, as the config says; size: tokens of a row;
    start: what rows that begin alike have in common, so that they are put together."""
    together = None if start is None else [start(row) for row in rows]
    parts = by_length([size(row) for row in rows], config.rows_at_once, config.micro_tokens, together)
    return [[rows[i] for i in part] for part in parts]


@dataclass(frozen=True, slots=True)
class Share(Generic[T]):
    """What one rank computes of a step."""

    parts: list[list[T]]  # its micro-batches
    borrowed: list[list[T]]  # micro-batches that it computes for nothing, so that all make as many forwards


def share_of(
    config: Training,
    rows: Sequence[T],
    size: Callable[[T], int],
    start: Callable[[T], Hashable] | None = None,
) -> Share[T]:
    """This rank's part of a step's rows, in micro-batches of similar length; all of it for a process alone.
    Every rank knows all rows, so that what is dealt to whom needs no word between them. size, start: as of
    `parts_of`."""
    if group.size() == 1:
        return Share(parts_of(config, rows, size, start), [])
    shares = group.deal([size(row) for row in rows], group.size())
    parts = [parts_of(config, [rows[i] for i in share], size, start) for share in shares]
    mine = parts[group.rank()]
    missing = max(map(len, parts)) - len(mine) if group.is_sharded() else 0
    return Share(mine, missing * [[min(rows, key=size)]])


def seed_step(seed: int, step: int) -> None:
    """Make dropout a function of (seed, step), so that a resumed run draws what an undisturbed one drew; each
    rank draws its own."""
    of_rank = ("rank", group.rank()) if group.rank() else ()
    torch.manual_seed(derive_seed("step", seed, step, *of_rank))


def add_metrics(total: dict[str, float], part: Mapping[str, Any], weight: float = 1.0) -> None:
    """total += weight · part, name by name."""
    for name, value in part.items():
        total[name] = total.get(name, 0.0) + weight * float(value)


def due(step: int, steps: int, every: int | None) -> bool:
    """Whether something done every `every` steps, and at the end, is due after `step` steps."""
    return step == steps or (every is not None and step % every == 0)


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """The best evaluation so far and how many since were no better. Higher is better; negate a loss."""

    patience: int | None
    best: float = -math.inf
    waited: int = 0

    def see(self, value: float) -> EarlyStop:
        """The state after one more evaluation."""
        return (
            replace(self, best=value, waited=0)
            if value > self.best
            else replace(self, waited=self.waited + 1)
        )

    @property
    def stop(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best."""
        return self.patience is not None and self.waited >= self.patience

    def values(self) -> dict[str, float | int | None]:
        """For a checkpoint (JSON has no infinity)."""
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def restored(self, values: Mapping[str, Any]) -> EarlyStop:
        """The state that `values` of a checkpoint describe."""
        return replace(
            self, best=-math.inf if values["best"] is None else values["best"], waited=values["waited"]
        )


def state_of(module: nn.Module) -> dict[str, Any]:
    """What training changes: the whole state, or with adapters their parameters and the trained head's."""
    state = module.state_dict()
    if not hasattr(module, "peft_config"):
        return state
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def put_back(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module the state that `state_of` took of it."""
    mismatch = module.load_state_dict(state, strict=not hasattr(module, "peft_config"))
    assert not mismatch.unexpected_keys, mismatch.unexpected_keys


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's `state_of`, cloned."""
    return {name: value.detach().clone() for name, value in state_of(module).items()}
