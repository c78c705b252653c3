"""Epochs of mini-batches over one batch of experience, whatever the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.algorithms.control import kl_adaptive_lr
from keel.config import OnPolicy
from keel.data.batches import derive_seed, permutation, rows_of_step, useful_tokens
from keel.models import optim
from keel.models.head import head_of
from keel.rl.rollout import Setup
from keel.rundir.stage_run import StageRun
from keel.stages import language
from keel.stages.loop_utils import add_metrics, lr_scale, parts_of
from keel.types import Episodes


@dataclass(frozen=True, slots=True)
class LogprobMismatch:
    """|log π − log π_old| at the response tokens of the first gradient step, where both are of the same
    weights."""

    largest: float = 0.0
    total: float = 0.0
    tokens: int = 0

    @staticmethod
    def between(logp: Tensor, old_logp: Tensor, mask: Tensor) -> LogprobMismatch:
        """Of (B, T)."""
        gap = torch.where(mask, (logp.detach() - old_logp).abs(), 0.0)
        return LogprobMismatch(float(gap.max()), float(gap.sum()), int(mask.sum()))

    def and_of(self, other: LogprobMismatch) -> LogprobMismatch:
        return LogprobMismatch(
            max(self.largest, other.largest), self.total + other.total, self.tokens + other.tokens
        )

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)


LossTerm = tuple[Tensor, dict[str, Tensor], LogprobMismatch]  # a loss, metrics that add up, drift
# rows of a part, those of its mini-batch, whether π still is π_old → the terms of the loss that have no
# backward in common, one after the other: what one keeps for its backward is gone before the next is there
Losses = Callable[[list[int], list[int], bool], Iterable[LossTerm]]


def learn(
    setup: Setup,
    optimizers: Sequence[torch.optim.Optimizer],
    episodes: Episodes,
    update: int,
    losses: Losses,
    *,
    pace: float = 1.0,
    learning: bool = True,
    first: bool = False,
) -> dict[str, float]:
    """Returns means over the gradient steps taken.

    pace: share of the scheduled learning rate, for the policy's optimiser, which is the first. learning
    False: the policy stands still (only the critic learns). first: it has not learned before. Adam's first
    steps are as long as the rate allows, whatever the gradient, and nothing is known yet of how far they
    lead: where `desired_kl` is to be held, their rates rise from step to step.
    """
    config, run = setup.config, setup.run
    lengths = (episodes.prompt_lengths + episodes.mask.sum(dim=1)).tolist()
    prompts = _prompts(episodes)
    scale = lr_scale(config, update - 1, config.updates)
    desired = math.inf if config.desired_kl is None else config.desired_kl
    taken, ramp = _Means(), _steps(config, len(episodes.ids)) if first and config.desired_kl else 1
    epochs, drift, first_ratio, furthest = 0, LogprobMismatch(), 1.0, 0.0
    for epoch, chosen in _mini_batches(config, run, len(episodes.ids), update):
        # rows of one prompt, and of similar length, share a micro-batch: less is read, the same sum
        measured: dict[str, float] = {}
        with batch_layout.counting() as read, cast_cache():
            for part in parts_of(config, sorted(chosen), lengths.__getitem__, prompts.__getitem__):
                for term, part_metrics, part_drift in losses(part, chosen, taken.count == 0):
                    if term.requires_grad:
                        optim.backward(term)
                    add_metrics(measured, part_metrics)
                    drift = drift.and_of(part_drift)
        run.count("train", useful_tokens([(prompts[i], lengths[i]) for i in chosen]), read())
        if learning:
            furthest = max(furthest, measured["policy/approxkl_avg"])
        slower = kl_adaptive_lr(pace, furthest, desired) if furthest > desired else pace
        # where nothing varies it is 1, and its sum over the parts is only rounded
        if taken.count == 0 and measured["val/ratio_var"] > 0:
            first_ratio = measured["val/ratio"]
        if setup.ptx and learning:
            add_metrics(measured, {"loss/ptx": _ptx_gradient(setup, update, taken.count)})
        slower *= min(1.0, (taken.count + 1) / ramp)
        rates = (slower * scale, scale)  # a critic of its own has the second
        stepped = [
            optim.step(optimizer, rate, config.max_grad_norm, f"{run.name}, update {update}")
            for optimizer, rate in zip(optimizers, rates)
        ]
        taken.add(measured | {"grad_norm": stepped[0]["grad_norm"], "lr": stepped[0]["lr"]})
        epochs = epoch + 1
        end = config.max_approx_kl
        if end is not None and learning and measured["policy/approxkl_k3"] > end:
            break
    said = {
        "policy/epochs": epochs, "policy/logp_drift": drift.largest, "val/ratio_first": first_ratio,
        "policy/approxkl_max": furthest, "policy/pace": pace,
    }  # fmt: skip
    if config.trusts_sampler and head_of(setup.roles.policy) is not None:  # π_old's are the sampler's own
        said["rollout/sampler_drift"] = drift.mean
    return taken.means() | said


class _Means:
    """Of what was measured so far."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: dict[str, float] = {}

    def add(self, measured: dict[str, float]) -> None:
        add_metrics(self.totals, measured)
        self.count += 1

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.totals.items()}


def _prompts(episodes: Episodes) -> list[tuple[int, ...]]:
    """The prompt of each row."""
    rows = zip(episodes.ids.tolist(), episodes.prompt_lengths.tolist(), strict=True)
    return [tuple(ids[:length]) for ids, length in rows]


def _mini_batches(
    config: OnPolicy, run: StageRun, count: int, update: int
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, rows) in the order of an update."""
    size = config.mini_batch or count
    for epoch in range(config.epochs):
        order = permutation(count, derive_seed(run.seed, "mini-batches", update), epoch)
        for start in range(0, count, size):
            yield epoch, list(order[start : start + size])


def _steps(config: OnPolicy, count: int) -> int:
    """Gradient steps of an update."""
    return config.epochs * math.ceil(count / (config.mini_batch or count))


@cast_cache()
def _ptx_gradient(setup: Setup, update: int, step: int) -> float:
    """Add the gradient of coef × language-modelling loss on a few rows (PPO-ptx, 2203.02155); returns the
    loss."""
    ptx = setup.config.ptx
    assert ptx is not None
    seed = derive_seed(setup.run.seed, "ptx", update)
    rows = [setup.ptx[i] for i in rows_of_step(len(setup.ptx), ptx.batch_size, step, seed)]
    tokens, total = sum(row.counted for row in rows), 0.0
    for part in parts_of(setup.config, rows, lambda row: len(row.ids)):
        value, _ = language.loss(setup.roles.policy, part, setup.pad_id, tokens)
        optim.backward(ptx.coef * value)
        total += float(value.detach())
    return total
