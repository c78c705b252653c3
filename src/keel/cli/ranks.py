"""`keel run --nproc N`: the same command on N ranks of this machine, started and watched from here, and
started again where that is asked for. `--node`: these are some of the ranks that several machines run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from keel.cli import boundary
from keel.cli.progress import say
from keel.config import RunConfig
from keel.distributed import launch, nodes, records
from keel.distributed.launch import Node, Outcome
from keel.errors import UsageError

LARGEST = 256  # ranks on one machine
LOST = nodes.LOST
FRESH = "--fresh"


def check(count: int) -> None:
    """UsageError where ranks cannot be started from here."""
    if records.place():
        raise UsageError(
            "--nproc has no effect under torchrun, which has started the ranks already: leave it out"
        )
    if count > LARGEST:
        raise UsageError(f"--nproc {count}: at most {LARGEST} ranks on one machine")


def place_of(node: str | None, count: int | None, restarts: int) -> Node | None:
    """What `--node` says. UsageError for options that have no effect with the others."""
    if count is None and (node or restarts):
        raise UsageError(f"{'--node' if node else '--max-restarts'} needs --nproc: the ranks of this machine")
    if node and restarts:
        raise UsageError("--max-restarts with --node: whoever starts all machines starts them again")
    return Node.parse(node) if node else None


def run(
    arguments: Sequence[str], count: int, config: RunConfig, node: Node | None = None, restarts: int = 0
) -> int:
    """Run `keel ARGUMENTS` on `count` ranks; the exit code, with one line on stderr for what went wrong.
    restarts: how many times they are started again where a rank fails."""

    def start(arguments: Sequence[str]) -> Outcome:
        command = [sys.executable, "-m", "keel", *arguments]
        return launch.run(command, count, _environment(count, config), node)

    outcome = again(start, arguments, restarts)
    if outcome.code:
        say(f"keel: {outcome.line}")
    return LOST if outcome.lost else outcome.code


def again(start: Callable[[Sequence[str]], Outcome], arguments: Sequence[str], restarts: int) -> Outcome:
    """Start a command, and up to so many times again where it fails (exit code 1) and what is done may be
    gone on with."""
    outcome = start(arguments)
    for number in range(1, restarts + 1):
        if outcome.code != 1 or outcome.interrupted:
            break
        say(f"keel: {outcome.line}\nkeel: starting again, {number} of at most {restarts} times")
        outcome = start([argument for argument in arguments if argument != FRESH])
    return outcome


def _environment(count: int, config: RunConfig) -> dict[str, str]:
    """A rank's share of the cores, where neither the config nor the environment says how many threads (one
    that is alone on its machine takes those of a run without ranks); and `--traceback`."""
    more = {launch.TRACEBACK: "1"} if boundary.shows_tracebacks() else {}
    if count == 1 or config.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return more
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {**more, "OMP_NUM_THREADS": str(max(1, cores // count))}
