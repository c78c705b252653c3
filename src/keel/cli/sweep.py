"""`keel sweep`: a config over settings and seeds, each point a run of its own.

Points share what they can: before a point runs, stages that another point has done with the same fingerprint
are taken from it, and a point waits while a stage that it needs is in the making in another. What is done is
never done again.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import yaml

from keel.config import RunConfig, read
from keel.errors import UsageError
from keel.pipeline import dates
from keel.pipeline.pipeline import Pipeline, locked
from keel.report import sweeps
from keel.rundir import kept
from keel.rundir.checkpoint import write_json, write_text

CONFIG = "base.yaml"  # in a sweep's directory: what its points are run from
POLL = 0.3  # seconds between looks at what is running
LONGEST_NAME = 80
WHOLE = (".safetensors", ".bin")  # files that are written once and never changed: hard links do


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep."""

    name: str
    settings: Mapping[str, Any]  # swept key → its value here
    seed: int
    overrides: tuple[str, ...]  # all that the run is started with
    pipeline: Pipeline

    @property
    def directory(self) -> Path:
        return self.pipeline.directory

    def missing(self) -> list[str]:
        """Stages that are not done."""
        return [name for name in self.pipeline.config.stages if not self.pipeline.is_done(name)]


class Process(Protocol):
    """What the sweep needs of a process; subprocess.Popen is one."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> int: ...


# ---------------------------------------------------------------- what is swept


def grid(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """(overrides with one value, swept key → its values): `key=1,2,3` is swept, values are YAML between
    commas.

    UsageError for what is no override, a value given twice, and for what cannot be swept.
    """
    fixed: list[str] = []
    swept: dict[str, list[Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(
                f"{override!r} is not a setting: write dotted.key=value, or dotted.key=1,2,3 to sweep it"
            )
        if key in ("seed", "name"):
            raise UsageError(
                f"{override!r}: "
                f"{'seeds are given by --seeds 0,1,2' if key == 'seed' else 'the name is given by --name'}"
            )
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError as error:
            raise UsageError(f"{override!r}: the values are not YAML: {error}") from None
        if len(values) < 2:
            fixed.append(override)
            continue
        shown = [json.dumps(value, sort_keys=True) for value in values]
        if key in swept or len(set(shown)) < len(shown):
            raise UsageError(f"{override!r}: {'the key' if key in swept else 'a value'} is given twice")
        swept[key] = values
    return fixed, swept


def seeds_of(text: str | None) -> list[int]:
    """The seeds in `0,1,2`; [] for None. UsageError for what is none, or is given twice."""
    if text is None:
        return []
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text!r}: write whole numbers between commas, such as 0,1,2") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise UsageError(f"--seeds {text!r}: different numbers of 0 or more")
    return found


def points(
    config: Path,
    overrides: Sequence[str],
    seeds: Sequence[int],
    runs: Path,
    name: str | None,
    say: Callable[[str], None],
) -> tuple[Path, list[Point]]:
    """The directory of the sweep and its points, seed by seed. UsageError for settings that any of them
    cannot have."""
    fixed, swept = grid(overrides)
    base = read(config, fixed)
    given = list(seeds) or [base.seed]
    if not swept and len(given) < 2:
        raise UsageError(
            "nothing to sweep: give a setting several values, such as ppo.kl.coef=0.01,0.1, or several "
            "--seeds"
        )
    directory = runs / (name or f"{base.name}-sweep")
    if (directory / "config.yaml").exists():
        raise UsageError(f"{directory} is a run, not a sweep: give another --name")
    found: list[Point] = []
    fixed += _day(base, directory)
    for seed, values in itertools.product(given, itertools.product(*swept.values())):
        settings = dict(zip(swept, values, strict=True))
        point = _name(settings, seed)
        changes = [*fixed, *(f"{key}={json.dumps(value)}" for key, value in settings.items()), f"seed={seed}"]
        own = read(config, [*changes, f"name={json.dumps(point)}"])
        for stage, facts in own.stages.items():
            if facts.asks_people:
                raise UsageError(
                    f"stage {stage!r} waits for people's votes, which no point of a sweep can wait for: run "
                    "it alone, or name a world's annotators"
                )
        found.append(
            Point(point, settings, seed, tuple(changes), Pipeline(own, directory / "points" / point, say))
        )
    return directory, found


def _day(base: RunConfig, directory: Path) -> list[str]:
    """An override with the day of the sweep's first start, where a template writes one and the config names
    none: points that start tomorrow share stages with those of today."""
    pipeline = Pipeline(base, directory)
    if base.date is not None or pipeline.day() is None:
        return []
    begun = [dates.kept(path.parent) for path in sorted(directory.glob("points/*/config.yaml"))]
    return [f"date={next((day for day in begun if day), pipeline.day())}"]


def _name(settings: Mapping[str, Any], seed: int) -> str:
    """A name for a directory: settings and seed, with a hash of them where something had to be left out."""
    whole = "_".join([*(f"{key}-{value}" for key, value in settings.items()), f"seed-{seed}"])
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", whole)[:LONGEST_NAME]
    return slug if slug == whole else f"{slug}_{sha256(whole.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------- what points share


def take(point: Point, others: Sequence[Point]) -> list[str]:
    """Take every stage that is missing and that another point has done with the same fingerprint. Returns
    their names."""
    reused: list[str] = []
    for name in point.missing():
        own = point.pipeline.fingerprint(name)
        for other in others:
            if (
                other is point
                or name not in other.pipeline.config.stages
                or other.pipeline.fingerprint(name) != own
            ):
                continue
            if other.pipeline.is_done(name):
                _copy(other.pipeline.stage_directory(name), point.pipeline.stage_directory(name))
                reused.append(name)
                break
    return reused


def _copy(source: Path, target: Path) -> None:
    """A whole stage, or none of it: weights by hard link where the disk can, the rest copied."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, copy_function=_link)
    kept.keep(target)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    if source.endswith(WHOLE):
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copy2(source, target)


