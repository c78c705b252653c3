"""What a config leaves on the disk: the models of its stages, and the checkpoints while one is at work.

Reckoned from the shapes of the models alone. Logs, rows that were made ready and the report are left out:
they are small beside weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.pipeline import stage_kinds
from keel.pipeline.pipeline import Pipeline
from keel.plan import model_memory, planner, stage_memory
from keel.plan.stage_memory import Lengths
from keel.rundir.machine_faults import free_bytes, size_in_words


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes of one stage."""

    model: int  # what it leaves
    checkpoint: int  # one of them: trained weights and AdamW's two moments


@dataclass(frozen=True, slots=True)
class Room:
    """What several stages need, beside what is free."""

    models: int
    checkpoint: int  # the largest of a stage
    there: int  # what lies in the directories of these stages already
    free: int | None  # None where nobody knows

    @property
    def least(self) -> int:
        """Below this it cannot work: all models, and one checkpoint of the stage at work."""
        return max(0, self.models + self.checkpoint - self.there)

    @property
    def whole(self) -> int:
        """A checkpoint is written before the one before it is removed."""
        return max(0, self.models + 2 * self.checkpoint - self.there)


def need(pipeline: Pipeline, name: str) -> DiskNeed | None:
    """What a stage puts on the disk; None where the shape of a model is unknown."""
    stage = pipeline.config.stages[name]
    if stage.leaves in ("nothing", "comparisons"):
        return DiskNeed(0, 0)
    count = planner.parameters(pipeline, name)
    if count is None:
        return None
    start = stage.starts_from
    dtype = start.dtype if start is not None and getattr(stage, "lora", None) is not None else "float32"
    model = count * model_memory.WEIGHT[dtype] * getattr(stage, "members", 1)
    return DiskNeed(round(model), round(_checkpoint(pipeline, name)))


def _checkpoint(pipeline: Pipeline, name: str) -> float:
    """Of each trained weight the weight and two moments, all of 4 bytes: one and a half optimisers."""
    stage, refs = pipeline.config.stages[name], planner.models(pipeline, name)
    if refs is None or stage_kinds.kind_of(stage.kind).memory is None:
        return 0
    phases = stage_memory.phases(stage, refs, Lengths(1, 1), "cpu") or []
    return 1.5 * max(
        (sum(p.get("optimizer", 0) for p in phase.parts.values()) for phase in phases), default=0
    )


def room(pipeline: Pipeline, names: Sequence[str]) -> Room | None:
    """What stages that are to be run need; None where the shape of a model is unknown."""
    needs = [need(pipeline, name) for name in names]
    known = [one for one in needs if one is not None]
    if len(known) < len(needs):
        return None
    there = sum(_size(pipeline.stage_directory(name)) for name in names)
    largest = max((one.checkpoint for one in known), default=0)
    return Room(sum(one.model for one in known), largest, there, free_bytes(pipeline.directory))


def as_dict(found: DiskNeed | None) -> dict[str, int] | None:
    """For JSON."""
    return None if found is None else {"model": found.model, "checkpoint": found.checkpoint}


def line(pipeline: Pipeline, entries: Sequence[Mapping[str, Any]]) -> str:
    """What the stages of a plan that are not done need, and what is free: one line."""
    found = room(pipeline, [entry["stage"] for entry in entries if not entry["done"]])
    if found is None:
        return "disk: unknown until the shapes of all models are"
    free = "unknown" if found.free is None else size_in_words(found.free)
    short = found.free is not None and found.free < found.whole
    return (
        f"disk: about {size_in_words(found.whole)} for what is left to run (models "
        f"{size_in_words(found.models)}, checkpoints {size_in_words(2 * found.checkpoint)} at a time); "
        f"{free} free{': TOO LITTLE' if short else ''}"
    )


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0
