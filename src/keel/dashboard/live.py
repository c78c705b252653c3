"""What is new of a run or of several, since a reader's last look."""

from __future__ import annotations

import json
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from keel.dashboard.keel_run import Stage
from keel.dashboard.reduce import Points, as_json, band, extremes, numbers_json, within
from keel.dashboard.runs import METRICS, QUANTITIES, TIMES, OpenRun, Runs, focus, guarded
from keel.dashboard.samples import groups
from keel.dashboard.table import Position, Table
from keel.report import pictures, reward_models

BOOT = secrets.token_hex(4)  # of this server: what another one counted means nothing here
MOST = 1200  # points of a curve of one run
MOST_TOGETHER = 12_000  # points of all curves in one picture
SMOOTHED = 16  # curves in one picture that are drawn with a line through their middle
PIECES = 150  # of a band
BANDS_AGAIN = 3.0  # seconds between two reckonings of the bands of runs that are written


_POSITION = re.compile(r"[0-9a-z]{1,8}:[0-9]{1,11}\.[0-9]{1,17}")  # a table's key, its epoch, its rows


class Event(NamedTuple):
    """An event as it is sent."""

    name: str
    data: dict[str, Any]


class Positions:
    """How far a reader has read which tables; sent with each event, and brought back by a reader who was cut
    off, so that only what is new is sent again."""

    def __init__(self, text: str = "") -> None:
        self._known: dict[str, Position] = {}
        boot, *parts = text[:65536].split("~")
        if boot != BOOT:
            return
        for part in parts:
            key, _, place = part.partition(":")
            epoch, _, rows = place.partition(".")
            if _POSITION.fullmatch(part):
                self._known[key] = Position(int(epoch), int(rows))

    def get(self, key: str) -> Position:
        return self._known.get(key, Position())

    def put(self, key: str, position: Position) -> None:
        self._known[key] = position

    def __str__(self) -> str:
        return "~".join([BOOT, *(f"{key}:{p.epoch}.{p.rows}" for key, p in self._known.items())])


def table_key(*parts: str) -> str:
    """A short name of a table for a position."""
    return f"{zlib.crc32(chr(0).join(parts).encode('utf-8', 'replace')):x}"


def news(
    table: Table,
    positions: Positions,
    key: str,
    names: Iterable[str] | None,
    most: int,
    *,
    middle: bool = True,
) -> dict[str, Any] | None:
    """What is new of a table since a reader's position, which is moved on; None where nothing is.
    {"reset": whether what was read before is void, "rows", "series": {name: [steps, values]}}."""
    before, now = positions.get(key), table.position
    reset = before.epoch != now.epoch or before.rows > now.rows
    if before == now:
        return None
    since = 0 if reset else before.rows
    series = {}
    for name in table.columns if names is None else names:
        points = Points(*table.points(name, since))
        if len(points.steps):
            series[name] = as_json(points, most, middle=middle)
    positions.put(key, now)
    return {"reset": reset, "rows": now.rows, "series": series}


class RunFeed:
    """One run's page: its state, and the curves of one stage."""

    def __init__(self, run: OpenRun, stage: str | None, positions: Positions) -> None:
        self._run, self._stage, self.positions = run, stage, positions
        self._said: dict[str, str] = {}
        self._replies: dict[str, tuple[int, int, dict[str, int]]] = {}  # stage → epoch, replies, as they were

    def poll(self) -> list[Event]:
        """What is new."""
        with self._run.lock:
            state = self._run.state()
            stages = self._run.facts().stages
            chosen = choose(stages, self._stage)
            state["shown"] = chosen.name if chosen else None
            events = self._state_events(state)
            if chosen is not None:
                for file in (METRICS, TIMES):
                    key = table_key(self._run.name, chosen.name, file)
                    new = news(self._run.table(chosen, file), self.positions, key, None, MOST)
                    if new is not None:
                        events.append(Event("points", {"stage": chosen.name, "file": file, **new}))
            events += [event for stage in stages for event in self._reply_events(stage)]
        return events

    def _reply_events(self, stage: Stage) -> list[Event]:
        """Of which steps or models a stage has kept replies, and how many: those that changed."""
        samples = self._run.samples(stage)
        epoch, count, known = self._replies.get(stage.name, (-1, 0, {}))
        if (samples.epoch, len(samples.spots)) == (epoch, count) or not (count or samples.spots):
            return []
        reset = epoch != samples.epoch
        found = dict(groups(samples))
        self._replies[stage.name] = samples.epoch, len(samples.spots), found
        changed = [[name, n] for name, n in found.items() if reset or known.get(name) != n]
        return [Event("replies", {"stage": stage.name, "reset": reset, "groups": changed})]

    def _state_events(self, state: dict[str, Any]) -> list[Event]:
        """The run's state where it changed: its head, and those stages that did."""
        stages = state.pop("stages")
        parts = {"run": state, **{f"stage {one['name']}": one for one in stages}}
        parts["order"] = {"names": [one["name"] for one in stages]}
        changed: dict[str, Any] = {}
        for name, part in parts.items():
            text = json.dumps(part, sort_keys=True)
            if self._said.get(name) != text:
                self._said[name], changed[name] = text, part
        if not changed:
            return []
        data = {key: changed[key] for key in ("run", "order") if key in changed}
        data["stages"] = [part for name, part in changed.items() if name.startswith("stage ")]
        return [Event("state", data)]


