# pyright: strict
"""A run's side of its trackers: a process for each, told of stages, waited for at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel import plugins
from keel.errors import UsageError

FOLDER = "trackers"  # in a run's directory: what the tools print, and leave behind
MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow"}
AT_THE_END = 30.0  # seconds that a finished run waits for what is not sent yet
WHEN_CUT_OFF = 3.0  # seconds, where a run ends early
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from keel.trackers.follow import main; main()"
)


def check(kinds: Sequence[str]) -> None:
    """UsageError for a tracker that is not installed, or whose package cannot be imported."""
    for kind in kinds:
        if kind not in MODULES:
            plugins.load("keel.trackers", kind)
        elif importlib.util.find_spec(MODULES[kind]) is None:
            raise UsageError(f"track: {kind} is not installed: pip install 'keel-rlhf[{kind}]'")


class TrackerProcess:
    """The process of one tracker."""

    def __init__(
        self, kind: str, options: Mapping[str, Any], directory: Path, say: Callable[[str], None]
    ) -> None:
        """directory: the run's. say: told what to open, and once that something went wrong."""
        self.kind, self.say = kind, say
        folder = (directory / FOLDER).resolve()
        self._log = directory / FOLDER / f"{kind}.log"
        self._child: subprocess.Popen[str] | None = None
        self._left: int | None = None  # lines that are not sent, as it said at its end
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps([*map(str, sys.path)])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the run's; this one ends when its input does
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._trouble(f"its process cannot be started: {error}")
            return
        self._reader.start()
        self.tell({"kind": kind, "options": dict(options), "folder": str(folder)})

    def tell(self, message: Mapping[str, Any]) -> None:
        """Say something to the process; one that is gone is no error."""
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._child.stdin.write(json.dumps(message) + "\n")
                self._child.stdin.flush()

    def close(self, seconds: float, *, finished: bool) -> None:
        """Give it so many seconds for what is left. finished: then it is ended; else it goes on by itself for
        a little."""
        child = self._child
        if child is None:
            return
        self.tell({"end": seconds})
        self._reader.join(seconds + 1)
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
        if not self._reader.is_alive() or finished:
            _kill(child)
            self._reader.join(2)
            if child.stdout is not None and not self._reader.is_alive():
                child.stdout.close()
        if finished and self._left is None:
            self._say("did not end in time; what it has not got is sent by the next start of this run")
        elif finished and self._left:
            self._say(f"has not got {self._left:,} lines of the logs; the next start of this run sends them")

    def _read(self) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._child.stdout:
                message: Mapping[str, Any] = json.loads(line)
                if "where" in message:
                    self._say(str(message["where"]))
                elif "trouble" in message:
                    self._trouble(str(message["trouble"]))
                elif "left" in message:
                    self._left = int(message["left"])
                    return
        if self._left is None and self._child.stdin is not None and not self._child.stdin.closed:
            self._trouble("its process has ended")

    def _trouble(self, reason: str) -> None:
        self._say(f"{reason}. The run goes on; its own logs are whole, and what is not sent is sent later")

    def _say(self, text: str) -> None:
        self.say(f"{self.kind}: {text}")


class Trackers:
    """All trackers of a run; a context that waits for them at its end."""

    def __init__(
        self,
        settings: Sequence[Mapping[str, Any]],
        directory: Path,
        say: Callable[[str], None],
        wait: float = AT_THE_END,
    ) -> None:
        """settings: `track` of the config, with a `kind` each. wait: seconds at the end of a run."""
        self._settings, self.directory, self.say, self.wait = settings, directory, say, wait
        self._processes: list[TrackerProcess] = []

    def __enter__(self) -> Trackers:
        for one in self._settings:
            options = {key: value for key, value in one.items() if key not in ("kind", "args")}
            options |= one.get("args") or {}
            self._processes.append(TrackerProcess(one["kind"], options, self.directory, self.say))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            process.close(self.wait if kind is None else WHEN_CUT_OFF, finished=kind is None)
        self._processes.clear()

    def follow(self, name: str, kind: str, folder: Path, settings: Mapping[str, Any], done: bool) -> None:
        """A stage whose logs lie, or will lie, in `folder`. done: it was done before."""
        facts = {
            "run": run_name(self.directory),
            "name": name,
            "kind": kind,
            "directory": str(self.directory.resolve()),
            "settings": dict(settings),
            "folder": str(folder.resolve()),
            "done": done,
        }
        for process in self._processes:
            process.tell({"follow": facts})

    def ended(self, name: str, done: bool) -> None:
        """A stage that writes nothing more. done: it ended well."""
        for process in self._processes:
            process.tell({"ended": name, "done": done})


def run_name(directory: Path) -> str:
    """What a run is called in a tracker: its directory's name, for a point of a sweep with the sweep's."""
    place = directory.resolve()
    return f"{place.parents[1].name}-{place.name}" if place.parent.name == "points" else place.name


def _kill(child: subprocess.Popen[str]) -> None:
    """End the process and everything that it started."""
    if child.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
