"""The report: one HTML file that opens offline, made from a run directory and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from keel.diagnosis.logs import Diagnosis
from keel.pipeline.stage_kinds import KeyNumber
from keel.report import health, overoptimization, pictures, replies, reward_models, rounds, wording
from keel.report.notes import Notes, mapping, short
from keel.report.pictures import Picture
from keel.report.reading import Run, StageRun, read, readable
from keel.report.verdict import Verdict, kl_target, unjudged, verdict
from keel.report.wording import bound, decimals, duration, large, mean, number

_HERE = Path(__file__).parent
FEW = 2  # measures that stand for a stage of a kind that names none
MOST_FACTS, LONGEST_FACT = 200, 500  # of a manifest, and characters of one
LONGEST_TEXT = 200_000  # characters of the config, as it is shown
T = TypeVar("T")


class Cell(NamedTuple):
    """One model's value of one measure."""

    value: str
    interval: str
    position: float | None  # of the mean on the row's strip, in percent
    low: float | None
    high: float | None


class Row(NamedTuple):
    """One measure of all models."""

    label: str
    explanation: str
    part: bool  # it is a part of the measure above it
    cells: list[Cell]
    scale: tuple[str, str]  # the strip's ends


def write(run: Path) -> Path:
    """Write `run/report.html` from what `run` holds so far and return its path. What cannot be read or shown
    is said in the page.

    The file appears at once, by an atomic rename; the same run directory gives the same bytes.
    Raises UsageError when there is no run, or nothing of it can be read.
    """
    return write_read(run, read(run, Notes(strict=False)))


def write_read(run: Path, found: Run) -> Path:
    """Write the page of a run that was read."""
    path = run / "report.html"
    with readable(run):
        put(path, render(found))
    return path


def put(path: Path, page: str) -> None:
    """Write a page at once, by an atomic rename."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.unlink(missing_ok=True)  # of a former process of this number, or a link that somebody left there
    try:
        # a lone surrogate, which JSON can hold, is written out
        with half.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(page)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by processes that were killed while they wrote
        if left.suffix[1:].isdigit() and not _is_alive(int(left.suffix[1:])):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    else:
        return True


def render(run: Run) -> str:
    """The whole page. What of the run cannot be shown is noted in `run.notes`, and left out."""
    of, judged, trained = run.notes.of, run.judged, [s for s in run.stages if s.shown_as.has_steps]
    learned = [stage for stage in run.stages if stage.shown_as.on_policy]
    curves = _each(run, trained, "the curves of", lambda s: _drawable(run, pictures.curves(s)), list)
    diagnoses = health.diagnoses(run)
    findings = {
        name: of(f"the findings of {name}", lambda d=one: health.lines(d), [])
        for name, one in diagnoses.items()
    }
    ways = of("ways of over-optimisation", lambda: overoptimization.by_name([run]), {})
    paths = _drawable(run, of("pictures of the whole run", lambda: _paths(run, learned, ways), []))
    points = _each(run, judged, "the pictures of", lambda s: _drawable(run, _points(s, run)), list)
    drawn = [*(p for group in (*curves.values(), *points.values()) for p in group), *paths]
    return fill(
        "page.html",
        drawn,
        run=run,
        head=_head(run),
        environment=_environment(run),
        trained=trained,
        verdicts=verdicts(run, diagnoses),
        findings=findings,
        facts={
            (s.name, model): rows
            for s in judged
            for model, rows in of(f"the numbers of {s.name}", lambda s=s: _facts_of(s, run), {}).items()
        },
        done=sum(stage.status in ("done", "cached") for stage in run.stages),
        seconds=sum(stage.record.get("seconds") or 0 for stage in run.stages),
        columns=_columns(run.stages),
        results=_each(run, run.stages, "the result of", key_result, str),
        curves=curves,
        keys=_each(run, run.stages, "the curves of", pictures.curve_keys, tuple),
        broken={stage.name: _broken(stage) for stage in run.stages},
        last={stage.name: _last(stage) for stage in run.stages},
        judged=judged,
        tables=_each(run, judged, "the measures of", lambda s: measures(s.result), list),
        judgement_title=_judgement_title([stage.result for stage in judged]),
        rm_lines=_each(
            run, judged, "the reward model in", lambda s: reward_models.lines(_of_reward(s)), list
        ),
        points=points,
        paths=paths,
        ways=(overoptimization.HEAD, of("ways of over-optimisation", lambda: _cells(ways), [])),
        replies=_each(run, judged, "the replies of", replies.side_by_side, list),
        during=_each(run, learned, "the replies of", replies.during, list),
        notes=run.notes.lines,
    )


def _each(
    run: Run, stages: Sequence[StageRun], what: str, work: Callable[[StageRun], T], empty: Callable[[], T]
) -> dict[str, T]:
    """Stage → what `work` makes of it; empty, with a note, where the stage's files are broken."""
    return {
        stage.name: run.notes.of(f"{what} {stage.name}", lambda stage=stage: work(stage), empty())
        for stage in stages
    }