def choose(stages: Sequence[Stage], name: str | None) -> Stage | None:
    """The stage of that name, else the one that is at work or was last."""
    asked = next((stage for stage in stages if stage.name == name), None)
    return asked or focus(list(stages)) or (stages[-1] if stages else None)


class ListFeed:
    """The list of all runs."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._said: dict[str, str] = {}
        self._spoke = False
        self.positions = ""

    def poll(self) -> list[Event]:
        """The runs that changed, and the names of those that are gone."""
        changed, names = [], set()
        for run in self._runs.all():
            names.add(run.name)
            with run.lock:
                line = guarded(run.summary, None)
            text = json.dumps(line, sort_keys=True)
            if line is not None and self._said.get(run.name) != text:
                self._said[run.name] = text
                changed.append(line)
        gone = [name for name in self._said if name not in names]
        for name in gone:
            del self._said[name]
        if not (changed or gone) and self._spoke:
            return []
        self._spoke = True
        return [Event("runs", {"runs": changed, "gone": gone})]


@dataclass(frozen=True, slots=True)
class Line:
    """One run's part in a picture."""

    run: OpenRun
    stage: Stage
    group: str | None
    seed: int | None
    metrics: dict[str, str]  # quantity → the metric that it is in this run


class CompareFeed:
    """Several runs in one picture a quantity; runs that differ in their seed alone as a band where asked."""

    def __init__(
        self, runs: Sequence[OpenRun], quantities: Sequence[str], bands: bool, positions: Positions
    ) -> None:
        self._runs, self._quantities, self._bands, self.positions = runs, quantities, bands, positions
        self._drawn: dict[str, tuple[float, list[Position]]] = {}
        self._said: dict[str, str] = {}

    def poll(self) -> list[Event]:
        """What is new."""
        lines = [line for run in self._runs if (line := line_of(run, self._quantities)) is not None]
        grouped = by_group(lines) if self._bands else {}
        single = [line for line in lines if not any(line in group for group in grouped.values())]
        most = max(min(MOST_TOGETHER // max(len(lines), 1), MOST), 60)
        events, curves = self._legend(lines, grouped), []
        for line in single:
            key = table_key(line.run.name, line.stage.name, METRICS)
            with line.run.lock:
                table = line.run.table(line.stage)
                middle = len(lines) <= SMOOTHED
                new = news(table, self.positions, key, line.metrics.values(), most, middle=middle)
            if new is not None:
                named = {
                    quantity: new["series"][metric]
                    for quantity, metric in line.metrics.items()
                    if metric in new["series"]
                }
                curves.append({"run": line.run.name, "reset": new["reset"], "series": named})
        events += [Event("points", {"runs": curves})] if curves else []
        for name, group in grouped.items():
            events += self._band(name, group)
        return events

    def _legend(self, lines: Sequence[Line], grouped: dict[str, list[Line]]) -> list[Event]:
        said = {
            "lines": [
                {"run": line.run.name, "stage": line.stage.name, "seed": line.seed, "metrics": line.metrics}
                for line in lines
            ],
            "groups": {name: [line.run.name for line in group] for name, group in grouped.items()},
            "missing": [run.name for run in self._runs if run not in [line.run for line in lines]],
        }
        text = json.dumps(said, sort_keys=True)
        if self._said.get("legend") == text:
            return []
        self._said["legend"] = text
        return [Event("legend", said)]

    def _band(self, name: str, group: list[Line]) -> list[Event]:
        positions = []
        for line in group:
            with line.run.lock:
                positions.append(line.run.table(line.stage).position)
        drawn, before = self._drawn.get(name, (0.0, []))
        if positions == before or time.monotonic() - drawn < BANDS_AGAIN:
            return []
        self._drawn[name] = time.monotonic(), positions
        found = {quantity: band_of(group, quantity) for quantity in self._quantities}
        return [Event("band", {"group": name, "series": {k: v for k, v in found.items() if v is not None}})]


def line_of(run: OpenRun, quantities: Sequence[str]) -> Line | None:
    """A run's stage that has most to say of what is asked; None where none has any of it."""
    with run.lock:
        facts = guarded(run.facts, None)
        if facts is None:
            return None
        best: Line | None = None
        for stage in facts.stages:
            if stage.status in ("out of date", "not run yet"):
                continue
            columns = run.table(stage).columns
            found = {q: metric for q in quantities if (metric := metric_of(q, columns)) is not None}
            if found and (best is None or len(found) >= len(best.metrics)):
                best = Line(run, stage, facts.group, facts.seed, found)
    return best


def metric_of(quantity: str, columns: Iterable[str]) -> str | None:
    """The metric that a quantity is; a quantity that nobody named is a metric itself."""
    known = QUANTITIES.get(quantity)
    return next((m for m in (known[2] if known else (quantity,)) if m in columns), None)


def by_group(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Name of a group → its lines, for those of two seeds or more. A group is named by what its runs' names
    begin with."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line.group is not None and line.seed is not None:
            groups.setdefault(line.group, []).append(line)
    named: dict[str, list[Line]] = {}
    for key, group in groups.items():
        if len({line.seed for line in group}) > 1:
            first = _beginning([line.run.name for line in group]) or key
            named[first if first not in named else f"{first} ({key})"] = group
    return named


def _beginning(names: Sequence[str]) -> str:
    same = 0
    while all(len(name) > same and name[same] == names[0][same] for name in names):
        same += 1
    start = names[0][:same].rstrip("-_ /=")
    for word in ("seed", "s"):
        if start.endswith(tuple(f"{mark}{word}" for mark in "-_ ")):
            start = start[: -len(word) - 1]
    return start


def band_of(group: Sequence[Line], quantity: str, low: float | None = None, high: float | None = None) -> Any:
    """A quantity over the seeds of a group, as {"steps", "middle", "low", "high", "runs"}."""
    curves = []
    for line in group:
        if quantity in line.metrics:
            with line.run.lock:
                points = Points(*line.run.table(line.stage).points(line.metrics[quantity]))
            curves.append(within(points, low, high))
    found = band(curves, PIECES)
    if not len(found.steps):
        return None
    return {
        "steps": found.steps.tolist(), "middle": numbers_json(found.middle), "low": numbers_json(found.low),
        "high": numbers_json(found.high), "runs": int(np.max(found.runs)),
    }  # fmt: skip


def drawn(run: OpenRun) -> dict[str, Any]:
    """The pictures of what evaluations found, and what they say of the reward model."""
    with run.lock:
        facts = run.facts()
        figures: list[pictures.Picture] = []
        tables: list[dict[str, Any]] = []
        for stage in facts.stages:
            if not stage.shown_as.compares or not stage.result:
                continue
            found = stage.result.get("reward_model")
            judged: Callable[[], Any] = lambda stage=stage: pictures.judgement(  # noqa: E731
                stage.name, stage.result, facts.config
            )
            figures += guarded(judged, [])
            if isinstance(found, dict):
                diagram = guarded(
                    lambda stage=stage, found=found: reward_models.reliability_diagram(stage.name, found),
                    None,
                )
                figures += [diagram] if diagram is not None else []
                rows = guarded(lambda found=found: reward_models.lines(found), [])
                tables.append({"stage": stage.name, "rows": [list(map(str, row)) for row in rows]})
        path = guarded(lambda: pictures.trajectories(_with_scores(run, facts.stages), {}), None)
        figures += [path] if path is not None else []
    return {
        "pictures": [
            {"id": p.id, "title": p.title, "unit": p.unit, "keys": [list(key) for key in p.keys], **p.figure}
            for p in figures
        ],
        "reward_models": tables,
    }


def _with_scores(run: OpenRun, stages: Sequence[Stage]) -> list[Any]:
    found = []
    for stage in stages:
        if stage.shown_as.on_policy:
            table = run.table(stage)
            metrics = {}
            for name in ("objective/kl", "objective/scores"):
                points = extremes(Points(*table.points(name)), 3000)
                values = [None if v != v else v for v in points.values.tolist()]
                metrics[name] = list(zip(points.steps.tolist(), values))
            found.append(stage.as_report(metrics))
    return found
