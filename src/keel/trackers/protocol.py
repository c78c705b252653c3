# pyright: strict
"""What a tracker is, for keel's own and for those of other packages (entry points of `keel.trackers`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

NOTHING = -1  # what `Tracker.open` returns where the tracker has nothing of the stage yet


@dataclass(frozen=True, slots=True)
class TrackedStage:
    """A stage, which is one run of a tracker."""

    run: str  # the keel run's name
    name: str  # the stage's
    kind: str
    id: str  # of this stage with these settings, a few letters: stages that are made anew get another
    directory: str  # the keel run's, absolute
    settings: Mapping[str, Any]  # of the stage, defaults written out, with seed and versions

    @property
    def label(self) -> str:
        """A name that no other stage has: run-stage-id."""
        return f"{self.run}-{self.name}-{self.id}"


@dataclass(slots=True)
class Frame:
    """What belongs to one step."""

    step: int
    numbers: dict[str, float] = field(default_factory=dict[str, float])  # metrics; of times.jsonl as time/…
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # rows of samples.jsonl
    findings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # rows of events.jsonl


class Tracker(Protocol):
    """One tool. It may block, raise and print: it runs in a process of its own, and is asked again later."""

    def open(self, stage: TrackedStage) -> int | None:
        """Begin a stage's run, or go on with it. Returns the last step whose numbers it holds, where it can
        tell; NOTHING where it holds nothing of the stage; None where it cannot tell, and keel's own record
        counts."""
        ...

    def where(self) -> str:
        """What to open to see it, in a few words."""
        ...

    def send(self, frames: Sequence[Frame]) -> None:
        """Frames in the order of their steps. They count as sent once this returns."""
        ...

    def result(self, step: int, measures: Mapping[str, float]) -> None:
        """The stage's final measures; step: the last one."""
        ...

    def close(self, done: bool) -> None:
        """Let go of the stage. done: it ended well; else it is gone on with later."""
        ...


def flat(value: object, prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings and lists, by their path: {"models/sft/gold/mean": 0.4}."""
    if isinstance(value, bool) or value is None:
        return {}
    if isinstance(value, int | float):
        return {prefix: float(value)}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    elif isinstance(value, list):
        items = enumerate(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    found: dict[str, float] = {}
    for key, inner in items:
        found |= flat(inner, f"{prefix}/{key}" if prefix else str(key))
    return found


def finding_text(row: Mapping[str, Any]) -> tuple[str, str, bool]:
    """(title, text, urgent) of a row of events.jsonl: a finding, or what was done about some."""
    if "check" in row:
        text = "; ".join(str(row[key]) for key in ("evidence", "remedy") if row.get(key))
        return str(row["check"]), text, row.get("severity") == "act"
    known = {key: value for key, value in row.items() if key not in ("event", "step") and value is not None}
    return str(row.get("event", "event")), ", ".join(f"{key} {value}" for key, value in known.items()), False
