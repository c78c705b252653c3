# pyright: strict
"""What runs wrote, as values and data frames: `keel.load_run`, `keel.compare`, `keel.diagnose`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from keel.api.frames import data_frame
from keel.errors import UsageError
from keel.report import reading

if TYPE_CHECKING:
    from keel.api.frames import DataFrame
    from keel.diagnosis.logs import Diagnosis
    from keel.report import compare as ranking

INTERVAL = ("mean", "low", "high", "n")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run as it stands."""

    name: str
    kind: str  # pretrain, sft, reward, ppo …
    status: str  # "done" | "cached" | "unfinished" | "not run yet" | "out of date"
    inputs: tuple[str, ...]  # the stages it takes models or data from
    seconds: float | None  # that it took; None before it is done
    directory: Path
    settings: Mapping[str, Any]  # its part of the config, every default written out
    result: Mapping[str, Any]  # result.json as it is; {} before it is done


class Run:
    """A run directory. Nothing is kept: each call reads the files as they are now, of a run at work, too."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """UsageError where there is no run."""
        self.path = Path(path)
        if not (self.path / "config.yaml").exists():
            raise UsageError(f"no run at {self.path}: there is no config.yaml in it")

    def __repr__(self) -> str:
        return f"Run({fspath(self.path)!r})"

    def __str__(self) -> str:
        from keel import report

        return report.summary(self.path)

    @property
    def name(self) -> str:
        """The run's name."""
        return self._read().name

    @property
    def config(self) -> Mapping[str, Any]:
        """The config, every default written out."""
        return self._read().config

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in the order of the config."""
        return {stage.name: _stage(stage) for stage in self._read().stages}

    def metrics(self, stage: str) -> DataFrame:
        """What a stage logged: one row a step (the index), one column a metric; NaN where a step has none.

        docs/metrics.md defines every name. UsageError for a stage that is not there or has logged nothing.
        """
        points = self._stage(stage).metrics
        if not points:
            raise UsageError(f"stage {stage!r} has no metrics: it is {self.stages[stage].status}")
        by_step: dict[int, dict[str, Any]] = {}
        for name, values in points.items():
            for step, value in values:
                by_step.setdefault(step, {"step": step})[name] = float("nan") if value is None else value
        return data_frame((by_step[step] for step in sorted(by_step)), "step")

    def samples(self, stage: str) -> DataFrame:
        """The samples that a stage wrote: one row each, with `prompt`, `completion`, `rewards/NAME` and so
        on.

        UsageError for a stage that is not there or has written none.
        """
        rows = [dict(_flat(row)) for row in self._stage(stage).samples()]
        if not rows:
            raise UsageError(f"stage {stage!r} has no samples: it is {self.stages[stage].status}")
        return data_frame(rows)

    def result(self, stage: str) -> DataFrame:
        """A stage's final measures: columns `mean`, `low`, `high` (a 95 % interval) and `n`; NaN for what a
        plain number does not have.

        The index is the measure; of an evaluate stage it is (model, measure), so that `.loc["ppo"]` is one
        model. Measures inside of others are joined by "/". UsageError for a stage that is not there or not
        done.
        """
        own = self._stage(stage)
        if not own.result:
            raise UsageError(f"stage {stage!r} has no result: it is {own.status}")
        if own.kind == "evaluate":
            models: dict[str, Any] = own.result["models"]
            rows = [
                {"model": name, **row} for name, measures in models.items() for row in _measures(measures)
            ]
            return data_frame(rows, ("model", "measure"), INTERVAL)
        return data_frame(_measures(own.result), "measure", INTERVAL)

    def model_path(self, stage: str) -> Path:
        """The folder of the model that a stage left: what from_pretrained, `keel.generate`,
        `keel.RewardModel` and a config's `model` take. UsageError where it has none, or is not done."""
        own = self.stages[self._stage(stage).name]
        folder = own.directory / "model"
        if own.status not in ("done", "cached") or not (folder / "config.json").exists():
            why = (
                f"it is {own.status}" if own.status not in ("done", "cached") else f"it is of kind {own.kind}"
            )
            raise UsageError(f"stage {stage!r} has no model: {why}")
        return folder

    def report(self) -> Path:
        """Write the run's report.html again, from what is there now, and return its path."""
        from keel import report

        return report.write(self.path)

    def diagnose(self) -> dict[str, Diagnosis]:
        """Findings in the logs of each stage that learns from its own samples: see `keel.diagnose`."""
        return diagnose(self)

    def _read(self) -> reading.Run:
        return reading.read(self.path)

    def _stage(self, name: str) -> reading.StageRun:
        stages = {stage.name: stage for stage in self._read().stages}
        if name not in stages:
            close = difflib.get_close_matches(name, list(stages), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{self.path} has no stage {name!r}{hint}; it has {', '.join(stages)}")
        return stages[name]


def load_run(path: str | PathLike[str]) -> Run:
    """The run at `path` ("runs/helpdesk"), finished or at work. UsageError where there is none."""
    return Run(path)


def diagnose(path: str | PathLike[str] | Run) -> dict[str, Diagnosis]:
    """Stage → what its logs show: `findings` (check, severity, evidence, cause, remedy), `actions` that the
    loop took, and `steps`.

    path: a run, one of its stages, or a trainer_state.json of TRL. UsageError for a path that is none of
    these, DataError for a file that cannot be read.
    """
    from keel.cli import diagnose as diagnosing

    return diagnosing.diagnose(path.path if isinstance(path, Run) else Path(path))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models of one run or several, best first; `print` shows the verdict and the table as text."""

    ranked_by: str | None  # "gold" or "proxy", whichever the models were judged by; None: by neither
    verdict: str  # a sentence that knows its intervals
    notes: tuple[str, ...]  # what to know before numbers of different runs are compared
    ranking: ranking.Comparison

    def table(self) -> DataFrame:
        """Index (model, measure), best model first; columns `mean`, `low`, `high`, `n`: over prompts for a
        single run, over seeds for runs that differ in nothing else."""
        rows = [
            {"model": entry.name, **row}
            for entry in self.ranking.entries
            for row in _measures(entry.measures)
        ]
        return data_frame(rows, ("model", "measure"), INTERVAL)

    def differences(self) -> DataFrame:
        """How far the best model is ahead of each other one: `mean`, `low`, `high`, `how` it was reckoned,
        and `distinguishable`, whether the interval leaves 0 out."""
        rows = [
            {
                "model": name,
                "mean": apart.mean,
                "low": apart.low,
                "high": apart.high,
                "how": apart.how,
                "distinguishable": apart.distinguishable,
            }
            for name, apart in self.ranking.differences.items()
        ]
        return data_frame(rows, "model", ("mean", "low", "high", "how", "distinguishable"))

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the comparison as a page of HTML and return its path."""
        from keel.report import compare as ranking

        ranking.write(self.ranking, Path(path))
        return Path(path)

    def __str__(self) -> str:
        from keel.report import compare as ranking

        return ranking.as_text(self.ranking)


def compare(*runs: str | PathLike[str] | Run) -> Comparison:
    """Rank the models of runs by gold reward, else by proxy. Runs that differ only in their seed are pooled,
    and their intervals are those over seeds.

    UsageError for no run, for what is no run, and for a run without a finished evaluate stage.
    """
    from keel.report import compare as ranking

    if not runs:
        raise UsageError("compare needs the path of at least one run")
    ranked = ranking.compare([run.path if isinstance(run, Run) else Path(run) for run in runs])
    _, word, sentence = ranking.verdict(ranked)
    return Comparison(ranked.by, f"{word}: {sentence}", ranked.notes, ranked)


# ---------------------------------------------------------------- parts


def _stage(stage: reading.StageRun) -> Stage:
    return Stage(
        stage.name,
        stage.kind,
        stage.status,
        stage.inputs,
        stage.record.get("seconds"),
        stage.directory,
        stage.settings,
        stage.result,
    )


def _flat(row: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """{"rewards": {"a": 1}} as ("rewards/a", 1)."""
    for key, value in row.items():
        if isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            yield from _flat(inner, f"{head}{key}/")
        else:
            yield head + key, value


def _measures(result: Mapping[str, Any], head: str = "") -> Iterator[dict[str, Any]]:
    """Each measure of a result, those inside of others too; what is no number is left out."""
    for name, value in result.items():
        if isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            if {"mean", "low", "high"} <= inner.keys():
                yield {"measure": head + name, **{key: inner.get(key) for key in INTERVAL}}
            else:
                yield from _measures(inner, f"{head}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield {"measure": head + name, **dict.fromkeys(INTERVAL), "mean": float(value)}
