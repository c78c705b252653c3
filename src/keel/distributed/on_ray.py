"""Ranks as workers of Ray Train: Ray places them, one process each, and starts them again where one is gone.

The launcher (this process) asks Ray for a `TorchTrainer`. Its controller gives every worker torchrun's names
in its environment (`RankBackend`), the worker of rank 0 holds the store that all meet in, and each then does
its `work` in its own process, in a thread of Ray Train's. torch's process group is made there
(`group.joined`), as under every other launcher, so Ray Train's own is not. What ranks say, and how they end,
comes back by an actor beside the launcher (`Desk`); records of ranks that can say nothing any more by a
folder that all share.

Of Ray Train 2.60 (V2): a worker whose function raises, or that is gone, ends the group; all its processes are
killed and, up to `FailureConfig.max_failures` times, others are started in its place. It knows no error that
is not worth trying again, so the launcher ends the job itself where a config is wrong.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray  # pyright: ignore[reportMissingImports]
import ray.train  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback  # pyright: ignore[reportMissingImports]
from ray.train.backend import Backend  # pyright: ignore[reportMissingImports]
from ray.train.torch import TorchConfig, TorchTrainer  # pyright: ignore[reportMissingImports]

from keel.distributed import engine_place, launch, ray_cluster, records
from keel.distributed.launch import Node, Outcome
from keel.distributed.ray_cluster import FOR_PLACE, STARTS, Job
from keel.distributed.records import Record

# exit codes of what another start would not mend: bad usage, waiting for people, a signal
FINAL = (2, 3, 130)
FOR_DEATH = 3.0  # seconds that Ray has to notice a worker's death, before those that lost it say so
TO_ABORT = 20.0  # seconds that Ray has to end all workers
_TOKEN = "token"
_WORKED = "worked"  # in the folder of a start: its first rank has begun to work
_LOOK = 0.1  # seconds between looks at the desk


class Voice(NamedTuple):
    """What a rank speaks with."""

    rank: int
    desk: Any

    def tell(self, line: str, is_output: bool = False) -> None:
        """A line on the launcher's standard error, or its standard output."""
        with contextlib.suppress(RayActorError):
            ray.get(self.desk.put.remote(("line", line, is_output)))


Work = Callable[[Voice, bool], Any]  # the voice, whether this is the first start → a value, or a Record


# ---------------------------------------------------------------- beside the launcher


class Desk:
    """Where all lay down what the launcher is to know, in order."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)

    def take(self) -> list[Any]:
        taken, self.items = self.items, []
        return taken


class Failures(UserCallback):
    """In the controller: which workers failed, and how."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        died = {number: _of_death(error) for number, error in worker_exceptions.items()}
        ray.get(self.desk.put.remote(("failed", died)))


def _of_death(error: Exception) -> str | None:
    """How a worker's process died; None for one that has raised an error."""
    cause = getattr(error, "health_check_failure", error)
    if not isinstance(cause, RayActorError):
        return None
    if "node" in str(cause).split("Worker exit detail")[0] and "died" in str(cause):
        return "its machine is gone, or Ray has lost it"
    return "its process was killed, perhaps for want of memory"


# ---------------------------------------------------------------- in the controller and the workers


@dataclass
class RankConfig(TorchConfig):
    """keel's ranks as a backend of Ray Train."""

    desk: Any = None
    records: str = ""  # the shared folder
    engine: str = ""  # the placement group of the vLLM server

    @property
    def backend_cls(self) -> type[Backend]:
        return RankBackend


