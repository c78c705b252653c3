"""What TRL hands a reward function beside the samples: where training stands, and two ways to log.

`trainer_state`, `log_extra` and `log_metric` are arguments of TRL's signature (its GRPO trainer). A function
that asks for them gets what keel has. Light: the process of a reward imports this too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

STATE = "trainer_state"
EXTRAS = (STATE, "log_extra", "log_metric")  # arguments that are no columns


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where training stands when a reward is asked."""

    step: int = 0  # updates done before
    total: int = 0  # updates that the settings ask for; 0 outside of training
    epoch: float = 0.0  # passes over the prompts before this update

    def plain(self) -> dict[str, Any]:
        """By the names of TRL's TrainerState."""
        return {"global_step": self.step, "max_steps": self.total, "epoch": self.epoch}


@dataclass(slots=True)
class Logged:
    """What reward functions logged of a batch of B samples."""

    metrics: dict[str, list[float]] = field(default_factory=dict[str, list[float]])  # name → values, in order
    extra: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])  # column → B values

    def log_metric(self, name: str, value: float, of: int = 1) -> None:
        """Log a number; the mean of an update's calls becomes a metric. What is not finite is left out. of:
        what it is a mean over counts for so many calls, so that the metric does not depend on how samples
        are dealt out to calls."""
        number = float(value)
        if math.isfinite(number):
            self.metrics.setdefault(str(name), []).extend([number] * of)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a value a sample, for samples.jsonl."""
        self.extra[str(column)] = [_plain(value) for value in values]

    def add(self, other: Mapping[str, Any], rows: Sequence[int] | None = None, size: int = 0) -> None:
        """Take over what a `dump` of some rows holds. rows: their places in a batch of `size`."""
        for name, values in other["metrics"].items():
            self.metrics.setdefault(name, []).extend(values)
        for name, values in other["extra"].items():
            if rows is None:
                self.extra[name] = list(values)
            elif len(values) == len(rows):
                column = self.extra.setdefault(name, [None] * size)
                for row, value in zip(rows, values, strict=True):
                    column[row] = value

    def dump(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"metrics": self.metrics, "extra": self.extra}


def extras(state: Mapping[str, Any], logged: Logged) -> dict[str, Any]:
    """The arguments. state: of `TrainingState.plain`."""
    log: dict[str, Callable[..., None]] = {"log_extra": logged.log_extra, "log_metric": logged.log_metric}
    return {STATE: SimpleNamespace(**state), **log}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
