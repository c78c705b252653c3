"""Tasks that check themselves: those of reasoning-gym (2505.24760), by `gym:NAME` and `gym:NAME/SPLIT`.

The package makes questions and scores answers; here are rows of them, and the process that both happen in
(`gym_process`). Row i of a split depends on the task, its settings, the split and the seed alone. Which
questions are held out is decided by their text, so that no question of `test_prompts` is in another split,
whatever the seeds.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from keel.errors import DataError, KeelError, UsageError
from keel.worlds import gym_process, streams

PREFIX = "gym:"
COLUMN = "gym"  # of a row: what scoring an answer to it needs, as JSON
INSTALL = "tasks of reasoning-gym need its package: pip install 'keel-rlhf[gym]'"
splits: Mapping[str, str] = {
    "prompts": "questions (prompt, answer, task, gym)",
    "test_prompts": "questions that no other split has",
    "demonstrations": "questions with the right answer as the completion, for SFT",
    "text": "the same as the text of a chat, for pretraining",
}
DEFAULT_ROWS = {"prompts": 4000, "test_prompts": 256, "demonstrations": 2000, "text": 4000}
TEST_SHARE = 0.15  # of all questions are in test_prompts only
NONSENSE, _TRIED = "xyzzy", 4  # what no question asks for; rows of a task that are scored with it
_LOOKED_AT = 5000  # rows among which those are
_CHUNK = 50  # rows that share a seed: some tasks make all of their questions at once
_MOST_MISSES = 2000  # questions of the other side in a row, after which there are no more of this one
_ROW_TIMEOUT, _START_TIMEOUT = 120.0, 300.0  # seconds
_START = f"import sys; from {gym_process.__name__} import main; main(int(sys.argv[1]))"


def name_and_split(source: str) -> tuple[str, str]:
    """("leg_counting", "prompts") of gym:leg_counting; UsageError for a split that there is not."""
    name, _, split = source.removeprefix(PREFIX).partition("/")
    if not name:
        raise UsageError(f"{source}: write gym:NAME or gym:NAME/SPLIT, with the name of a task")
    if (split or "prompts") not in splits:
        raise streams.unknown(f"{PREFIX}{name}: split", split, splits)
    return name, split or "prompts"


def rows(source: str, count: int | None, seed: int, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`count` rows of a source (the split's own default when None). options: the task's settings; `seed` in
    place of the run's.

    UsageError, at the call, for a task, a split, a setting or a value that there is not, and without the
    package; DataError for a task that has no row of the split.
    """
    name, split = name_and_split(source)
    settings = {key: value for key, value in options.items() if key != "seed"}
    given = options.get("seed", seed)
    if isinstance(given, bool) or not isinstance(given, int):
        raise UsageError(f"{source}: `seed` must be a whole number, not {given!r}")
    check_settings(source, name, settings)
    made = _rows(source, name, split, settings, given)
    first = next(made)  # values of settings that do not go together are found by the first row
    return itertools.islice(itertools.chain([first], made), DEFAULT_ROWS[split] if count is None else count)


def check_settings(source: str, name: str, settings: Mapping[str, Any]) -> None:
    """UsageError for a task or a setting that there is not."""
    known = process().tasks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        raise UsageError(f"{source}: reasoning-gym has no task {name!r}{hint} ({len(known)} are known)")
    if "size" in settings:
        raise UsageError(f"{source}: how many rows there are is said by `rows`, not by an option `size`")
    for key in settings:
        if key not in known[name]:
            raise streams.unknown(f"{source}: option", str(key), known[name])


