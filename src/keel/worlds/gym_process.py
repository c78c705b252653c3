"""The other end of `gym`: a process that makes and scores tasks of reasoning-gym, and nothing else.

It reads a request a line and answers with a line of JSON each. Light: nothing of keel is loaded. Strings are
hashed with a fixed seed there, since some tasks go through sets, so that the same row comes out in every
process. Some tasks read an answer as a formula by sympy, which evaluates it: once everything is imported this
process may write no file, start no other and use no network, whatever an answer says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DENIED = (
    *("subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "urllib.", "http.", "ftplib.", "smtplib."),
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "os.remove", "os.rename"),
    *("os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.chflags"),
    *("os.putenv", "os.unsetenv", "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "os.startfile"),
    *("signal.pthread_kill", "sqlite3.", "mmap.", "syslog.", "webbrowser.", "resource.setrlimit"),
)
_MEMORY = 4 << 30  # bytes of addresses: an answer may be a tower of powers
_TAG = "\0"  # what begins the only key of an object that stands for something else


def encode(value: Any) -> Any:
    """A value as JSON has it, from which `decode` makes the same one again: tuples, sets and keys that are no
    text included. TypeError for anything else."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {_TAG + "tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {_TAG + "set": [encode(item) for item in sorted(value, key=repr)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith(_TAG) for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {_TAG + "dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__}")


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1 and (key := next(iter(value))).startswith(_TAG):
            items = [decode(item) for item in value[key]]
            makers: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "dict": dict}
            return makers[key[1:]](items)
        return {key: decode(item) for key, item in value.items()}
    return value


def main(lifeline: int) -> None:
    """Answer requests until standard input ends. lifeline: a pipe that closes when the parent dies."""
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a task prints is no answer
    end_with(lifeline)
    try:
        tasks = Tasks()
    except Exception as error:  # a broken installation may raise anything
        answers.write(json.dumps({"refused": f"{type(error).__name__}: {error}"[:500]}) + "\n")
        answers.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sys.addaudithook(deny)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(tasks, request.pop("do"))(**request)
        except Exception as error:  # of a task's code: it is said, and the next request is answered
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def deny(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578): PermissionError for what reaches beyond this process."""
    if event == "open":
        _, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & _WRITES
        ):
            raise PermissionError("a task may write no file")
    elif event.startswith(_DENIED):
        raise PermissionError(f"a task may not use {event}")


def end_with(lifeline: int) -> None:
    """Have the kernel end this process when the parent is gone, even in the middle of C."""
    import fcntl

    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO, whose default is to end


class Tasks:
    """The tasks of reasoning-gym, by name."""

    def __init__(self) -> None:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

        self._create = reasoning_gym.create_dataset
        self._known: Mapping[str, Any] = {n: pair for n, pair in DATASETS.items() if n != "composite"}
        self._row_makers: dict[str, Any] = {}  # of the newest request
        self._scorers: dict[str, Any] = {}

    def names(self) -> dict[str, Any]:
        """Every task with its settings; `size` and `seed`, which keel gives, left out."""
        own = {name: [f.name for f in dataclasses.fields(pair[1])] for name, pair in self._known.items()}
        return {"tasks": {name: [n for n in f if n not in ("size", "seed")] for name, f in own.items()}}

    def row(self, task: str, settings: Mapping[str, Any], seed: int, size: int, index: int) -> dict[str, Any]:
        """Question, answer and what scoring needs of entry `index` of `size` with this seed."""
        key = json.dumps([task, settings, seed, size], sort_keys=True)
        if key not in self._row_makers:
            self._row_makers = {key: self._create(task, **settings, seed=seed, size=size)}
        entry = self._row_makers[key][index]
        return {"question": entry["question"], "answer": entry.get("answer"), "entry": encode(entry)}

    def score(self, task: str, settings: Mapping[str, Any], answer: str, entry: Any) -> dict[str, Any]:
        """The task's own score of an answer."""
        key = json.dumps([task, settings], sort_keys=True)
        if key not in self._scorers:
            self._scorers[key] = self._create(task, **settings, seed=0, size=1)
        try:
            score = float(self._scorers[key].score_answer(answer, decode(entry)))
        except (Exception, SystemExit) as error:  # which an answer has brought about
            return {"score": 0.0, "raised": type(error).__name__}
        return {"score": score if math.isfinite(score) else 0.0}