# ---------------------------------------------------------------- running


@dataclass
class Sweep:
    """Points at work."""

    config: Path
    directory: Path
    points: Sequence[Point]
    jobs: int
    say: Callable[[str], None] = print
    failed: dict[str, str] = field(default_factory=dict)  # point → the last line that it said

    def run(self) -> dict[str, Any]:
        """Run what is not done, `jobs` points at a time; a point that fails leaves the others alone. Returns
        the facts of `sweep.json`, which with the page is written again after every point."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory):
            self._keep_config()
            waiting = [point for point in self.points if point.missing()]
            done = len(self.points) - len(waiting)
            if done:
                self.say(f"{done} of {len(self.points)} points done before, unchanged")
            facts = self._write()
            with self._children() as running:
                while waiting or running:
                    self._start_more(waiting, running)
                    ended = [name for name, (_, process) in running.items() if process.poll() is not None]
                    for name in ended:
                        self._ended(*running.pop(name))
                        facts = self._write()
                    if running and not ended:
                        time.sleep(POLL)
        return facts

    def _keep_config(self) -> None:
        """A copy of the config, which all points are run from: an edit while the sweep is at work reaches
        none of them. UsageError where it was edited already."""
        copy = self.directory / CONFIG
        write_text(copy, self.config.read_text(encoding="utf-8"))
        for point in self.points:
            if read(copy, [*point.overrides, f"name={json.dumps(point.name)}"]) != point.pipeline.config:
                raise UsageError(f"{self.config} was changed while the sweep began; start again")

    def _start_more(self, waiting: list[Point], running: dict[str, tuple[Point, Process]]) -> None:
        for point in list(waiting):
            if len(running) >= self.jobs:
                return
            making = {p.pipeline.fingerprint(name) for p, _ in running.values() for name in p.missing()}
            if any(point.pipeline.fingerprint(name) in making for name in point.missing()):
                continue  # it will be there to take
            waiting.remove(point)
            point.directory.mkdir(parents=True, exist_ok=True)
            with locked(point.directory):
                reused = take(point, self.points)
            place = f"{list(self.points).index(point) + 1}/{len(self.points)} {point.name}"
            shared = f", with {', '.join(reused)} of another point" if reused else ""
            self.say(f"{place}: running{shared} (log: {self._log(point)})")
            running[point.name] = (point, start(point, self.directory / CONFIG, self._log(point)))

    def _ended(self, point: Point, process: Process) -> None:
        code = process.poll()
        if code == 0 and not point.missing():
            self.failed.pop(point.name, None)
            self.say(f"{point.name}: done")
            return
        said = [line for line in self._log(point).read_text(encoding="utf-8").splitlines() if line.strip()]
        self.failed[point.name] = said[-1] if said else f"ended with exit code {code}"
        self.say(f"{point.name}: failed: {self.failed[point.name]}")

    def _log(self, point: Point) -> Path:
        return self.directory / "logs" / f"{point.name}.log"

    @contextmanager
    def _children(self) -> Iterator[dict[str, tuple[Point, Process]]]:
        """What is running; ended with the sweep, however that ends."""
        running: dict[str, tuple[Point, Process]] = {}
        try:
            yield running
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()

    def _write(self) -> dict[str, Any]:
        shown = [
            sweeps.Ended(
                p.name, p.directory, p.settings, p.seed, self._status(p), self.failed.get(p.name, "")
            )
            for p in self.points
        ]
        found = sweeps.gather(self.directory.name, shown)
        facts = sweeps.facts(found, self.directory)
        write_json(self.directory / "sweep.json", facts)
        sweeps.write_csv(found, self.directory / "sweep.csv")
        sweeps.write(found, self.directory / "report.html")
        return facts

    def _status(self, point: Point) -> str:
        return "failed" if point.name in self.failed else "not run" if point.missing() else "done"


def start(point: Point, config: Path, log: Path) -> Process:
    """A run of the point in a process of its own, whose words go to `log`. It ends with this process, however
    that ends: this one holds the other end of its standard input."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "keel",
        "run",
        str(config),
        *point.overrides,
        "--runs",
        str(point.directory.parent),
        "--name",
        point.name,
        "--while-stdin",
    ]
    with log.open("w", encoding="utf-8") as words:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words)
