"""What was made with other settings: moved beside the current stages, and brought back when it is asked for.

`runs/NAME/stages/STAGE` holds what the config asks for now; `runs/NAME/kept/STAGE-PRINT` what it asked for
before, by the first letters of its fingerprint. Nothing that was trained is removed but by `keel clean`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keel.rundir.checkpoint import BY_HAND, discard, free_place
from keel.rundir.stage_files import read_mark, read_object, read_record

KEPT = "kept"
LETTERS = 12  # of a fingerprint, in the name of a folder


@dataclass(frozen=True, slots=True)
class Kept:
    """A stage as it was made before."""

    path: Path
    stage: str
    fingerprint: str
    done: bool  # run to its end
    seconds: float | None  # that it took
    changed: float  # when it was last written, in seconds since 1970
    size: int  # bytes

    def remove(self) -> None:
        """Remove it for good, and what a link of it leads to."""
        place = self.path.resolve()
        if self.path.is_symlink():
            self.path.unlink()
        discard(place)


def worth_keeping(directory: Path) -> bool:
    """Whether somebody's time is in it: it is done, can be gone on with, or people voted in it."""
    checkpoints = directory / "checkpoints"
    return (
        (directory / "stage.json").exists()
        or any((directory / name).exists() for name in BY_HAND)
        or (checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    )


def keep(directory: Path) -> Path | None:
    """Move a stage's directory to the kept ones of its run, where it is worth it, else remove it. Where it
    went; None for nowhere. A link stays where it is, and what it leads to is moved beside itself."""
    mark = read_mark(directory)
    if not directory.exists() or not worth_keeping(directory) or mark is None:
        discard(directory)
        return None
    folder = directory.parents[1] / KEPT
    folder.mkdir(exist_ok=True)
    place = free_place(folder / f"{directory.name}-{_letters(mark)}")
    if directory.is_symlink():
        target = directory.resolve()
        moved = free_place(target.with_name(f"{target.name}-{place.name.removeprefix(f'{directory.name}-')}"))
        os.replace(target, moved)
        target.mkdir()
        place.symlink_to(moved)
    else:
        os.replace(directory, place)
    return place


def find(run: Path, stage: str, fingerprint: str) -> Path | None:
    """The kept directory of a stage with this fingerprint; a done one before one that is half done."""
    found = [
        one for one in listed(run, measure=False) if (one.stage, one.fingerprint) == (stage, fingerprint)
    ]
    return max(found, key=lambda one: (one.done, one.changed)).path if found else None


def bring_back(kept: Path, directory: Path) -> None:
    """Make a kept directory the current one; what is there now is kept in its place."""
    if directory.is_symlink():  # its target keeps the name that the link leads to
        target, place = directory.resolve(), kept.resolve()
        keep(directory)
        target.rmdir()
        shutil.move(place, target)  # perhaps to another disk
        if kept.is_symlink():
            kept.unlink()
        return
    if directory.exists():
        keep(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if kept.is_symlink():
        directory.symlink_to(kept.resolve())
        kept.unlink()
    else:
        os.replace(kept, directory)


def listed(run: Path, *, measure: bool = True) -> list[Kept]:
    """All that is kept of a run, the newest first. measure: whether to count their bytes."""
    folder = run / KEPT
    found = [_read(path, measure) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return sorted((one for one in found if one is not None), key=lambda one: -one.changed)


def _read(path: Path, measure: bool) -> Kept | None:
    mark = read_mark(path)
    if mark is None:
        return None
    facts, parts = read_record(path), read_object(path / "fingerprint.json")
    stage = parts.get("name") or path.name.rpartition("-")[0]
    size = sum(file.stat().st_size for file in _files(path)) if measure else 0
    changed = (path / "fingerprint").stat().st_mtime
    return Kept(path, str(stage), mark, bool(facts), facts.get("seconds"), changed, size)


def _letters(mark: str) -> str:
    """The first letters of a fingerprint, of one that is none what can stand in a name."""
    return "".join(letter for letter in mark[:LETTERS] if letter.isalnum()) or "unknown"


def _files(path: Path) -> Iterator[Path]:
    return (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