class RankBackend(Backend):
    """Tells each worker which rank it is."""

    share_cuda_visible_devices = True  # a rank takes the card of its number on the machine, as elsewhere

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Before the ranks begin, at each start."""
        starts = Path(backend_config.records)
        attempt = len(list(starts.glob("start-*"))) + 1
        folder = starts / f"start-{attempt}"
        folder.mkdir()
        host, port = worker_group.execute_single(0, _hold_store, len(worker_group))
        before = len(list(starts.glob(f"start-*/{_WORKED}")))  # whose ranks are all gone
        hosts = worker_group.execute(_become_rank, host, port, before, str(folder), backend_config.engine)
        controller = ray.get_runtime_context().current_actor
        ray.get(backend_config.desk.put.remote(("began", attempt, hosts, controller)))


_held: list[Any] = []


def _hold_store(size: int) -> tuple[str, int]:
    """In the process of rank 0: the store, for as long as it lives; where it is."""
    address = ray.util.get_node_ip_address()
    store = launch.hold_store(Node(0, size, address, 0))
    _held.append(store)
    return address, store.port


def _become_rank(host: str, port: int, before: int, folder: str, engine: str) -> str:
    """In each worker's process: torchrun's names in the environment. before: starts that came to work.
    engine: the placement group of the vLLM server. Returns the host's name."""
    context = ray.train.get_context()
    node = Node(context.get_world_rank(), context.get_world_size(), host, port)
    os.environ |= launch.of_rank(context.get_local_rank(), context.get_local_world_size(), Path(folder), node)
    os.environ["RANK"] = str(node.first)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(before)
    os.environ[engine_place.GROUP] = engine
    return socket.gethostname()


def _as_rank(work: Work, desk: Any, token: str, cwd: str) -> Any:
    """In each worker's thread. What it raises has Ray Train start all again, where it may."""
    number, folder = int(os.environ["RANK"]), Path(os.environ[records.FOLDER])
    voice = Voice(number, desk)
    try:
        os.chdir(cwd)
        seen = (folder.parent / _TOKEN).read_text(encoding="utf-8") == token
    except OSError:
        seen = False
    if not seen:
        line = f"it does not see {folder.parent.parent}: put runs on a file system that all machines share"
        found: Any = records.of_this("own", line, 2)
    else:
        if number == 0:
            (folder / _WORKED).touch()
        found = work(voice, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    if not isinstance(found, Record):
        return found
    if found.kind == "lost":
        time.sleep(FOR_DEATH)
    ray.get(desk.put.remote(("record", found)))
    if found.code in FINAL:
        time.sleep(TO_ABORT)  # the launcher ends the job
    raise RuntimeError(found.line)


# ---------------------------------------------------------------- the launcher


def run(job: Job, work: Work, show: Callable[[str, bool], None]) -> tuple[Outcome, Any]:
    """Do the work on all ranks, to its end: how they ended, and what the first one returned. show: is given
    each line that they write, and whether on standard output.

    Whatever ends this process ends the ranks. UsageError where there is no Ray at the address, or no room;
    EngineError where a vLLM server finds none in time.
    """
    with (
        _shared(job.directory) as folder,
        ray_cluster.connected(job) as cpus,
        ray_cluster.reserved(job, cpus, lambda line: show(line, False)) as engine,
    ):
        desk = ray.remote(num_cpus=0)(Desk).options(**_here()).remote()
        with tempfile.TemporaryDirectory(prefix="keel-ray-") as storage:
            config = RankConfig(desk=desk, records=str(folder), engine=engine)
            trainer = _trainer(job, work, config, folder, Path(storage), cpus)
            return _Watching(job, desk, folder, show).to_end(trainer)


def _trainer(job: Job, work: Work, config: RankConfig, folder: Path, storage: Path, cpus: int) -> Any:
    token, cwd = (folder / _TOKEN).read_text(encoding="utf-8"), str(job.folder)
    desk = config.desk
    card = ray_cluster.with_cards(job)
    spread = "PACK" if job.nodes == 1 else "STRICT_SPREAD" if job.nodes == job.ranks else "SPREAD"
    return TorchTrainer(
        lambda: _as_rank(work, desk, token, cwd),
        torch_config=config,
        scaling_config=ScalingConfig(
            num_workers=job.ranks, use_gpu=card, placement_strategy=spread,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if card else {})},
        ),
        run_config=RunConfig(
            name="keel", storage_path=str(storage), callbacks=[Failures(desk)],
            failure_config=FailureConfig(max_failures=job.restarts, controller_failure_limit=STARTS),
        ),
    )  # fmt: skip


