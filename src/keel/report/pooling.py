"""Which models of which runs are the same one, and what they come to over seeds: the lines of a
comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.errors import DataError, UsageError
from keel.evaluation.measures import Measure, across_runs
from keel.report.comparison import COLUMNS, Model
from keel.report.notes import Notes, is_number, mapping
from keel.report.reading import Run, StageRun, read, readable
from keel.report.wording import bound, mean

NOT_THE_MODELS = (
    "models",
    "reference",
    "batch_size",
)  # settings of `evaluate` that change no model's measures


@dataclass(frozen=True, slots=True)
class Judged:
    """One model as one evaluate stage of one run judged it."""

    path: Path
    run: Run
    stage: StageRun
    model: str

    @property
    def measures(self) -> Mapping[str, Any]:
        return self.stage.result["models"][self.model]

    @property
    def seed(self) -> object:
        """What tells runs of the same settings apart."""
        return self.run.config.get("seed", str(self.path))

    @property
    def reference(self) -> str:
        return str(self.stage.result.get("reference") or next(iter(self.stage.result["models"])))

    @property
    def record(self) -> Mapping[str, Any]:
        """stage.json of the stage that made the model; empty for one from outside."""
        return next((stage.record for stage in self.run.stages if stage.name == self.model), {})


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table: a model in one run, or pooled over runs that differ in their seed."""

    name: str
    judged: tuple[Judged, ...]  # one a seed
    measures: Mapping[str, Measure]

    @property
    def model(self) -> Model:
        seconds = [s for j in self.judged if (s := j.record.get("seconds")) is not None]
        facts = [mapping(j.record.get("facts")) for j in self.judged]
        memory = [m for one in facts if is_number(m := one.get("peak_memory_mib"))]
        first = self.judged[0]
        return Model(
            self.name, len(self.judged), first.model == first.reference, self.measures,
            sum(seconds) / len(seconds) if seconds else None, max(memory) if memory else None,
        )  # fmt: skip


def entries(runs: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """Every model of every finished evaluate stage, runs of the same settings pooled; and notes on what was
    left out.

    UsageError for what is no run, and for a run without a finished evaluate stage.
    """
    groups: dict[tuple[str, str], list[Judged]] = {}
    twice: dict[str, list[str]] = {}
    unread: list[str] = []
    for path in {path.resolve(): path for path in runs}.values():
        with readable(path):
            of_run = _judged(path)
        unread += [f"{path}, not shown: {line}" for line in of_run[0][0].run.notes.lines]
        for judged, label in of_run:
            seeds = groups.setdefault((label, _settings(judged)), [])
            same = next((other for other in seeds if other.seed == judged.seed), None)
            if same is None:
                seeds.append(judged)
            else:
                twice.setdefault(label, [str(same.path)]).append(str(path))
    labels = [label for label, _ in groups]
    found = [
        Entry(
            label if labels.count(label) == 1 else f"{_run_name(own, groups)}/{label}",
            tuple(own),
            _pooled(own),
        )
        for (label, _), own in groups.items()
    ]
    return found, [
        *unread,
        *(
            f"{label} has the same settings and seed in {', '.join(dict.fromkeys(paths))}: it is counted "
            "once for a seed."
            for label, paths in twice.items()
        ),
    ]


def _judged(path: Path) -> list[tuple[Judged, str]]:
    """Every model of every finished evaluate stage, with what it is called: its name, after the stage's where
    several stages of the run judged it."""
    if not (path / "config.yaml").exists():
        raise UsageError(
            f"no run at {path}: there is no config.yaml in it; give the path of a run, such as runs/NAME"
        )
    run = read(path, Notes(strict=False))
    broken = next((line for line in run.notes.lines if line.startswith("config.yaml")), None)
    if broken is not None:  # the settings say which runs are seeds of one
        raise DataError(f"{path}/{broken}")
    stages, done = run.judged, run.with_models
    if not done:
        what = (
            f"its evaluate stage {stages[0].name!r} has no current result: run it"
            if stages
            else "its config has no evaluate stage: add one, and run it"
        )
        raise UsageError(f"nothing to compare in {path}: {what} with `keel run`")
    names = [name for stage in done for name in stage.result["models"]]
    return [
        (Judged(path, run, stage, name), name if names.count(name) == 1 else f"{stage.name}:{name}")
        for stage in done
        for name in stage.result["models"]
    ]


def _settings(judged: Judged) -> str:
    """All settings that the model's measures depend on, the seed aside, as one string."""
    roots = [judged.model, judged.reference]
    return json.dumps([judged.model, evaluation(judged), _chain(judged.run, roots)], sort_keys=True)


def evaluation(judged: Judged) -> list[Any]:
    """How it was judged: settings of the evaluate stage, the reference, and the stages of its reward."""
    own = {key: value for key, value in judged.stage.settings.items() if key not in NOT_THE_MODELS}
    return [own, judged.reference, _chain(judged.run, _strings(own))]


def _chain(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Settings of the stages called `names`, and of all that they come from."""
    settings = {stage.name: stage.settings for stage in run.stages}
    found: dict[str, Any] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in settings and name not in found:
            found[name] = settings[name]
            waiting += _strings(settings[name])
    return found


def _strings(settings: Mapping[str, Any]) -> list[str]:
    """All strings in a stage's settings but its kind: whichever is another stage's name refers to it."""

    def walk(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from walk(item)

    return list(walk({key: value for key, value in settings.items() if key != "kind"}))


def _run_name(own: Sequence[Judged], groups: Mapping[tuple[str, str], Sequence[Judged]]) -> str:
    """The name of the first run's directory; its path where another directory has the same name."""
    first = own[0].path
    others = {judged.path for group in groups.values() for judged in group} - {first}
    name = first.resolve().name
    return str(first) if any(other.resolve().name == name for other in others) else name


def _pooled(own: Sequence[Judged]) -> dict[str, Measure]:
    """The measures of the table: a single run's own, else the mean over runs with its interval over runs."""
    found: dict[str, Measure] = {}
    for name in COLUMNS:
        values = [m for judged in own if (m := mean(judged.measures, name)) is not None]
        if len(own) == 1 and values:
            known = {end: bound(own[0].measures, name, end) for end in ("low", "high", "n")}
            alone = {"mean": values[0], "low": values[0], "high": values[0], "n": 1.0}
            found[name] = {**alone, **{end: value for end, value in known.items() if value is not None}}
        elif len(values) > 1:
            found[name] = across_runs(values)
    if len(own) > 1 and "win_rate" in found:  # a share; t knows nothing of its bounds
        found["win_rate"] |= {
            "low": max(found["win_rate"]["low"], 0.0),
            "high": min(found["win_rate"]["high"], 1.0),
        }
    return found


def scores(judged: Judged, by: str) -> dict[tuple[int, str], float]:
    """(number of the prompt, prompt) → the reward of the reply; empty where samples were not kept for all
    prompts."""
    found: dict[tuple[int, str], float] = {}
    for row in judged.stage.samples():
        if row.get("model") == judged.model:
            value = mapping(row.get("gold")).get("total") if by == "gold" else row.get("proxy")
            index = row.get("index")
            if not is_number(value) or not isinstance(index, int):
                return {}
            found[index, json.dumps(row.get("prompt"), sort_keys=True)] = float(value)
    whole = bound(judged.measures, by, "n")
    return found if whole is None or len(found) == whole else {}