def _rows(
    source: str, name: str, split: str, settings: Mapping[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of a split without end."""
    missed, chunk = 0, 0
    while True:
        rng = streams.row_random(f"{PREFIX}{name}{json.dumps(settings, sort_keys=True)}", split, seed, chunk)
        chunk_seed = rng.getrandbits(31)
        for index in range(_CHUNK):
            made = process().row(source, name, settings, chunk_seed, index)
            test = streams.fraction(f"{PREFIX}{name}/{made['question']}") < TEST_SHARE
            if test != (split == "test_prompts"):
                missed += 1
                if missed > _MOST_MISSES:
                    raise DataError(
                        f"{source}: the task has too few different questions with these settings to have any "
                        f"for {split}; change its settings"
                    )
                continue
            missed = 0
            yield _row(source, name, split, settings, made)
        chunk += 1


def _row(
    source: str, name: str, split: str, settings: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    question, answer = made["question"], made["answer"]
    task = " ".join([name, *(f"{key}={value}" for key, value in sorted(settings.items()))])
    if split in ("demonstrations", "text") and not isinstance(answer, str):
        raise DataError(
            f"{source}: the task says no right answer, only how good one is: it has prompts alone"
        )
    if split == "text":
        return {"text": f"User: {question}\nAssistant: {answer}", "task": task}
    kept = {"task": name, "settings": dict(settings), "entry": made["entry"]}
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": question}]}
    if split == "demonstrations":
        row["completion"] = [{"role": "assistant", "content": answer}]
    if isinstance(answer, str):
        row["answer"] = answer
    return {**row, "task": task, COLUMN: json.dumps(kept, ensure_ascii=False)}


def problem(value: object) -> str:
    """Why a row's column `gym` cannot be scored by; "" where it can."""
    try:
        kept = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        kept = None
    wanted = {"task": str, "settings": dict, "entry": dict}
    sound = isinstance(kept, dict) and all(isinstance(kept.get(name), kind) for name, kind in wanted.items())
    return "" if sound else "is not what gym:NAME writes there"


def pays_nonsense(values: Iterable[object], timeout: float = 10.0) -> str | None:
    """Of the tasks of these columns `gym` the first that gives its full score to a reply that answers
    nothing, on each of its first rows; None where none does. Its rewards say nothing of a reply."""
    scores: dict[str, list[float]] = {}
    for value in itertools.islice(values, _LOOKED_AT):
        if value is None or problem(value):
            continue
        kept = json.loads(str(value))
        of_task = scores.setdefault(kept["task"], [])
        if len(of_task) < _TRIED and all(score >= 1 for score in of_task):
            of_task.append(process().score(kept, NONSENSE, timeout) or 0.0)
    return next((task for task, of in scores.items() if of and min(of) >= 1), None)


def package_version() -> str:
    """Of reasoning-gym, by which its rows may differ."""
    return version("reasoning-gym") if importlib.util.find_spec("reasoning_gym") else ""


@functools.cache
def process() -> GymProcess:
    """The process of this one's tasks. UsageError without the package."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UsageError(INSTALL)
    return GymProcess()


class GymProcess:
    """Makes and scores tasks in a process of its own, started at the first request and after a stop."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._child: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._end = lambda: None
        self._tasks: dict[str, list[str]] | None = None

    def tasks(self) -> dict[str, list[str]]:
        """Name → settings of every task. UsageError where the package cannot be imported."""
        if self._tasks is None:
            with self._lock:
                self._start()
        assert self._tasks is not None
        return self._tasks

    def row(
        self, source: str, task: str, settings: Mapping[str, Any], seed: int, index: int
    ) -> dict[str, Any]:
        """An entry: question, answer, entry. UsageError where the task refuses its settings."""
        request = {"task": task, "settings": settings, "seed": seed, "size": _CHUNK, "index": index}
        answer = self.ask({"do": "row", **request}, _ROW_TIMEOUT)
        if answer is None:
            raise UsageError(
                f"{source}: a question took more than {_ROW_TIMEOUT:g} s to make; change its settings"
            )
        if "failed" in answer:
            raise UsageError(
                f"{source}: reasoning-gym makes no question with these settings: {answer['failed']}"
            )
        return answer

    def score(self, kept: Mapping[str, Any], answer: str, timeout: float) -> float | None:
        """The task's own score of an answer; None where it took longer than `timeout` seconds and was
        stopped. An answer that its score fails on has 0."""
        request = {"task": kept["task"], "settings": kept["settings"], "entry": kept["entry"]}
        said = self.ask({"do": "score", "answer": answer, **request}, timeout)
        if said is None:
            return None
        if "failed" in said:
            raise KeelError(f"gym:{kept['task']}: the row cannot be scored by: {said['failed']}")
        return said["score"]

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any] | None:
        """The answer to a request; None where none came in time or the process ended, which is stopped."""
        if self._owner != os.getpid():  # a fork of keel's: the process is its parent's
            self.__init__()
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            return self._asked(request, timeout)

    def _asked(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any] | None:
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended; that is found where it is read
                self._child.stdin.write(json.dumps(request).encode() + b"\n")
                self._child.stdin.flush()
            line = self._line(time.monotonic() + timeout)
        except BaseException:  # an interrupt: what is still to come is no answer to the next request
            self.close()
            raise
        if line is None:
            self.close()
            return None
        return json.loads(line)

    def _line(self, until: float) -> bytes | None:
        assert self._child is not None
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        while b"\n" not in self._read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            part = os.read(descriptor, 1 << 16)
            if not part:
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _start(self) -> None:
        self.close()
        read_end, write_end = os.pipe()
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, str(read_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(read_end,),
                start_new_session=True,
                env=environment,
            )
        finally:
            os.close(read_end)
        self._end = weakref.finalize(self, _killed, os.getpid(), self._child, write_end)
        answer = self._asked({"do": "names"}, _START_TIMEOUT) or {}  # so that no other waits for the imports
        if "tasks" not in answer:
            self.close()
            said = answer.get("refused") or answer.get("failed") or "its process does not answer"
            raise UsageError(f"reasoning-gym cannot be imported: {said}")
        self._tasks = answer["tasks"]

    def close(self) -> None:
        """End the process."""
        self._end()
        self._child, self._read, self._end = None, b"", lambda: None


def _killed(owner: int, child: subprocess.Popen[bytes], lifeline: int) -> None:
    if os.getpid() != owner:  # a fork of keel's that ends: the process is its parent's
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    with contextlib.suppress(OSError):
        os.close(lifeline)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
