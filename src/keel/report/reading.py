"""A run directory as plain values. Whatever is not there yet is empty; nothing is ever written.

What cannot be read is a DataError, or with `Notes(strict=False)` a line: then the rest is read. Nothing
outside of the directory is read, and nothing without bounds.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from keel.config.plain import plain_copy, read_yaml
from keel.errors import DataError, KeelError, UsageError
from keel.pipeline.stage_kinds import StageKind, shown_as
from keel.report.notes import BROKEN, LARGEST_SECONDS, Notes, is_number, short
from keel.rundir.run_status import newer_keel
from keel.rundir.stage_files import LARGEST, open_file, read_mark, read_record, whole_text

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a stage
_REFERENCES = ("model", "models", "reward", "reference")  # settings that may name another stage
_LARGEST_CONFIG = 2 * 2**20  # bytes
_LARGEST_LOG = 4 * 2**30
_LONGEST_LINE = 16 * 2**20
_MOST_STAGES = 200
_MOST_MODELS, _MOST_MEASURES = 200, 500  # of an evaluate stage
_MOST_METRICS, _LONGEST_NAME = 2000, 200
_LONGEST_PATH = 4096  # characters, of a model that is called by it
_LONGEST_STAGE = 100  # characters of a stage's name, as a config has it at most


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
    files: RunFiles | None = None  # that it is read through

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
        """The samples that it wrote."""
        return self._rows("samples.jsonl")

    def chosen(self) -> Iterator[dict[str, Any]]:
        """The best response to each prompt, of a best_of_n stage."""
        return self._rows("best.jsonl")

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        files = self.files or RunFiles(self.directory, Notes())
        return (row for _, row in files.rows(self.directory / name))


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run directory."""

    name: str
    config: dict[str, Any]
    config_text: str
    manifest: dict[str, Any]
    stages: tuple[StageRun, ...]  # in the order of the config
    notes: Notes = field(default_factory=Notes)  # what of it cannot be read or shown

    @property
    def judged(self) -> list[StageRun]:
        """The stages that compare models, finished or not."""
        return [stage for stage in self.stages if stage.shown_as.compares]

    @property
    def with_models(self) -> list[StageRun]:
        """The stages that have compared models."""
        return [stage for stage in self.judged if stage.result.get("models")]


def read(run: Path, notes: Notes | None = None) -> Run:
    """Everything the report needs from `run`, finished or not. notes: takes what cannot be read; without it
    that is an error.

    Raises UsageError when there is no such directory, or nothing in it can be read; DataError, without
    notes, when one of its files cannot be.
    """
    if not run.is_dir():
        raise UsageError(f"no run directory at {run}: give the path of a run, such as runs/NAME")
    notes = Notes() if notes is None else notes
    files = RunFiles(run, notes)
    text, config = _config(files, run / "config.yaml")
    manifest = files.object(run / "manifest.json")
    if (newer := newer_keel(manifest)) is not None:
        notes.remark(
            f"the run is of keel {newer}, newer than this one: what it added is not shown; update keel"
        )
    settings = _stages_of(config, run / "config.yaml", files)
    recorded = _stages_of(manifest, run / "manifest.json", files)
    names = [*settings, *(name for name in recorded if name not in settings)]
    if not names and (notes.lines or not config):
        names = _folders(run / "stages")
    if not names and notes.lines and not config and not manifest:
        raise UsageError(f"nothing in {run} can be read as a run: {notes.lines[0]}")
    if len(names) > _MOST_STAGES:
        notes.add(f"{run} has {len(names):,} stages: only the first {_MOST_STAGES} are shown")
    names = names[:_MOST_STAGES]
    stages = tuple(
        _stage(files, name, settings.get(name, {}), recorded.get(name, {}), names) for name in names
    )
    name = config.get("name") or manifest.get("name") or run.resolve().name
    config = {**config, "stages": settings} if "stages" in config else config
    return Run(short(name, _LONGEST_NAME), config, text, manifest, stages, notes)


def _config(files: RunFiles, path: Path) -> tuple[str, dict[str, Any]]:
    """config.yaml as text and as values, with the bounds of any config: aliases may make a few lines a great
    deal."""
    text = files.text(path, _LARGEST_CONFIG)
    if text is None:
        return "", {}
    try:
        config: Any = plain_copy(read_yaml(text, yaml.SafeLoader))
    except (UsageError, ValueError) as error:
        files.notes.add(f"{files.name(path)} cannot be read as YAML: {error}")
        return text, {}
    if not isinstance(config, dict | None):
        files.notes.add(f"{files.name(path)} is not a mapping: a run's config has `name` and `stages`")
        return text, {}
    return text, config or {}


