"""What a sweep found: settings × measures over seeds, as a table, as files, and as a page with pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from keel.evaluation.measures import Measure, across_runs
from keel.report import comparison, overoptimization, page, pictures
from keel.report.comparison import Cell
from keel.report.pictures import Key, Picture
from keel.report.reading import read
from keel.report.summary import table
from keel.report.wording import bound, decimals, mean, measure, number, order, signed
from keel.rundir.checkpoint import write_text

MOST_MEASURES = 8  # columns, where no evaluate stage says what matters
ALL = "every setting"  # what a row is called that no swept setting changes


class Ended(NamedTuple):
    """A point as far as it came."""

    name: str
    run: Path
    settings: Mapping[str, Any]
    seed: int
    status: str  # "done" | "failed" | "not run"
    error: str  # the last that a failed one said


@dataclass(frozen=True, slots=True)
class Row:
    """One model (or stage) at one setting, over the seeds that are done."""

    settings: str
    values: Mapping[str, Any]  # swept key → value; {} where no swept setting changes it
    subject: str
    by_seed: Mapping[int, Mapping[str, float]]  # seed → measure → mean
    measures: Mapping[str, Measure]


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that the outputs of a sweep are made of."""

    name: str
    points: Sequence[Ended]
    measured: Mapping[
        str, Mapping[str, Mapping[str, Any]]
    ]  # point → subject → measures as result.json has them
    rows: Sequence[Row]
    columns: Sequence[str]
    ways: Mapping[str, Sequence[overoptimization.Path]]  # of over-optimisation, by setting


def shown(settings: Mapping[str, Any]) -> str:
    """ "ppo.kl.coef=0.1, ppo.lr=1e-4"; "" where only seeds are swept."""
    return ", ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    )


# ---------------------------------------------------------------- gathering


def gather(name: str, points: Sequence[Ended]) -> Found:
    """Read the results of all points that are done."""
    done = [point for point in points if point.status == "done"]
    measured = {point.name: _measured(point.run) for point in done}
    subjects = dict.fromkeys(subject for found in measured.values() for subject in found)
    by_setting: dict[str, list[Ended]] = {}
    for point in done:
        by_setting.setdefault(shown(point.settings), []).append(point)
    rows = [row for subject in subjects for row in _rows(subject, by_setting, measured)]
    known = [m for m in comparison.COLUMNS if any(m in row.measures for row in rows)]
    columns = known or order(m for row in rows for m in row.measures)[:MOST_MEASURES]
    return Found(name, points, measured, rows, columns, _ways(by_setting))


def _measured(path: Path) -> dict[str, dict[str, Any]]:
    """Subject → its measures: the models of the evaluate stages; of a run without any, its stages."""
    run = read(path)
    judged = run.with_models
    names = [model for stage in judged for model in stage.result["models"]]
    found = {
        model if names.count(model) == 1 else f"{stage.name}:{model}": dict(measures)
        for stage in judged
        for model, measures in stage.result["models"].items()
    }
    return found or {
        stage.name: {
            name: value for name, value in stage.result.items() if mean(stage.result, name) is not None
        }
        for stage in run.stages
        if stage.result
    }


