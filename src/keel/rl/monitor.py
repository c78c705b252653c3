"""What watches over a loop: its metrics go through the checks, and what `control` says is carried out.

Decisions are `keel.diagnosis.control`'s; here weights are kept, put back and learning rates cut. What a watch
knows is in metrics.jsonl and events.jsonl, which a resumed run reads again; what was kept is in the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from keel.diagnosis import logs
from keel.diagnosis.control import LR_FACTOR, Action, decide, event, raised
from keel.diagnosis.findings import WINDOW, Finding, conditions
from keel.diagnosis.watch import CHECKS, Watch, replay
from keel.errors import KeelError
from keel.rewards.shaping import RunningScale
from keel.rl.rollout import LoopState, Setup
from keel.stages.loop_utils import put_back, state_of


@dataclass
class Monitor:
    """The watch over one stage. `snapshots` holds whole states: "healthy" (of which a window of updates
    without a finding has passed), "fresh" (the next to become so) and "best" (the highest held-out judge,
    else evaluated reward)."""

    setup: Setup[Any]
    optimizers: Sequence[torch.optim.Optimizer]
    watch: Watch
    peaks: list[list[float]]  # learning rates as the config has them
    snapshots: dict[str, dict[str, Any]]
    actions_taken: int = 0  # adjustments and rollbacks so far
    lr_factor: float = 1.0
    best: float | None = None
    stopped: bool = False
    rollbacks: int = 0  # of this process

    @classmethod
    def open(cls, setup: Setup[Any], optimizers: Sequence[torch.optim.Optimizer]) -> Monitor:
        """The monitor of a stage before its first update."""
        peaks = [[group["peak_lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        watch = Watch(conditions(setup.config.model_dump(mode="json")))
        monitor = cls(setup, optimizers, watch, peaks, {})
        if setup.config.control.goes_back:
            monitor.snapshots["healthy"] = monitor._snapshot(0, RunningScale())
        return monitor

    # ------------------------------------------------------------ for a checkpoint

    def values(self) -> dict[str, Any]:
        return {
            "actions_taken": self.actions_taken,
            "lr_factor": self.lr_factor,
            "best": self.best,
            "stopped": self.stopped,
        }

    def restored(self, values: Mapping[str, Any], snapshots: Mapping[str, Any]) -> None:
        """As it was when a checkpoint with `values` and `snapshots` was written."""
        self.actions_taken, self.lr_factor = values["actions_taken"], values["lr_factor"]
        self.best, self.stopped = values["best"], values["stopped"]
        self.snapshots = {name: _copied(snapshot, copy=False) for name, snapshot in snapshots.items()}
        if self.off:
            return
        folder = self.setup.run.directory
        events = logs.lines(folder / "events.jsonl")
        acted = {row["step"] for row in events if row["event"] != "finding"}
        self.watch, _ = replay(logs.lines(folder / "metrics.jsonl"), self.watch.history.conditions, acted)
        if acted:  # also where the last action was at a step without metrics
            self.watch.history.since = max(acted)

    # ------------------------------------------------------------ what the loop asks

    @property
    def off(self) -> bool:
        return self.setup.config.control.on_finding == "off"

    def begin(self, metrics: Mapping[str, float]) -> None:
        """The evaluation of what the stage starts from, which is the first to go back to."""
        if not self.off:
            found = self.watch.see(0, metrics)
            assert not found, found  # no check speaks before there was an update
        value = _worth(metrics)
        if self.setup.config.control.goes_back and value is not None:
            self.best, self.snapshots["best"] = value, self.snapshots["healthy"]  # which is the same state

    def see(self, update: int, metrics: Mapping[str, float], state: LoopState) -> LoopState:
        """The metrics of an update that went well → the state to go on with."""
        if self.off:
            return state
        findings = self.watch.see(update, metrics)
        after = self._react(update, findings, state)
        if after is state and self.setup.config.control.goes_back and not _urgent(findings):
            self._remember(update, metrics, state.reward_scaler)
        return after

    def failed(self, update: int, error: KeelError, state: LoopState) -> LoopState:
        """An update whose numbers are none → the state to go on with; the error where control does not go
        back."""
        if self.off:
            raise error
        finding = CHECKS["not_finite"].found(update, "act", str(error).partition(";")[0])
        if not self.setup.config.control.goes_back:
            self.setup.run.events([finding.row()])
            raise error
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return self._react(update, [finding], state)

    def finish(self, last: int) -> None:
        """Put the best weights back: those that the judge liked best, where control may go back at all;
        without a judge only where the stage was stopped, by evaluated reward, else the last healthy. last:
        the update that the stage ended with."""
        if self.chooses:
            snapshot = self.snapshots.get("best", self.snapshots["healthy"])
            self._put_weights_back(snapshot)
            self._record_kept(snapshot["update"], last)

    @property
    def chooses(self) -> bool:
        """Whether `finish` puts weights back."""
        return self.stopped or (self.setup.judge is not None and "best" in self.snapshots)

    # ------------------------------------------------------------ how

    def _record_kept(self, to: int, last: int) -> None:
        """An event, unless the stage was stopped, which says so itself, or ends as it is."""
        run = self.setup.run
        said = any(row["event"] == "keep" for row in logs.lines(run.directory / "events.jsonl"))
        if self.stopped or said or to == last:
            return
        row = {"event": "keep", "checks": [], "kl_coef": None, "lr_factor": self.lr_factor, "to": to}
        run.events([{"step": last, **row}])
        run.say(f"{run.name}: the weights of update {to} are kept, which the judge liked best")

    def _react(self, update: int, findings: Sequence[Finding], state: LoopState) -> LoopState:
        run, control = self.setup.run, self.setup.config.control
        rows: list[dict[str, Any]] = [finding.row() for finding in findings]
        for finding in findings:
            if finding.severity != "note":
                run.say(f"{run.name}: update {update}: {finding.check}: {finding.evidence}; {finding.remedy}")
        action = decide(findings, control.on_finding, self.actions_taken, control.attempts)
        if action is not None:
            state, to = self._carry_out(action, state)
            rows.append(event(update, action, state.kl_coef, self.lr_factor, to))
            self.watch.acted(update)
            run.say(
                f"{run.name}: update {update}: {action.kind}" + ("" if to is None else f" to update {to}")
            )
        run.events(rows)
        return state

    def _carry_out(self, action: Action, state: LoopState) -> tuple[LoopState, int | None]:
        """The state from now on, and the update whose weights are taken."""
        if action.kind == "stop":
            self.stopped = True
            return state, self.snapshots.get("best", self.snapshots["healthy"])["update"]
        self.actions_taken += 1
        to = None
        if action.kind == "rollback":
            snapshot = self.snapshots[self._refuge]
            self._put_back(snapshot)
            self.rollbacks += 1
            self.snapshots.pop("fresh", None)  # it may have been ill already
            state = replace(state, reward_scaler=RunningScale(**snapshot["reward_scaler"]))
            to = snapshot["update"]
        if action.cut_lr:
            self.lr_factor *= LR_FACTOR
        self._set_learning_rates()
        return replace(state, kl_coef=raised(state.kl_coef)) if action.raise_kl else state, to

    @property
    def _refuge(self) -> str:
        """With a judge the state that it liked best; else the last that was followed by a window without a
        finding."""
        return "best" if self.setup.judge is not None and "best" in self.snapshots else "healthy"

    def _remember(self, update: int, metrics: Mapping[str, float], reward_scaler: RunningScale) -> None:
        fresh = self.snapshots.get("fresh")
        if fresh is None or update - fresh["update"] >= WINDOW:
            if fresh is not None:
                self.snapshots["healthy"] = fresh
            self.snapshots["fresh"] = self._snapshot(update, reward_scaler)
        self._prefer(update, metrics, reward_scaler)

    def _prefer(self, update: int, metrics: Mapping[str, float], reward_scaler: RunningScale) -> None:
        value = _worth(metrics)
        if value is not None and (self.best is None or value > self.best):
            self.best, self.snapshots["best"] = value, self._snapshot(update, reward_scaler)

    def _values(self) -> list[tuple[torch.nn.Module, str]]:
        return [(module, f"value{i}") for i, module in enumerate(self.setup.roles.value_modules)]

    def _snapshot(self, update: int, reward_scaler: RunningScale) -> dict[str, Any]:
        """Everything that training changes, copied to the CPU."""
        modules = {"policy": self.setup.roles.policy, **{name: module for module, name in self._values()}}
        return {
            "update": update,
            "modules": {name: _copied(state_of(module)) for name, module in modules.items()},
            "optimizers": [_copied(optimizer.state_dict()) for optimizer in self.optimizers],
            "reward_scaler": asdict(reward_scaler),
        }

    def _put_weights_back(self, snapshot: Mapping[str, Any]) -> None:
        put_back(self.setup.roles.policy, snapshot["modules"]["policy"])
        for module, name in self._values():
            put_back(module, snapshot["modules"][name])

    def _put_back(self, snapshot: Mapping[str, Any]) -> None:
        self._put_weights_back(snapshot)
        for optimizer, saved in zip(self.optimizers, snapshot["optimizers"], strict=True):
            optimizer.load_state_dict(
                _copied(saved)
            )  # which takes tensors as they are, and would change what is kept

    def _set_learning_rates(self) -> None:
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak * self.lr_factor


def _worth(metrics: Mapping[str, float]) -> float | None:
    """By what the best state is chosen: the judge, else the evaluated reward; None where nothing was
    evaluated."""
    return metrics.get("eval/judge", metrics.get("eval/objective/rlhf_reward"))


def _urgent(findings: Sequence[Finding]) -> bool:
    return any(finding.severity == "act" for finding in findings)


def _copied(value: object, *, copy: bool = True) -> Any:
    """Tensors cloned to the CPU, whatever they lie in; of weights that are cut over ranks this one's parts.
    Not `copy`: those that are there already stay as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, Mapping):
        return {key: _copied(item, copy=copy) for key, item in value.items()}
    return [_copied(item, copy=copy) for item in value] if isinstance(value, list) else value
