"""The runs of a folder, each opened when somebody asks for it and read on from where it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keel.dashboard import discovery, foreign
from keel.dashboard.discovery import Place
from keel.dashboard.findings import Findings, StateFindings
from keel.dashboard.keel_run import Facts, KeelRun, Stage, resident_mib, words
from keel.dashboard.samples import LineSamples, ParquetSamples, Samples
from keel.dashboard.table import LogTable, Table, numbers, parse_object
from keel.dashboard.tail import Tail, last_lines
from keel.dashboard.tfevents import MARK
from keel.pipeline.stage_kinds import Curve
from keel.report.page import key_result
from keel.report.reading import StageRun
from keel.rundir.worker import stop

LOOK_AGAIN = 2.0  # seconds after which the folder is searched for new runs
ACTIVE = 120.0  # seconds since its last write for which another trainer's run counts as active
STEPS_FOR_PACE = 20  # last steps that time left is reckoned from
METRICS, TIMES = "metrics", "times"

# what runs are compared by: a name, its unit, and the metrics that are it, the first one that a run has
QUANTITIES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "reward": ("Reward", "of the rewards", ("objective/scores", "reward", "rewards/margins")),
    "judge": ("Judge", "held out", ("eval/judge",)),
    "kl": ("KL from the reference", "nats per reply", ("objective/kl", "kl")),
    "entropy": ("Entropy", "nats per token", ("policy/entropy_avg", "entropy")),
    "length": ("Reply length", "tokens", ("rollout/response_length", "completions/mean_length")),
    "clip": (
        "Clip fraction", "share of tokens",
        ("policy/clipfrac_avg", "clip_ratio/region_mean", "clip_ratio"),
    ),
    "loss": ("Loss", "", ("loss", "train/loss", "loss/policy_avg")),
    "eval_loss": ("Held-out loss", "", ("eval_loss", "eval/loss")),
    "accuracy": ("Accuracy", "share", ("accuracy", "rewards/accuracies", "mean_token_accuracy")),
}  # fmt: skip


class OpenRun:
    """One run: its facts, and the files of its stages. For one thread at a time: `lock`.

    All pages share it. fresh: seconds in which files are not looked at again, so that many pages cost hardly
    more than one.
    """

    def __init__(self, place: Place, fresh: float = 0.0) -> None:
        self.place = place
        self._fresh = fresh
        self._looked: dict[tuple[str, ...], float] = {}
        self._state: dict[str, Any] = {}
        self._summary: dict[str, Any] = {}
        self.lock = threading.RLock()
        kinds = {
            "keel": KeelRun,
            "transformers": foreign.TransformersRun,
            "tensorboard": foreign.TensorBoardRun,
        }
        self._reader = kinds[place.format](place.path)
        self._tables: dict[tuple[str, str], Table] = {}
        self._samples: dict[str, Samples] = {}
        self._findings: dict[str, Findings | StateFindings] = {}

    @property
    def name(self) -> str:
        return self.place.name

    def _is_due(self, *what: str) -> bool:
        """Whether something is to be looked at again; then it is."""
        now = time.monotonic()
        if now - self._looked.get(what, -1e9) < self._fresh:
            return False
        self._looked[what] = now
        return True

    def facts(self) -> Facts:
        """The run but for its numbers."""
        facts = self._reader.facts()
        if facts.group is None and (named := foreign.seed_group(self.name)) is not None:
            facts.group, facts.seed = named
        return facts

    def table(self, stage: Stage, file: str = METRICS) -> Table:
        """The metrics or times of a stage, up to date."""
        key = (stage.name, file)
        table = self._tables.get(key)
        if table is None:
            if self.place.format != "keel":
                table = foreign.table_of(stage, self.place.path) if file == METRICS else Table()
            else:
                table = LogTable(Tail(stage.directory / f"{file}.jsonl"))
            self._tables[key] = table
        if (
            stage.status != "out of date"
            and isinstance(table, LogTable | foreign.StateTable | foreign.EventTable)
            and self._is_due(*key)
        ):
            table.refresh()
        return table

    def is_open(self, stage: Stage) -> bool:
        """Whether the stage's metrics have been read."""
        return (stage.name, METRICS) in self._tables

    def samples(self, stage: Stage) -> Samples:
        """The replies of a stage, up to date."""
        if stage.name not in self._samples:
            trl = self.place.format == "transformers"
            self._samples[stage.name] = (
                ParquetSamples(self.place.path / "completions")
                if trl
                else LineSamples(stage.directory / "samples.jsonl")
            )
        found = self._samples[stage.name]
        if stage.status != "out of date" and self._is_due(stage.name, "samples"):
            found.refresh()
        return found

    def findings(self, stage: Stage) -> Findings | StateFindings | None:
        """What diagnosis says of a stage; None for one that it does not look at."""
        if stage.status in ("out of date", "not run yet"):
            return None
        found = self._findings.get(stage.name)
        if self.place.format == "transformers" and stage.name == foreign.TRAINING:
            found = found or StateFindings()
        elif self.place.format == "keel" and stage.shown_as.on_policy:
            found = found or Findings(stage.directory, stage.settings)
        else:
            return None
        self._findings[stage.name] = found
        if isinstance(found, StateFindings):
            found.refresh(foreign.newest_state(self.place.path), self.table(stage).position.rows)
        else:
            found.refresh()
        return found

    def steps(self, stage: Stage) -> int | None:
        """Steps of the whole stage; None where nothing says."""
        table = self._tables.get((stage.name, METRICS))
        return table.steps if isinstance(table, foreign.StateTable) else stage.steps

    def seconds_per_step(self, stage: Stage) -> float | None:
        """Mean time of the last steps; None before there are any."""
        table = self.table(stage, TIMES)
        rows = table.position.rows
        count = min(rows, STEPS_FOR_PACE)
        if not count:
            return None
        columns = [column for name, column in table.columns.items() if "/" not in name]
        total = sum(float(np.nansum(column.since(rows - count)[1])) for column in columns)
        return total / count if total < 1e12 else None

    # ------------------------------------------------------------ what pages show

    def summary(self) -> dict[str, Any]:
        """The run as a line of the list: read from the ends of its files, so that it costs little."""
        if self._is_due("summary"):
            self._summary = self._summed_up()
        return self._summary

    def _summed_up(self) -> dict[str, Any]:
        facts = self.facts()
        stage = focus(facts.stages)
        step, values, changed = None, {}, _changed(self.place.path / "manifest.json")
        if stage is not None:
            latest = self._latest(stage)
            step = int(latest.pop("step", 0)) or None
            values = {
                name: latest[metric]
                for name, (_, _, metrics) in QUANTITIES.items()
                if (metric := next((m for m in metrics if m in latest), None)) is not None
            }
            changed = max(changed, self._written(stage))
        done = sum(one.status == "done" for one in facts.stages)
        return {
            "name": self.name,
            "format": self.place.format,
            "status": self._status(facts),
            "stage": stage.name if stage else None,
            "kind": stage.kind if stage else None,
            "done": done,
            "stages": len(facts.stages),
            "step": step,
            "steps": (self.steps(stage) if stage else None),
            "values": values,
            "seed": facts.seed,
            "group": facts.group,
            "changed": round(changed, 1) or None,
        }

    def _latest(self, stage: Stage) -> dict[str, float]:
        """The last values of a stage's metrics, its step among them."""
        if self.place.format == "keel":
            values: dict[str, float] = {}
            for line in last_lines(stage.directory / "metrics.jsonl", 16384):
                row = parse_object(line)
                if row is not None:
                    values |= numbers(row)
                    step = row.get("step")
                    values |= {"step": step} if isinstance(step, int) else {}
            return {name: value for name, value in values.items() if abs(value) < 1e300}
        if self.place.format == "tensorboard" and not self.is_open(stage):
            return {}  # read by whoever opens the run, or by the warm-up
        table = self.table(stage)
        values = {name: value for name in table.columns if (value := table.mean_of_last(name, 1)) is not None}
        return {**values, **({"step": table.last_step} if table.last_step else {})}

    def _written(self, stage: Stage) -> float:
        """When a stage last wrote its metrics, in seconds since 1970; 0 where it has not."""
        if self.place.format == "keel":
            return _changed(stage.directory / "metrics.jsonl")
        if stage.kind == foreign.EVENTS:
            return max(map(_changed, stage.directory.glob(f"{MARK}*")), default=0.0)
        state = foreign.newest_state(self.place.path)
        return _changed(state) if state else 0.0

    def _status(self, facts: Facts) -> str:
        """A run in one word. Nothing says of another trainer's run whether it is at work, but when it last
        wrote."""
        if self.place.format == "keel" or not facts.stages:
            return status_of(facts)
        if facts.stages[0].status == "done":
            return "done"
        latest = max(map(self._written, facts.stages))
        return "active" if time.time() - latest < ACTIVE else "idle"

    def state(self) -> dict[str, Any]:
        """The run as its page shows it, but for the curves and the replies. A copy."""
        if self._is_due("state"):
            self._state = self._made_state()
        return dict(self._state)

    def _made_state(self) -> dict[str, Any]:
        facts = self.facts()
        config = facts.config
        memory = resident_mib(facts.worker.pid) if facts.worker else None
        return {
            "name": self.name,
            "title": words(config.get("name"), 200) or self.name,
            "description": words(config.get("description"), 2000),
            "format": self.place.format,
            "status": self._status(facts),
            "seed": facts.seed,
            "created": facts.created,
            "machine": facts.machine,
            "can_stop": facts.worker is not None,
            "memory_mib": None if memory is None else round(memory / 16) * 16,
            "stages": [self._stage(stage) for stage in facts.stages],
        }

    def _stage(self, stage: Stage) -> dict[str, Any]:
        table = self.table(stage)
        steps, step = self.steps(stage), table.last_step
        pace = self.seconds_per_step(stage) if stage.status == "running" else None
        left = pace * (steps - step) if pace is not None and steps and step is not None else None
        found = self.findings(stage)
        kind, counted = stage.shown_as, stage.facts.get("facts")
        return {
            "name": stage.name,
            "kind": stage.kind,
            "status": stage.status,
            "inputs": list(stage.inputs),
            "column": stage.column,
            "row": stage.row,
            "step": step,
            "steps": steps,
            "pace": None if pace is None else round(pace, 3),
            "left": None if left is None else round(max(left, 0)),
            "seconds": _number(stage.facts.get("seconds")),
            "rows": _number(stage.facts.get("rows")),
            "parameters": _number(stage.facts.get("parameters")),
            "memory_mib": _number(counted.get("peak_memory_mib")) if isinstance(counted, dict) else None,
            "data": words(stage.facts.get("data"), 500),
            "result": guarded(lambda: key_result(self._for_report(stage, table)), ""),
            "has_steps": kind.has_steps,
            "compares": kind.compares,
            "x_word": kind.x_word,
            "known": bool(kind.curves),
            "curves": _curves(stage, table),
            "findings": found.rows() if found is not None else None,
            "note": found.note if found is not None else "",
            "broken_lines": table.broken_lines,
        }  # fmt: skip

    def _for_report(self, stage: Stage, table: Table) -> StageRun:
        late = {one.late for one in stage.shown_as.key_numbers if one.late}
        return stage.as_report(
            {name: [(0, value)] for name in late if (value := table.mean_of_last(name, 5)) is not None}
        )

    def stop(self) -> int | None:
        """End the run as Ctrl-C does; the number of its process, None where nothing runs."""
        return stop(self.place.path) if self.place.format == "keel" else None


