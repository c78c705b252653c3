"""One command on several machines, each reached by ssh: started, shown, and ended together.

What runs there is a launcher (`launch`) that looks after the ranks of its machine. It holds the other end of
our pipe as its standard input and ends with it, so that nothing is left where a connection breaks. The first
machine that fails ends all; which of them is to blame their exit codes say, since those that have only lost
the others end with `LOST`.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from keel.distributed.launch import FOR_OTHERS, TO_END, Outcome
from keel.distributed.records import LOST
from keel.errors import UsageError

LOOK = 0.05  # seconds between looks
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")
NO_CONNECTION = 255  # ssh's exit code of its own errors
_HOST = re.compile(r"(?:[\w.-]+@)?[\w.:\[\]-]+")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, as a file of hosts names it."""

    name: str  # as ssh takes it: [user@]host
    ranks: int | None = None  # `slots`; None: as many as on the others

    @property
    def address(self) -> str:
        """Of the machine, without a user."""
        return self.name.rpartition("@")[2]


def read_hosts(path: Path) -> list[Host]:
    """One host a line: `[user@]host [slots=N]`; # begins a comment. UsageError for anything else, for a host
    twice, and for none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--nodes {path}: {error}: give a file with one host a line") from None
    found: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, slots = words[0], re.fullmatch(r"slots=([1-9]\d{0,3})", words[1]) if len(words) > 1 else None
        # what begins with a dash would be an option of ssh
        if len(words) > 2 or (len(words) == 2 and not slots) or not _HOST.fullmatch(name) or name[0] == "-":
            raise UsageError(f"{path}:{number}: write [user@]host, and slots=N behind it where ranks differ")
        if any(host.address == name.rpartition("@")[2] for host in found):
            raise UsageError(f"{path}:{number}: {name} stands there twice: write slots=N for its ranks")
        found.append(Host(name, int(slots[1]) if slots else None))
    if not found:
        raise UsageError(f"--nodes {path}: no host in it")
    return found


def remote(
    host: Host, folder: Path, environment: Mapping[str, str], command: Sequence[str], ssh: Sequence[str] = SSH
) -> list[str]:
    """What runs a command on a host, in the same folder as here, with these variables added there."""
    settings = [f"{name}={value}" for name, value in sorted(environment.items())]
    run = ["exec", *(["env", *settings] if settings else []), *command]
    return [*ssh, host.name, f"cd {shlex.quote(str(folder))} && {shlex.join(run)}"]


@dataclass
class _Running:
    host: Host
    process: subprocess.Popen[str]
    readers: list[threading.Thread]
    last: str = ""  # what it said of its end


def run(commands: Sequence[tuple[Host, Sequence[str]]], show: Callable[[Host, str, bool], None]) -> Outcome:
    """Run each host's command to the end of all. show: is told of every line that one writes, and whether on
    standard output.

    Whatever ends this process ends them. UsageError where a command is not there.
    """
    running: list[_Running] = []
    try:
        for host, command in commands:
            running.append(_start(host, command, show))
        while True:
            codes = [one.process.poll() for one in running]
            if all(code == 0 for code in codes):
                _read_out(running)
                return Outcome(0)
            if any(code for code in codes):
                return _failed(running)
            time.sleep(LOOK)
    finally:
        _end(running)


def _start(host: Host, command: Sequence[str], show: Callable[[Host, str, bool], None]) -> _Running:
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
    except FileNotFoundError:
        raise UsageError(f"there is no {command[0]} here: install it, or name another (--ssh)") from None
    one = _Running(host, process, [])

    def read(stream: IO[str], is_output: bool) -> None:
        for line in stream:
            line = line.rstrip("\n")
            if not is_output and line.startswith("keel: "):
                one.last = line.removeprefix("keel: ")
            show(host, line, is_output)

    for stream, is_output in ((process.stdout, True), (process.stderr, False)):
        assert stream is not None
        one.readers.append(threading.Thread(target=read, args=(stream, is_output), daemon=True))
        one.readers[-1].start()
    return one


def _read_out(running: Sequence[_Running]) -> None:
    for one in running:
        for reader in one.readers:
            reader.join(TO_END)


def _failed(running: Sequence[_Running]) -> Outcome:
    """Give the others a moment to say what they know, end them, and say whose fault it was."""
    until = time.monotonic() + FOR_OTHERS + 2
    while time.monotonic() < until and not any(_knows(one) for one in running):
        time.sleep(LOOK)
    ended = [(one, code) for one in running if (code := one.process.poll())]
    _end(running)
    _read_out([one for one, _ in ended])
    one, code = next(((one, code) for one, code in ended if code != LOST), ended[0])
    said = one.last or f"ended with code {code}"
    if code == NO_CONNECTION and not one.last:
        said = f"ssh did not get there, or lost the connection: try `ssh {one.host.name}`"
    if code == 130:
        return Outcome(code, said, interrupted=True)
    # bad usage is everywhere the same, and ranks name their hosts themselves
    told = said if code == 2 or said.startswith("rank ") else f"{one.host.name}: {said}"
    return Outcome(1 if code in (LOST, NO_CONNECTION) or code < 0 else code, told)


def _knows(one: _Running) -> bool:
    return one.process.poll() not in (None, 0, LOST)


def _end(running: Sequence[_Running]) -> None:
    """Close the pipes, on which a launcher ends its ranks and itself; then what carried it."""
    for one in running:
        if one.process.stdin is not None:
            with contextlib.suppress(OSError):
                one.process.stdin.close()
    until = time.monotonic() + TO_END
    for one in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.0, until - time.monotonic()))
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
