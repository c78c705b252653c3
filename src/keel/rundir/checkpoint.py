"""Checkpoints of a stage: written whole or not at all, and enough to end with the bytes of an undisturbed
run.

Random numbers and the order of the data are functions of (seed, step), so neither needs a state of its own: a
checkpoint is the step, the tensors (weights, optimiser), a few plain values, and how long the logs were. Of
tensors that are cut over ranks each rank writes its parts.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from keel.distributed.parts import sum_of

PARTS = "parts"  # the folder in a checkpoint of what each rank has written
_BROKEN = (
    *(ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, RecursionError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a stage goes on from."""

    step: int  # steps that are done
    tensors: Mapping[str, Any]  # name → state_dict
    values: Mapping[str, Any] = field(default_factory=dict)  # JSON
    logs: Mapping[str, int] = field(default_factory=dict)  # log file → its length in bytes
    # file in `PARTS` → its sum: of tensors that were cut over ranks, which leave marks (`distributed.parts`)
    parts: Mapping[str, int] = field(default_factory=dict)


def folder_of(directory: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return directory / f"step-{step:06d}"


def begin(directory: Path, step: int) -> Path:
    """An empty folder for the checkpoint after a step, which nobody takes for one yet."""
    partial = _partial_of(folder_of(directory, step))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def begin_parts(directory: Path, step: int) -> Path:
    """As `begin`; the folder in it for what ranks write before `save`."""
    folder = begin(directory, step) / PARTS
    folder.mkdir()
    return folder


def forget(directory: Path, step: int) -> None:
    """Remove what was begun: half a checkpoint would keep a full disk full."""
    shutil.rmtree(_partial_of(folder_of(directory, step)), ignore_errors=True)


def _partial_of(final: Path) -> Path:
    return final.with_name(f".partial-{final.name}")


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Write `directory/step-NNNNNN` by atomic rename, then remove the ones before it. One with parts was
    begun by `begin_parts`."""
    final = folder_of(directory, checkpoint.step)
    partial = _partial_of(final)
    try:
        if not checkpoint.parts:
            begin(directory, checkpoint.step)
        with (partial / "tensors.pt").open("wb") as handle:
            torch.save(dict(checkpoint.tensors), handle)
            handle.flush()
            os.fsync(handle.fileno())
        of_parts = {"parts": checkpoint.parts} if checkpoint.parts else {}
        write_json(
            partial / "values.json",
            {"step": checkpoint.step, "values": checkpoint.values, "logs": checkpoint.logs, **of_parts},
        )
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        forget(directory, checkpoint.step)
        raise
    for other in directory.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def latest(directory: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Tensors are loaded as data only: no code in a checkpoint
    is run. say: is told of one that is broken."""
    steps = {path: path.name.removeprefix("step-") for path in directory.glob("step-*")}
    known = [path for path, step in steps.items() if step.isdigit()]
    for path in sorted(known, key=lambda path: int(steps[path]), reverse=True):
        try:
            return _read(path)
        except (OSError, *_BROKEN) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            say(f"the checkpoint {path} is broken ({reason}): going on without it")
    return None


def _read(path: Path) -> Checkpoint:
    """A checkpoint; one of several errors where it is broken. The sums that torch writes with tensors are
    compared, which torch itself does not do."""
    meta = json.loads((path / "values.json").read_text(encoding="utf-8"))
    found = Checkpoint(
        int(meta["step"]), {}, dict(meta["values"]), dict(meta["logs"]), dict(meta.get("parts", {}))
    )
    if not all(isinstance(length, int) for length in found.logs.values()):
        raise ValueError("the lengths of logs are no numbers")
    for name, expected in found.parts.items():
        if Path(name).name != name or sum_of(path / PARTS / name) != expected:
            raise ValueError(f"{name} was changed")
    with zipfile.ZipFile(path / "tensors.pt") as packed:
        if (name := packed.testzip()) is not None:
            raise ValueError(f"{name} was changed")
    tensors = torch.load(path / "tensors.pt", weights_only=True, map_location="cpu")
    return replace(found, tensors=dict(tensors))


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