class _Watching:
    """The launcher's side of a job."""

    def __init__(self, job: Job, desk: Any, folder: Path, show: Callable[[str, bool], None]) -> None:
        self.job, self.desk, self.folder, self.show = job, desk, folder, show
        self.attempt, self.restarted = 0, 0
        self.hosts: list[str] = []
        self.controller: Any = None
        self.records: dict[int, Record] = {}
        self.died: dict[int, str | None] = {}
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.over = threading.Event()

    def to_end(self, trainer: Any) -> tuple[Outcome, Any]:
        for work in (lambda: self._fit(trainer), self._listen):
            threading.Thread(target=work, daemon=True).start()
        waits = time.monotonic() + FOR_PLACE
        try:
            while True:
                try:
                    what, *item = self.inbox.get(timeout=0.5)
                except queue.Empty:
                    if not self.attempt and time.monotonic() > waits:
                        waits = float("inf")
                        self.show(f"keel: waiting for Ray to place {self.job.ranks} ranks", False)
                    continue
                if (end := self._see(what, item)) is not None:
                    return end
        finally:
            self.over.set()
            self._abort()

    def _fit(self, trainer: Any) -> None:
        try:
            result: Any = ("done", trainer.fit().return_value)
        except BaseException as error:
            result = ("ended", error)
        with contextlib.suppress(Exception):  # what was laid down before comes first
            self._take()
        self.inbox.put(result)

    def _listen(self) -> None:
        with contextlib.suppress(Exception):  # Ray is gone
            while not self.over.wait(_LOOK):
                self._take()

    def _take(self) -> None:
        for item in ray.get(self.desk.take.remote()):
            self.inbox.put(item)

    def _see(self, what: str, item: list[Any]) -> tuple[Outcome, Any] | None:
        if what == "line":
            self.show(*item)
        elif what == "began":
            self.attempt, self.hosts, self.controller = item
            self.records, self.died = {}, {}
        elif what == "record":
            self.records[item[0].rank if item[0].kind != "hung" else -1] = item[0]
            if item[0].code in FINAL:
                return self._outcome(), None
        elif what == "failed":
            (self.died,) = item
            if self.restarted < self.job.restarts:
                self.restarted += 1
                again = f"starting again, {self.restarted} of at most {self.job.restarts} times"
                self.show(f"keel: {self._outcome().line}\nkeel: {again}", False)
        elif what == "done":
            return Outcome(0), item[0]
        elif what == "ended":
            return self._ended(item[0]), None
        return None

    def _ended(self, error: BaseException) -> Outcome:
        if self.died or self.records:
            return self._outcome()
        reason = str(getattr(error, "controller_failure", error)).strip().splitlines() or ["without a word"]
        return Outcome(1, f"Ray did not start the ranks ({type(error).__name__}: {reason[-1][:300]})")

    def _outcome(self) -> Outcome:
        return launch.of_workers(self.job.ranks, self._left(), self.died, self.hosts)

    def _left(self) -> dict[int, Record]:
        return {**records.read(self.folder / f"start-{self.attempt}"), **self.records}

    def _abort(self) -> None:
        """End all workers, in the order that Ray Train has for it."""
        if self.controller is not None:
            with contextlib.suppress(Exception):  # it is gone, or it ends by this
                ray.get(self.controller.abort.remote(), timeout=TO_ABORT)


@contextlib.contextmanager
def _shared(directory: Path) -> Iterator[Path]:
    """A folder in the run's directory, which all machines must see, for as long as the job lasts."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    folder = directory.resolve() / f".ranks-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    (folder / _TOKEN).write_text(secrets.token_hex(16), encoding="utf-8")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the run has begun
            for path in new:
                path.rmdir()


def _here() -> dict[str, Any]:
    """Options of an actor on the launcher's machine."""
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
