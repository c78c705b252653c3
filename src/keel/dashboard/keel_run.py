"""A run of keel as the dashboard shows it. Nothing in a folder of somebody else is taken for granted: what is
missing, half written or of another form is left out, and no name leads out of the run's folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from keel.dashboard.tail import read_text
from keel.pipeline.stage_kinds import StageKind, shown_as
from keel.report.reading import StageRun, inputs_of
from keel.rundir.stage_files import PROGRESS
from keel.rundir.worker import LOCK, Worker, worker

LARGEST = 16 * 2**20  # bytes of a file that is read whole
MOST_STAGES = 200
MOST_VALUES = 200_000  # of a config
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
# lines of a config in which two runs of one group may differ, with what is indented below them
_OWN = re.compile(r"^(?:name|seed|description|date|threads|workers|device):.*\n(?:[ \t].*\n)*", re.MULTILINE)

Value = TypeVar("Value")


class Cached:
    """What a file says, read again when it changed."""

    def __init__(self, path: Path, parse: Callable[[str], Value], empty: Value) -> None:
        self._path, self._parse, self._empty = path, parse, empty
        self._seen: tuple[int, int] | None = None
        self._value = empty

    @property
    def value(self) -> Any:
        try:
            state = self._path.stat()
            seen = (state.st_size, state.st_mtime_ns)
        except OSError:
            seen = None
        if seen != self._seen:
            self._seen = seen
            self._value = self._parse(read_text(self._path, LARGEST)) if seen else self._empty
        return self._value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def yaml_object(text: str) -> dict[str, Any]:
    """A mapping in YAML; {} for anything else, and where a few lines stand, by aliases, for a great deal."""
    try:
        value = yaml.load(text, _LOADER)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError):
        return {}
    return value if isinstance(value, dict) and _is_small(value) else {}


def _is_small(value: object) -> bool:
    waiting, seen = [value], 0
    while waiting:
        one = waiting.pop()
        inside = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        seen += len(inside)
        if seen > MOST_VALUES:
            return False
        waiting += inside
    return True


def mapping(value: object) -> dict[str, Any]:
    """The value where it is a mapping with names; {} otherwise."""
    return {k: v for k, v in value.items() if isinstance(k, str)} if isinstance(value, dict) else {}


def words(value: object, most: int) -> str:
    """The value as a text of at most `most` characters; "" for nothing, and for a number that Python does not
    write out."""
    try:
        return str(value or "")[:most]
    except (ValueError, RecursionError):
        return ""


def number(value: object) -> float | None:
    """The value where it is a finite number; None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def is_plain_name(name: str) -> bool:
    """Whether a stage's name is one folder inside `stages`."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\\0") and len(name) < 200


@dataclass(slots=True)
class Stage:
    """One stage: what was asked of it, and how far it is."""

    name: str
    kind: str
    status: str  # "running" | "done" | "interrupted" | "not run yet" | "out of date" | "begun"
    directory: Path
    inputs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # stage.json
    result: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None  # of the whole stage
    column: int = 0
    row: int = 0

    @property
    def shown_as(self) -> StageKind:
        """How stages of its kind are shown."""
        return shown_as(self.kind)

    def as_report(self, metrics: Mapping[str, list[tuple[int, float | None]]] | None = None) -> StageRun:
        """The stage as the report's functions take it."""
        return StageRun(
            self.name, self.kind, self.status, self.directory, self.settings, self.inputs, self.facts,
            self.result, dict(metrics or {}),
        )  # fmt: skip


@dataclass(slots=True)
class Facts:
    """A run but for its numbers."""

    stages: list[Stage]
    config: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    updated: str = ""
    machine: str = ""
    seed: int | None = None
    group: str | None = None  # equal for runs that differ in name and seed alone
    worker: Worker | None = None


class KeelRun:
    """Reads a run again whenever one of its small files changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = Cached(path / "config.yaml", yaml_object, {})
        self._group = Cached(path / "config.yaml", group_of, None)
        self._manifest = Cached(path / "manifest.json", json_object, {})
        self._files: dict[Path, Cached] = {}

    def facts(self) -> Facts:
        """The run as it is now."""
        config, manifest = mapping(self._config.value), mapping(self._manifest.value)
        asked, recorded = mapping(config.get("stages")), mapping(manifest.get("stages"))
        names = [name for name in [*asked, *(n for n in recorded if n not in asked)] if is_plain_name(name)]
        names = names[:MOST_STAGES]
        working = worker(self.path)
        stages = [
            self._stage(name, mapping(asked.get(name)), mapping(recorded.get(name)), names, working)
            for name in names
        ]
        place(stages)
        seed = config.get("seed", manifest.get("seed"))
        machine = mapping(manifest.get("hardware"))
        return Facts(
            stages,
            config,
            created=words(manifest.get("created"), 40),
            updated=words(manifest.get("updated"), 40),
            machine=", ".join(words(machine[k], 80) for k in ("device", "name") if machine.get(k)),
            seed=seed if isinstance(seed, int) and abs(seed) < 2**63 else None,
            group=self._group.value,
            worker=working,
        )

    def _is_at_work(self, directory: Path) -> bool:
        """Whether it is this stage that the run's process works on: it writes a stage's fingerprint when it
        begins, after it has taken the lock."""
        try:
            begun = (directory / "fingerprint").stat().st_mtime_ns
            return begun >= (self.path / LOCK).stat().st_mtime_ns
        except OSError:
            return False

    def _object(self, path: Path) -> dict[str, Any]:
        return self._files.setdefault(path, Cached(path, json_object, {})).value

    def _stage(
        self,
        name: str,
        asked: dict[str, Any],
        recorded: dict[str, Any],
        names: list[str],
        working: Worker | None,
    ) -> Stage:
        directory = self.path / "stages" / name
        written = self._object(directory / "stage.json")
        kinds = (words(facts.get("kind"), 80) for facts in (asked, written, recorded))
        stage = Stage(
            name, next(filter(None, kinds), "stage"), "not run yet", directory, inputs_of(asked, names), asked
        )
        wanted = recorded.get("fingerprint")
        made = written.get("fingerprint") or read_text(directory / "fingerprint", 200).strip()
        if wanted and made and wanted != made:
            stage.status = "out of date"
            return stage
        if written:
            stage.status = "done"
        elif working is not None and self._is_at_work(directory):
            stage.status = "running"
        elif made:
            stage.status = "interrupted"
        stage.facts = written
        stage.result = self._object(directory / "result.json") if written else {}
        for found in (self._object(directory / PROGRESS), mapping(written.get("facts"))):
            steps = number(found.get("steps"))
            stage.steps = int(steps) if steps is not None and steps > 0 else stage.steps
        return stage


def place(stages: list[Stage]) -> None:
    """Put each stage right of everything that it takes something from."""
    columns: dict[str, int] = {}
    filled: dict[int, int] = {}
    for stage in stages:
        column = max((columns[name] + 1 for name in stage.inputs if name in columns), default=0)
        columns[stage.name] = stage.column = column
        stage.row = filled.get(column, 0)
        filled[column] = stage.row + 1


def group_of(text: str) -> str | None:
    """What is equal for runs whose configs differ in their name and seed alone; None without a config."""
    if not text.strip():
        return None
    return hashlib.blake2b(_OWN.sub("", text).encode("utf-8", "replace"), digest_size=6).hexdigest()


def resident_mib(pid: int) -> float | None:
    """Memory that a process holds now, in MiB; None where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
