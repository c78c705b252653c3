"""A run directory as plain values. Whatever is not there yet is empty; nothing is ever written."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from keel.errors import DataError, KeelError, UsageError
from keel.pipeline.stage_kinds import StageKind, shown_as
from keel.rundir.stage_files import read_mark, read_record

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a stage
_REFERENCES = ("model", "models", "reward", "reference")  # settings that may name another stage


@dataclass(frozen=True, slots=True)
class StageRun:
    """One stage of a run: what was asked of it and what it has written so far."""

    name: str
    kind: str
    status: str  # "done" | "cached" | "unfinished" | "not run yet" | "out of date"
    directory: Path
    settings: dict[str, Any]
    inputs: tuple[str, ...]  # names of the stages it takes models from, in the order of the config
    record: dict[str, Any]  # stage.json, completed from the manifest
    result: dict[str, Any]  # result.json
    metrics: dict[str, list[tuple[int, float | None]]]  # name → (step, value), by step; None: not finite

    @property
    def shown_as(self) -> StageKind:
        """How stages of its kind are shown; as an unknown kind where the package that adds it is not here."""
        return shown_as(self.kind)

    @property
    def late(self) -> dict[str, float]:
        """Metric → mean over its last five steps, for a stage that has no result yet."""
        return {
            name: sum(values) / len(values)
            for name, points in self.metrics.items()
            if (values := [value for _, value in points[-5:] if value is not None])
        }

    def samples(self) -> Iterator[dict[str, Any]]:
        return _rows(self.directory / "samples.jsonl")

    def chosen(self) -> Iterator[dict[str, Any]]:
        """The best response to each prompt, of a best_of_n stage."""
        return _rows(self.directory / "best.jsonl")


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run directory."""

    name: str
    config: dict[str, Any]
    config_text: str
    manifest: dict[str, Any]
    stages: tuple[StageRun, ...]  # in the order of the config

    @property
    def judged(self) -> list[StageRun]:
        """The stages that compare models, finished or not."""
        return [stage for stage in self.stages if stage.shown_as.compares]

    @property
    def with_models(self) -> list[StageRun]:
        """The stages that have compared models."""
        return [stage for stage in self.judged if stage.result.get("models")]


def read(run: Path) -> Run:
    """Everything the report needs from `run`, finished or not.

    Raises UsageError when there is no such directory, DataError when one of its files cannot be parsed.
    """
    if not run.is_dir():
        raise UsageError(f"no run directory at {run}: give the path of a run, such as runs/NAME")
    config_path = run / "config.yaml"
    try:
        text = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
        config = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{config_path} cannot be read as YAML: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{config_path} is not a mapping: a run's config has `name` and `stages`")
    manifest = _object(run / "manifest.json")
    settings = _stages_of(config, config_path)
    recorded = _stages_of(manifest, run / "manifest.json")
    names = [*settings, *(name for name in recorded if name not in settings)]
    stages = tuple(_stage(run, name, settings.get(name, {}), recorded.get(name, {}), names) for name in names)
    name = str(config.get("name") or manifest.get("name") or run.resolve().name)
    return Run(name, config, text, manifest, stages)


def _stages_of(whole: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """What a file says of each stage. DataError for other things than stages, and for a name that would lead
    out of the run's directory."""
    stages = whole.get("stages") or {}
    if not isinstance(stages, dict):
        raise DataError(f"{path}: `stages` is no mapping from names to settings")
    for name, facts in stages.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise DataError(f"{path}: {name!r} is no stage's name: letters, digits, - and _ only")
        if not isinstance(facts, dict | None):
            raise DataError(f"{path}: what is said of the stage {name!r} is no mapping")
    return {name: facts or {} for name, facts in stages.items()}


@contextlib.contextmanager
def readable(run: Path) -> Iterator[None]:
    """What breaks the drawing of a run that keel has not written, or that was edited, is a DataError: a run's
    directory may come from anybody."""
    try:
        yield
    except KeelError:
        raise
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{run} holds what no run of keel writes, and cannot be shown ({words})") from error


def _stage(
    run: Path, name: str, settings: dict[str, Any], recorded: dict[str, Any], names: list[str]
) -> StageRun:
    directory = run / "stages" / name
    written = _object(directory / "stage.json") and read_record(directory)
    if _out_of_date(directory, written, recorded):
        # what lies there answers another config: none of it may be shown as this one's
        nowhere, kind = directory / "out-of-date", str(settings.get("kind") or recorded.get("kind"))
        return StageRun(name, kind, "out of date", nowhere, settings, inputs_of(settings, names), {}, {}, {})
    metrics = _metrics(directory / "metrics.jsonl")
    status = "not run yet"
    if written:
        status = "cached" if recorded.get("status") in ("cached", "done before") else "done"
    elif metrics:
        status = "unfinished"
    return StageRun(
        name=name,
        kind=str(settings.get("kind") or written.get("kind") or recorded.get("kind") or "stage"),
        status=status,
        directory=directory,
        settings=settings,
        inputs=inputs_of(settings, names),
        record={**recorded, **written},
        result=_result(directory / "result.json"),
        metrics=metrics,
    )


def _out_of_date(directory: Path, written: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """Whether the stage's files were made with other settings or inputs than the manifest now asks for."""
    wanted = recorded.get("fingerprint")
    made = written.get("fingerprint") or (read_mark(directory) or "").strip()
    return bool(wanted and made and wanted != made)


def inputs_of(settings: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    """The stages that a stage's settings take models, rewards or data from, in the order of the settings."""
    found: list[str] = []
    for key in (*_REFERENCES, "data"):
        value = settings.get(key)
        for item in value if isinstance(value, list) else [value]:
            # a model's path, or the model of a reward term
            name = item.get("path") or item.get("model") if isinstance(item, dict) else item
            if key == "data":
                source = str(item.get("source") if isinstance(item, dict) else item)
                name = source.removeprefix("stage:") if source.startswith("stage:") else None
            if isinstance(name, str) and name in names and name not in found:
                found.append(name)
    return tuple(found)


def _result(path: Path) -> dict[str, Any]:
    """result.json. DataError where its comparison of models is none."""
    result = _object(path)
    models = result.get("models")
    if models is not None and not (
        isinstance(models, dict) and all(isinstance(measures, dict) for measures in models.values())
    ):
        raise DataError(f'{path}: "models" is no object of measures by model: run the stage again')
    return result


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line without its end is still being written: it is left
    out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object")
            yield row


def _metrics(path: Path) -> dict[str, list[tuple[int, float | None]]]:
    by_name: dict[str, dict[int, float | None]] = {}
    for position, row in enumerate(_rows(path), start=1):
        step = row.get("step", position)
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError(f"{path}:{position}: `step` is no whole number")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                finite = abs(value) < float("inf")  # False for NaN as well
                by_name.setdefault(name, {})[step] = float(value) if finite else None
    return {name: sorted(points.items()) for name, points in by_name.items()}
