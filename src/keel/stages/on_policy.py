"""The loop of the stages that learn from their own samples; they differ in advantages and in the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from keel.algorithms.control import adaptive_kl
from keel.config import OnPolicy
from keel.data.batches import derive_seed, rows_of_step
from keel.models.roles import Roles
from keel.rewards.shaping import RunningScale
from keel.stages import experience, judging
from keel.stages.experience import Experience, Setup, Steering, Task
from keel.stages.guard import Guard
from keel.stages.update import EarlyStop, copy_state, due, optimizer_for, put_back, state_of
from keel.types import NotFiniteError

# prompts of an update, steering, number of the update → what was sampled, the scale that has seen it, metrics
Step = Callable[[list[Task], Steering, int], tuple[Experience, RunningScale, dict[str, float]]]


def loop(
    setup: Setup,
    tasks: Sequence[Task],
    held: Sequence[Task],
    optimizers: Sequence[torch.optim.Optimizer],
    step: Step,
    *,
    warmup: int = 0,
) -> dict[str, Any]:
    """Each update: 1. prompts  2. sample, score, learn  3. steer β  4. evaluate  5. log, diagnose, checkpoint. Where there is a
    judge, or weights may be put back, what the stage starts from is evaluated as update 0.

    warmup: updates at the start during which the policy stands still, so that its KL says nothing about β. Returns the
    stage's result; the policy ends with the weights to keep.
    """
    config, run, policy = setup.config, setup.run, setup.roles.policy
    steering, guard = Steering(config.kl.coef, RunningScale()), Guard.open(setup, optimizers)
    asked = held or (tasks[: judging.JUDGED] if setup.judge else [])
    stopping, best, first, update = EarlyStop(config.patience), None, 0, 0
    if checkpoint := run.restore():
        _load_state(setup, optimizers, checkpoint.tensors)
        values = checkpoint.values
        steering = Steering.restored(values)
        stopping = stopping.restored(values["stopping"])
        best, first = checkpoint.tensors["best"], checkpoint.step
        update = first
        guard.restored(values["guard"], checkpoint.tensors["kept"])
    elif asked and (setup.judge or config.control.goes_back):
        with run.timed("evaluate"):
            before = experience.evaluate(setup, asked)
        run.log(0, config.updates, before)
        guard.begin(before)

    for update in range(first + 1, config.updates + 1):
        if stopping.stop or guard.stopped:
            break
        # 1. the prompts of this update
        prompts = rows_of_step(
            len(tasks), config.batch_size // config.samples_per_prompt, update - 1, run.seed
        )
        # 2. experience, and epochs of mini-batches over it
        try:
            done, scale, metrics = step([tasks[i] for i in prompts], steering, update)
            run.check_finite(update, metrics)
        except NotFiniteError as error:  # nothing of this update counts
            steering = guard.failed(update, error, steering)
            run.log(update, config.updates, {"episode": steering.episodes})
            continue
        # 3. β follows the KL of this batch
        coef = steering.coef
        if config.kl.target is not None and update > warmup:
            coef = adaptive_kl(coef, done.kl, config.kl.target, config.batch_size, config.kl.horizon)
        steering = Steering(coef, scale, steering.episodes + round(metrics["rollout/episodes"]))
        metrics["episode"] = steering.episodes
        # 4. held-out prompts
        if asked and due(update, config.updates, config.eval_every):
            with run.timed("evaluate"):
                metrics |= experience.evaluate(setup, asked)
            stopping = stopping.see(metrics["eval/objective/rlhf_reward"])
            if config.patience is not None and stopping.waited == 0:
                best = copy_state(policy)
        # 5. what happened, and where to go on from
        if update == 1 or due(update, config.updates, max(1, config.updates // 10)):
            run.samples(experience.sample_rows(setup, update, done))
        run.log(update, config.updates, metrics)
        steering = guard.see(update, metrics, steering)
        if due(update, config.updates, config.save_every) or stopping.stop or guard.stopped:
            tensors = _state(setup, optimizers) | {"best": best, "kept": guard.kept}
            values = {**steering.values(), "stopping": stopping.values(), "guard": guard.values()}
            run.save(update, tensors, values)

    guard.finish(update)
    if best is not None and not guard.chooses:
        put_back(policy, best)
    return experience.final_measures(setup, held or tasks) | {
        "kl_coef": steering.coef, "kl_target": config.kl.target, "episodes": steering.episodes,
    }  # fmt: skip


def rollout_seed(setup: Setup, update: int, *more: object) -> int:
    """The seed of an update's samples."""
    return derive_seed(setup.run.seed, "rollout", update, *more)


def optimizers(config: OnPolicy, roles: Roles, value_lr: float | None = None) -> list[torch.optim.Optimizer]:
    """One for the policy (and its value head); one more for a separate critic, whose gradient is clipped by itself."""
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
