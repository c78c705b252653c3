"""Which runs lie in a folder: keel's, those of TRL and any trainer of transformers, and TensorBoard's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keel.dashboard.tfevents import MARK

DEEPEST = 4  # folders below the one that is given
MOST = 2000  # runs that are shown
LOOKED_AT = 50_000  # entries of folders that one look may read

Format = Literal["keel", "transformers", "tensorboard"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run lies."""

    name: str  # its path from the folder that is shown, or that folder's own name
    path: Path
    format: Format


def find(folder: Path) -> list[Place]:
    """The runs in a folder, by name; nothing inside a run is one: what TensorBoard wrote in the folder of
    a trainer belongs to its run. Folders that are links are not followed."""
    found: list[Place] = []
    left = LOOKED_AT
    waiting = [(folder, 0)]
    while waiting and len(found) < MOST and left > 0:
        path, depth = waiting.pop()
        entries = _entries(path)
        left -= len(entries)
        kind = _format(entries, path)
        if kind is not None:
            name = str(path.relative_to(folder)) if path != folder else path.resolve().name
            found.append(Place(os.fsencode(name).decode("utf-8", "replace"), path, kind))
        elif depth < DEEPEST:
            waiting += [
                (path / name, depth + 1)
                for name, is_folder in entries.items()
                if is_folder and not name.startswith(".")
            ]
    return sorted(found, key=lambda place: place.name)


def _entries(path: Path) -> dict[str, bool]:
    """Name → whether it is a folder."""
    try:
        with os.scandir(path) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError:
        return {}


def _format(entries: dict[str, bool], path: Path) -> Format | None:
    if ("manifest.json" in entries and "stages" in entries) or (
        "config.yaml" in entries and ("stages" in entries or ".lock" in entries or "manifest.json" in entries)
    ):
        return "keel"
    if "trainer_state.json" in entries or any(
        name.startswith("checkpoint-") and (path / name / "trainer_state.json").is_file() for name in entries
    ):
        return "transformers"
    if any(name.startswith(MARK) for name in entries):
        return "tensorboard"
    if entries.get("runs") and "training_args.bin" in entries:  # a trainer before its first checkpoint
        return "transformers"
    return None