class Runs:
    """All runs of a folder."""

    def __init__(self, folder: Path, fresh: float = 0.0) -> None:
        """fresh: as of `OpenRun`."""
        self.folder = folder
        self._fresh = fresh
        self._lock = threading.Lock()
        self._open: dict[str, OpenRun] = {}
        self._looked: float | None = None

    def all(self) -> list[OpenRun]:
        """The runs by name, those that are new since the last look among them."""
        with self._lock:
            now = time.monotonic()
            if self._looked is None or now - self._looked > LOOK_AGAIN:
                places = discovery.find(self.folder)
                self._open = {
                    place.name: known
                    if (known := self._open.get(place.name)) is not None and known.place == place
                    else OpenRun(place, self._fresh)
                    for place in places
                }
                self._looked = now
            return list(self._open.values())

    def get(self, name: str) -> OpenRun | None:
        """The run of this name; None where there is none. Only names of runs that were found lead far."""
        return next((run for run in self.all() if run.name == name), None)

    def warm_up(self, ended: Callable[[], bool]) -> None:
        """Read every run's curves once, so that they are there when somebody asks."""
        for run in self.all():
            for stage in guarded(lambda run=run: run.facts().stages, []):
                if ended():
                    return
                with run.lock:
                    guarded(lambda run=run, stage=stage: run.table(stage), None)


