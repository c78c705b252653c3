"""Processes that tokenise.

Each is a new interpreter that is told everything through a pipe: a forked one could hang on a lock that some
thread of the parent held, and one that multiprocessing spawns would run the caller's script again. A worker
ends when its pipe does, so none outlives its parent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from keel.data.chat import rendering
from keel.data.stored.tokens import Preparation, Task, work
from keel.errors import KeelError
from keel.types import Record

_START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from keel.data.stored.worker import serve; serve()"
)
_HEADER = struct.Struct(">Q")


def do(
    rows: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    folder: Path,
    preparation: Preparation,
    what: str,
) -> list[tuple[int, int]]:
    """Every task, what each has made in their order; the error is the first task's that has one."""
    count = min(preparation.workers, len(tasks))
    setting = _pickled(rows, tokenizer, folder, rendering.today()) if count > 1 else None
    if setting is None:
        made: list[tuple[int, int]] = []
        for task in tasks:
            made.append(work(rows, tokenizer, task, folder))
            preparation.progress(what, task.stop, len(rows))
        return made
    return _Crew(setting, tasks, count).run(preparation, what, len(rows))


def _pickled(*setting: Any) -> bytes | None:
    """None for a tokenizer that cannot travel, as one with code of its own."""
    try:
        return pickle.dumps(setting)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


class _Crew:
    """Workers, each with a thread that hands it one task after the other."""

    def __init__(self, setting: bytes, tasks: Sequence[Task], count: int) -> None:
        self.setting, self.tasks, self.count = setting, tasks, count
        self.made: dict[int, Any] = {}  # a task's number → what it made, or its error
        self._next = 0
        self._lock = threading.Lock()
        self._done: SimpleQueue[Task | None] = SimpleQueue()

    def run(self, preparation: Preparation, what: str, total: int) -> list[tuple[int, int]]:
        """Do all tasks, telling how far it is from this thread."""
        processes = [_process() for _ in range(self.count)]
        threads = [threading.Thread(target=self._lead, args=(process,), daemon=True) for process in processes]
        try:
            for thread in threads:
                thread.start()
            leading, records = len(threads), 0
            while leading:
                with contextlib.suppress(Empty):
                    task = self._done.get(timeout=1)
                    leading -= task is None
                    records += task.stop - task.start if task else 0
                    preparation.progress(what, records, total)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):
                        pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        return [self._result(task) for task in self.tasks]

    def _result(self, task: Task) -> tuple[int, int]:
        result = self.made.get(task.number)
        if isinstance(result, BaseException):
            raise result
        if result is None:
            raise KeelError(
                f"a process that tokenises rows ended without a word at row {task.start:,} to {task.stop:,}; "
                "if memory ran out, set fewer `workers`"
            )
        return result

    def _lead(self, process: subprocess.Popen[bytes]) -> None:
        """Hand tasks to one worker until there are none, or until one has failed: those before it are under
        way or done, those after it are not needed."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(sys.path, process.stdin)
            _send(process.stdin, self.setting)
            while (task := self._take()) is not None:
                _send(process.stdin, pickle.dumps(task))
                self.made[task.number] = pickle.loads(_receive(process.stdout))
                self._done.put(task)
        except (OSError, EOFError):
            pass  # its task has no result, which `_result` tells
        finally:
            self._done.put(None)

    def _take(self) -> Task | None:
        with self._lock:
            failed = any(isinstance(result, BaseException) for result in self.made.values())
            if failed or self._next == len(self.tasks):
                return None
            self._next += 1
            return self.tasks[self._next - 1]


def _process() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def serve() -> None:
    """What a worker does: receive rows, tokenizer and folder, then tasks, until the pipe ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer's own code prints must not end up among the replies
    asked = sys.stdin.buffer
    try:
        rows, tokenizer, folder, day = pickle.loads(_receive(asked))
        while True:
            task = pickle.loads(_receive(asked))
            try:
                with rendering.on_date(day.date, given=day.given):  # templates write the run's date
                    result: Any = work(rows, tokenizer, task, folder)
            except Exception as error:
                result = _portable(error)
            _send(replies, pickle.dumps(result))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


def _portable(error: Exception) -> Exception:
    """The error, or where it does not survive the pipe, its words."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return error
    except Exception:
        pass
    return KeelError(f"{type(error).__name__}: {error}")


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(_HEADER.pack(len(content)) + content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    (length,) = _HEADER.unpack(_exactly(pipe, _HEADER.size))
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    content = pipe.read(length)
    if len(content) < length:
        raise EOFError
    return content


class Shown:
    """Tells a run's progress of a long pass, on a terminal only, once it has taken two seconds."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self._began: dict[str, float] = {}

    def __call__(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        began = self._began.setdefault(what, now)
        if sys.stderr.isatty() and now - began > 2:
            self.progress(what, done, of, {})
