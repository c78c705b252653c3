"""What a person sees on stderr while stages run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from keel.api.progress import TextProgress, shown
from keel.api.terminal import show


def say(line: str) -> None:
    """A line on stderr."""
    show(line, sys.stderr)


@contextmanager
def progress() -> Iterator[Any]:
    """Bars on a terminal; elsewhere a line at every tenth of a stage."""
    if not sys.stderr.isatty():
        yield TextProgress(sys.stderr, redraw=False)
        return
    from rich.console import Console  # here: `keel --help` needs none of it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=steps, shown="")
            bars.update(tasks[stage], completed=step, shown=shown(metrics))

        yield draw
