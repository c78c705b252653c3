"""A server on a machine that Ray chooses: an actor holds it, in the placement group that the launcher has
reserved for it (`distributed.ray_cluster`).

The actor belongs to the process that starts it, the first rank, and ends with it: Ray ends actors whose owner
is gone, and the server's guard ends the server with the actor's process. One that dies is followed by another
in the same group, which Ray moves to another machine where its own is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
    PlacementGroupSchedulingStrategy,
)

from keel.errors import EngineError, UsageError
from keel.rollout.vllm import guard
from keel.rollout.vllm.server import Launch, Server, program_of
from keel.rollout.vllm.wire import DownError

FOR_PLACE = 30.0  # seconds without a place after which that is said
TO_ANSWER = 20.0  # seconds that an actor has to say whether its server lives


class ServerKeeper:
    """The actor: it has one server, on its own machine."""

    def __init__(self) -> None:
        self.server: Server | None = None

    def start(self, launch: Launch, log: Path, key: str, folder: str, owner: str) -> tuple[str, str]:
        """Start a server, and do not wait until it answers. folder: in which the run works. owner: Ray's id
        of the first rank's machine, which alone may ask one that stands there. Its address, and what is wrong
        with this machine, of which one is empty."""
        here = socket.gethostname()
        try:
            os.chdir(folder)
            program_of(launch.program.parents[1])
        except OSError:
            return "", f"{here} does not see {folder}, in which the run works"
        except UsageError as error:
            return "", f"{here}, where Ray has placed the server: {error}"
        if not (Path(launch.model) / "config.json").exists():
            return "", (
                f"{here}, where Ray has placed the server, does not see {launch.model}: put runs (or "
                "rollout.folder) on a file system that all machines share"
            )
        near = ray.get_runtime_context().get_node_id() == owner
        host = "127.0.0.1" if near else ray.util.get_node_ip_address()
        self.server = Server(dataclasses.replace(launch, host=host), log, key)
        self.server.start()
        return self.server.address, ""

    def alive(self) -> bool:
        return self.server is not None and self.server.alive

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()


@dataclass
class ActorServer:
    """A server that an actor of this process's holds; used as `Server`.

    group: the name of the placement group. patience: seconds that Ray may take to place it.
    """

    launch: Launch
    log: Path
    group: str
    patience: float
    say: Callable[[str], None] = field(repr=False)
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    address: str = ""
    _actor: Any = field(default=None, repr=False)
    _lost: bool = False

    def start(self) -> None:
        """Have an actor start it, without waiting until it answers. EngineError where Ray does not place it,
        or the machine lacks something; DownError where the actor dies."""
        self.stop()
        self._lost = False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        launch = dataclasses.replace(self.launch, program=self.launch.program.absolute())
        try:
            self._actor = _actor_in(ray.util.get_placement_group(self.group))
            owner = ray.get_runtime_context().get_node_id()
            begun = self._actor.start.remote(launch, self.log, self.key, os.getcwd(), owner)
            self.address, fault = self._awaited(begun)
        except RayTaskError as error:  # the actor is there, and met this
            fault = " ".join(str(error.cause).split())[:300]
        except (RayError, ValueError) as error:
            raise self._gone(error) from None
        if fault:
            self.stop()
            raise EngineError(f"the vLLM server cannot be started: {fault}")

    def _awaited(self, begun: Any) -> tuple[str, str]:
        """What `start` of the actor returns, once there is room for the actor."""
        since, told = time.monotonic(), False
        while not ray.wait([begun], timeout=0.5)[0]:
            waited = time.monotonic() - since
            if waited > self.patience:
                self.stop()
                raise EngineError(
                    f"Ray has not placed the vLLM server within {self.patience:g} s; `rollout.patience` sets "
                    "how long keel waits"
                )
            if waited > FOR_PLACE and not told:
                told = True
                self.say("waiting for Ray to place the vLLM server")
        return ray.get(begun)

    @property
    def alive(self) -> bool:
        """Whether it runs. DownError, once, where its actor does not answer."""
        if self._actor is None:
            return False
        try:
            return ray.get(self._actor.alive.remote(), timeout=TO_ANSWER)
        except RayError as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> DownError:
        """What is said of an actor that is gone; what may be left of it is ended."""
        one, self._actor, self._lost = self._actor, None, True
        _kill(one)
        return DownError(f"Ray has lost its actor ({type(error).__name__})")

    def stop(self) -> None:
        """End it, and its actor."""
        one, self._actor = self._actor, None
        if one is None:
            return
        with contextlib.suppress(Exception):  # it is gone, or Ray is
            ray.get(one.stop.remote(), timeout=guard.PATIENCE + 10)
        _kill(one)

    def last_words(self) -> str:
        """As of `Server`: the log lies where all machines see it."""
        if self._lost:
            return f"its actor was killed, or its machine is gone (its log: {self.log})"
        return Server(self.launch, self.log, self.key).last_words()


def _actor_in(group: Any) -> Any:
    """An actor with all that the group has."""
    (bundle,) = group.bundle_specs
    return (
        ray.remote(ServerKeeper)
        .options(
            num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote()
    )  # fmt: skip


def _kill(actor: Any) -> None:
    if actor is not None:
        with contextlib.suppress(Exception):
            ray.kill(actor)
