"""Checkpoints of a stage: written whole or not at all, and enough to end with the bytes of an undisturbed
run.

Random numbers and the order of the data are functions of (seed, step), so neither needs a state of its own: a
checkpoint is the step, the tensors (weights, optimiser), a few plain values, and how long the logs were.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a stage goes on from."""

    step: int  # steps that are done
    tensors: Mapping[str, Any]  # name → state_dict
    values: Mapping[str, Any] = field(default_factory=dict)  # JSON
    logs: Mapping[str, int] = field(default_factory=dict)  # log file → its length in bytes


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Write `directory/step-NNNNNN` by atomic rename, then remove the ones before it."""
    final = directory / f"step-{checkpoint.step:06d}"
    partial = directory / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with (partial / "tensors.pt").open("wb") as handle:
            torch.save(dict(checkpoint.tensors), handle)
            handle.flush()
            os.fsync(handle.fileno())
        write_json(
            partial / "values.json",
            {"step": checkpoint.step, "values": checkpoint.values, "logs": checkpoint.logs},
        )
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:  # half a checkpoint would keep a full disk full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for other in directory.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, or None. Tensors are loaded as data only: no code in a checkpoint is run."""
    found = list(directory.glob("step-*")) if directory.exists() else []
    if not found:
        return None
    newest = max(found, key=lambda path: int(path.name.removeprefix("step-")))
    meta = json.loads((newest / "values.json").read_text(encoding="utf-8"))
    tensors = torch.load(newest / "tensors.pt", weights_only=True, map_location="cpu")
    return Checkpoint(meta["step"], tensors, meta["values"], meta["logs"])


BY_HAND = ("votes.jsonl", "pairs.jsonl")  # what people made, and what they made it of


def discard(directory: Path) -> None:
    """Remove a directory that somebody may take for a whole one: out of sight by rename first, then file by
    file. What people made in it is never removed: it is moved beside it, as NAME.kept, NAME.kept-2 …"""
    if directory.is_symlink():  # it stays, and what it leads to is emptied
        if directory.exists():
            discard(directory.resolve())
            directory.resolve().mkdir()
        return
    gone = directory.with_name(f".{directory.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if (directory / BY_HAND[0]).exists():
        kept = free_place(directory.with_name(f"{directory.name}.kept"))
        kept.mkdir()
        for name in BY_HAND:
            if (directory / name).exists():
                shutil.copy2(directory / name, kept / name)
    if directory.exists():
        directory.rename(gone)
        shutil.rmtree(gone)


def free_place(path: Path) -> Path:
    """The path, or with the first number that nothing has yet, not even a link that leads nowhere."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not (p.exists() or p.is_symlink()))


def write_json(path: Path, value: object) -> None:
    """Write JSON by atomic rename, flushed to the disk first."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file by atomic rename, flushed to the disk first."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Append to a text file all of it or nothing, as where the disk is full."""
    with path.open("ab", buffering=0) as handle:
        start, rest = handle.seek(0, os.SEEK_END), memoryview(text.encode("utf-8"))
        try:
            while rest:
                rest = rest[handle.write(rest) :]
        except OSError:
            handle.truncate(start)
            raise
