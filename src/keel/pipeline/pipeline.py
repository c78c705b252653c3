"""The stage graph: joined by artifacts, cached by content, resumable anywhere.

A stage is done when its `stage.json` is there and carries the fingerprint of what it would be run with now:
its settings, its inputs' fingerprints, its data's content, the seed, the device, the code; and when its model
is still there. Everything else is run, or gone on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

import keel
from keel import accel, report
from keel.config import RunConfig, Stage, Training
from keel.data import chat, load
from keel.data.batches import derive_seed
from keel.data.stored.cache import Cache, keep_digests
from keel.data.stored.tokens import Preparation
from keel.data.stored.worker import Shown
from keel.errors import DataError, KeelError, MachineError, UsageError
from keel.models import lora
from keel.models.device_info import forget_peak, keep_freed_memory, peak_memory_mib
from keel.pipeline import dates, lengths
from keel.pipeline.device import cores, deterministic, device_of, hardware
from keel.pipeline.fingerprint import code_print, code_prints, model_print, plugin_prints, versions
from keel.pipeline.preflight import Sources, from_outside, functions_of
from keel.pipeline.stage_kinds import kind_of, resolve
from keel.report import rerun_reason
from keel.report.wording import duration
from keel.rewards import loading
from keel.rundir import kept, machine_faults, weights, worker
from keel.rundir.checkpoint import discard, write_json, write_text
from keel.rundir.machine_faults import size_in_words
from keel.rundir.stage_files import read_mark, read_object, read_record
from keel.rundir.stage_run import Progress, StageRun
from keel.stages import collect
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
class Pipeline:
    """A config bound to a run directory."""

    config: RunConfig
    directory: Path
    say: Callable[[str], None] = print
    progress: Progress = lambda stage, step, steps, metrics: None
    fit: Callable[[Pipeline, str], int | None] | None = None  # what `micro_batch: auto` of a stage comes to
    room: Callable[[Pipeline, Sequence[str]], Room | None] | None = None  # what stages need of the disk
    sources: Sources = field(init=False)  # where models lie and what data hold
    confirm: Callable[[str], bool] = lambda question: True  # asked before hours of work are done again
    wait: bool = False  # for people's votes, in place of ending with a WaitingError
    _parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _asks: dict[str, bool] = field(default_factory=dict)  # stage → whether a template of it writes the date
    _date: date | None = None  # once it has been found
    _heard: dict[str, str | None] = field(default_factory=dict)  # stage → print of people's votes

    def __post_init__(self) -> None:
        self.sources = Sources(self.config, self.directory, lambda line: self.say(line))

    def stage_directory(self, name: str) -> Path:
        return self.sources.stage_directory(name)

    # ------------------------------------------------------------ what day it is

    def asks_for_date(self, name: str, *, hub: bool = False) -> bool:
        """Whether a template that the stage renders with writes the date. hub: templates may be fetched."""
        if name not in self._asks:
            self._asks[name] = dates.asks(self.sources, name, hub=hub)
        return self._asks[name]

    def day(self, *, fresh: bool = False, hub: bool = False) -> date | None:
        """The day that templates write: the config's, else the one kept from the run's first start, else
        today. None where no template asks. fresh: no day is kept."""
        asking = [name for name in self.config.stages if self.asks_for_date(name, hub=hub)]
        if self._date is None and asking:
            before = None if fresh else dates.kept(self.directory)
            self._date = self.config.date or before or date.today()
        return self.config.date or self._date

    def dated(self) -> contextlib.AbstractContextManager[None]:
        """Templates write the run's day for as long as it lasts."""
        return chat.on_date(self.day(), given=self.config.date is not None)

    # ------------------------------------------------------------ what a stage is made of

    def parts(self, name: str) -> dict[str, Any]:
        """What this stage would be run with, part by part, as JSON has it."""
        if name not in self._parts:
            stage, outside = self.config.stages[name], self._outside(name)
            made_here = {s: self.input_print(s) for s in stage.inputs() if s in self.config.stages}
            parts = {
                "name": name,  # the stage's own seed is derived from it
                "settings": stage.decisive(),
                "seed": self.config.seed,
                "threads": self.config.threads,
                "device": device_of(self.config).type,
                "accel": _accel_state(self.config),
                **outside,
                "inputs": {**outside["inputs"], **made_here},
                "code": code_prints(stage.kind),
                "versions": versions(),
            }
            if self.asks_for_date(name):
                parts["date"] = str(self.day())
            self._parts[name] = json.loads(json.dumps(parts))
        return self._parts[name]

    def _outside(self, name: str) -> dict[str, Any]:
        """Of its parts those that lie in files of the user's, which may be edited at any time."""
        stage, cache = self.config.stages[name], self.sources.preparation.cache
        tokenizer = stage.starts_from and stage.starts_from.tokenizer
        models = [source for source in stage.inputs() if source not in self.config.stages]
        return {
            "inputs": {
                **({tokenizer: model_print(tokenizer)} if tokenizer else {}),
                **{source: self.input_print(source) for source in models},
            },
            "data": [
                load.fingerprint(from_outside(sources), cache)
                for sources, _ in [*stage.all_data(), *stage.streamed_data()]
            ],
            "rewards": {function: loading.source_print(function) for function in functions_of(stage)},
            "plugins": plugin_prints(stage),
        }

    def _check_unedited(self, name: str, *, streamed: bool = False) -> None:
        """KeelError where what a stage reads from outside was edited since its fingerprint was taken: what is
        recorded of a stage is what it was made of. streamed: only what it reads while it trains."""
        if streamed and not self.config.stages[name].streamed_data():
            return
        self.sources.check_unedited(name)
        now = json.loads(json.dumps(self._outside(name)))
        changed = {key: now[key] for key in ("data",) if streamed} or now
        before = {key: self.parts(name)[key] for key in changed}
        if "inputs" in before:
            before["inputs"] = {key: before["inputs"].get(key) for key in now["inputs"]}
        if changed != before:
            raise KeelError(
                f"{name}: {rerun_reason.reason(before, changed)} since this run began; what is done is kept, "
                "and the same command goes on with what is there now"
            )

    def fingerprint(self, name: str) -> str:
        """What this stage would be run with, as a hash."""
        return hashlib.sha256(json.dumps(self.parts(name), sort_keys=True).encode()).hexdigest()

    def input_print(self, name: str) -> str:
        """A model's identity: its stage's fingerprint, its files' content, or its hub id. Of comparisons by
        people their votes are part of it."""
        if name in self.config.stages:
            votes = self._votes(name)
            return self.fingerprint(name) + (f"+{votes}" if votes else "")
        return model_print(self.sources.resolve(name))

    def is_done(self, name: str) -> bool:
        """Whether the stage was run to its end with what it would be run with now, and what it made is still
        there."""
        return self._is_current(name) and self._is_whole(name)

    def _is_current(self, name: str) -> bool:
        return read_record(self.stage_directory(name)).get("fingerprint") == self.fingerprint(name)

    def _is_whole(self, name: str) -> bool:
        """Whether its model is there, or its comparisons, made of the votes that are there now."""
        directory, leaves = self.stage_directory(name), self.config.stages[name].leaves
        if leaves == "comparisons":
            counted = (read_record(directory).get("facts") or {}).get("votes_print")
            return (directory / collect.COMPARISONS).exists() and counted == self._votes(name)
        folder = directory / "model"
        whole = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
        return (whole and self._edited(name) is None) or leaves == "nothing"

    def _edited(self, name: str) -> str | None:
        """A weight file of a done stage that is not what the stage left; None where all are."""
        directory = self.stage_directory(name)
        return weights.differs(directory, read_record(directory).get("weights") or {})

    def is_kept(self, name: str) -> bool:
        """Whether the stage was run with what it would be run with now, before it was run with other
        settings, and is brought back by `run`."""
        return not self._is_current(name) and self._kept(name) is not None

    def _kept(self, name: str) -> Path | None:
        return kept.find(self.directory, name, self.fingerprint(name))

    def _votes(self, name: str) -> str | None:
        """What people's votes on a stage's pairs hold; None for a stage that asks no people. Looked up once:
        votes that come in while other stages run count in the next run, for all stages alike. Where their
        database is gone, what was counted stands."""
        stage = self.config.stages[name]
        if not stage.asks_people:
            return None
        if name not in self._heard:
            directory = self.stage_directory(name)
            try:
                self._heard[name] = collect.votes_print(directory, stage.votes_in)
            except UsageError as error:
                if isinstance(error, DataError):
                    raise
                facts = read_record(directory).get("facts", {})
                self._heard[name] = facts.get("votes_print")
                self.say(f"{name}: {error}; the votes that were counted before stand")
        return self._heard[name]

    def _why_again(self, name: str) -> str | None:
        """Why a stage that was run before, or begun, cannot stay as it is; None for a new one and one to go
        on with."""
        directory = self.stage_directory(name)
        if self._is_current(name) and not self._is_whole(name):
            if self.config.stages[name].leaves == "comparisons":
                return "its votes or comparisons changed"
            edited = self._edited(name) if (directory / "model" / "config.json").exists() else None
            return f"{edited} is not what it left" if edited else "its model is no longer there"
        mark = read_mark(directory)
        if mark is None or mark == self.fingerprint(name):
            return None
        before = read_object(directory / "fingerprint.json")
        return rerun_reason.reason(before, self.parts(name)) if before else "settings, inputs or code changed"

    # ------------------------------------------------------------ running

    def run(self, *, only: str | None = None, fresh: bool = False) -> None:
        """Run what is not done. UsageError before anything is touched if a setting, a model or a row is
        unusable; MachineError where the disk is full, or the like."""
        with machine_faults.explained(self.directory):
            self._run(only, fresh)

    def _run(self, only: str | None, fresh: bool) -> None:
        stages = self.config.stages
        if only is not None and only not in stages:
            raise UsageError(f"no stage {only!r}; the config has {', '.join(stages)}")
        names = [only] if only else list(stages)
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
        for name, line in self.sources.check(names, hub=True).items():
            self.say(f"{name}: {line}")
        if (today := self.day(fresh=fresh and only is None, hub=True)) and any(self._asks.values()):
            self.say(f"the date is {today}: a chat template writes it, and the run keeps it (`date`)")
        with self.dated():
            for name in names:
                if fresh or not (self.is_done(name) or self.is_kept(name)):
                    lengths.check(self.sources, name, hub=True)
        self._check_disk([name for name in names if fresh or not (self.is_done(name) or self.is_kept(name))])
        if not fresh:
            self._say_what_runs_again(names)
        self.directory.mkdir(parents=True, exist_ok=True)
        keep_digests(preparation.cache)
        with locked(self.directory), deterministic(self.config), switched(self.config), self.dated():
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

    def _forget_votes(self) -> None:
        """Votes of people, which are part of what follows, may be others now."""
        self._heard.clear()
        self._parts.clear()

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
            run = StageRun(
                name,
                directory,
                derive_seed(self.config.seed, name),
                device_of(self.config),
                self.sources.resolve,
                partial(self.sources.load_data, stage=name),
                self.say,
                self.progress,
                preparation=self.sources.preparation,
                waits=self.wait,
            )
            if getattr(asked, "micro_batch", None) != "auto":
                return run, run_stage(asked, run)
            rows = self._micro_batch(name, asked)
            run.facts["micro_batch"] = rows
            try:
                return run, run_stage(asked.model_copy(update={"micro_batch": rows}), run)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                write_json(directory / MICRO_BATCH, {"micro_batch": math.ceil(rows / 2)})
            gc.collect()
            torch.cuda.empty_cache()
            self.say(f"{name}: {rows} examples at a time do not fit; half as many from here")

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
        """A stage that is done needs no checkpoints, and an ensemble's members lie in its model's folder. Its
        adapters find their base where the run lies now."""
        directory = self.stage_directory(name)
        for adapter in directory.glob("model/**/adapter"):
            lora.follow_base(adapter)
        for left in ("checkpoints", *(f"members/*/{part}" for part in ("checkpoints", "model"))):
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


def switched(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """`accel: off` for as long as it lasts; otherwise as the environment says."""
    return accel.disabled() if config.accel == "off" else contextlib.nullcontext()


def _accel_state(config: RunConfig) -> str:
    """Which of keel's faster paths a run uses: it changes rounding. UsageError for a `KEEL_ACCEL` that says
    nothing."""
    try:
        with switched(config):
            return accel.state()
    except ValueError as error:
        raise UsageError(str(error)) from None


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


def run_stage(stage: Stage, run: StageRun) -> dict[str, Any]:
    """Run a stage of any kind; what it returns becomes its result.json."""
    return resolve(kind_of(stage.kind).run)(stage, run)


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config with every default written out."""
    return config.model_dump(mode="json")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
