"""Start n ranks of a command on this machine, watch them, and say in one line why they ended early.

The ranks meet in a store that this process holds, on the loopback interface. Where several machines
share a run (`Node`), each has a launcher of its own; the first one's holds the store, at a port that all know
(`nodes` starts them). The first rank has this process's terminal; what the others write goes to a file. Where
one fails, the others are given a moment to say so themselves, then ended: a rank alone cannot go on.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keel.distributed import records
from keel.distributed.records import Record
from keel.errors import UsageError

TRACEBACK = "KEEL_TRACEBACK"  # in the environment: what every rank writes is shown
LOOK = 0.05  # seconds between looks at the ranks
FOR_OTHERS = 5.0  # seconds that the others have to say what they met, where nobody knows the cause yet
FOR_THE_SAME = 0.5  # seconds that they have to say the same, where one has said the cause
TO_END = 10.0  # seconds that a rank has to end by itself once it is asked to
FOR_SIGNAL = 2.0  # seconds that ranks have to end by a Ctrl-C that the terminal sent to them, too


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the ranks ended together."""

    code: int  # 0: all came to their end
    line: str = ""  # what went wrong, and where
    interrupted: bool = False
    lost: bool = False  # these ranks only know that others are gone


@dataclass(frozen=True, slots=True)
class Node:
    """The part of a run's ranks that this machine runs."""

    first: int  # number of its first rank
    of: int  # ranks on all machines
    host: str  # of the first rank, as all machines reach it
    port: int  # where its launcher holds the store

    @classmethod
    def parse(cls, text: str) -> Node:
        """FIRST/OF@HOST:PORT. UsageError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)@(\S+):(\d+)", text)
        node = found and cls(int(found[1]), int(found[2]), found[3].strip("[]"), int(found[4]))
        if not node or node.first >= node.of or not 0 < node.port < 65536:
            raise UsageError(
                f"--node {text}: write FIRST/OF@HOST:PORT: the first rank of this machine, how many there "
                "are on all, and where the first machine listens (8/16@node-a:29500)"
            )
        return node

    def __str__(self) -> str:
        return f"{self.first}/{self.of}@{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether all machines are this one."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


@dataclass
class Ranks:
    """Ranks at work, in a folder for their records and logs."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]
    node: Node

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]


def run(
    command: Sequence[str],
    size: int,
    environment: Mapping[str, str] | None = None,
    node: Node | None = None,
) -> Outcome:
    """Run a command on `size` ranks of this machine to its end. environment: added to this process's own.
    node: which ranks these are, where other machines run others.

    Whatever ends this process ends the ranks. UsageError where the store cannot be held, or there are not so
    many ranks.
    """
    if node is not None and node.first + size > node.of:
        raise UsageError(f"--node {node}: {size} ranks from {node.first} on are more than {node.of}")
    store: Any = None if node and node.first else hold_store(node)  # held by this process
    node = node or Node(0, size, "127.0.0.1", store.port)
    with tempfile.TemporaryDirectory(prefix="keel-ranks-") as name:
        folder = Path(name)
        with _started(command, size, {**os.environ, **(environment or {})}, folder, node) as ranks:
            while True:
                codes = ranks.codes()
                if all(code == 0 for code in codes):
                    return Outcome(0)
                if any(code for code in codes):
                    return _outcome(ranks)
                time.sleep(LOOK)


