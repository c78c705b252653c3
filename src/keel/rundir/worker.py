"""Who is working in a run directory: its process, written into `.lock` by whoever holds the lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"
_LONGEST = 1000  # characters that keel writes into a lock, and more


@dataclass(frozen=True, slots=True)
class Worker:
    """The live process that holds a run's lock."""

    pid: int
    signal: signal.Signals  # what ends it as Ctrl-C does: at once, and it can go on from its checkpoint


def sign(lock: TextIO) -> None:
    """Write this process into a lock that it holds. A process started with `&` by a script ignores SIGINT: it
    is to be sent SIGTERM."""
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    facts = {
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "host": socket.gethostname(),
        "signal": "SIGTERM" if deaf else "SIGINT",
    }
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps(facts) + "\n")
    lock.flush()


def worker(run: Path) -> Worker | None:
    """The process that works in a run; None where there is none.

    A lock stays behind when its process is killed, and a run may come from elsewhere: the process must live
    on this machine, have begun when the lock says, and, where the system tells, hold that very file open. A
    lock that is a link is none.
    """
    path = run / LOCK
    facts = _facts(path)
    pid, name = facts.get("pid"), facts.get("signal")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 1 or name not in ("SIGINT", "SIGTERM"):
        return None
    born = _born(pid)
    if facts.get("host") != socket.gethostname() or born is None or facts.get("born") != born:
        return None
    return Worker(pid, signal.Signals[name]) if _holds(pid, path) else None


def stop(run: Path) -> int | None:
    """End a run as Ctrl-C does, and say the number of its process; None where nobody works in it."""
    found = worker(run)
    if found is None:
        return None
    try:
        os.kill(found.pid, found.signal)
    except ProcessLookupError:
        return None
    return found.pid


def _facts(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or not path.is_file():  # a link may lead to the lock of quite another run
            return {}
        with path.open(encoding="utf-8") as handle:
            facts = json.loads(handle.read(_LONGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _born(pid: int) -> str | None:
    """When a process began, in the system's own words; None where there is no such process. A number is given
    to another process later, but never with the same beginning."""
    try:
        if Path("/proc/self/stat").exists():
            # the second field is the program's name in brackets, which may hold anything
            words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            fields = words.split()
            return None if fields[0] in "ZX" else fields[19]  # ticks since the machine started
        found = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, IndexError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _holds(pid: int, path: Path) -> bool:
    """Whether the process has the file open. True where the system does not tell."""
    folder = Path(f"/proc/{pid}/fd")
    if not folder.exists():
        return True
    try:
        wanted = path.stat()
        numbers = list(folder.iterdir())
    except OSError:
        return False  # somebody else's process
    for number in numbers:
        try:
            if os.path.samestat(number.stat(), wanted):
                return True
        except OSError:
            continue
    return False
