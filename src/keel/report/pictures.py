"""Pictures as plain plotly figures. Colours are names of CSS variables ("--after"), so that one figure
serves a light and a dark page; `page.js` puts the colours in and draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from keel.pipeline.stage_kinds import Curve
from keel.report.notes import is_number
from keel.report.reading import StageRun
from keel.report.still import still
from keel.report.verdict import kl_target
from keel.report.wording import bound, mean, measure, number, short

Points = Sequence[tuple[int, float | None]]
Trace = dict[str, Any]

MODEL_COLOURS = ("--model-0", "--model-1", "--model-2", "--model-3", "--model-4", "--model-5")
MOST_POINTS = 600  # of a curve; beyond, each bucket keeps its lowest and highest value
SMOOTH_FROM = 40  # steps from which a running mean is drawn over the raw curve


class Key(NamedTuple):
    """An entry of a picture's legend, set in the page's own type."""

    label: str
    colour: str
    mark: str  # "line" | "thin" | "dot" | "dash"


@dataclass(frozen=True, slots=True)
class Picture:
    id: str
    title: str
    unit: str
    keys: tuple[Key, ...]
    figure: dict[str, Any]  # {"data": [...], "layout": {...}}, JSON values only
    wide: bool = False

    def still(self) -> Markup:
        """The same without scripts."""
        return still(self.figure, self.title, wide=self.wide)


def model_colour(position: int) -> str:
    """The colour of a model, by its position in the evaluation; the first, usually the reference, is grey."""
    return MODEL_COLOURS[position % len(MODEL_COLOURS)]


def curves(stage: StageRun) -> list[Picture]:
    """The curves of a stage that has logged something, in reading order; what their lines mean:
    `curve_keys`."""
    known = _known(stage)
    pictures: list[Picture] = []
    for position, curve in enumerate(known):
        if curve.metric == "objective/kl":
            curve = curve._replace(level=kl_target({"stages": {stage.name: stage.settings}}, stage.name))
            curve = curve._replace(level_label="target")
        if any(value is not None for _, value in stage.metrics.get(curve.metric, ())):
            pictures.append(_curve(f"{stage.name}-{position}", curve, stage))
    best = _chosen(stage)
    return [best, *pictures] if best else pictures


def _chosen(stage: StageRun) -> Picture | None:
    """A point a prompt: the reward of the response that was chosen against the mean of all that were
    sampled. None for a stage that chose none."""
    found = [
        (row["mean"], row["reward"])
        for row in stage.chosen()
        if is_number(row.get("mean")) and is_number(row.get("reward"))
    ]
    found = found[:: -(-len(found) // MOST_POINTS) or 1]
    if not found:
        return None
    x, y = [mean for mean, _ in found], [reward for _, reward in found]
    dots = {
        "type": "scatter", "mode": "markers", "x": x, "y": y, "marker": {"color": "--train", "size": 5},
        "hovertemplate": "chosen %{y:.4~g}<br>mean %{x:.4~g}<extra></extra>",
    }  # fmt: skip
    layout, ends = _layout(x_title="mean reward of the samples", height=250), [min(x), max(x)]
    _pad(layout, x, y)
    line = {"type": "line", "line": {"color": "--ink", "width": 1, "dash": "dash"}, "layer": "below"}
    layout["shapes"] = [{**line, "x0": ends[0], "x1": ends[1], "y0": ends[0], "y1": ends[1]}]
    keys = [Key("a prompt", "--train", "dot"), Key("the mean itself", "--ink", "dash")]
    least = stage.settings.get("min_reward")
    if least is not None:
        layout["shapes"].append(_level(y=least, colour="--held-out"))
        layout["yaxis"]["range"] = _span([*y, *ends, least])
        keys.append(Key(f"kept from {number(float(least))}", "--held-out", "dash"))
    figure = {"data": [dots], "layout": layout}
    return Picture(f"{stage.name}-best", "Chosen response", "reward", tuple(keys), figure, wide=True)


def curve_keys(stage: StageRun) -> tuple[Key, ...]:
    """The legend that all curves of a stage share."""
    present = [curve for curve in _known(stage) if curve.metric in stage.metrics]
    window = max((_window(stage.metrics[curve.metric]) for curve in present if curve.smooth), default=1)
    held_out = any(curve.held_out in stage.metrics for curve in present)
    unit = _unit(stage)
    if window > 1:
        keys = [
            Key(f"each {unit}", "--train-faint", "thin"),
            Key(f"mean of {window} {unit}s", "--train", "line"),
        ]
    else:
        keys = [Key("training", "--train", "line")] if held_out else []
    return (*keys, Key("held out", "--held-out", "dot")) if held_out else tuple(keys)


def _known(stage: StageRun) -> tuple[Curve, ...]:
    known = stage.shown_as.curves
    if known:
        return tuple(curve for curve in known if not curve.setting or stage.settings.get(curve.setting))
    return tuple(Curve(name, "", name) for name in list(stage.metrics)[:12])


def _unit(stage: StageRun) -> str:
    return stage.shown_as.x_word


def _window(points: Points) -> int:
    """Points that a running mean takes in: odd, so that it is centred; 1 where a curve is short."""
    return max(len(points) // 20 | 1, 3) if len(points) >= SMOOTH_FROM else 1


def _curve(name: str, curve: Curve, stage: StageRun) -> Picture:
    points, keys = stage.metrics[curve.metric], ()
    window = _window(points) if curve.smooth else 1
    if window > 1:
        traces = [
            _line(thin(points), "--train-faint", 1, f"this {_unit(stage)}"),
            _line(running_mean(points, window), "--train", 2, f"mean of {window}"),
        ]
    else:
        traces = [_line(thin(points), "--train", 2, "training" if curve.held_out else curve.title.lower())]
    held_out = stage.metrics.get(curve.held_out, [])
    if held_out:
        traces.append(_dots(held_out))
    layout = _layout(x_title=_unit(stage), height=250 if curve.wide else 180)
    steps = [step for step, _ in (*points, *held_out)]
    if min(steps) < max(steps):
        layout["xaxis"]["range"] = [min(steps), max(steps)]
    if max(steps) - min(steps) < 6:
        layout["xaxis"]["dtick"] = 1  # there is no half a step
    if curve.level is not None:
        layout["shapes"] = [_level(y=curve.level)]
        keys = (Key(f"{curve.level_label} {curve.level:.2g}", "--ink", "dash"),)
    values = [value for _, value in (*points, *held_out) if is_number(value)]
    if curve.level is not None:
        layout["yaxis"]["range"] = _span([*values, curve.level])
    elif values and max(values) - min(values) <= 1e-6 * max(map(abs, values)):
        layout["yaxis"]["range"] = _span([values[0]])  # rounding is no curve
    return Picture(name, curve.title, curve.unit, keys, {"data": traces, "layout": layout}, curve.wide)


def judgement(name: str, result: Mapping[str, Any], config: Mapping[str, Any]) -> list[Picture]:
    """Models of an `evaluate` result as points: gold against proxy, and reward against KL."""
    models: Mapping[str, Any] = result.get("models") or {}
    rewards = [by for by in ("gold", "proxy") if sum(mean(m, by) is not None for m in models.values()) > 1]
    pictures = []
    if len(rewards) == 2:
        pictures.append(points(f"{name}-gold-proxy", models, "proxy", "gold", {}))
    targets = {model: target for model in models if (target := kl_target(config, model)) is not None}
    reference = str(result.get("reference") or next(iter(models), ""))
    at_zero = {"kl": {"mean": 0.0, "low": 0.0, "high": 0.0}}  # the reference is at distance 0 from itself
    placed = {model: {**at_zero, **m} if model == reference else m for model, m in models.items()}
    if rewards and sum(mean(m, "kl") is not None for m in placed.values()) > 1:
        pictures.append(points(f"{name}-kl", placed, "kl", rewards[0], targets))
    return pictures


def trajectories(stages: Sequence[StageRun], colours: Mapping[str, str]) -> Picture | None:
    """Score against KL over each on-policy stage (2210.10760): what each nat of distance bought."""
    traces, keys, all_x, all_y = [], [], [], []
    for position, stage in enumerate(stages):
        kl = dict(stage.metrics.get("objective/kl", ()))
        scores = dict(stage.metrics.get("objective/scores", ()))
        steps = sorted(step for step in kl if kl[step] is not None and scores.get(step) is not None)
        if len(steps) < 3:
            continue
        window = len(steps) // 8 | 1
        x = [value for _, value in running_mean([(step, kl[step]) for step in steps], window)]
        y = [value for _, value in running_mean([(step, scores[step]) for step in steps], window)]
        own = [colours.get(s.name) for s in stages]
        distinct = None not in own and len(set(own)) == len(own)
        colour = colours[stage.name] if distinct else model_colour(position + 1)
        traces += _path(x, y, colour, stage.name if len(stages) > 1 else None)
        smoothed = f", mean of {window} updates" if window > 1 else ""
        keys.append(Key(f"{stage.name}{smoothed}", colour, "line"))
        all_x += [value for value in x if value is not None]
        all_y += [value for value in y if value is not None]
    if not traces:
        return None
    layout = _layout(x_title="KL, nats per reply", height=290)
    _pad(layout, all_x, all_y)
    figure = {"data": traces, "layout": layout}
    return Picture("training-path", "Score against KL in training", "", tuple(keys), figure)


def _path(x: list[float | None], y: list[float | None], colour: str, name: str | None = None) -> list[Trace]:
    """A line with its ends marked, the last one by `name` where there are several lines."""
    line = {"type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip"}
    rose = (y[-1] or 0) >= (y[0] or 0)
    ends = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [x[0], x[-1]],
        "y": [y[0], y[-1]],
        "text": ["start", "end"] if name is None else ["", plain(name)],
        "textposition": ["bottom center", "top center"] if rose else ["top center", "bottom center"],
        "textfont": {"color": "--ink", "size": 12},
        "marker": {"size": 9, "color": ["--paper", colour], "line": {"color": colour, "width": 2}},
        "hovertemplate": "KL %{x:.2f} nats<br>score %{y:.2f}<extra></extra>",
        "cliponaxis": False,
    }
    return [{**line, "line": {"color": colour, "width": 2}}, ends]


def points(name: str, models: Mapping[str, Any], x: str, y: str, targets: Mapping[str, float]) -> Picture:
    """A point a model, its name beside it, with the intervals of both measures; `targets` of KL as lines."""
    traces, all_x, all_y = [], [0.0] if x == "kl" else [], []
    for position, (model, measures) in enumerate(models.items()):
        if mean(measures, x) is None or mean(measures, y) is None:
            continue
        traces.append(_point(model, measures, x, y, model_colour(position)))
        all_x += [v for end in ("mean", "low", "high") if (v := bound(measures, x, end)) is not None]
        all_y += [v for end in ("mean", "low", "high") if (v := bound(measures, y, end)) is not None]
    unit = {"kl": "KL, nats per reply", "proxy": "proxy reward"}[x]
    layout = _layout(x_title=unit, height=290)
    _pad(layout, [*all_x, *targets.values()], all_y)
    middle = sum(layout["xaxis"]["range"]) / 2
    for trace in traces:  # a label points inwards, where there is room
        trace["textposition"] = "top left" if trace["x"][0] > middle else "top right"
    _labels_apart(traces, layout)
    coloured = [(model, model_colour(list(models).index(model)), target) for model, target in targets.items()]
    layout["shapes"] = [_level(x=target, colour=colour) for _, colour, target in coloured]
    title = f"{measure(y).label} against {'KL' if x == 'kl' else measure(x).label.lower()}"
    keys = tuple(
        Key(f"{short(model)}: target {number(target, 1)}", colour, "dash")
        for model, colour, target in coloured
    )
    return Picture(name, title, "", keys, {"data": traces, "layout": layout})


def _labels_apart(traces: Sequence[Trace], layout: Mapping[str, Any]) -> None:
    """Labels of points that lie on each other go below them, the third ones to the other side."""
    (left, right), (low, high) = layout["xaxis"]["range"], layout["yaxis"]["range"]
    spots: dict[str, list[tuple[float, float]]] = {}
    for trace in traces:
        at = (trace["x"][0] - left) / (right - left), (trace["y"][0] - low) / (high - low)
        side = trace["textposition"].split()[1]
        other = {"left": "right", "right": "left"}[side]
        choices = (f"top {side}", f"bottom {side}", f"bottom {other}", f"top {other}")
        near = {
            place
            for place, points in spots.items()
            for x, y in points
            if abs(x - at[0]) < 0.25 and abs(y - at[1]) < 0.07
        }
        trace["textposition"] = next((place for place in choices if place not in near), choices[0])
        spots.setdefault(trace["textposition"], []).append(at)


def _point(model: str, measures: Mapping[str, Any], x: str, y: str, colour: str) -> Trace:
    def bars(by: str) -> dict[str, Any]:
        middle, low, high = (bound(measures, by, end) for end in ("mean", "low", "high"))
        if middle is None or low is None or high is None:
            return {"visible": False}
        return {
            "type": "data",
            "symmetric": False,
            "array": [max(high - middle, 0)],
            "arrayminus": [max(middle - low, 0)],
            "color": colour,
            "thickness": 1.5,
            "width": 0,
        }

    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [mean(measures, x)],
        "y": [mean(measures, y)],
        "error_x": bars(x),
        "error_y": bars(y),
        "text": [plain(model.partition(" best of ")[2] or short(model))],  # n alone, of many such points
        "textfont": {"color": "--ink", "size": 13},
        "marker": {"size": 10, "color": colour},
        "hovertemplate": f"{plain(model)}<br>{x} %{{x:.3f}}<br>{y} %{{y:.3f}}<extra></extra>",
        "cliponaxis": False,
    }


# ---------------------------------------------------------------- parts of figures


def plain(text: str) -> str:
    """Text that plotly shows as it is: it reads `<…>` as tags and `%{…}` as placeholders."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")


