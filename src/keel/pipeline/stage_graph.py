"""What each stage of a config would be run with, and whether it is done: the stage graph, cached by content.

A stage is done when its `stage.json` is there and carries the fingerprint of what it would be run with now:
its settings, its inputs' fingerprints, its data's content, the seed, the device, the code; and when its model
is still there. Nothing is run or changed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from keel import accel
from keel.config import RunConfig
from keel.data import chat, load
from keel.errors import DataError, KeelError, UsageError
from keel.pipeline import dates
from keel.pipeline.device import device_of
from keel.pipeline.fingerprint import code_prints, model_print, plugin_prints, versions
from keel.pipeline.preflight import Sources, from_outside, functions_of
from keel.report import rerun_reason
from keel.rewards import loading
from keel.rundir import kept, weights
from keel.rundir.stage_files import read_mark, read_object, read_record
from keel.stages import collect


@dataclass
class StageGraph:
    """A config bound to a run directory: its stages, joined by what they leave."""

    config: RunConfig
    directory: Path
    say: Callable[[str], None] = print
    sources: Sources = field(init=False)  # where models lie and what data hold
    _parts: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    _asks: dict[str, bool] = field(init=False, default_factory=dict)  # stage → whether it writes the date
    _date: date | None = field(init=False, default=None)  # once it has been found
    _heard: dict[str, str | None] = field(init=False, default_factory=dict)  # stage → print of people's votes

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
                "accel": accel_state(self.config),
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

    def _forget_votes(self) -> None:
        """Votes of people, which are part of what follows, may be others now."""
        self._heard.clear()
        self._parts.clear()

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


def accel_switched(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """`accel: off` for as long as it lasts; otherwise as the environment says."""
    return accel.disabled() if config.accel == "off" else contextlib.nullcontext()


def accel_state(config: RunConfig) -> str:
    """Which of keel's faster paths a run uses: it changes rounding. UsageError for a `KEEL_ACCEL` that says
    nothing."""
    try:
        with accel_switched(config):
            return accel.state()
    except ValueError as error:
        raise UsageError(str(error)) from None
