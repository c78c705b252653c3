"""Which weights a stage has left: hashed when it is done, so that an edited file is not taken for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a done stage has no use for: checkpoints, and what an ensemble's members left outside of its model.
CLEARED = ("checkpoints", "members/*/checkpoints", "members/*/model")
Recorded = dict[str, dict[str, Any]]  # file, from the stage's directory → size, time of change, SHA-256


def record(directory: Path) -> Recorded:
    """The weight files of a stage's directory as they are now; those that it is cleared of aside."""
    return {
        str(path.relative_to(directory)): {**_state(path), "sha256": _hash(path)}
        for path in sorted(directory.rglob("*.safetensors"))
        if not _is_cleared(path.relative_to(directory))
    }


def _is_cleared(name: Path) -> bool:
    """Whether a file lies in what a done stage is cleared of. A command that ends before it has cleared up
    leaves it there."""
    return any(
        above.match(pattern) and len(above.parts) == pattern.count("/") + 1
        for above in name.parents
        for pattern in CLEARED
    )


def differs(directory: Path, recorded: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first recorded file that is gone or has other content; None where all are as they were. A file of
    the recorded size and time is taken for the same; one with another time, as after a copy, is hashed."""
    for name, facts in recorded.items():
        path = directory / name
        if _is_cleared(Path(name)):
            continue
        if not path.exists():
            return name
        now = _state(path)
        if now["size"] != facts["size"]:
            return name
        if now["changed"] != facts["changed"] and _hash(path) != facts["sha256"]:
            return name
    return None


def _state(path: Path) -> dict[str, int]:
    state = path.stat()
    return {"size": state.st_size, "changed": state.st_mtime_ns}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