def running_mean(points: Points, window: int) -> list[tuple[int, float | None]]:
    """Centred mean over `window` points, at no more than MOST_POINTS of them and always at the last.

    Missing values are left out, and the ends use what there is.
    """
    half, every, out = window // 2, -(-len(points) // MOST_POINTS) or 1, []
    for position in sorted({*range(0, len(points), every), len(points) - 1} if points else ()):
        step = points[position][0]
        near = [v for _, v in points[max(0, position - half) : position + half + 1] if v is not None]
        out.append((step, sum(near) / len(near) if near else None))
    return out


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[int, float | None]]:
    """At most about `most` points; each bucket keeps its extremes, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // max(most // 2, 1))
    kept: list[tuple[int, float | None]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = [(value, step) for step, value in bucket if value is not None]
        if not values:
            kept.append(bucket[0])
            continue
        ends = {step: value for value, step in (min(values), max(values))}
        kept += sorted(ends.items())
    return kept


def _line(points: Points, colour: str, width: float, name: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "name": name,
        "line": {"color": colour, "width": width},
        "marker": {"color": colour, "size": 7},
        "hovertemplate": "%{y:.4~g}<extra>" + plain(name) + "</extra>",
    }


def _dots(points: Points) -> Trace:
    return {
        **_line(points, "--held-out", 1.5, "held out"),
        "mode": "lines+markers" if len(points) <= 30 else "lines",
        "cliponaxis": False,
        "marker": {"color": "--held-out", "size": 6},
    }


def _level(x: float | None = None, y: float | None = None, colour: str = "--ink") -> dict[str, Any]:
    line = {"type": "line", "line": {"color": colour, "width": 1, "dash": "dash"}, "layer": "below"}
    if x is not None:
        return {**line, "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x}
    return {**line, "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}


def _span(values: Sequence[float], share: float = 0.08) -> list[float]:
    low, high = min(values), max(values)
    room = (high - low) * share or max(abs(high) * share, 0.1)
    return [low - room, high + room]


def _pad(layout: dict[str, Any], x: Sequence[float], y: Sequence[float]) -> None:
    """Room around points for their labels."""
    layout["xaxis"]["range"] = _span(x, 0.15)
    layout["yaxis"]["range"] = _span(y, 0.2)
    layout["hovermode"] = "closest"


def _layout(x_title: str, height: int) -> dict[str, Any]:
    axis = {
        "gridcolor": "--grid",
        "linecolor": "--rule",
        "tickcolor": "--rule",
        "zerolinecolor": "--rule",
        "zerolinewidth": 1,
        "ticks": "outside",
        "ticklen": 3,
        "fixedrange": True,  # a finger on a picture scrolls the page
        "automargin": True,
        "nticks": 6,
        "exponentformat": "e",
    }
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "dragmode": False,
        "hovermode": "x unified",
        "paper_bgcolor": "transparent",
        "plot_bgcolor": "transparent",
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 11,
            "color": "--quiet",
        },
        "hoverlabel": {"bgcolor": "--paper", "bordercolor": "--rule", "font": {"color": "--ink", "size": 12}},
        "xaxis": {**axis, "nticks": 4, "showgrid": False, "title": {"text": x_title, "standoff": 4}},
        "yaxis": {**axis, "showline": False, "ticks": ""},
    }
