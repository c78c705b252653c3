"""`keel launch --ray`: what Ray is asked for, and what each of its workers does: a run of the same config, as
one of its ranks."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import ipaddress
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.api.progress import TextProgress
from keel.api.terminal import show, show_json
from keel.cli import boundary, launch
from keel.distributed import records
from keel.distributed.launch import Outcome
from keel.errors import LostRankError, UsageError
from keel.rundir.worker import LOCK
from keel.stages import samplers as samplers_of

if TYPE_CHECKING:
    from keel.config import RunConfig
    from keel.distributed.on_ray import Voice
    from keel.distributed.ray_cluster import Job
    from keel.pipeline.pipeline import Pipeline

LARGEST = 65_536  # ranks of a job
ADDRESSES = ("auto", "local")
FOR_LOCK = 20.0  # seconds that a worker of the start before may take to be gone


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks of Ray."""

    address: str
    ranks: int  # of all machines
    nodes: int
    cpus: int | None  # of a rank; None: its share of the smallest machine
    card: bool | None  # of a rank; None: one where the cluster has any
    restarts: int
    directory: Path
    engine: int | None = None  # cards of a vLLM server that Ray places, 0 for a processor's; None: none
    engines: tuple[str, ...] = ()  # the stages that have it
    beside: tuple[str, ...] = ()  # those that start one beside the first rank


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of `keel run`, as each rank reads them."""

    config: str
    overrides: tuple[str, ...]
    runs: str
    name: str | None
    only: str | None
    fresh: bool
    as_json: bool
    traceback: bool


def asked(
    pipeline: Pipeline,
    nodes: str | None,
    nproc: int | None,
    address: str | None,
    restarts: int,
    only: str | None = None,
) -> Asked:
    """only: the stage that is run alone. UsageError for what cannot be asked."""
    if nproc is None:
        raise UsageError("--ray needs --nproc N: the ranks, with --nodes those of each machine")
    if nodes is not None and not re.fullmatch(r"[1-9]\d{0,3}", nodes):
        raise UsageError(f"--nodes {nodes} with --ray: give a number of machines; Ray chooses which")
    machines = int(nodes or 1)
    if nproc * machines > LARGEST:
        raise UsageError(f"{nproc * machines} ranks: at most {LARGEST:,}")
    address = address or "auto"
    if address == "auto" and os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        raise UsageError(
            "RAY_ADDRESS is that of a Ray client (ray://): give --address HOST:PORT of the cluster"
        )
    if address not in ADDRESSES and not re.fullmatch(r"[\w.\[\]:-]+:\d{1,5}", address):
        raise UsageError(f"--address {address}: write HOST:PORT (6379 is Ray's own port), auto or local")
    config = pipeline.config
    threads = config.threads or os.environ.get("OMP_NUM_THREADS", "").strip()
    cpus = int(threads) if str(threads).isdigit() and int(threads) > 0 else None
    card = None if config.device == "auto" else config.device.startswith("cuda")
    return Asked(
        address, nproc * machines, machines, cpus, card, restarts, pipeline.directory,
        *_engines(config, only),
    )  # fmt: skip


def _engines(config: RunConfig, only: str | None) -> tuple[int | None, tuple[str, ...], tuple[str, ...]]:
    """The vLLM servers that stages start: what the largest one that Ray places needs, as of `Asked.engine`,
    and the stages whose servers it places, and whose it does not."""
    samplers = {
        name: sampler
        for name, stage in config.stages.items()
        if (sampler := getattr(stage, "rollout", None)) is not None and only in (None, name)
    }
    placed = {name: sampler for name, sampler in samplers.items() if sampler.placeable}
    beside = [
        name for name, one in samplers.items() if one.vllm and one.address is None and name not in placed
    ]
    cards: list[int] = []
    for name, sampler in placed.items():
        try:
            cards.append(0 if samplers_of.on_processor(sampler) else sampler.cards())
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    return max(cards, default=None), tuple(placed), tuple(beside)


def as_text(one: Asked) -> str:
    """What a dry run prints."""
    spread = "wherever they fit" if one.nodes == 1 else f"spread over {one.nodes} machines"
    cpus = "a rank's share of the cores" if one.cpus is None else f"{one.cpus} CPU"
    card = {None: ", 1 GPU where there are any", True: ", 1 GPU", False: ""}[one.card]
    as_rank = "as many CPUs as a rank" if one.cpus is None else f"{one.cpus} CPU"
    server = f"1 CPU and {one.engine} GPU where there are any, else {as_rank}" if one.engine else as_rank
    engine = f"; a vLLM server ({', '.join(one.engines)}) in a placement group of its own: {server}"
    beside = f"; a vLLM server ({', '.join(one.beside)}) beside the first rank, of which Ray counts nothing"
    return (
        f"ray at {one.address}: {one.ranks} workers of Ray Train, {spread}; each {cpus}{card}; "
        f"started again at most {one.restarts} times; run directory {one.directory}"
        + (engine if one.engines else "")
        + (beside if one.beside else "")
    )


def run(one: Asked, arguments: Arguments) -> Outcome:
    """Run it; the results stand on standard output as those of `keel run` do."""
    on_ray, own = _ray(one.address), sys.stdout

    def told(line: str, is_output: bool) -> None:
        show(line, own if is_output else sys.stderr)

    # a thread of Ray's prints there what its raylets say, whatever `log_to_driver` is
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        outcome, value = on_ray.run(_job(on_ray, one), partial(_work, arguments), told)
    if outcome.code == 0 and value is not None:
        if arguments.as_json:
            show_json(value["json"])
        else:
            show(value["text"])
    return outcome


def _ray(address: str) -> Any:
    """keel's part that needs Ray. UsageError without it."""
    if _is_loopback(address):
        # read when ray is imported; without it ray takes 127.0.0.1 for this machine's address to others
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray: pip install 'keel-rlhf[ray]'")
    try:
        from keel.distributed import on_ray
    except ModuleNotFoundError as error:
        raise UsageError(f"--ray needs Ray Train ({error.name}): pip install 'keel-rlhf[ray]'") from None
    return on_ray


