"""`keel clean`: what is kept of stages that were run again, its size, and its removal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keel.errors import UsageError
from keel.pipeline.pipeline import locked
from keel.report.wording import duration
from keel.rundir import kept
from keel.rundir.machine_faults import size_in_words


def clean(
    run: Path, stage: str | None, *, agree: Callable[[str], bool], say: Callable[[str], None]
) -> dict[str, Any]:
    """List the kept directories of a run, and remove them where `agree` says so. Returns what was found and
    whether it was removed. UsageError where there is no run, or nothing is kept of this stage."""
    if not (run / "config.yaml").exists():
        raise UsageError(f"no run at {run}: there is no config.yaml in it")
    with locked(run):
        found = [one for one in kept.listed(run) if stage in (None, one.stage)]
        if stage is not None and not found:
            raise UsageError(f"nothing is kept of a stage {stage!r} in {run}")
        for line in lines(found):
            say(line)
        total = sum(one.size for one in found)
        remove = bool(found) and agree(f"Remove {len(found)} of them, {size_in_words(total)}, for good?")
        if remove:
            for one in found:
                one.remove()
        say(_outcome(found, remove, total))
    return {
        "kept": [
            {"stage": one.stage, "path": str(one.path), "bytes": one.size, "done": one.done} for one in found
        ],
        "removed": remove,
    }


def lines(found: Sequence[kept.Kept]) -> list[str]:
    """A line for each: stage, size, how far it came, how long it took, since when it lies there."""
    return [
        f"{_place(one.path)}: {size_in_words(one.size)}, {'done' if one.done else 'not done'}"
        + (f" in {duration(one.seconds)}" if one.seconds is not None else "")
        + f", of {time.strftime('%Y-%m-%d %H:%M', time.localtime(one.changed))}"
        for one in found
    ]


def _place(path: Path) -> str:
    """Where it lies; of a link also what it leads to, since that is removed with it."""
    return f"{path} → {path.resolve()}" if path.is_symlink() else str(path)


def _outcome(found: Sequence[kept.Kept], removed: bool, total: int) -> str:
    if not found:
        return "nothing is kept: no stage was run with other settings before"
    return (
        f"{size_in_words(total)} are free again"
        if removed
        else "nothing was removed (--yes removes without asking)"
    )