def _rows(
    subject: str,
    by_setting: Mapping[str, Sequence[Ended]],
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[Row]:
    """A row for each setting; a single one for what no swept setting changes."""
    found: list[Row] = []
    for label, points in by_setting.items():
        own = {p.seed: measured[p.name][subject] for p in points if subject in measured[p.name]}
        means = {
            s: {m: v for m in measures if (v := mean(measures, m)) is not None} for s, measures in own.items()
        }
        if own:
            found.append(Row(label, points[0].settings, subject, means, _over_seeds(list(own.values()))))
    same = len(found) > 1 and all(row.by_seed == found[0].by_seed for row in found)
    return [Row(ALL, {}, subject, found[0].by_seed, found[0].measures)] if same else found


def _over_seeds(own: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """Of a single seed its own intervals; else the mean over seeds with Student's."""
    found: dict[str, Measure] = {}
    for name in dict.fromkeys(name for measures in own for name in measures):
        values = [value for measures in own if (value := mean(measures, name)) is not None]
        if len(own) > 1 and len(values) > 1:
            found[name] = across_runs(values)
        elif values:
            ends = {end: bound(own[0], name, end) for end in ("low", "high", "n")}
            alone = {"mean": values[0], "low": values[0], "high": values[0], "n": 1.0}
            found[name] = {**alone, **{end: value for end, value in ends.items() if value is not None}}
    return found


def _ways(by_setting: Mapping[str, Sequence[Ended]]) -> dict[str, Sequence[overoptimization.Path]]:
    """The ways of over-optimisation of each setting; what is the same in several stands once."""
    by_name: dict[str, dict[str, Sequence[overoptimization.Path]]] = {}
    for label, points in by_setting.items():
        for name, own in overoptimization.by_name([read(point.run) for point in points]).items():
            if own not in by_name.setdefault(name, {}).values():
                by_name[name][label] = own
    return {
        name if len(settings) == 1 else f"{name}, {label}": own
        for name, settings in by_name.items()
        for label, own in settings.items()
    }


# ---------------------------------------------------------------- words


def verdict(found: Found) -> str:
    """Which setting did best, by gold where there is one, and whether it can be told apart from the second of
    the same model; where only seeds are swept, which model."""
    failed = [point for point in found.points if point.status == "failed"]
    lost = f" {len(failed)} of {len(found.points)} points failed." if failed else ""
    by = next((by for by in ("gold", "proxy") if any(by in row.measures for row in found.rows)), None)
    changed = [row for row in found.rows if row.settings != ALL and by in row.measures]
    rated = sorted(changed, key=lambda row: row.measures[str(by)]["mean"], reverse=True)
    done = f"{len(found.points) - len(failed)} of {len(found.points)} points are done"
    if by is not None and not rated and any(row.settings == ALL and by in row.measures for row in found.rows):
        return f"{done}; the settings that are swept change nothing that was measured.{lost}"
    if by is None or not rated:
        return f"{done}; no reward was measured.{lost}"
    best = rated[0]
    text = f"{_named(best)} has the highest {by} reward, {_value(best.measures[by])}"
    second = next((row for row in rated[1:] if row.subject == best.subject or not best.settings), None)
    if second is None:
        return f"{text}.{lost}"
    seeds = [seed for seed in best.by_seed if by in second.by_seed.get(seed, {})]
    apart = [best.by_seed[seed][by] - second.by_seed[seed][by] for seed in seeds]
    if len(apart) < 2:
        ahead = best.measures[by]["mean"] - second.measures[by]["mean"]
        lead = f"{text}, {signed(ahead, 3)} ahead of {_named(second)}"
        return f"{lead}; a single seed says nothing of how runs vary.{lost}"
    ahead = across_runs(apart)
    clear = "" if ahead["low"] > 0 else ", which includes 0: they cannot be told apart"
    interval = (
        f"{number(ahead['low'], 3)} to {number(ahead['high'], 3)}, paired over {len(apart)} seeds{clear}"
    )
    return f"{text}, {signed(ahead['mean'], 3)} ({interval}) ahead of {_named(second)}.{lost}"


def _named(row: Row) -> str:
    return f"{row.subject} with {row.settings}" if row.settings else row.subject


def _value(found: Measure) -> str:
    places = max(2, decimals([found["mean"]]))
    span = (
        f" ({number(found['low'], places)} to {number(found['high'], places)})"
        if found["low"] < found["high"]
        else ""
    )
    return number(found["mean"], places) + span


def cells(found: Found) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the table: setting where one is swept, model, then each measure with its
    interval."""
    swept = any(point.settings for point in found.points)
    body: list[list[Cell]] = []
    for row in found.rows:
        line = [*([Cell(row.settings)] if swept else []), Cell(row.subject)]
        for name in found.columns:
            one = row.measures.get(name)
            if one is None:
                line.append(Cell("–"))
                continue
            places = max(2, decimals([one["mean"]])) if name != "length" else 1
            ends = (
                f"{number(one['low'], places)} to {number(one['high'], places)}"
                if one["low"] < one["high"]
                else ""
            )
            line.append(Cell(number(one["mean"], places), ends))
        body.append(line)
    return [*(["Setting"] if swept else []), "Model", *(measure(name).label for name in found.columns)], body


def as_text(facts: Mapping[str, Any]) -> str:
    """Verdict, table and failures for a terminal."""
    head, body = facts["table"]["head"], facts["table"]["rows"]
    lines = [facts["verdict"], "", *table([head, *body])]
    if facts["overoptimization"]["rows"]:
        lines += ["", *table([facts["overoptimization"]["head"], *facts["overoptimization"]["rows"]])]
    failed = [point for point in facts["points"] if point["status"] == "failed"]
    lines += ["", *(f"failed: {point['name']}: {point['error']}" for point in failed)] if failed else []
    return "\n".join(lines)


# ---------------------------------------------------------------- files


def facts(found: Found, directory: Path) -> dict[str, Any]:
    """What `sweep.json` holds."""
    head, body = cells(found)
    return {
        "name": found.name,
        "verdict": verdict(found),
        "report": str(directory / "report.html"),
        "points": [
            {
                "name": p.name,
                "run": str(p.run),
                "settings": dict(p.settings),
                "seed": p.seed,
                "status": p.status,
                "error": p.error or None,
            }
            for p in found.points
        ],
        "rows": [
            {
                "settings": dict(row.values),
                "subject": row.subject,
                "seeds": list(row.by_seed),
                "measures": dict(row.measures),
            }
            for row in found.rows
        ],
        "table": {
            "head": head,
            "rows": [[f"{c.value} ({c.interval})" if c.interval else c.value for c in line] for line in body],
        },
        "overoptimization": {
            "head": list(overoptimization.HEAD),
            "rows": [line.cells for line in overoptimization.lines(found.ways)],
            "ways": overoptimization.facts(found.ways),
        },
    }


def write_csv(found: Found, path: Path) -> None:
    """A line a point, model and measure."""
    keys = list(dict.fromkeys(key for point in found.points for key in point.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", "seed", *keys, "model", "measure", "mean", "low", "high", "n"])
    for point in found.points:
        for subject, measures in found.measured.get(point.name, {}).items():
            for name in measures:
                ends = [
                    "" if (v := bound(measures, name, end)) is None else v
                    for end in ("mean", "low", "high", "n")
                ]
                own = [point.settings[key] for key in keys]
                writer.writerow([point.name, point.seed, *own, subject, name, *ends])
    write_text(path, text.getvalue())


def write(found: Found, path: Path) -> None:
    """The page: verdict, pictures, table, points."""
    drawn = [
        *(p for by in ("gold", "proxy", "kl") if (p := against_setting(found, by)) is not None),
        *overoptimization.drawn(found.ways),
    ]
    head, body = cells(found)
    seeds = {point.seed for point in found.points}
    page.put(
        path,
        page.fill(
            "sweep.html",
            drawn,
            name=found.name,
            verdict=verdict(found),
            head=head,
            rows=body,
            points=found.points,
            seeds=sorted(seeds),
            shown=shown,
            ways=(overoptimization.HEAD, [line.cells for line in overoptimization.lines(found.ways)]),
            pictures=drawn,
            done=sum(point.status == "done" for point in found.points),
        ),
    )


# ---------------------------------------------------------------- pictures


def against_setting(found: Found, by: str) -> Picture | None:
    """A measure against the swept setting, a line for each model and combination of the others; what no
    setting changes is a dashed level. None where nobody measured it, or only seeds were swept."""
    rows = [row for row in found.rows if by in row.measures]
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    if not keys:
        return None
    key = max(keys, key=lambda k: len({json.dumps(row.values.get(k)) for row in rows}))
    place, kind = _axis([row.values[key] for row in rows if key in row.values])
    layout = pictures._layout(x_title=key, height=330)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if key in row.values:
            others = {k: v for k, v in row.values.items() if k != key}
            lines.setdefault(row.subject + (f", {shown(others)}" if others else ""), []).append(row)
    traces, legend, values = [], [], []
    for position, (label, own) in enumerate(lines.items()):
        colour = pictures.model_colour(position + 1)
        traces.append(
            _line(label, [place(row.values[key]) for row in own], [row.measures[by] for row in own], colour)
        )
        legend.append(Key(label, colour, "line"))
        values += [row.measures[by][end] for row in own for end in ("low", "high")]
    for row in (row for row in rows if " best of " not in row.subject):
        if row.settings == ALL and (by != "kl" or row.measures[by]["mean"] > 0):
            layout.setdefault("shapes", []).append(pictures._level(y=row.measures[by]["mean"]))
            legend.append(Key(f"{row.subject}, {ALL}", "--ink", "dash"))
            values.append(row.measures[by]["mean"])
    layout["xaxis"]["type"], layout["hovermode"] = kind, "closest"
    if kind != "category":
        ticks = sorted({x for trace in traces for x in trace["x"]})
        layout["xaxis"] |= {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{x:g}" for x in ticks]}
    layout["yaxis"]["range"] = pictures._span(values, 0.15)
    return Picture(f"sweep-{by}", measure(by).label, "", tuple(legend), {"data": traces, "layout": layout})


def _axis(values: Sequence[Any]) -> tuple[Callable[[Any], Any], str]:
    """How a value is placed, and the kind of axis: numbers on a line, or on a logarithmic one where they span
    a decade."""
    try:
        found = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        found = []
    if len(found) < len(values) or not found:
        return lambda value: shown({"": value})[1:], "category"
    return float, "log" if min(found) > 0 and max(found) >= 10 * min(found) else "linear"


def _line(label: str, x: list[Any], found: list[Measure], colour: str) -> dict[str, Any]:
    bars = {
        "type": "data", "symmetric": False, "array": [m["high"] - m["mean"] for m in found],
        "arrayminus": [m["mean"] - m["low"] for m in found], "color": colour, "thickness": 1.5, "width": 0,
    }  # fmt: skip
    return {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": [m["mean"] for m in found], "error_y": bars,
        "line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 8},
        "hovertemplate": f"{pictures.plain(label)}<br>%{{x}}: %{{y:.3f}}<extra></extra>",
    }  # fmt: skip
