# pyright: strict
"""Trackio, by its own client: a database on this machine, or a Space."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from keel.trackers.protocol import NOTHING, Frame, TrackedStage, finding_text

STORED = 30.0  # seconds within which what was logged is in the database


class Trackio:
    """One run of Trackio a stage, named run-stage-id, grouped by the keel run."""

    def __init__(self, project: str = "keel", space: str | None = None) -> None:
        self._project, self._space = project, space
        self._run: Any = None
        self._stage: TrackedStage | None = None

    def open(self, stage: TrackedStage) -> int | None:
        """As of `Tracker`. The last step is what the database holds; of a Space it is not asked."""
        self._stage = stage
        settings = {key: value for key, value in stage.settings.items() if not key.startswith("_")}
        self._run = trackio.init(
            project=self._project,
            name=stage.label,
            group=stage.run,
            space_id=self._space,
            config={"run": stage.run, "stage": stage.name, "kind": stage.kind, **settings},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return None if self._space else self._last()

    def where(self) -> str:
        """As of `Tracker`."""
        return self._space or f"trackio show --project {self._project}"

    def send(self, frames: Sequence[Frame]) -> None:
        """As of `Tracker`. Trackio only warns of a database that cannot be written, so it is asked what it
        has."""
        for frame in frames:
            if frame.numbers:
                self._run.log(dict(frame.numbers), step=frame.step)
            if frame.samples:
                rows: list[Any] = [_row(row) for row in frame.samples]
                self._run.log({"samples": trackio.Table(data=[*rows])}, step=frame.step)
            for row in frame.findings:
                title, text, urgent = finding_text(row)
                level = trackio.AlertLevel.WARN if urgent else trackio.AlertLevel.INFO
                self._run.alert(html.escape(title), html.escape(text), level, step=frame.step)
        logged = [frame.step for frame in frames if frame.numbers or frame.samples]
        if logged:
            self._wait_for(logged[-1])

    def result(self, step: int, measures: Mapping[str, float]) -> None:
        """As of `Tracker`: numbers `result/…` at the last step."""
        if measures:
            self._run.log({f"result/{name}": value for name, value in measures.items()}, step=step)

    def close(self, done: bool) -> None:
        """As of `Tracker`."""
        trackio.finish()

    def _last(self) -> int:
        assert self._stage is not None
        last = SQLiteStorage.get_max_step_for_run(self._project, self._stage.label)
        return NOTHING if last is None else int(last)

    def _wait_for(self, step: int) -> None:
        until = time.monotonic() + STORED
        while not self._space and self._last() < step:
            if time.monotonic() > until:
                raise RuntimeError(f"step {step} is not in Trackio's database after {STORED:.0f} s")
            time.sleep(0.1)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as a row of a table, whose cells Trackio reads as Markdown: markup of a model's stays text."""
    return {key: _cell(value) for key, value in row.items()}


def _cell(value: object) -> Any:
    if isinstance(value, str | dict | list):
        return html.escape(str(value), quote=False)  # pyright: ignore[reportUnknownArgumentType]
    return value