def _drawable(run: Run, drawn: Sequence[Picture]) -> list[Picture]:
    """The pictures without those of values that are none: each can be written as JSON, and drawn."""
    return [
        picture
        for picture in drawn
        if run.notes.of(
            f"the picture {picture.title!r}", lambda picture=picture: _is_drawable(picture), False
        )
    ]


def _is_drawable(picture: Picture) -> bool:
    json.dumps(picture.figure, allow_nan=False)
    picture.still()
    return True


def _paths(
    run: Run, learned: Sequence[StageRun], ways: Mapping[str, Sequence[overoptimization.Path]]
) -> list[Picture]:
    """The pictures of the whole run: score against KL, rounds, over-optimisation."""
    path = pictures.trajectories(learned, _colours(run.judged))
    paths = [path] if path else []
    if (refreshed := rounds.picture(run)) is not None:
        paths.append(refreshed)
    return paths + overoptimization.drawn(ways)


def _points(stage: StageRun, run: Run) -> list[Picture]:
    """The pictures of an evaluate stage."""
    found = pictures.judgement(stage.name, stage.result, run.config)
    diagram = reward_models.reliability_diagram(stage.name, _of_reward(stage))
    return found if diagram is None else [*found, diagram]


def _of_reward(stage: StageRun) -> Mapping[str, Any]:
    return mapping(stage.result.get("reward_model"))


def _cells(ways: Mapping[str, Sequence[overoptimization.Path]]) -> list[list[str]]:
    return [line.cells for line in overoptimization.lines(ways)]


def _facts_of(stage: StageRun, run: Run) -> dict[str, list[tuple[str, str, str]]]:
    return {one.model: _facts(stage, one, run) for one in verdict(stage.result, run.config)}


def _head(run: Run) -> dict[str, str]:
    """What stands above the verdict, and below the page."""
    versions, seed = mapping(run.manifest.get("versions")), run.config.get("seed")
    return {
        "seed": "" if seed is None else short(seed, 30),
        "created": short(run.manifest.get("created") or "", 60),
        "description": short(run.config.get("description") or "", 5000),
        "keel": short(versions.get("keel") or "", 60),
        "config": short(run.config_text, LONGEST_TEXT),
    }


def _environment(run: Run) -> list[tuple[str, str]]:
    """Versions and hardware, as the manifest names them."""
    facts = [item for group in ("versions", "hardware") for item in mapping(run.manifest.get(group)).items()]
    return [(short(name, 100), short(value, LONGEST_FACT)) for name, value in facts[:MOST_FACTS]]


def _judgement_title(results: Sequence[Mapping[str, Any]]) -> str:
    models = [measures for result in results for measures in (result.get("models") or {}).values()]
    gold = not models or any(mean(measures, "gold") is not None for measures in models)
    return "Gold against proxy" if gold else "Judgement"


def fill(template: str, drawn: list[Picture], **values: object) -> str:
    """A page of this folder with its pictures, style and scripts in it, so that it opens offline."""
    plotly = get_plotlyjs() if drawn else ""  # 4 MB
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("figures.js", "page.js"))
    return (
        _templates()
        .get_template(template)
        .render(
            **values,
            colours=pictures.MODEL_COLOURS,
            css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
            plotly=Markup(plotly),
            script=Markup(script),
            figures=_figures(drawn),
            hashes=" ".join(f"'sha256-{_digest(source)}'" for source in (plotly, script)),
        )
    )