def hold_store(node: Node | None) -> Any:
    """What the ranks meet in, held by this process: on the loopback interface, at a port that the system
    chooses; with other machines at their port, on the interface that the host's name leads to.

    torch's own socket would listen on all interfaces, whatever its host, and its store asks nobody who he is.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    listening = _listening(node)
    address, port = listening.getsockname()
    host = "127.0.0.1" if address == "0.0.0.0" else address
    return TCPStore(host, port, None, True, wait_for_workers=False, master_listen_fd=listening.detach())


def _listening(node: Node | None) -> socket.socket:
    """A socket that listens. UsageError where the port of several machines is taken."""
    places: list[tuple[str, int]] = [("127.0.0.1", 0)]
    if node is not None:
        found = ""
        with contextlib.suppress(OSError):
            found = socket.gethostbyname(node.host)
        # a name that leads to the loopback interface here is one that others know by another address
        everywhere = not found or (found.startswith("127.") and not node.is_local)
        places = [*([] if everywhere else [(found, node.port)]), ("", node.port)]
    for place in places:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(place)
            listening.listen(1024)
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRNOTAVAIL and place is not places[-1]:
                continue
            raise UsageError(
                f"port {place[1]} of {socket.gethostname()} cannot be listened at ({error.strerror}): choose "
                "another (keel launch --port)"
            ) from None
        return listening
    raise AssertionError("the last place was tried")


@contextlib.contextmanager
def _started(
    command: Sequence[str], size: int, environment: Mapping[str, str], folder: Path, node: Node
) -> Iterator[Ranks]:
    ranks = Ranks(folder, [], node)
    try:
        for local in range(size):
            its_own = {**environment, **of_rank(local, size, folder, node)}
            ranks.processes.append(_start(command, node.first + local, its_own, folder))
        yield ranks
    except BaseException:
        _wait(ranks, FOR_SIGNAL)
        raise
    finally:
        _end(ranks)


def of_rank(local: int, size: int, folder: Path, node: Node) -> dict[str, str]:
    """What a rank finds in its environment, by torchrun's names."""
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform) if node.is_local else None
    return {
        "RANK": str(node.first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(node.of),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": node.host,
        "MASTER_PORT": str(node.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # a launcher holds it
        records.FOLDER: str(folder),
        **({"GLOO_SOCKET_IFNAME": loopback} if loopback else {}),
    }


def _start(
    command: Sequence[str], number: int, environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    if number == 0:
        return subprocess.Popen(command, env=environment)
    if environment.get(TRACEBACK, "0") not in ("", "0"):
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    with (folder / f"rank-{number}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def _wait(ranks: Ranks, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(code is None for code in ranks.codes()):
        time.sleep(LOOK)


def _end(ranks: Ranks) -> None:
    """End what still runs: asked first, then made to. A stopped process cannot hear, and is killed."""
    asked = [i for i, process in enumerate(ranks.processes) if process.poll() is None]
    for number in asked:
        with contextlib.suppress(ProcessLookupError):
            ranks.processes[number].send_signal(signal.SIGTERM)
    until = time.monotonic() + TO_END
    for number in asked:
        with contextlib.suppress(subprocess.TimeoutExpired):
            stopped = _is_stopped(ranks.processes[number].pid)
            ranks.processes[number].wait(0.2 if stopped else max(0.0, until - time.monotonic()))
    for number in asked:
        if ranks.processes[number].poll() is None:
            ranks.processes[number].kill()
            ranks.processes[number].wait()


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


# ---------------------------------------------------------------- why they ended


def _outcome(ranks: Ranks) -> Outcome:
    """Wait for whoever knows the cause, end the rest, and say it."""
    until = time.monotonic() + FOR_OTHERS
    while time.monotonic() < until and not _known(ranks):
        time.sleep(LOOK)
    _wait(ranks, FOR_THE_SAME)
    codes, left = ranks.codes(), records.read(ranks.folder)  # of those that ended by themselves
    _end(ranks)
    return outcome(codes, left, ranks.folder, ranks.node)


def _known(ranks: Ranks) -> bool:
    left = records.read(ranks.folder)
    if any(record.kind in ("own", "hung", "interrupted") for record in left.values()):
        return True
    return all(code is not None for code in ranks.codes())


def outcome(
    codes: Sequence[int | None], left: Mapping[int, Record], folder: Path, node: Node | None = None
) -> Outcome:
    """What is said of ranks that ended with these codes (None: they had to be ended) and left these records.
    node: which ranks they are; None: all there are."""
    first, size = (0, len(codes)) if node is None else (node.first, node.of)
    for kind in ("interrupted", "own"):
        found = sorted((r for r in left.values() if r.kind == kind), key=lambda record: record.time)
        if found:
            return _of_record(found[0], size, everywhere=_said_by_all(found, len(codes)))
    silent = [i for i, code in enumerate(codes) if code and first + i not in left]
    killed = next((i for i in silent if (codes[i] or 0) < 0), next(iter(silent), None))
    if killed is not None:
        return _of_code(first + killed, size, codes[killed] or 1, folder)
    hung = next((record for record in left.values() if record.kind == "hung"), None)
    if hung is not None:
        return _of_record(hung, size)
    absent = next((i for i, code in enumerate(codes) if code is None), None)
    if absent is not None:
        where = f"rank {first + absent} of {size} on {socket.gethostname()}"
        line = f"{where}: it did not come to where the others waited for it (distributed.timeout); {GOES_ON}"
        return Outcome(1, line, lost=len(codes) < size)
    lost = _of_record(next(iter(left.values())), size)
    return replace(lost, lost=len(codes) < size)


def of_workers(
    size: int, left: Mapping[int, Record], died: Mapping[int, str | None], hosts: Sequence[str]
) -> Outcome:
    """What is said of ranks that somebody else started, and that left these records; died: those that ended
    (rank → how its process died; None: it raised). hosts: of all ranks."""
    told = any(record.kind in ("own", "interrupted") for record in left.values())
    silent = next((n for n, how in sorted(died.items()) if how is not None and n not in left), None)
    if silent is not None and not told:
        host = hosts[silent] if silent < len(hosts) else "an unknown host"
        line = f"rank {silent} of {size} on {host}: {died[silent]}; {GOES_ON}"
        return Outcome(1, line)
    if not left:
        return Outcome(1, f"a rank of {size} failed without a word; {GOES_ON}")
    codes = [1 if number in died or number in left else None for number in range(size)]
    return replace(outcome(codes, left, Path(), Node(0, size, "", 0)), lost=False)


GOES_ON = "what is done is kept, and the same command goes on"


def _said_by_all(found: Sequence[Record], size: int) -> bool:
    return len(found) == size and len({record.line for record in found}) == 1


def _of_record(record: Record, size: int, *, everywhere: bool = False) -> Outcome:
    """A command that is wrong is wrong on every rank; anything else names its place."""
    if record.kind == "interrupted":
        return Outcome(record.code, record.line, interrupted=True)
    if everywhere or record.code in (2, 3):  # 3: it waits for people
        return Outcome(record.code, record.line)
    return Outcome(record.code, f"rank {record.rank} of {size} on {record.host}: {record.line}")


def _of_code(number: int, size: int, code: int, folder: Path) -> Outcome:
    """Of a rank that ended without a word of its own."""
    where = f"rank {number} of {size} on {socket.gethostname()}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return Outcome(1, f"{where} was killed ({name}{hint}); {GOES_ON}")
    last = _last_line(folder / f"rank-{number}.log")
    return Outcome(1, f"{where} ended with code {code}{f': {last}' if last else ''}; {GOES_ON}")


def _last_line(log: Path) -> str:
    try:
        lines: list[Any] = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""
