"""A Ray cluster: what a job asks of it, whether it is there and has room, and this process as its driver.

A vLLM server that a run starts has a placement group of its own, of one bundle, which is reserved before the
ranks are placed and held as long as the job lasts. It is kept off machines on which it would take the room
without which the ranks never fit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]

from keel.errors import EngineError, UsageError

TO_CONNECT = 10.0  # seconds in which the head of a cluster must take a connection
LOOK = 0.1  # seconds between looks at what another thread does
FOR_PLACE = 30.0  # seconds without a place after which the launcher says that it waits
STARTS = 10  # how often Ray tries to find room, or to start workers, a minute each
A_START = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # other than a minute


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
    engine: int | None = None  # cards of a vLLM server, 0 for a processor's; None: there is none to place


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
        _check_room_of_engine(job, cpus)
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


def _cards_of_engine(job: Job) -> int:
    """Cards of the vLLM server; 0 where it computes on the processor."""
    return (job.engine or 0) if any(node.get("GPU", 0) for node in _nodes()) else 0


def _share(job: Job) -> int:
    """CPUs of a rank where nobody says how many: its share of the smallest machine. A vLLM server without
    cards takes part like a rank, one with cards takes one CPU."""
    least = min((node.get("CPU", 0) for node in _nodes() if node.get("CPU", 0)), default=1)
    on_cards = bool(_cards_of_engine(job))
    sharing = job.ranks + (job.engine is not None and not on_cards)
    return max(1, int((least - on_cards) // -(-sharing // job.nodes)))


def _each(job: Job, cpus: int) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": 1} if with_cards(job) else {})}


def bundle_of_engine(job: Job, cpus: int) -> dict[str, float]:
    """What the vLLM server is given: its cards and one CPU, or as many CPUs as a rank."""
    cards = _cards_of_engine(job)
    return {"CPU": 1, "GPU": cards} if cards else {"CPU": cpus}


def _room(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How often a machine holds something."""
    return min(max(0, int(node.get(name, 0) // need)) for name, need in each.items())


def _fits(job: Job, rooms: list[int]) -> bool:
    """Whether the ranks find room. rooms: how many each machine holds."""
    able = [count for count in rooms if count]
    return sum(able) >= job.ranks and len(able) >= job.nodes


def _wanted(each: Mapping[str, float]) -> str:
    return " and ".join(f"{need:g} {name}" for name, need in each.items())


def _check_room(job: Job, cpus: int) -> None:
    """UsageError where the machines could never hold the ranks: Ray would wait for more of them."""
    each = _each(job, cpus)
    rooms = [_room(node, each) for node in _nodes()]
    if not _fits(job, rooms):
        raise UsageError(
            f"{job.ranks} ranks of {_wanted(each)} each on {job.nodes} machines: the Ray cluster has room "
            f"for {sum(rooms)} on {sum(map(bool, rooms))}; ask for fewer, or for fewer CPUs of each "
            "(threads: N)"
        )


def _able(job: Job, cpus: int) -> tuple[list[str], list[str]]:
    """The machines, by Ray's ids, that hold the vLLM server: those on which it leaves room for the ranks, and
    the others."""
    each, bundle = _each(job, cpus), bundle_of_engine(job, cpus)
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    good, others = list[str](), list[str]()
    for name, own in nodes.items():
        if _room(own, bundle):
            left = {key: value - bundle.get(key, 0) for key, value in own.items()}
            rooms = [_room(left if one == name else node, each) for one, node in nodes.items()]
            (good if _fits(job, rooms) else others).append(name)
    return good, others


def _check_room_of_engine(job: Job, cpus: int) -> None:
    """UsageError where no machine could ever hold the vLLM server beside the ranks."""
    if job.engine is not None and not _able(job, cpus)[0]:
        bundle = bundle_of_engine(job, cpus)
        share = "let it share the first rank's card (rollout.sleep: true), " if "GPU" in bundle else ""
        raise UsageError(
            f"a vLLM server of {_wanted(bundle)} on one machine, beside {job.ranks} ranks of "
            f"{_wanted(_each(job, cpus))} each: the Ray cluster never has room for it; ask for fewer ranks, "
            f"{share}or name a server elsewhere (rollout.address)"
        )


@contextlib.contextmanager
def reserved(job: Job, cpus: int, say: Callable[[str], None]) -> Iterator[str]:
    """Within it a placement group has room for the vLLM server; the group's name, "" where none is wanted.
    EngineError where there is no room for ten minutes."""
    if job.engine is None:
        yield ""
        return
    others = _able(job, cpus)[1]
    avoided = [{"ray.io/node-id": f"!in({','.join(others)})"}] if others else []
    name = f"keel-engine-{secrets.token_hex(8)}"
    group = ray.util.placement_group(
        [bundle_of_engine(job, cpus)], "STRICT_PACK", name, bundle_label_selector=avoided
    )
    try:
        _await_place(group, say)
        yield name
    finally:
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(group)


def _await_place(group: Any, say: Callable[[str], None]) -> None:
    since, told = time.monotonic(), False
    patience = STARTS * float(os.environ.get(A_START, 60))
    while not group.wait(0.5):
        waited = time.monotonic() - since
        if waited > patience:
            raise EngineError(f"Ray has found no room for the vLLM server in {patience:g} s; try again later")
        if waited > FOR_PLACE and not told:
            told = True
            say("keel: waiting for Ray to place the vLLM server")