def _stages_of(whole: dict[str, Any], path: Path, files: RunFiles) -> dict[str, dict[str, Any]]:
    """What a file says of each stage. Left out are other things than stages, and a name that would lead out
    of the run's directory."""
    stages, name_of_file = whole.get("stages") or {}, files.name(path)
    if not isinstance(stages, dict):
        files.notes.add(f"{name_of_file}: `stages` is no mapping from names to settings")
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, facts in stages.items():
        if not _is_name(name):
            files.notes.add(
                f"{name_of_file}: {short(repr(name), 60)} is no stage's name: letters, digits, - and _ only"
            )
        elif not isinstance(facts, dict | None):
            files.notes.add(f"{name_of_file}: what is said of the stage {name!r} is no mapping")
            found[name] = {}
        else:
            found[name] = facts or {}
    return found


def _is_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= _LONGEST_STAGE and _NAME.fullmatch(name) is not None


def _folders(stages: Path) -> list[str]:
    """The stages of a run whose config and manifest do not name them."""
    try:
        return sorted(path.name for path in stages.iterdir() if path.is_dir() and _is_name(path.name))
    except OSError:
        return []


@contextlib.contextmanager
def readable(run: Path) -> Iterator[None]:
    """What breaks the drawing of a run that keel has not written, or that was edited, is a DataError: a run's
    directory may come from anybody."""
    try:
        yield
    except KeelError:
        raise
    except BROKEN as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{run} holds what no run of keel writes, and cannot be shown ({words})") from error


# ---------------------------------------------------------------- one stage


def _stage(
    files: RunFiles, name: str, settings: dict[str, Any], recorded: dict[str, Any], names: list[str]
) -> StageRun:
    directory = files.run / "stages" / name
    written = files.object(directory / "stage.json")
    if written and not (written := read_record(directory)):
        files.notes.remark(f"{files.name(directory / 'stage.json')} is not as keel writes it")
    inputs = inputs_of(settings, names)
    if _out_of_date(directory, written, recorded):
        # what lies there answers another config: none of it may be shown as this one's
        nowhere, kind = directory / "out-of-date", _kind(settings, recorded)
        return StageRun(name, kind, "out of date", nowhere, settings, inputs, {}, {}, {}, files)
    metrics = _metrics(files, directory / "metrics.jsonl")
    status = "not run yet"
    if written:
        status = "cached" if recorded.get("status") in ("cached", "done before") else "done"
    elif metrics:
        status = "unfinished"
    return StageRun(
        name=name,
        kind=_kind(settings, written, recorded),
        status=status,
        directory=directory,
        settings=settings,
        inputs=inputs,
        record=_record({**recorded, **written}, files.notes, f"what is recorded of the stage {name}"),
        result=_result(files, directory / "result.json"),
        metrics=metrics,
        files=files,
    )


def _kind(*facts: Mapping[str, Any]) -> str:
    """The first that says a kind."""
    kinds = (one.get("kind") for one in facts)
    return short(next((kind for kind in kinds if kind and isinstance(kind, str)), "stage"), _LONGEST_NAME)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and is_number(value) and 0 <= value < LARGEST_SECONDS


def _is_count(value: object) -> bool:
    return isinstance(value, int) and is_number(value)


_RECORDED: Mapping[str, Callable[[object], bool]] = {  # what a report shows of it: how it must be
    "seconds": _is_time,
    "rows": _is_count,
    "parameters": _is_count,
    "data": lambda value: isinstance(value, str),
    "fingerprint": lambda value: isinstance(value, str),
    "facts": lambda value: isinstance(value, dict),
}


def _record(record: dict[str, Any], notes: Notes, what: str) -> dict[str, Any]:
    """The record without values of another type than keel writes."""
    odd = [
        name for name, fits in _RECORDED.items() if record.get(name) is not None and not fits(record[name])
    ]
    for name in odd:
        notes.add(f"{what}: `{name}` is not as keel writes it")
    return {name: value for name, value in record.items() if name not in odd}


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


def _result(files: RunFiles, path: Path) -> dict[str, Any]:
    """result.json, without a comparison of models that is none."""
    result, where = files.object(path), files.name(path)
    models = result.get("models", {})
    if not isinstance(models, dict) or not all(isinstance(measures, dict) for measures in models.values()):
        files.notes.add(f'{where}: "models" is no object of measures by model: run the stage again')
        models = models if isinstance(models, dict) else {}
    sound = {name: measures for name, measures in models.items() if isinstance(measures, dict)}
    found = {
        name: _named(measures, _MOST_MEASURES, _LONGEST_NAME)
        for name, measures in _named(sound, _MOST_MODELS, _LONGEST_PATH).items()
    }
    if found != sound:
        files.notes.add(f"{where}: some models or measures are too many, or have too long names, to be shown")
    kept = {**result, "models": found} if "models" in result else result
    for name, kind in (("reference", str), ("reward_model", dict)):
        if found and not isinstance(kept.get(name), kind | None):
            files.notes.add(f"{where}: `{name}` is not as keel writes it")
            kept = {key: value for key, value in kept.items() if key != name}
    return kept


