# pyright: strict
"""Weights & Biases, by its own client."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from keel.trackers.protocol import Frame, TrackedStage, finding_text

_COLUMNS = ("step", "prompt", "completion", "rewards", "kl", "length", "stop_reason", "more")


class Wandb:
    """One run a stage, grouped by the keel run; gone on with by its id."""

    def __init__(self, project: str = "keel", entity: str | None = None, mode: str | None = None) -> None:
        self._project, self._entity, self._mode = project, entity, mode
        self._run: Any = None

    def open(self, stage: TrackedStage) -> int | None:
        """As of `Tracker`. A run that is gone on with online knows its last step; one that lies in a folder
        does not."""
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            mode=self._mode,
            id=stage.label.replace(".", "-")[-64:],
            name=f"{stage.run}/{stage.name}",
            group=stage.run,
            job_type=stage.kind,
            config={"run": stage.run, "stage": stage.name, **stage.settings},
            dir=str(Path(stage.directory) / "trackers"),
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )
        return self._run.step - 1 if self._run.resumed and not self._run.offline else None

    def where(self) -> str:
        """As of `Tracker`."""
        return self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def send(self, frames: Sequence[Frame]) -> None:
        """As of `Tracker`."""
        for frame in frames:
            logged: dict[str, Any] = dict(frame.numbers)
            if frame.samples:
                rows = [_cells(row) for row in frame.samples]
                logged["samples"] = wandb.Table(columns=list(_COLUMNS), data=rows)
            if frame.findings:
                found = [(row.get("step", frame.step), *finding_text(row)) for row in frame.findings]
                columns = ["step", "finding", "text", "urgent"]
                logged["findings"] = wandb.Table(columns=columns, data=[list(row) for row in found])
                for _, title, text, urgent in found:
                    if urgent:
                        self._run.alert(title=title, text=text, level=wandb.AlertLevel.WARN)
            self._run.log(logged, step=frame.step)

    def result(self, step: int, measures: Mapping[str, float]) -> None:
        """As of `Tracker`: the run's summary, as `result/…`."""
        self._run.summary.update({f"result/{name}": value for name, value in measures.items()})

    def close(self, done: bool) -> None:
        """As of `Tracker`."""
        self._run.finish(exit_code=0 if done else 1)


def _cells(row: Mapping[str, Any]) -> list[Any]:
    """A sample as a row of a table; what has no column of its own is joined in the last one."""
    *known, _ = _COLUMNS
    more = {key: value for key, value in row.items() if key not in known}
    cells = [row.get(column) for column in known]
    return [_text(cell) if isinstance(cell, dict | list) else cell for cell in cells] + [_text(more)]


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
