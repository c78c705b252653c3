"""Which model of a run is meant, and what its run says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.errors import UsageError
from keel.models.checkpoint_files import json_object
from keel.report.reading import Run, StageRun, read


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a stage left, or a model folder from anywhere (without `run` and `stage`)."""

    folder: Path
    run: Run | None = None
    stage: StageRun | None = None

    @property
    def name(self) -> str:
        """RUN-STAGE, or the folder's name."""
        return (
            self.folder.name
            if self.stage is None or self.run is None
            else f"{self.run.name}-{self.stage.name}"
        )

    @property
    def config(self) -> dict[str, Any]:
        return json_object(self.folder / "config.json")

    @property
    def scores(self) -> bool:
        """Whether it is a classifier (a reward model) and no language model."""
        return any("SequenceClassification" in kind for kind in self.config.get("architectures") or ())


def find(place: str) -> Model:
    """The model of RUN, RUN/STAGE, RUN/stages/STAGE, or a model folder. Of a run alone: what its last
    finished stage that leaves a language model has left.

    UsageError where there is none, or where the stage is unfinished or out of date.
    """
    path = Path(place)
    if (path / "config.json").is_file():
        return (
            Model(path) if path.name != "model" or path.parent.parent.name != "stages" else _of(path.parent)
        )
    if (path / "config.yaml").is_file():
        return _last(path)
    for run, name in ((path.parent, path.name), (path.parent.parent, path.name)):
        if (run / "config.yaml").is_file():
            return _of(run / "stages" / name)
    raise UsageError(f"no run, stage or model at {place}: give runs/NAME, runs/NAME/STAGE or a model folder")


def _of(directory: Path) -> Model:
    """The model of a stage's directory, RUN/stages/STAGE."""
    run = read(directory.parent.parent)
    stage = next((stage for stage in run.stages if stage.name == directory.name), None)
    if stage is None:
        known = ", ".join(stage.name for stage in run.stages)
        raise UsageError(f"the run {run.name!r} has no stage {directory.name!r}; it has {known}")
    if stage.status not in ("done", "cached"):
        raise UsageError(f"stage {stage.name!r} is {stage.status}: run it to its end first")
    folder = directory / "model"
    if not (folder / "config.json").is_file():
        raise UsageError(f"stage {stage.name!r} ({stage.kind}) leaves no model")
    return Model(folder, run, stage)


def _last(path: Path) -> Model:
    run = read(path)
    for stage in reversed(run.stages):
        leaves = stage.shown_as.config.leaves
        if leaves == "language model" and stage.status in ("done", "cached"):
            return _of(path / "stages" / stage.name)
    raise UsageError(f"the run {run.name!r} has no finished language model; name a stage: {path}/STAGE")
