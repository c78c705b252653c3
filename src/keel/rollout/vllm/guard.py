"""Runs a command and ends it, with all that it started, when whoever runs this is gone.

`python -I guard.py LOG COMMAND…`: standard input is held open by the process that owns the server; once it is
closed, by an end in order or by SIGKILL, the command's process group is ended. It imports nothing of keel, so
that it starts in a moment and stays small.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE = 10.0  # seconds to end in order


def end(group: int) -> None:
    """End a process group: in order, then at once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(0.05)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)


def main(log: str, command: list[str]) -> int:
    """The command's exit code."""
    until_gone, held = os.pipe()
    inner = os.fork()
    if inner == 0:
        os.close(held)
        os.setsid()
        os._exit(_guarded(log, command, (0, until_gone)))
    os.close(until_gone)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who owns the server says when it ends
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(inner, signal.SIGTERM))
    return os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])


def _guarded(log: str, command: list[str], watched: tuple[int, int]) -> int:
    """Run the command until it ends, or until one of two pipes is closed; its exit code."""
    with open(log, "ab") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )

    def watch(pipe: int) -> None:
        with contextlib.suppress(OSError):
            while os.read(pipe, 4096):
                pass
        end(child.pid)

    def told(number: int, frame: object) -> None:
        threading.Thread(target=end, args=(child.pid,), daemon=True).start()

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for pipe in watched:
        threading.Thread(target=watch, args=(pipe,), daemon=True).start()
    code = child.wait()
    end(child.pid)  # what it has left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
