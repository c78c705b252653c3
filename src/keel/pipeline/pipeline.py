"""Running the stages of a config: what is done stays, what was begun is gone on with, the rest is run.

What each stage would be run with, and whether it is done, `pipeline/stage_graph.py` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

import keel
from keel import report
from keel.config import RunConfig, Stage, Training
from keel.data.batches import derive_seed
from keel.data.stored.cache import Cache, keep_digests
from keel.data.stored.tokens import Preparation
from keel.data.stored.worker import Shown
from keel.distributed import group
from keel.errors import KeelError, MachineError, UsageError
from keel.models import lora
from keel.models.device_info import forget_peak, peak_memory_mib
from keel.models.freed_memory import keep_freed_memory
from keel.pipeline import following, lengths, teachers
from keel.pipeline.device import cores, deterministic, device_of, hardware
from keel.pipeline.fingerprint import code_print, versions
from keel.pipeline.stage_graph import StageGraph, accel_switched
from keel.report.wording import duration
from keel.rundir import kept, machine_faults, weights, worker
from keel.rundir.checkpoint import discard, write_json, write_text
from keel.rundir.machine_faults import size_in_words
from keel.rundir.stage_files import read_mark, read_object, read_record
from keel.rundir.stage_run import Progress, StageRun
from keel.trackers import process as tracking

PREPARED = "prepared"  # in the run's directory: rows of large data sets, validated and as tokens
LONG = 600.0  # seconds of work above which one is asked before it is done again
MICRO_BATCH = "micro_batch.json"  # in a stage's directory: what `micro_batch: auto` came to


class Room(Protocol):
    """Bytes on the disk of a run."""

    @property
    def least(self) -> int:
        """Without which it cannot work."""
        ...

    @property
    def whole(self) -> int:
        """What it takes."""
        ...

    @property
    def free(self) -> int | None:
        """What there is; None where nobody knows."""
        ...


@dataclass
class Pipeline(StageGraph):
    """A config bound to a run directory, and run there."""

    progress: Progress = lambda stage, step, steps, metrics: None
    fit: Callable[[Pipeline, str], int | None] | None = None  # what `micro_batch: auto` of a stage comes to
    room: Callable[[Pipeline, Sequence[str]], Room | None] | None = None  # what stages need of the disk
    confirm: Callable[[str], bool] = lambda question: True  # asked before hours of work are done again
    wait: bool = False  # for people's votes, in place of ending with a WaitingError

    def run(self, *, only: str | None = None, fresh: bool = False) -> None:
        """Run what is not done. UsageError before anything is touched if a setting, a model or a row is
        unusable; MachineError where the disk is full, or the like."""
        with machine_faults.explained(self.directory), following.joined(self.config):
            if not group.is_first():
                self.say = lambda line: None
                self.progress = lambda stage, step, steps, metrics: None
                following.follow(self.sources, self.directory / PREPARED, self._stage_run)
                return
            self._run(only, fresh)
            following.dismiss()

    def _run(self, only: str | None, fresh: bool) -> None:
        stages = self.config.stages
        if only is not None and only not in stages:
            raise UsageError(f"no stage {only!r}; the config has {', '.join(stages)}")
        names = [only] if only else list(stages)
        if group.size() > 1:
            following.check_kinds(self.config, [name for name in names if fresh or not self.is_done(name)])
        tracking.check([tracker.kind for tracker in self.config.track])
        for source in (s for s in (stages[only].inputs() if only else ()) if s in stages):
            if not self.is_done(source) and not self.is_kept(source):
                raise UsageError(
                    f"--only {only}: its input {source!r} is not done with these settings; run the whole "
                    "config first"
                )
        preparation = self.sources.preparation = Preparation(
            Cache(self.directory / PREPARED, snapshots=self.sources.preparation.cache.snapshots),
            self.config.workers or cores(),
            Shown(self.progress),
        )
        with self.sources.tokenizers.kept():
            self._check(names, fresh, whole=only is None)
        if not fresh:
            self._say_what_runs_again(names)
        self.directory.mkdir(parents=True, exist_ok=True)
        keep_digests(preparation.cache)
        with locked(self.directory), deterministic(self.config), accel_switched(self.config), self.dated():
            if fresh:
                for name in names:
                    discard(self.stage_directory(name))
            for name in stages if only is None else [*stages[only].inputs(), only]:
                self._bring_back(name, forget=fresh and name in names)
            write_text(
                self.directory / "config.yaml",
                yaml.safe_dump(self._resolved(), sort_keys=False, allow_unicode=True),
            )
            with tracking.Trackers(resolved(self.config)["track"], self.directory, self.say) as trackers:
                self._run_stages(names, trackers)
            if only is None:
                preparation.cache.sweep()

    def _check(self, names: Sequence[str], fresh: bool, whole: bool) -> None:
        """Say what stages work on. UsageError, DataError or MachineError where one of them cannot."""
        for name, line in self.sources.check(names, hub=True).items():
            self.say(f"{name}: {line}")
        if (today := self.day(fresh=fresh and whole, hub=True)) and any(self._asks.values()):
            self.say(f"the date is {today}: a chat template writes it, and the run keeps it (`date`)")
        left = [name for name in names if fresh or not (self.is_done(name) or self.is_kept(name))]
        with self.dated():
            for name in left:
                lengths.check(self.sources, name, hub=True)
                teachers.check(self.sources, name, hub=True)
        self._check_disk(left)

    def _run_stages(self, names: Sequence[str], trackers: tracking.Trackers) -> None:
        """One stage after the other; what they log is sent to the trackers beside it."""
        states: dict[str, str] = {}
        self._write_manifest(states)
        for name in names:
            states[name] = "done before" if self.is_done(name) else "running"
            if states[name] == "running":
                self._run_stage(name, trackers)
                states[name] = "done"
            else:
                self._clear_up(name)  # a kill right after the mark of being done leaves this undone
                self.say(f"{name}: done before, unchanged")
                self._track(name, trackers, done=True)
            self._write_manifest(states)
            self._report()

    def _track(self, name: str, trackers: tracking.Trackers, *, done: bool) -> None:
        """Tell the trackers of a stage."""
        stage = self.config.stages[name]
        about = {"seed": self.config.seed, "keel": keel.__version__, **stage.model_dump(mode="json")}
        trackers.follow(name, stage.kind, self.stage_directory(name), about, done)

    def _resolved(self) -> dict[str, Any]:
        """The config with every default and the run's day written out."""
        return {**resolved(self.config), "date": str(self.day()) if self.day() else None}

    def _check_disk(self, names: Sequence[str]) -> None:
        """MachineError where what these stages leave cannot fit on the disk; a word where it is scarce."""
        need = self.room(self, names) if self.room and names else None
        if need is None or need.free is None or need.whole <= need.free:
            return
        words = (
            f"the disk of {self.directory} has {size_in_words(need.free)} free, and models and checkpoints "
            f"of {', '.join(names)} take about {size_in_words(need.whole)}"
        )
        if need.least > need.free:
            hint = f"free some (`keel clean {self.directory}` lists kept stages), or name another folder"
            raise MachineError(f"{words}; {hint} (--runs). Nothing was run")
        self.say(f"{words}: it may become full")

    def _say_what_runs_again(self, names: Sequence[str]) -> None:
        """Before anything is touched: which done stages will be run again, and how long they took. UsageError
        where it is long and somebody who is asked says no."""
        took: dict[str, float] = {}
        for name in names:
            seconds = read_record(self.stage_directory(name)).get("seconds")
            if seconds is not None and not self.is_done(name) and not self.is_kept(name):
                took[name] = seconds
        if not took:
            return
        listed = ", ".join(f"{name} ({duration(seconds)})" for name, seconds in took.items())
        self.say(f"done before, and to be run again: {listed}; what they made is kept until `keel clean`")
        total, first = sum(took.values()), next(iter(took))
        question = (
            f"{first} is run again, since {self._why_again(first)}. Go on? It took {duration(total)} before"
        )
        if total > LONG and not self.confirm(question):
            raise UsageError("nothing was run, and nothing was changed")

    def _bring_back(self, name: str, *, forget: bool = False) -> None:
        """Make what was made before with these very settings the stage's own again. forget: remove it."""
        if name not in self.config.stages:
            return
        if forget:
            while place := self._kept(name):
                discard(place)
            return
        place = None if self._is_current(name) else self._kept(name)
        begun = read_mark(self.stage_directory(name)) == self.fingerprint(name)
        if place is None or begun:
            return
        kept.bring_back(place, self.stage_directory(name))
        self._forget_votes()
        self.say(f"{name}: made before with these settings, brought back")

    def _run_stage(self, name: str, trackers: tracking.Trackers) -> None:
        """1. a directory of this fingerprint  2. the stage  3. its mark of being done, last."""
        stage, directory, fingerprint = (
            self.config.stages[name],
            self.stage_directory(name),
            self.fingerprint(name),
        )
        self._check_unedited(name)
        if why := self._why_again(name):
            self.say(f"{name}: run again, since {why}")
        other = read_mark(directory) != fingerprint
        if (other or (self._is_current(name) and self._edited(name))) and (place := kept.keep(directory)):
            self.say(f"{name}: what was made before is kept in {place}")
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "fingerprint.json", self.parts(name))  # what the fingerprint is made of
        write_text(directory / "fingerprint", fingerprint)
        (directory / "stage.json").unlink(missing_ok=True)
        keep_freed_memory()
        forget_peak(device_of(self.config))
        self._track(name, trackers, done=False)
        start = time.perf_counter()
        try:
            run, result = self._worked(name)
        except BaseException:
            trackers.ended(name, done=False)
            raise
        self._check_unedited(name, streamed=True)
        run.facts["peak_memory_mib"] = peak_memory_mib(run.device)
        if stage.asks_people:
            self._parts.clear()
            self._heard[name] = run.facts.get("votes_print")  # what its comparisons were made of
        run.result(result)
        seconds = round(time.perf_counter() - start, 2)
        done = {
            "kind": stage.kind,
            "fingerprint": fingerprint,
            "seconds": seconds,
            "rows": run.facts.get("rows"),
        }
        write_json(
            directory / "stage.json",
            {
                **done,
                "parameters": run.facts.get("parameters"),
                "data": self.sources.summary(name),
                "weights": weights.record(directory),
                "facts": run.facts,
            },
        )
        trackers.ended(name, done=True)
        self._clear_up(name)
        gc.collect()
        self.say(f"{name}: done in {seconds:.1f} s")

    def _worked(self, name: str) -> tuple[StageRun, dict[str, Any]]:
        """Run a stage. With `micro_batch: auto`, one that runs out of memory goes on from its last checkpoint
        with half of it."""
        directory, asked = self.stage_directory(name), self.config.stages[name]
        while True:
            run = self._stage_run(name)
            if getattr(asked, "micro_batch", None) != "auto":
                return run, self._called(asked, run)
            rows = self._micro_batch(name, asked)
            run.facts["micro_batch"] = rows
            try:
                return run, self._called(asked.model_copy(update={"micro_batch": rows}), run)
            except torch.OutOfMemoryError:
                if rows == 1 or group.size() > 1:
                    raise
                write_json(directory / MICRO_BATCH, {"micro_batch": math.ceil(rows / 2)})
            gc.collect()
            torch.cuda.empty_cache()
            self.say(f"{name}: {rows} examples at a time do not fit; half as many from here")

    def _stage_run(self, name: str) -> StageRun:
        return StageRun(
            name,
            self.stage_directory(name),
            derive_seed(self.config.seed, name),
            device_of(self.config),
            self.sources.resolve,
            partial(self.sources.load_data, stage=name),
            self.say,
            self.progress,
            preparation=self.sources.preparation,
            waits=self.wait,
        )

    def _called(self, stage: Stage, run: StageRun) -> dict[str, Any]:
        """What a stage returns, on all ranks that there are."""
        return following.call(stage, run, self.day(), self.sources)

    def _micro_batch(self, name: str, stage: Stage) -> int:
        """What `micro_batch: auto` comes to: what the stage began with, so that it goes on alike after a
        kill, else what fits."""
        path = self.stage_directory(name) / MICRO_BATCH
        known = read_object(path).get("micro_batch")
        if isinstance(known, int) and known > 0:
            return known
        fitting = self.fit(self, name) if self.fit else None
        assert isinstance(stage, Training)  # which alone has the setting
        rows = fitting or stage.whole_batch
        write_json(path, {"micro_batch": rows})
        why = "" if fitting else ", since nobody can reckon what fits"
        self.say(f"{name}: {rows} examples at a time{why}")
        return rows

    def _report(self) -> None:
        """A page that cannot be drawn must not cost a trained model."""
        try:
            report.write(self.directory)
        except Exception as error:
            self.say(
                f"the report could not be written ({type(error).__name__}: {error}); `keel report` shows why"
            )

    def _clear_up(self, name: str) -> None:
        """Remove what a done stage has no use for. Its adapters find their base where the run lies now."""
        directory = self.stage_directory(name)
        for adapter in directory.glob("model/**/adapter"):
            lora.follow_base(adapter)
        for left in weights.CLEARED:
            for path in directory.glob(left):
                shutil.rmtree(path, ignore_errors=True)

    def _write_manifest(self, states: Mapping[str, str]) -> None:
        path = self.directory / "manifest.json"
        before = read_object(path)
        stages: dict[str, Any] = {}
        for name, stage in self.config.stages.items():
            facts, current = read_record(self.stage_directory(name)), self.is_done(name)
            stages[name] = {
                "kind": stage.kind,
                "fingerprint": self.fingerprint(name),
                "inputs": {s: self.input_print(s) for s in stage.inputs()},
                "seconds": facts.get("seconds") if current else None,
                "status": states.get(name, "done" if current else "not run"),
            }
        manifest = {
            "name": self.config.name,
            "seed": self.config.seed,
            "created": before.get("created", _now()),
            "updated": _now(),
            "versions": {"keel": keel.__version__, "python": platform.python_version(), **versions()},
            "hardware": hardware(self.config),
            "code": code_print(stage.kind for stage in self.config.stages.values()),
            "stages": stages,
        }
        write_json(path, manifest)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process a directory; the lock ends with the process, however that ends. KeelError where another has
    it."""
    with (directory / worker.LOCK).open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KeelError(f"another process is working in {directory}") from None
        worker.sign(handle)
        yield


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config with every default written out."""
    return config.model_dump(mode="json")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
