"""Runs of other trainers: what transformers and TRL leave, and TensorBoard's event files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from keel.dashboard.keel_run import LARGEST, Facts, Stage
from keel.dashboard.table import Table, numbers, step_of
from keel.dashboard.tail import read_text
from keel.dashboard.tfevents import MARK, EventFile

TRAINING, EVENTS = "training", "tensorboard"
STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_MOST_FILES = 2000  # event files of a run


class StateTable(Table):
    """The log history of a trainer of transformers. The trainer writes it whole with each checkpoint:
    rows that it had before stay as they are, and those that are new are appended."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._run = run
        self._seen: tuple[Path, int, int] | None = None
        self._rows: list[str] = []
        self.steps: int | None = None
        self.path: Path | None = None

    def refresh(self) -> None:
        """Read the newest state again if it changed."""
        self.path = newest_state(self._run)
        if self.path is None:
            return
        try:
            state = self.path.stat()
        except OSError:
            return
        seen = (self.path, state.st_size, state.st_mtime_ns)
        if seen == self._seen:
            return
        self._seen = seen
        found = _state(self.path)
        if found is None:  # half written: read again when it has changed
            self.broken_lines = 1
            return
        self.broken_lines = 0
        steps = found.get("max_steps")
        self.steps = steps if isinstance(steps, int) and steps > 0 else None
        rows = [row for row in found["log_history"] if isinstance(row, dict)]
        texts = [json.dumps(row, sort_keys=True) for row in rows]
        if texts[: len(self._rows)] != self._rows:
            self.clear()
            self._rows = []
        new = rows[len(self._rows) :]
        first = len(self._rows) + 1
        self.add_rows((step_of(row, first + n), numbers(row)) for n, row in enumerate(new))
        self._rows = texts


def newest_state(run: Path) -> Path | None:
    """The trainer_state.json of the latest step: the run's own, which is written at its end, or that of the
    last checkpoint. A run that trains on writes checkpoints again, later than its own."""
    found = [run / STATE] if (run / STATE).is_file() else []
    checkpoints = [
        (int(match[1]), path / STATE)
        for path in run.glob("checkpoint-*")
        if (match := _CHECKPOINT.match(path.name)) and (path / STATE).is_file()
    ]
    found += [path for _, path in sorted(checkpoints)[-1:]]
    try:
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    except OSError:
        return None


def _state(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(read_text(path, LARGEST * 8, follow=True))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("log_history"), list) else None


class EventTable(Table):
    """The scalars of the event files in a folder, in the order of their names, which begin with the time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files: dict[Path, EventFile] = {}

    def refresh(self) -> None:
        """Read what is new."""
        paths = sorted(self._folder.glob(f"{MARK}*"))[:_MOST_FILES]
        gone = [path for path in self._files if path not in paths]
        for path in paths:
            self._files.setdefault(path, EventFile(path))
        new = [(file, file.read()) for file in (self._files[path] for path in paths)]
        if gone or any(file.reset for file, _ in new):
            self.clear()
            self._files = {path: EventFile(path) for path in paths}
            new = [(file, file.read()) for file in self._files.values()]
        self.broken_lines = sum(file.broken for file in self._files.values())
        for _, rows in new:
            self.add_rows(rows)


class TransformersRun:
    """A run of TRL, or of any trainer of transformers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def facts(self) -> Facts:
        """Its training as one stage, and what TensorBoard wrote beside it as further ones."""
        kind = "trl" if (self.path / "completions").is_dir() else "trainer"
        done = "done" if (self.path / STATE).is_file() else "begun"
        stages = [Stage(TRAINING, kind, done, self.path)]
        stages += [Stage(name, EVENTS, "begun", folder) for name, folder in event_folders(self.path)]
        return Facts([stage for stage in stages if stage.name != TRAINING or newest_state(self.path)])


class TensorBoardRun:
    """A folder of event files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def facts(self) -> Facts:
        """A stage for each folder that has event files of its own."""
        return Facts([Stage(name, EVENTS, "begun", path) for name, path in event_folders(self.path)])


def event_folders(path: Path) -> list[tuple[str, Path]]:
    """Name and folder of those with event files, down to three levels."""
    found: dict[Path, None] = {}
    for pattern in (f"{MARK}*", f"*/{MARK}*", f"*/*/{MARK}*", f"*/*/*/{MARK}*"):
        for file in sorted(path.glob(pattern)):
            found.setdefault(file.parent)
            if len(found) >= 50:
                break
    names = {folder: str(folder.relative_to(path)) for folder in found}
    return [(EVENTS if name == "." else name, folder) for folder, name in names.items()]


def table_of(stage: Stage, run: Path) -> Table:
    """The table of a foreign run's stage."""
    return EventTable(stage.directory) if stage.kind == EVENTS else StateTable(run)


def seed_group(name: str) -> tuple[str, int] | None:
    """What a run's name says of its seed: ("ppo", 3) of ppo-seed3, ppo_s3 and ppo-seed-3."""
    match = re.match(r"(.+?)[-_ ](?:seed|s)[-_=]?(\d{1,6})$", name)
    return (match[1], int(match[2])) if match else None
