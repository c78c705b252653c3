"""A reward in a process of its own: what it does to its process, it does to nobody else.

An exit, a crash in C, a call that never comes back, prints, forks and threads: each ends, at worst, in an
error that names the reward. The limit on time works inside C too, since the process is killed. What it costs:
a Python process (about 15 MB and 0.1 s, without what the function imports) and some 0.1 ms a call.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from keel.errors import KeelError, RewardError, UsageError
from keel.rewards.loading import Signature

TIMEOUT = 600.0  # seconds that an import or a call may take where nothing else is said
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[3]); from keel.rewards.worker import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)


class Process:
    """A worker process, started at the first request; started again after it died."""

    def __init__(self, name: str, first: Mapping[str, Any], timeout: float) -> None:
        self.name, self.first, self.timeout = name, dict(first), timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()  # one request at a time
        self._end: Callable[[], Any] = lambda: None

    def start(self) -> dict[str, Any]:
        """Start it and return what it says first. UsageError where it cannot load what it is for."""
        self.close()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        arguments = [str(theirs.fileno()), str(read_end), json.dumps([*map(str, sys.path)])]
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(), read_end),
                start_new_session=True,
            )
        except OSError as error:
            for descriptor in (write_end, ours.detach()):
                os.close(descriptor)
            raise RewardError(f"reward {self.name!r}: its process cannot be started: {error}") from None
        finally:
            theirs.close()
            os.close(read_end)
        self._child, self._pipe = child, Connection(ours.detach())
        self._end = weakref.finalize(self, _killed, os.getpid(), child, self._pipe, write_end)
        answer = self._answer(self.send(self.first), "to be imported")
        if "refused" in answer:
            self.close()
            raise UsageError(answer["refused"])
        return answer

    def send(self, request: Any) -> Connection:
        """Send a request; the answer is there once the pipe can be read."""
        if self._pipe is None:
            self.start()
        assert self._pipe is not None
        try:
            content = pickle.dumps(request)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RewardError(
                f"reward {self.name!r}: its arguments cannot be sent to a process of its own ({reason}); set "
                "`isolate: false`"
            ) from None
        with contextlib.suppress(OSError):  # it died; that is found where its answer is awaited
            self._pipe.send_bytes(content)
        return self._pipe

    def ask(self, request: Any, what: str) -> dict[str, Any]:
        """The answer to a request. RewardError, with the reward's name, where none comes."""
        with self._lock:
            return self._answer(self.send(request), what)

    def stream(self, request: Sequence[Any], late: Callable[[int], str]) -> list[dict[str, Any]]:
        """As many answers as the request is long, each within the limit. late: what is said of the one that
        is not."""
        with self._lock:
            pipe = self.send(request)
            return [self._answer(pipe, "", late=lambda i=i: late(i)) for i in range(len(request))]

    def _answer(self, pipe: Connection, what: str, late: Callable[[], str] | None = None) -> dict[str, Any]:
        try:
            if not pipe.poll(self.timeout):
                self.close()
                said = late() if late else f"took more than {self.timeout:g} s {what} and was stopped"
                hint = "raise its `timeout` if it needs longer"
                raise RewardError(f"reward {self.name!r} {said}; {hint}")
            return json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            how = self._how_it_ended()
        except (ValueError, MemoryError):
            self.close()
            how = "wrote to what keel and its process talk over"
        except KeelError:
            raise
        except (
            BaseException
        ):  # an interrupt: the answer that is still to come is no answer to the next request
            self.close()
            raise
        raise RewardError(f"reward {self.name!r} {how} ({what})") from None

    def _how_it_ended(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return f"crashed: its process was ended by {name}"
        return "left its process" + (f" with exit code {code}" if code is not None else "")

    def close(self) -> None:
        """End the process and everything that it started."""
        self._end()
        self._child, self._pipe, self._end = None, None, lambda: None


class IsolatedFunction:
    """A function of TRL's signature that runs in a process of its own."""

    def __init__(
        self, function: str, where: str, name: str, *, plugin: bool = False, timeout: float | None = None
    ) -> None:
        """function: as `loading.load` takes it, or an entry point's name. where: the setting, for
        messages."""
        first = {"what": "plugin" if plugin else "python", "function": function, "where": where}
        self.process = Process(name, first, TIMEOUT if timeout is None else timeout)
        self._signature: Signature | None = None

    @property
    def signature(self) -> Signature:
        """What it takes; the process is started to find out. UsageError where it cannot be loaded."""
        if self._signature is None:
            self._signature = Signature(**self.process.start())
        return self._signature

    def ask(self, arguments: Mapping[str, Sequence[Any]], samples: int) -> dict[str, Any]:
        """{"values": …}, {"kind": …} of what is no list, or {"raised": …}."""
        return self.process.ask(dict(arguments), f"on {samples} samples")


def _killed(owner: int, child: subprocess.Popen[bytes], pipe: Connection, lifeline: int) -> None:
    if os.getpid() != owner:  # a fork of keel's that ends: the process is its parent's
        return
    with contextlib.suppress(OSError):
        pipe.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.close(lifeline)
    until = time.monotonic() + 5
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
