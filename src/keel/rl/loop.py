"""The loop of the stages that learn from their own samples; they differ in advantages and in the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from keel.algorithms.control import adaptive_kl, kl_adaptive_lr
from keel.config import OnPolicy
from keel.data.batches import derive_seed, rows_of_step
from keel.errors import NotFiniteError
from keel.models.roles import Roles
from keel.rewards.shaping import RunningScale
from keel.rl import heldout_judge, rollout
from keel.rl.monitor import Monitor
from keel.rl.rollout import Experience, LoopState, PromptExample, Setup
from keel.stages.loop_utils import EarlyStop, copy_state, due, optimizer_for, put_back, state_of

# prompts of an update, steering, number of the update → what was sampled, the scale that has seen it, metrics
Step = Callable[[list[PromptExample], LoopState, int], tuple[Experience, RunningScale, dict[str, float]]]


def loop(
    setup: Setup,
    tasks: Sequence[PromptExample],
    held: Sequence[PromptExample],
    optimizers: Sequence[torch.optim.Optimizer],
    step: Step,
    *,
    warmup: int = 0,
) -> dict[str, Any]:
    """Updates until there are enough, or a reason to stop. Where there is a judge, or weights may be put
    back, what the stage starts from is evaluated as update 0.

    warmup: updates at the start during which the policy stands still, so that its KL says nothing about β.
    Returns the stage's result; the policy ends with the weights to keep.
    """
    course = OnPolicyLoop(setup, tasks, held, optimizers, step, warmup)
    last = course.begin()
    while last < setup.config.updates and not course.over:
        last += 1
        course.update(last)
    return course.end(last)


class OnPolicyLoop:
    """One stage on its way; what of it changes between updates is in each checkpoint."""

    def __init__(
        self,
        setup: Setup,
        tasks: Sequence[PromptExample],
        held: Sequence[PromptExample],
        optimizers: Sequence[torch.optim.Optimizer],
        step: Step,
        warmup: int,
    ):
        self.setup, self.config, self.run = setup, setup.config, setup.run
        self.tasks, self.held, self.optimizers, self.step, self.warmup = tasks, held, optimizers, step, warmup
        self.asked = held or (tasks[: heldout_judge.JUDGED] if setup.judge else [])
        self.steering = LoopState(self.config.kl.coef, RunningScale())
        self.stopping = EarlyStop(self.config.patience)
        self.guard = Monitor.open(setup, optimizers)
        self.best: dict[str, Any] | None = None  # the policy at its best evaluation, for `patience`

    @property
    def over(self) -> bool:
        return self.stopping.stop or self.guard.stopped

    def begin(self) -> int:
        """From the checkpoint, if there is one; the last update that was done."""
        if checkpoint := self.run.restore():
            _load_state(self.setup, self.optimizers, checkpoint.tensors)
            values, self.best = checkpoint.values, checkpoint.tensors["best"]
            self.steering = LoopState.restored(values)
            self.stopping = self.stopping.restored(values["stopping"])
            self.guard.restored(values["guard"], checkpoint.tensors["kept"])
            return checkpoint.step
        if self.asked and (self.setup.judge or self.config.control.goes_back):
            before = self._evaluate()
            self.run.log(0, self.config.updates, before)
            self.guard.begin(before)
        return 0

    def update(self, update: int) -> None:
        """1. prompts  2. sample, score, learn  3. steer β  4. evaluate  5. log, diagnose, checkpoint"""
        config, run = self.config, self.run
        # 1. the prompts of this update
        prompts = rows_of_step(
            len(self.tasks), config.batch_size // config.samples_per_prompt, update - 1, run.seed
        )
        # 2. experience, and epochs of mini-batches over it
        try:
            done, scale, metrics = self.step([self.tasks[i] for i in prompts], self.steering, update)
            run.check_finite(update, metrics)
        except NotFiniteError as error:  # nothing of this update counts
            self.steering = self.guard.failed(update, error, self.steering)
            run.log(update, config.updates, {"episode": self.steering.episodes})
            return
        # 3. β follows the KL of this batch, the pace that of the update
        coef = self.steering.coef
        if config.kl.target is not None and update > self.warmup:
            coef = adaptive_kl(coef, done.kl, config.kl.target, config.batch_size, config.kl.horizon)
        pace = self.steering.pace
        if config.desired_kl is not None:
            pace = kl_adaptive_lr(pace, metrics["policy/approxkl_max"], config.desired_kl)
        episodes = self.steering.episodes + round(metrics["rollout/episodes"])
        steering = LoopState(coef, scale, episodes, pace)
        metrics["episode"] = steering.episodes
        # 4. held-out prompts
        if self.asked and due(update, config.updates, config.eval_every):
            metrics |= self._evaluate()
            self.stopping = self.stopping.see(metrics["eval/objective/rlhf_reward"])
            if config.patience is not None and self.stopping.waited == 0:
                self.best = copy_state(self.setup.roles.policy)
        # 5. what happened, and where to go on from
        if update == 1 or due(update, config.updates, max(1, config.updates // 10)):
            run.samples(rollout.sample_rows(self.setup, update, done))
        run.log(update, config.updates, metrics)
        self.steering = self.guard.see(update, metrics, steering)
        if due(update, config.updates, config.save_every) or self.over:
            self._save(update)

    def end(self, last: int) -> dict[str, Any]:
        """The result, measured on the weights to keep. last: the last update."""
        self.guard.finish(last)
        if self.best is not None and not self.guard.chooses:
            put_back(self.setup.roles.policy, self.best)
        return rollout.final_measures(self.setup, self.held or self.tasks) | {
            "kl_coef": self.steering.coef, "kl_target": self.config.kl.target, "episodes": self.steering.episodes,
        }  # fmt: skip

    def _evaluate(self) -> dict[str, float]:
        with self.run.timed("evaluate"):
            return rollout.evaluate(self.setup, self.asked)

    def _save(self, update: int) -> None:
        tensors = _state(self.setup, self.optimizers) | {"best": self.best, "kept": self.guard.kept}
        values = {
            **self.steering.values(), "stopping": self.stopping.values(), "guard": self.guard.values(),
        }  # fmt: skip
        self.run.save(update, tensors, values)


def rollout_seed(setup: Setup, update: int, *more: object) -> int:
    """The seed of an update's samples."""
    return derive_seed(setup.run.seed, "rollout", update, *more)