def _job(on_ray: Any, one: Asked) -> Job:
    return on_ray.Job(
        one.address, one.ranks, one.nodes, one.cpus, one.card, one.restarts, one.directory.absolute(),
        launch.told(os.environ), Path.cwd(), _is_loopback(one.address), one.engine,
    )  # fmt: skip


def _is_loopback(address: str) -> bool:
    """Whether a cluster at this address is this machine's alone."""
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return address == "local" or host == "localhost"


# ---------------------------------------------------------------- in a worker of Ray Train


def _work(arguments: Arguments, voice: Voice, first_start: bool) -> Any:
    """The run as one of its ranks: what the launcher shows of it, from the first; else the record of its
    error."""
    try:
        with _speaking(voice):
            return _ran(arguments, voice, first_start)
    except BaseException as error:
        if arguments.traceback:
            voice.tell(f"rank {voice.rank}:\n{traceback.format_exc()}")
        line, code = boundary.explain(error)
        lost = isinstance(error, LostRankError) or boundary.is_lost(error)
        return records.of_this("lost" if lost else "own", line, code)


def _ran(arguments: Arguments, voice: Voice, first_start: bool) -> Any:
    from keel import report
    from keel.cli.main import pipeline_of
    from keel.rundir import run_status

    pipeline = pipeline_of(
        Path(arguments.config), list(arguments.overrides), Path(arguments.runs), arguments.name
    )
    if voice.rank == 0:
        pipeline.say = voice.tell
        pipeline.progress = TextProgress(_Stream(voice), redraw=False)  # type: ignore[arg-type]
        if not first_start:
            _await_lock(pipeline.directory)
    pipeline.run(only=arguments.only, fresh=arguments.fresh and first_start)
    if voice.rank:
        return None
    text = f"{report.summary(pipeline.directory)}\nreport: {pipeline.directory / 'report.html'}"
    return {"json": run_status.outcome(pipeline), "text": text}


@contextlib.contextmanager
def _speaking(voice: Voice) -> Iterator[None]:
    """Within it notes of keel's are told, of the first rank; torch's own warnings are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")

        def tell(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if voice.rank == 0 and category.__module__.partition(".")[0] == "keel":
                voice.tell(f"keel: note: {message}")

        warnings.showwarning = tell
        yield


class _Stream:
    """Where a text progress writes: whole lines, to the launcher."""

    def __init__(self, voice: Voice) -> None:
        self.voice, self.begun = voice, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self.voice.tell(line)
        return len(text)

    def flush(self) -> None:
        """Lines are told at once."""

    def isatty(self) -> bool:
        return False


def _await_lock(directory: Path) -> None:
    """Wait for a worker of the start before, which Ray kills, to leave the run's directory."""
    path, until = directory / LOCK, time.monotonic() + FOR_LOCK
    while path.exists() and time.monotonic() < until:
        with path.open("a+", encoding="utf-8") as handle, contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.2)