def focus(stages: list[Stage]) -> Stage | None:
    """The stage that a list shows: the one at work, else the last one that learns and has begun."""
    running = [stage for stage in stages if stage.status == "running"]
    begun = [
        stage
        for stage in stages
        if stage.status in ("done", "interrupted", "begun") and stage.shown_as.has_steps
    ]
    return (running or begun or [None])[-1]


def status_of(facts: Facts) -> str:
    """A run in one word or two."""
    statuses = [stage.status for stage in facts.stages]
    if facts.worker is not None:
        return "running"
    if not statuses:
        return "waiting"
    for status in ("interrupted", "out of date", "not run yet", "begun"):
        if status in statuses:
            return "unfinished" if status in ("not run yet", "out of date") else status
    return "done"


def _curves(stage: Stage, table: Table) -> list[dict[str, Any]]:
    """The curves that a stage's kind names; of an unknown kind those that runs are compared by."""
    curves = stage.shown_as.curves or tuple(
        Curve(title, unit, metric, held_out=f"eval_{metric}")
        for title, unit, metrics in QUANTITIES.values()
        if (metric := next((m for m in metrics if m in table.columns), None)) is not None
    )
    return [
        {
            "title": c.title,
            "unit": c.unit,
            "metric": c.metric,
            "held_out": c.held_out,
            "level": _target(stage) if c.metric == "objective/kl" else c.level,
            "level_label": "target" if c.metric == "objective/kl" else c.level_label,
            "smooth": c.smooth,
        }
        for c in curves
    ]


def _target(stage: Stage) -> float | None:
    kl = stage.settings.get("kl")
    return _number(kl.get("target")) if isinstance(kl, dict) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def guarded(make: Callable[[], Any], otherwise: Any) -> Any:
    """What a function of the report makes of files that may be anybody's: a result of another form must not
    take the page with it."""
    try:
        return make()
    except Exception:
        return otherwise
