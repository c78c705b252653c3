# pyright: strict
"""A stage's log files as a tracker reads them: what is new, step by step, and how much of it was sent.

How much was sent is counted in lines, in `tracker-KIND.json` beside the logs. A stage that goes on from a
checkpoint cuts its logs back and writes the same lines again: those that were sent already are passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keel.trackers.protocol import NOTHING, Frame

LOGS = ("metrics", "times", "samples", "events")
AT_ONCE = 200  # steps that are sent together
_BLOCK = 1 << 22  # bytes read at once


@dataclass(slots=True)
class Sent:
    """How far a tracker has a stage."""

    id: str = field(default_factory=lambda: secrets.token_hex(3))
    lines: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOGS, 0))
    step: int = NOTHING  # the last one sent
    result: bool = False

    @staticmethod
    def read(path: Path) -> Sent:
        """What the file says; a new one where there is none, or where it is not what keel writes."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            lines = {log: int(found["lines"][log]) for log in LOGS}
            return Sent(str(found["id"]), lines, int(found["step"]), bool(found["result"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Sent()

    def write(self, path: Path) -> None:
        """By atomic rename."""
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as handle:
            json.dump(asdict(self), handle)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)


class Tail:
    """The lines of a growing file from a place in it on."""

    def __init__(self, path: Path, sent: int) -> None:
        """sent: lines at its start that are of no interest any more."""
        self.path, self.sent = path, sent
        self._lines = 0  # that have been read
        self._place = 0  # bytes that have been read
        self._rest = b""
        self.waiting: list[dict[str, Any]] = []  # rows that were read and not sent

    def read(self) -> None:
        """Put whole lines that are new into `waiting`, some megabytes at most; none while enough wait."""
        if len(self.waiting) > AT_ONCE:
            return
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as handle:
            if handle.seek(0, os.SEEK_END) < self._place:  # cut back to a checkpoint
                self._lines, self._place, self._rest, self.waiting = 0, 0, b"", []
            handle.seek(self._place)
            block = handle.read(_BLOCK)
            self._place += len(block)
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                self._lines += 1
                if self._lines > self.sent:
                    self.waiting.append(_row(line))

    def take(self, count: int) -> list[dict[str, Any]]:
        """The first waiting rows, which from now on count as sent."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.sent += count
        return taken

    def up_to(self, step: int | None) -> list[dict[str, Any]]:
        """The first waiting rows whose step is not later; rows without a step belong to any. None: all."""
        count = 0
        for row in self.waiting:
            if step is not None and _step(row, step) > step:
                break
            count += 1
        return self.take(count)


class StageLogs:
    """The logs of one stage, as frames."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self._record = directory / f"tracker-{kind}.json"
        self.sent = Sent.read(self._record)
        self._tails: dict[str, Tail] = {}
        self._known = NOTHING  # the last step whose numbers the tracker has by its own word
        self._newest: int | None = None  # the last step of metrics, as of the last look
        self.rewind(None)

    def rewind(self, known: int | None) -> None:
        """Go by what a tracker says that it holds, as `Tracker.open` returns it."""
        lines = dict(self.sent.lines)
        if known == NOTHING:
            lines, self.sent.result, self.sent.step = dict.fromkeys(LOGS, 0), False, NOTHING
        elif known is not None:
            lines |= {"metrics": 0, "times": 0}
        self._known = NOTHING if known is None else known
        self._tails = {log: Tail(self.directory / f"{log}.jsonl", lines[log]) for log in LOGS}

    def frames(self, ended: bool) -> list[Frame]:
        """What can be sent now, `AT_ONCE` steps at most. ended: nothing more will be written.

        The newest step waits for the next look, since its seconds and findings are written after its metrics.
        """
        for tail in self._tails.values():
            tail.read()
        metrics, found = self._tails["metrics"], list[Frame]()
        rows = metrics.waiting
        newest = _step(rows[-1], 0) if rows else None
        ready = len(rows) if ended or newest == self._newest else len(rows) - 1
        self._newest = newest
        for row in metrics.take(max(0, min(ready, AT_ONCE))):
            step = _step(row, max(0, self.sent.step))
            times = _merged(self._tails["times"].up_to(step))
            frame = Frame(step, {**_numbers(row), **{f"time/{name}": v for name, v in times.items()}})
            if step <= self._known:
                frame.numbers = {}
            frame.samples, frame.findings = self._rest(step)
            found.append(frame)
        if ended and not metrics.waiting:
            step = found[-1].step if found else max(0, self.sent.step)
            self._tails["times"].up_to(None)
            samples, findings = self._rest(None)
            if samples or findings:
                found.append(Frame(step, {}, samples, findings))
        return found

    def _rest(self, step: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self._tails["samples"].up_to(step), self._tails["events"].up_to(step)

    def were_sent(self, frames: list[Frame]) -> None:
        """Record that the frames arrived."""
        self.sent.lines = {log: tail.sent for log, tail in self._tails.items()}
        self.sent.step = max([self.sent.step, *(frame.step for frame in frames)])
        self.sent.write(self._record)

    def result_was_sent(self) -> None:
        """Record that the stage's result arrived."""
        self.sent.result = True
        self.sent.write(self._record)

    def begin(self) -> None:
        """Record the stage's id, before a tracker hears of it."""
        self.sent.write(self._record)

    def unsent(self) -> int:
        """Lines that are not sent, of those that are there."""
        return sum(max(0, _lines_in(self.directory / f"{log}.jsonl") - self.sent.lines[log]) for log in LOGS)


def _merged(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: value for row in rows for name, value in _numbers(row).items()}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _row(line: bytes) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _step(row: dict[str, Any], otherwise: int) -> int:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else otherwise


def _lines_in(path: Path) -> int:
    try:
        with path.open("rb") as handle:
            return sum(block.count(b"\n") for block in iter(lambda: handle.read(_BLOCK), b""))
    except OSError:
        return 0