def optimizers(config: OnPolicy, roles: Roles, value_lr: float | None = None) -> list[torch.optim.Optimizer]:
    """One for the policy (and its value head); one more for a separate critic, whose gradient is clipped by
    itself."""
    groups: list[tuple[Sequence[nn.Module], float]] = [([roles.policy], config.lr)]
    if roles.value_head is not None:
        groups.append(([roles.value_head], value_lr or config.lr))
    found: list[torch.optim.Optimizer] = [optimizer_for(config, *groups)]
    if roles.critic is not None:
        found.append(optimizer_for(config, ([roles.critic], value_lr or config.lr)))
    return found


def _state(setup: Setup, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Everything that training changes, for a checkpoint."""
    modules = {
        "policy": setup.roles.policy,
        **{f"value{i}": m for i, m in enumerate(setup.roles.value_modules)},
    }
    return {name: state_of(m) for name, m in modules.items()} | {
        f"optimizer{i}": o.state_dict() for i, o in enumerate(optimizers)
    }


def _load_state(setup: Setup, optimizers: Sequence[torch.optim.Optimizer], tensors: Any) -> None:
    """Put a checkpoint's `state` back."""
    put_back(setup.roles.policy, tensors["policy"])
    for i, module in enumerate(setup.roles.value_modules):
        put_back(module, tensors[f"value{i}"])
    for i, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(tensors[f"optimizer{i}"])
