"""What a rank leaves of its end, for whoever started it: one file a rank, in the folder that `KEEL_RANKS`
names. Without torch: it is written when nothing else may work any more."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FOLDER = "KEEL_RANKS"  # in the environment of a rank that keel started
CODES = "KEEL_CODES"  # in that of a launcher: a folder for its exit code, where several machines share a run
LOST = 75  # exit code of a launcher whose ranks only know that others are gone (sysexits' EX_TEMPFAIL)
# own: what it raised itself; lost: others were gone; hung: another did not answer; interrupted: by a signal
Kind = Literal["own", "lost", "hung", "interrupted"]


@dataclass(frozen=True, slots=True)
class Record:
    """How a rank ended."""

    rank: int  # that is to blame: another one where it is `hung`
    host: str
    kind: Kind
    line: str
    code: int  # exit code
    time: float


def is_watched() -> bool:
    """Whether keel's launcher started this process: it says what went wrong, so the rank does not."""
    return FOLDER in os.environ


def rank() -> int:
    """The number of this process among the ranks, by its environment; 0 for a process alone."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdigit() and os.environ.get("WORLD_SIZE", "1") != "1" else 0


def place() -> str:
    """ "rank 1 of 2 on HOST"; "" for a process alone."""
    number, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return f"rank {number} of {count} on {socket.gethostname()}" if number and count != "1" else ""


def leave(kind: Kind, line: str, code: int, *, rank: int | None = None, host: str | None = None) -> None:
    """Leave a record, where there is a folder for it; the first one stays. rank, host: of the one to blame,
    this one by default."""
    folder, own = os.environ.get(FOLDER), os.environ.get("RANK", "0")
    if folder is None:
        return
    path = Path(folder) / f"rank-{own}.json"
    if path.exists():
        return
    blamed = int(own) if rank is None else rank
    record = Record(blamed, host or socket.gethostname(), kind, line, code, time.time())
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
        partial.replace(path)
    except OSError:  # a full disk: the exit code still tells that it failed
        return


def leave_code(folder: str, code: int) -> None:
    """Leave a launcher's exit code for whoever started those of all machines, where it knows the cause: not
    where it was ended, or its ranks only know that others are gone. Who sees the highest of all exit codes
    (srun) could not tell a rank that died from a job that was ended."""
    if code in (0, LOST, 130):
        return
    path = Path(folder) / f"{socket.gethostname()}-{os.getpid()}"
    try:
        path.write_text(f"{code}\n", encoding="utf-8")
    except OSError:  # as above: the exit code is there
        return


def of_this(kind: Kind, line: str, code: int) -> Record:
    """The record of this process, whose launcher hears of it otherwise."""
    return Record(int(os.environ.get("RANK", "0")), socket.gethostname(), kind, line, code, time.time())


def read(folder: Path) -> dict[int, Record]:
    """Rank → what it left."""
    found: dict[int, Record] = {}
    for path in sorted(folder.glob("rank-*.json")):
        try:
            found[int(path.stem.removeprefix("rank-"))] = Record(**json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return found
