"""Jobs on a Ray cluster of two machines that are really one, for tests: the cluster, what runs on it, and the
processes that it has."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CLUSTER = Path(__file__).with_name("ray_cluster.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
on_ranks = [
    pytest.mark.ranks,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'keel-rlhf[ray]'"
    ),
]


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[str]:
    """The address of two raylets with so many CPUs, or one each. Their sockets' paths must be short."""
    folder = tempfile.mkdtemp(prefix="keel-")
    (Path(folder) / "ray").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(CLUSTER), folder, *map(str, cpus)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def keel(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keel", *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@contextlib.contextmanager
def launched(config: Path, cluster: str, runs: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`keel launch --ray` on both machines, at work."""
    command = [sys.executable, "-m", "keel", "launch", str(config), "--ray", "--address", cluster]
    command += ["--nproc", "1", "--nodes", "2", "--runs", str(runs), *more]
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def of_keel(said: str) -> list[str]:
    """What keel says of the job, but that it waits for a machine that is busy."""
    lines = [line for line in said.splitlines() if line.startswith("keel: ")]
    return [line for line in lines if "waiting for Ray" not in line]


def await_updates(run: Path, number: int, stage: str = "ppo") -> None:
    log, until = run / "stages" / stage / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= number):
        assert time.monotonic() < until
        time.sleep(0.02)


def workers(kind: str = "RayTrainWorker") -> list[int]:
    """The processes of Ray Train's workers, or of another kind of actor."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(f"ray::{kind}".encode()):
                found.append(int(folder.name))
    return found


def children_of(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, waiting = list[int](), [pid]
    while waiting:
        above = waiting.pop()
        below = [child for child, parent in parents.items() if parent == above]
        found, waiting = found + below, waiting + below
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def worker_of(run: Path, rank: int) -> int:
    """The process of a rank: the first one holds the run's lock."""
    first = int(json.loads((run / ".lock").read_text())["pid"])
    found = workers()
    assert first in found
    return first if rank == 0 else next(pid for pid in found if pid != first)


def assert_nothing_is_left(run: Path) -> None:
    until = time.monotonic() + 10
    while workers() and time.monotonic() < until:  # Ray kills them, and looks at its dead now and then
        time.sleep(0.05)
    assert workers() == []
    assert not list(run.glob(".ranks-*"))
    assert not [p for p in run.rglob("*") if "partial" in p.name or p.name.endswith(".gone")]