@cache
def _templates() -> jinja2.Environment:
    """The pages of this folder; each is compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "minus": _minus,
        "short": wording.short,
        "moment": _moment,
        "number": number,
        "duration": duration,
        "large": large,
        "truncated": partial(short, most=LONGEST_FACT),
    }
    return environment


def verdicts(run: Run, diagnoses: Mapping[str, Diagnosis]) -> list[tuple[str, Verdict]]:
    """The name of each `evaluate` stage with each of its verdicts; at least one. diagnoses: of the stages
    that have any."""
    of = run.notes.of
    said = {
        name: of(f"the findings of {name}", lambda d=one: health.said(d), "")
        for name, one in diagnoses.items()
    }
    judged = run.judged
    if not judged:
        return [("", unjudged("run an evaluate stage"))]
    found: list[tuple[str, Verdict]] = []
    for stage in judged:
        if stage.result:
            broken = [unjudged(f"the result of the evaluate stage {stage.name} cannot be read")]
            judge = partial(verdict, stage.result, run.config, said)
            found += [(stage.name, one) for one in of(f"the verdict of {stage.name}", judge, broken)]
        else:
            found.append((stage.name, unjudged(f"the evaluate stage {stage.name} has not finished")))
    return found


def key_result(stage: StageRun) -> str:
    """What came out of a stage, in a few words; "" when nothing has."""
    result, kind = stage.result, stage.shown_as
    if kind.compares:
        return _models_in_short(result.get("models") or {})
    numbers = kind.key_numbers or tuple(
        KeyNumber(name.replace("_", " "), name)
        for name in [name for name in result if mean(result, name) is not None][:FEW]
    )
    late = stage.late
    return ", ".join(text for one in numbers if (text := _key_number(one, result, late)))


def _key_number(one: KeyNumber, result: Mapping[str, Any], late: Mapping[str, float]) -> str:
    """ "held-out loss 1.84", "reward 0.31 → 0.52", "12 comparisons"; "" where it was not measured."""
    value = mean(result, one.measure) if one.measure in result else late.get(one.late)
    if value is None:
        return ""
    shown = number(int(value)) if one.places == 0 else number(value, one.places)
    if one.before:
        shown = f"{number(mean(result, one.before), one.places)} → {shown}"
    if one.interval:
        shown = _with_interval(result, one.measure)
    return " ".join(part for part in (one.label, shown, one.unit) if part)


def _models_in_short(models: Mapping[str, Any]) -> str:
    """The gold reward of each model, else its proxy: "gold 0.41 → 0.58"."""
    by = next((by for by in ("gold", "proxy") if any(mean(m, by) is not None for m in models.values())), "")
    means = [(name, mean(m, by)) for name, m in models.items()]
    if len(means) == 2:
        return f"{by} " + " → ".join(number(value, 2) for _, value in means)
    return (
        f"{by}: " + ", ".join(f"{wording.short(name)} {number(value, 2)}" for name, value in means)
        if by
        else ""
    )


def measures(result: Mapping[str, Any]) -> list[Row]:
    """Models × measures of an `evaluate` result; a row a measure, a cell a model."""
    models: Mapping[str, Any] = result.get("models") or {}
    return [_row(name, models) for name in wording.order(name for m in models.values() for name in m)]


def _row(name: str, models: Mapping[str, Any]) -> Row:
    ends = {
        model: tuple(bound(m, name, end) for end in ("mean", "low", "high")) for model, m in models.items()
    }
    values = [value for triple in ends.values() for value in triple if value is not None]
    shown, places = wording.measure(name), decimals(values)
    low, high = (0.0, 1.0) if shown.share else _scale(values)

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max((value - low) / (high - low), 0), 1), 2)

    cells = []
    for middle, bottom, top in ends.values():
        known = bottom is not None and top is not None and bottom < top
        interval = f"{number(bottom, places)} to {number(top, places)}" if known else ""
        cells.append(Cell(number(middle, places), interval, place(middle), place(bottom), place(top)))
    return Row(shown.label, shown.explanation, "/" in name, cells, (f"{low:g}", f"{high:g}"))


def _scale(values: list[float]) -> tuple[float, float]:
    """Round ends of an axis that holds 0 and all values."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:
        return 0.0, 1.0
    reach = high - low
    power = 10 ** math.floor(math.log10(reach))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if reach / step <= 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _facts(stage: StageRun, one: Verdict, run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the few numbers that stand under a verdict."""
    models: Mapping[str, Any] = stage.result.get("models") or {}
    after, before = models.get(one.model) or {}, models.get(one.reference) or {}
    facts: list[tuple[str, str, str]] = []
    for name in ("gold", "proxy", "length"):
        old, new = mean(before, name), mean(after, name)
        if old is not None and new is not None:
            places = decimals([old, new])
            lift = mean(after, f"{name}_lift")
            remark = "tokens" if name == "length" else "" if lift is None else wording.signed(lift, places)
            facts.append(
                (wording.measure(name).label, f"{number(old, places)} → {number(new, places)}", remark)
            )
    if mean(after, "win_rate") is not None:
        facts.insert(
            2,
            (
                "Win rate",
                f"{mean(after, 'win_rate'):.0%}".replace("%", " %"),
                f"against {wording.short(one.reference)}",
            ),
        )
    if mean(after, "kl") is not None:
        target = kl_target(run.config, one.model)
        remark = f"of {number(target, 1)} targeted, nats" if target else "nats per reply"
        facts.insert(1, ("KL", number(mean(after, "kl"), 1), remark))
    return facts


def _colours(judged: list[StageRun]) -> dict[str, str]:
    """The colour of each model; the first evaluation that has it decides."""
    colours: dict[str, str] = {}
    for stage in judged:
        for position, model in enumerate(stage.result.get("models") or {}):
            colours.setdefault(model, pictures.model_colour(position))
    return colours


def _columns(stages: tuple[StageRun, ...]) -> list[tuple[StageRun, int, int]]:
    """(stage, column, row) of each box: a stage stands right of everything it takes as input."""
    column: dict[str, int] = {}
    filled: dict[int, int] = {}
    placed = []
    for stage in stages:
        column[stage.name] = max((column[name] + 1 for name in stage.inputs if name in column), default=0)
        filled[column[stage.name]] = filled.get(column[stage.name], 0) + 1
        placed.append((stage, column[stage.name], filled[column[stage.name]] - 1))
    return placed


def _last(stage: StageRun) -> list[tuple[str, int, str]]:
    return [
        (name, points[-1][0], number(points[-1][1]) if points[-1][1] is not None else "not finite")
        for name, points in sorted(stage.metrics.items())
    ]


def _broken(stage: StageRun) -> list[str]:
    """Metrics that were NaN or infinite at some step: a curve with a gap must not pass for a healthy one."""
    lines = []
    for name, points in sorted(stage.metrics.items()):
        steps = [step for step, value in points if value is None]
        if steps:
            lines.append(f"{name} was not a finite number at {len(steps)} steps, first at step {steps[0]}")
    return lines


def _with_interval(result: Mapping[str, Any], name: str) -> str:
    low, high = bound(result, name, "low"), bound(result, name, "high")
    interval = f" ({number(low, 2)} to {number(high, 2)})" if None not in (low, high) else ""
    return number(mean(result, name), 2) + interval


def _figures(drawn: list[Picture]) -> Markup:
    """The figures as JSON inside a script element: no "<" may end that element early."""
    text = json.dumps({picture.id: picture.figure for picture in drawn}, allow_nan=False, ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c"))


def _moment(text: str) -> str:
    """An ISO time to the minute."""
    return re.sub(r"T(\d\d:\d\d)[\d:.]*(?:\+00:00|Z)$", r" \1 UTC", str(text))


def _minus(text: str) -> str:
    """Hyphens that stand for minus become minus signs, and no line ends before a percent sign."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", str(text)).replace(" %", "\u00a0%")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
