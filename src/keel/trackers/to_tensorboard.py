# pyright: strict
"""TensorBoard's event files, by its own writer; TensorFlow is not needed."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from keel.trackers.protocol import NOTHING, Frame, TrackedStage, finding_text

SUFFIX = ".keel"  # of the event files that are keel's own
_SAMPLES = 8  # of a step that are shown: TensorBoard keeps ten texts a tag at most


class Tensorboard:
    """A folder of event files a stage."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._place = Path()
        self._writer: Any = None

    def open(self, stage: TrackedStage) -> int | None:
        """As of `Tracker`. An event file cannot be gone on with after a kill, so a stage's is written anew
        from its logs: no step is in it twice."""
        if self._folder is None:
            self._place = Path(stage.directory) / "tensorboard" / f"{stage.name}-{stage.id}"
        else:
            self._place = Path(self._folder).expanduser().absolute() / stage.label
        self._place.mkdir(parents=True, exist_ok=True)
        for old in self._place.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer = EventFileWriter(str(self._place), filename_suffix=SUFFIX)
        self._text("settings", 0, json.dumps(dict(stage.settings), indent=2, ensure_ascii=False))
        return NOTHING

    def where(self) -> str:
        """As of `Tracker`."""
        return f"tensorboard --logdir {self._place.parent}"

    def send(self, frames: Sequence[Frame]) -> None:
        """As of `Tracker`."""
        for frame in frames:
            self._scalars(frame.step, frame.numbers)
            for number, row in enumerate(frame.samples[:_SAMPLES]):
                self._text(f"samples/{number}", frame.step, json.dumps(row, indent=2, ensure_ascii=False))
            for row in frame.findings:
                title, text, _ = finding_text(row)
                self._text(f"findings/{title}", frame.step, text)
        self._writer.flush()

    def result(self, step: int, measures: Mapping[str, float]) -> None:
        """As of `Tracker`: scalars `result/…` at the last step."""
        self._scalars(step, {f"result/{name}": value for name, value in measures.items()})
        self._writer.flush()

    def close(self, done: bool) -> None:
        """As of `Tracker`."""
        self._writer.close()

    def _scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        if numbers:
            values = [
                summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()
            ]
            self._event(step, summary_pb2.Summary(value=values))

    def _text(self, tag: str, step: int, text: str) -> None:
        """A text as it is: indented, so that TensorBoard's Markdown reads nothing in it."""
        self._event(step, text_pb(tag, "\n".join(f"    {line}" for line in text.splitlines())))

    def _event(self, step: int, summary: Any) -> None:
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
