# pyright: strict
"""The process that sends a run's logs to one tracker: reads them as they grow, tries again what failed.

Its parent writes a line of JSON for each thing it should know to its standard input, and reads lines from its
standard output; what the tool prints goes to a log of its own. When the input ends, the parent is gone: what
is there is sent, and the process ends. Light: of keel it imports nothing that needs torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from keel import plugins
from keel.trackers.logs import StageLogs
from keel.trackers.protocol import TrackedStage, Tracker, flat

LOOK = 0.5  # seconds between looks at the logs
AGAIN = 5.0  # seconds until what failed is tried again; doubled each time
AGAIN_AT_MOST = 300.0
LEFT_ALONE = 30.0  # seconds for what is left when the parent is gone
OWN = {  # kind → the class that speaks to the tool
    "trackio": "keel.trackers.to_trackio:Trackio",
    "wandb": "keel.trackers.to_wandb:Wandb",
    "tensorboard": "keel.trackers.to_tensorboard:Tensorboard",
    "mlflow": "keel.trackers.to_mlflow:Mlflow",
}


def tracker_of(kind: str, options: Mapping[str, Any]) -> Tracker:
    """The tracker of a kind, made with the config's settings of it."""
    if kind not in OWN:
        return plugins.load("keel.trackers", kind)(**options)
    module, _, name = OWN[kind].partition(":")
    return getattr(importlib.import_module(module), name)(**options)


@dataclass(slots=True)
class _Followed:
    """A stage and how it stands."""

    facts: dict[str, Any]  # of TrackedStage, but for its id
    folder: Path
    logs: StageLogs
    ended: bool = False  # nothing more will be written
    done: bool = False  # it ended well: there is a result


class Follower:
    """Sends one stage after the other to a tracker."""

    def __init__(self, kind: str, options: Mapping[str, Any], tell: IO[str]) -> None:
        self.kind, self.options, self.tell = kind, options, tell
        self.stages: list[_Followed] = []
        self.deadline: float | None = None  # when to give up; None: the parent is at work
        self._tracker: Tracker | None = None  # with the first stage open in it
        self._retry = 0.0  # when to try again
        self._pause = AGAIN
        self._told: set[str] = set()

    def hear(self, message: Mapping[str, Any]) -> None:
        """What the parent says."""
        if "follow" in message:
            facts = dict(message["follow"])
            folder = Path(facts.pop("folder"))
            ended = facts.pop("done")
            self.stages.append(_Followed(facts, folder, StageLogs(folder, self.kind), ended, ended))
        elif "ended" in message:
            for stage in self.stages:
                if stage.facts["name"] == message["ended"]:
                    stage.ended, stage.done = True, bool(message["done"])
        elif "end" in message:
            self.leave(float(message["end"]))

    def leave(self, seconds: float) -> None:
        """Nothing more comes: send what is there, within so many seconds."""
        if self.deadline is None:
            self.deadline = time.monotonic() + seconds
            self._retry = 0.0
            for stage in self.stages:
                stage.ended = True

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do, or no time left to do it."""
        if self.deadline is None:
            return False
        return not self.stages or time.monotonic() > self.deadline or self._retry > self.deadline

    def look(self) -> bool:
        """Send what can be sent. Returns whether there may be more at once."""
        if not self.stages or time.monotonic() < self._retry:
            return False
        stage = self.stages[0]
        try:
            more = self._send(stage)
        except Exception as error:  # whatever a tool raises
            self._failed(stage, error)
            return False
        self._pause = AGAIN
        if stage.ended and not more:
            self._close(stage.done)
            self.stages.pop(0)
            return bool(self.stages)
        return more

    def _send(self, stage: _Followed) -> bool:
        nothing_left = stage.logs.sent.result or not stage.done
        if self._tracker is None and stage.ended and nothing_left and not stage.logs.unsent():
            return False  # all of it is there already: the tool need not even be imported
        tracker = self._opened(stage)
        frames = stage.logs.frames(stage.ended)
        if frames:
            tracker.send([frame for frame in frames if frame.numbers or frame.samples or frame.findings])
            stage.logs.were_sent(frames)
            return True
        if stage.done and not stage.logs.sent.result:
            tracker.result(max(0, stage.logs.sent.step), _result_of(stage.folder))
            stage.logs.result_was_sent()
        return False

    def _opened(self, stage: _Followed) -> Tracker:
        if self._tracker is None:
            stage.logs.begin()
            tracker = tracker_of(self.kind, self.options)
            stage.logs.rewind(tracker.open(TrackedStage(id=stage.logs.sent.id, **stage.facts)))
            self._tracker = tracker
            self.say("where", tracker.where())
        return self._tracker

    def _failed(self, stage: _Followed, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(reason, file=sys.stderr, flush=True)
        self.say("trouble", reason if len(reason) <= 300 else reason[:299] + "…")
        self._close(False)
        stage.logs = StageLogs(stage.folder, self.kind)  # what arrived, by the record
        self._retry, self._pause = time.monotonic() + self._pause, min(2 * self._pause, AGAIN_AT_MOST)
        if self.deadline is not None:  # nobody waits for another try: the next start makes one
            self.deadline = 0.0

    def _close(self, done: bool) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close(done)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def say(self, what: str, text: str) -> None:
        """Tell the parent, once of each sort."""
        if what not in self._told:
            self._told.add(what)
            _write(self.tell, {what: text})

    def end(self) -> None:
        """Close what is open, and tell how much is left."""
        left = sum(stage.logs.unsent() for stage in self.stages)
        self._close(False)
        _write(self.tell, {"left": left})


def main() -> None:
    """Serve the parent at the other end of standard input."""
    tell = os.fdopen(os.dup(1), "w", encoding="utf-8")
    said = _messages()
    early = list[Mapping[str, Any]]()
    while not early:
        early = next(said)
    first, *early = early
    if "kind" not in first:
        os._exit(0)  # its parent is gone already
    folder = Path(first["folder"])
    _print_into(folder / f"{first['kind']}.log")
    with contextlib.suppress(OSError):
        os.nice(10)
    follower = Follower(first["kind"], first["options"], tell)
    for message in early:
        follower.hear(message)
    with _alone(folder / f"{first['kind']}.lock") as free:
        while not free():  # another start's process still sends what it has
            for message in next(said):
                follower.hear(message)
            if follower.over:
                follower.end()
                os._exit(0)
        while not follower.over:
            if not follower.look():
                for message in next(said):
                    follower.hear(message)
        follower.end()
    os._exit(0)  # a tool's threads may never end


def _messages() -> Iterator[list[Mapping[str, Any]]]:
    """What the parent has said since the last look; that it is gone is said as an end."""
    rest, open_ = b"", True
    while True:
        found: list[Mapping[str, Any]] = []
        if not open_:
            time.sleep(LOOK / 10)
        elif select.select([0], [], [], LOOK)[0]:
            block = os.read(0, 1 << 16)
            *lines, rest = (rest + block).split(b"\n")
            found = [json.loads(line) for line in lines]
            if not block:
                open_ = False
                found.append({"end": LEFT_ALONE})
        yield found


def _print_into(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)


@contextlib.contextmanager
def _alone(path: Path) -> Generator[Callable[[], bool]]:
    """One process a tracker and run; what is yielded says whether it is this one's turn."""
    with path.open("w") as handle:

        def free() -> bool:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

        yield free


def _result_of(folder: Path) -> dict[str, float]:
    try:
        return flat(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write(tell: IO[str], message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps(message), file=tell, flush=True)


if __name__ == "__main__":
    main()
