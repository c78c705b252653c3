"""Whether ranks can work together, and how fast: `keel doctor --distributed` runs this on each of them.

    python -m keel.distributed.trial OUT [--shared FOLDER] [--timeout SECONDS] [--version OF_KEEL]

All ranks say who they are, add up tensors of a few sizes, and look at files that the others write. The first
one writes what was found to OUT, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import secrets
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from keel.distributed import group, records
from keel.errors import KeelError

T = TypeVar("T")
SIZES = (4 * 1024, 2**20, 2**25)  # bytes of an all-reduce; the last is a bucket of gradients
REPEATS = 5
SEEN_WITHIN = 10.0  # seconds in which a file of one machine must be seen by the others


def facts(version: str) -> dict[str, Any]:
    """Who this rank is. version: of keel."""
    name, address = socket.gethostname(), None
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
    return {
        "rank": group.rank(),
        "host": name,
        "address": address,
        "keel": version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cards": torch.cuda.device_count(),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "time": time.time(),
    }


def reduced(size: int, device: torch.device) -> dict[str, float]:
    """An all-reduce of so many bytes: seconds (the median of several) and bytes a second that a rank sends
    and receives for it, 2 (n − 1) / n times its size; `wrong` where the sums are not what they must be."""
    ranks, values = group.size(), torch.ones(size // 4, device=device)
    spent: list[float] = []
    for _ in range(REPEATS + 1):
        values.fill_(1.0)
        group.gathered(None)  # all begin together
        start = time.perf_counter()
        with group.talking():
            torch.distributed.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    seconds = max(group.gathered(statistics.median(spent[1:])))
    wrong = sum(group.gathered(int((values != ranks).sum())))
    rate = 2 * (ranks - 1) / ranks * size / seconds
    return {"bytes": size, "seconds": seconds, "bytes_per_second": rate, "wrong": wrong}


def shared(folder: Path) -> dict[str, Any]:
    """What the ranks see of each other's files in a folder: `failed`, by rank; seconds until all are seen;
    whether a lock of one holds for the others; free bytes."""
    token = group.from_first(lambda: secrets.token_hex(8))
    place = folder / f".keel-doctor-{token}"
    try:
        found = _shared(place)
    finally:
        with contextlib.suppress(KeelError):
            group.only_first(lambda: shutil.rmtree(place, ignore_errors=True))
    return found


def _shared(place: Path) -> dict[str, Any]:
    own, ranks = group.rank(), group.size()
    group.only_first(lambda: _tried(lambda: place.mkdir()))
    wrote = _tried(lambda: _write(place / str(own), str(own)))
    group.gathered(None)
    start = time.monotonic()
    unseen = set(range(ranks))
    while unseen and time.monotonic() < start + SEEN_WITHIN:
        unseen = {number for number in unseen if not _reads(place / str(number), str(number))}
        time.sleep(0.01 if unseen else 0)
    waited = time.monotonic() - start
    failed = wrote or (f"it does not see the file of rank {min(unseen)}" if unseen else None)
    return {
        "folder": str(place.parent),
        "failed": {str(i): why for i, why in enumerate(group.gathered(failed)) if why},
        "seconds": max(group.gathered(waited)),
        "locks": _locks(place / "lock"),
        "free_bytes": min(group.gathered(_free(place.parent))),
    }


def _locks(path: Path) -> bool:
    """Whether a lock that the first rank holds keeps the others out."""
    handle = None
    if group.is_first():
        with contextlib.suppress(OSError):
            handle = path.open("w")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    group.gathered(None)
    kept = True
    if not group.is_first():
        with contextlib.suppress(OSError), path.open("r+") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kept = False
            except BlockingIOError:
                kept = True
    found = all(group.gathered(kept))
    if handle is not None:
        handle.close()
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _reads(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8") == text
    return False


def _free(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


def _tried(work: Callable[[], object]) -> str | None:
    """What the system said against it."""
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})"
    return None


def run(folder: Path | None, timeout: float, version: str) -> dict[str, Any]:
    """Try all of it, as a rank; every one gets what was found."""
    started = time.monotonic()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with group.joined(kind, "ddp", timeout):
        seconds = max(group.gathered(time.monotonic() - started))
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        return {
            "backend": "nccl" if kind == "cuda" else "gloo",
            "seconds_to_join": seconds,
            "ranks": group.gathered(facts(version)),
            "reductions": [reduced(size, device) for size in SIZES],
            "shared": None if folder is None else shared(folder),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--version", default="")
    asked = parser.parse_args()
    try:
        found = run(asked.shared, asked.timeout, asked.version)
    except Exception as error:
        line = str(error) if isinstance(error, KeelError) else f"{type(error).__name__}: {error}"
        kind: records.Kind = "lost" if group.says_lost(error) or "ranks do not answer" in line else "own"
        records.leave(kind, " ".join(line.split())[:500], 1)
        sys.stderr.flush()
        os._exit(1)  # at once: the others learn of it by its connections
    if records.rank() == 0:
        asked.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