def _named(values: dict[str, Any], most: int, longest: int) -> dict[str, Any]:
    """The first `most` values whose names have at most `longest` characters."""
    return dict([item for item in values.items() if len(item[0]) <= longest][:most])


def _metrics(files: RunFiles, path: Path) -> dict[str, list[tuple[int, float | None]]]:
    by_name: dict[str, dict[int, float | None]] = {}
    odd = _Odd(files.notes)
    for position, row in files.rows(path):
        step = row.get("step", position)
        if not _is_count(step):
            odd.add(f"{files.name(path)}:{position}: `step` is no whole number")
            continue
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name not in by_name and (len(by_name) >= _MOST_METRICS or len(name) > _LONGEST_NAME):
                odd.add(
                    f"{files.name(path)}:{position}: {short(name, 60)!r} is one name too many, or too long"
                )
                continue
            by_name.setdefault(name, {})[step] = float(value) if is_number(value) else None
    odd.close()
    return {name: sorted(points.items()) for name, points in by_name.items()}


# ---------------------------------------------------------------- files


class _Odd:
    """What is wrong with lines of a file: the first in words, the others by their number."""

    def __init__(self, notes: Notes) -> None:
        self.notes, self.first, self.lines = notes, "", 0

    def add(self, line: str) -> None:
        if self.notes.strict:
            self.notes.add(line)
        self.first = self.first or line
        self.lines += 1

    def close(self) -> None:
        if self.lines:
            more = f"; and {self.lines - 1:,} more lines" if self.lines > 1 else ""
            self.notes.add(self.first[:200] + more)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run directory."""

    run: Path
    notes: Notes

    def name(self, path: Path) -> str:
        """What notes call a file: from the run's directory, so that a run that was moved gives the same page.
        An error names the whole path."""
        if self.notes.strict or not path.is_relative_to(self.run):
            return str(path)
        return path.relative_to(self.run).as_posix()

    def open(self, path: Path) -> IO[bytes] | None:
        """A file, open to be read; None, and a note, where it cannot be, or is a link that leads out of the
        run; None alone where there is none."""
        try:
            if path.is_symlink() and not path.resolve().is_relative_to(self.run.resolve()):
                raise ValueError("it is a link that leads out of the run")
            return open_file(path) if path.exists() else None
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a link to itself
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self.notes.add(f"{self.name(path)} cannot be read: {reason}")
            return None

    def text(self, path: Path, most: int = LARGEST) -> str | None:
        """A whole text file; None where there is none, or none that can be read."""
        handle = self.open(path)
        if handle is None:
            return None
        try:
            with handle:
                return whole_text(handle, most)
        except (OSError, ValueError) as error:
            self.notes.add(f"{self.name(path)} cannot be read: {error}")
            return None

    def object(self, path: Path) -> dict[str, Any]:
        """The object in a file of JSON; {} where there is none."""
        text = self.text(path)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.notes.add(f"{self.name(path)} is not JSON: {error}")
            return {}
        if not isinstance(value, dict):
            self.notes.add(f"{self.name(path)} does not hold a JSON object")
            return {}
        return value

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a JSON-lines file, each with its line's number. A last line without its end is still
        being written: it is left out."""
        handle = self.open(path)
        if handle is None:
            return
        odd = _Odd(self.notes)
        with handle:
            if handle.seek(0, 2) > _LARGEST_LOG:
                self.notes.add(f"{self.name(path)} is larger than any log")
                return
            handle.seek(0)
            try:
                for number, line in _lines(handle):
                    if not line.strip():
                        continue
                    row = self._row(path, number, line, odd)
                    if row is not None:
                        yield number, row
            finally:
                odd.close()

    def _row(self, path: Path, number: int, line: bytes, odd: _Odd) -> dict[str, Any] | None:
        where = f"{self.name(path)}:{number}"
        if len(line) >= _LONGEST_LINE:
            odd.add(f"{where} is longer than any line that keel writes")
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                odd.add(f"{where} is not JSON: {error}")
            return None
        if not isinstance(row, dict):
            odd.add(f"{where} is not a JSON object")
            return None
        return row


def _lines(handle: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long its beginning."""
    number = 0
    while line := handle.readline(_LONGEST_LINE):
        number += 1
        piece = line
        while len(piece) == _LONGEST_LINE and not piece.endswith(b"\n"):
            piece = handle.readline(_LONGEST_LINE)
        yield number, line
