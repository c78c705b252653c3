"""The run directory: what a stage is given to work with, and what it leaves behind.

`metrics.jsonl` and `samples.jsonl` hold nothing that depends on the clock, so that two runs of one config can
be compared byte by byte; seconds go to `times.jsonl`. Of several ranks the first alone writes; all call the
same methods.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keel.data.stored.tokens import Preparation
from keel.distributed import group, parts
from keel.errors import NotFiniteError
from keel.rundir.checkpoint import (
    PARTS,
    Checkpoint,
    append,
    begin_parts,
    folder_of,
    forget,
    latest,
    save,
    write_json,
)
from keel.rundir.stage_files import PROGRESS
from keel.types import DataSource, RecordType

if TYPE_CHECKING:
    from keel.distributed import sharded
    from keel.models.machine_speed import Speed
    from keel.models.phase_cost import PhaseCost

LOGS = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "times.jsonl")
PRECISION = "computes_in"  # a checkpoint's value
Progress = Callable[[str, int, int, Mapping[str, float]], None]  # stage, step, steps, metrics


@dataclass
class StageRun:
    """One stage at work: its directory, its seed, and where its inputs are."""

    name: str
    directory: Path
    seed: int
    device: torch.device
    resolve: Callable[[str], str]  # another stage's name, a path or a hub id → what from_pretrained takes
    load_data: Callable[
        [Sequence[DataSource], Sequence[RecordType]], Any
    ]  # → data.load.Dataset, read once a run
    say: Callable[[str], None] = lambda line: None
    progress: Progress = lambda stage, step, steps, metrics: None
    waits: bool = False  # for people, in place of ending the run
    facts: dict[str, Any] = field(default_factory=dict)  # rows, parameters …, for stage.json
    costs: dict[str, PhaseCost] = field(default_factory=dict)  # what phases cost at least
    speed: Speed | None = None  # what the machine reaches, where it has been measured
    computes_in: str | None = None  # precision of what is trained, where the loop has said it
    preparation: Preparation = field(default_factory=Preparation)  # where and how large data are made ready
    _at_end: list[Callable[[], None]] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)
    # by phase: tokens, useful and computed; passes over the model; pairs of which one attends to the other
    _counts: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    _steps: int | None = None  # of the whole stage, as progress.json says

    def at_end(self, work: Callable[[], None]) -> None:
        """Have something done once the stage has ended, however it ends: the last first."""
        self._at_end.append(work)

    def end(self, keep: int = 0) -> None:
        """The stage has ended, or what was begun after `begun()` said `keep`. Each work of `at_end` is done,
        whatever becomes of the others."""
        try:
            if len(self._at_end) > keep:
                self._at_end.pop()()
        finally:
            if len(self._at_end) > keep:
                self.end(keep)

    def begun(self) -> int:
        """How many works are waiting for the end."""
        return len(self._at_end)

    def check_finite(self, step: int, metrics: Mapping[str, float]) -> None:
        """NotFiniteError at the first number that is not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"{self.name}: {name} is {value} at step {step}; nothing of this step was kept (last "
                    f"checkpoint: {self.directory / 'checkpoints'})"
                )

    def log(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics. NotFiniteError at the first number that is not finite."""
        self.check_finite(step, metrics)
        if steps != self._steps and group.is_first():
            write_json(self.directory / PROGRESS, {"steps": steps})
            self._steps = steps
        self._append(
            "metrics.jsonl", [{"step": step, **{name: float(value) for name, value in metrics.items()}}]
        )
        rates = self._rates()
        if self._seconds:
            spent = {**self._seconds, **rates}
            self._append(
                "times.jsonl", [{"step": step, **{name: _short(value) for name, value in spent.items()}}]
            )
            self._seconds.clear()
            self._counts.clear()
        self.progress(self.name, step, steps, metrics)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append sample rows."""
        self._append("samples.jsonl", rows)

    def events(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append findings and what was done about them; no file is made for none."""
        if rows:
            self._append("events.jsonl", rows)

    def note(self, text: str) -> None:
        """Say once what a reader of the report must know too: it is kept in the stage's facts."""
        notes: list[str] = self.facts.setdefault("notes", [])
        if text not in notes:
            notes.append(text)
            self.say(f"{self.name}: {text}")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of a phase (rollout, score, train …) of the current step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A step of the optimisers: its seconds (part of those of training), and that it was one."""
        with self.timed("optimizer"):
            yield
        self.count("optimizer", passes=1)

    def count(
        self, phase: str, useful: int = 0, computed: int = 0, *, passes: int = 0, pairs: int = 0
    ) -> None:
        """Count the work of a phase: tokens that somebody needs, tokens that the model computed (padding
        included), passes over the model's weights, and pairs of tokens of which one attends to the other."""
        a, b, c, d = self._counts.get(phase, (0, 0, 0, 0))
        self._counts[phase] = (a + useful, b + computed, c + passes, d + pairs)

    def _rates(self) -> dict[str, float]:
        """Of each phase whose work was counted: tokens a second of all ranks together and their useful share;
        the share of the machine's speed that went into the model's own arithmetic on useful tokens (MFU,
        2204.02311), and the share of its time that the machine needs at least (the roofline: FLOP at its
        speed, or bytes at its speed, whichever takes longer), both of this rank. Every rank has to ask; the
        seconds are its own."""
        rates: dict[str, float] = {}
        tokens = group.summed({
            f"{phase}/{what}": count
            for phase, (useful, computed, *_) in self._counts.items()
            for what, count in (("useful", useful), ("computed", computed))
        })  # fmt: skip
        for phase, (useful, computed, passes, pairs) in self._counts.items():
            spent = self._seconds.get(phase)
            if not spent:
                continue
            if (all_computed := tokens[f"{phase}/computed"]) > 0:
                all_useful = tokens[f"{phase}/useful"]
                rates |= {
                    f"{phase}/tokens_per_second": all_useful / spent,
                    f"{phase}/useful": all_useful / all_computed,
                }
            cost = self.costs.get(phase)
            if self.speed is None or cost is None:
                continue
            if computed:
                rates[f"{phase}/mfu"] = useful / spent * cost.token / self.speed.flops
            flops = useful * cost.token + pairs * cost.pair
            moved = passes * cost.passed + pairs * cost.pair_bytes
            rates[f"{phase}/roofline"] = self.speed.seconds(flops, moved, cost.passed) / spent
        return rates

    def restore(self, place: sharded.Placing | None = None) -> Checkpoint | None:
        """The checkpoint to go on from, with the logs cut back to where they were then; None for a fresh
        start. Several ranks get the one that the first finds. place: what a rank keeps of its tensors."""
        found = group.from_first(
            lambda: _as_values(self._restored()), place and (lambda path, tensor: place(path[1:], tensor))
        )
        if found is None:
            return None
        step, tensors, values, logs = found
        folder = folder_of(self._checkpoints, step) / PARTS
        tensors = parts.read(folder, tensors, place.like if place else lambda path: None)
        return Checkpoint(step, tensors, values, logs)

    def _restored(self) -> Checkpoint | None:
        checkpoint = latest(self._checkpoints, lambda line: self.say(f"{self.name}: {line}"))
        for log in LOGS:
            path, length = self.directory / log, checkpoint.logs.get(log, 0) if checkpoint else 0
            if path.exists():
                with path.open("r+b") as handle:
                    handle.truncate(length)
        if checkpoint:
            self.say(f"{self.name}: going on after step {checkpoint.step}")
            before = checkpoint.values.get(PRECISION)
            if before and self.computes_in and before != self.computes_in:
                self.note(
                    f"products were in {before} up to step {checkpoint.step} and are in {self.computes_in} "
                    "from there on, as this machine chooses; `dtype: float32` is the same on every machine"
                )
        return checkpoint

    def save(self, step: int, tensors: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> None:
        """Checkpoint after `step` steps. Of tensors that are cut over ranks each writes its parts, the rest
        is written by the first."""
        whole, cut = parts.split(tensors) if group.is_sharded() else (tensors, {})
        sums: dict[str, int] = {}
        if cut:
            folder = group.from_first(lambda: begin_parts(self._checkpoints, step))
            try:
                sums = parts.write(folder, cut)
            except BaseException:
                if group.is_first():
                    forget(self._checkpoints, step)
                raise

        def write() -> None:
            logs = {log: path.stat().st_size for log in LOGS if (path := self.directory / log).exists()}
            known = {PRECISION: self.computes_in} if self.computes_in else {}
            kept = Checkpoint(step, whole, {**(values or {}), **known}, logs, sums)
            save(self._checkpoints, kept)

        group.only_first(write)

    @property
    def _checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def result(self, value: Mapping[str, Any]) -> None:
        """Write the stage's final measures."""
        if group.is_first():
            write_json(self.directory / "result.json", value)

    def _append(self, log: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if not group.is_first():
            return
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        append(self.directory / log, "".join(lines))


def _as_values(checkpoint: Checkpoint | None) -> tuple[Any, ...] | None:
    """A checkpoint as what can be sent to other ranks."""
    if checkpoint is None:
        return None
    return checkpoint.step, checkpoint.tensors, checkpoint.values, checkpoint.logs


def _short(value: float) -> float:
    """Four decimals, or as many as show four digits: a small share is not zero."""
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")
