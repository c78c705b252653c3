"""A Ray cluster: what a job asks of it, whether it is there and has room, and this process as its driver."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]

from keel.errors import UsageError

TO_CONNECT = 10.0  # seconds in which the head of a cluster must take a connection
LOOK = 0.1  # seconds between looks at what another thread does


@dataclass(frozen=True, slots=True)
class Job:
    """What Ray is asked for."""

    address: str  # auto, local, HOST:PORT
    ranks: int  # of all machines
    nodes: int  # machines that they are spread over; 1: wherever they fit
    cpus: int | None  # of each rank; None: its share of the smallest machine
    card: bool | None  # whether each rank needs one; None: where there are any
    restarts: int
    directory: Path  # of the run, on a file system that all machines share
    environment: Mapping[str, str]  # of the ranks, beside their machine's own
    folder: Path  # in which they work
    is_loopback: bool = False  # whether the address is of this machine's alone


@contextlib.contextmanager
def connected(job: Job) -> Iterator[int]:
    """Within it this process is a driver of the cluster; the CPUs of each rank."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    own: dict[str, Any] = {}
    if job.address == "local":
        own = {"include_dashboard": False}
    elif job.is_loopback:
        own = {"_node_ip_address": job.address.rpartition(":")[0]}
    _check_there(job.address)

    def init() -> None:
        ray.init(
            address=job.address, logging_level=logging.ERROR, log_to_driver=False, **own,
            runtime_env={"env_vars": dict(job.environment)},
        )  # fmt: skip

    try:
        _keeping_signals(init) if job.address == "local" else _interruptibly(init)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _not_there(job.address, error) from None
    try:
        cpus = job.cpus or _share(job)
        _check_room(job, cpus)
        yield cpus
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()


def _check_there(address: str) -> None:
    """UsageError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise _not_there(address, error) from None


def _not_there(address: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:200]
    return UsageError(
        f"no Ray cluster at {address} ({reason}): start one with `ray start --head`, or give "
        "--address HOST:PORT or local"
    )


def _keeping_signals(work: Callable[[], object]) -> None:
    """Do it here, and put back the handler of SIGTERM that Ray replaces. In a thread that ends, Ray's own
    processes would end with it (PR_SET_PDEATHSIG is of the thread that started them)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interruptibly(work: Callable[[], object]) -> None:
    """Do it in a thread: while Ray waits for another process, no signal reaches Python; and Ray puts no
    handler of its own in the place of keel's."""
    raised: list[BaseException] = []

    def go() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK)
    if raised:
        raise raised[0]


def _nodes() -> list[Mapping[str, float]]:
    """What each machine that is there has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def with_cards(job: Job) -> bool:
    """Whether each rank has a card of its own."""
    return any(node.get("GPU", 0) for node in _nodes()) if job.card is None else job.card


def _share(job: Job) -> int:
    """CPUs of a rank where nobody says how many: its share of the smallest machine."""
    least = min((node.get("CPU", 0) for node in _nodes() if node.get("CPU", 0)), default=1)
    return max(1, int(least // -(-job.ranks // job.nodes)))


def _check_room(job: Job, cpus: int) -> None:
    """UsageError where the machines could never hold the ranks: Ray would wait for more of them."""
    each = {"CPU": cpus, **({"GPU": 1} if with_cards(job) else {})}
    room = [min(int(node.get(name, 0) // need) for name, need in each.items()) for node in _nodes()]
    wanted = " and ".join(f"{need:g} {name}" for name, need in each.items())
    able = [count for count in room if count > 0]
    if sum(able) < job.ranks or len(able) < job.nodes:
        raise UsageError(
            f"{job.ranks} ranks of {wanted} each on {job.nodes} machines: the Ray cluster has room for "
            f"{sum(able)} on {len(able)}; ask for fewer, or for fewer CPUs of each (threads: N)"
        )
