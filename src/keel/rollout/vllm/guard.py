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
    with open(log, "ab") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        end(child.pid)

    def told(number: int, frame: object) -> None:
        threading.Thread(target=end, args=(child.pid,), daemon=True).start()

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who owns the server says when it ends
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end(child.pid)  # what it has left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
