"""`keel run --nproc N`: the same command on N ranks of this machine, started and watched from here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from keel.cli import boundary
from keel.cli.progress import say
from keel.config import RunConfig
from keel.distributed import launch, records
from keel.errors import UsageError

LARGEST = 256  # ranks on one machine


def check(count: int) -> None:
    """UsageError where ranks cannot be started from here."""
    if records.place():
        raise UsageError(
            "--nproc has no effect under torchrun, which has started the ranks already: leave it out"
        )
    if count > LARGEST:
        raise UsageError(f"--nproc {count}: at most {LARGEST} ranks on one machine")


def run(arguments: Sequence[str], count: int, config: RunConfig) -> int:
    """Run `keel ARGUMENTS` on `count` ranks; the exit code, with one line on stderr for what went wrong."""
    outcome = launch.run([sys.executable, "-m", "keel", *arguments], count, _environment(count, config))
    if outcome.code:
        say(f"keel: {outcome.line}")
    return outcome.code


def _environment(count: int, config: RunConfig) -> dict[str, str]:
    """A rank's share of the cores, where neither the config nor the environment says how many threads; and
    `--traceback`."""
    more = {launch.TRACEBACK: "1"} if boundary.shows_tracebacks() else {}
    if config.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return more
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {**more, "OMP_NUM_THREADS": str(max(1, cores // count))}
