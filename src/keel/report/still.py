"""A picture as a still SVG, for print and for readers without scripts.

It draws what `pictures` puts into figures: lines, dots with error bars and names, levels, on linear,
logarithmic or named axes. Colours stay names of CSS variables, so that the page's theme holds here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import Any

from markupsafe import Markup

WIDTH = 260.0  # of a picture in units of its own; a wide one has twice as many
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 8.0, 36.0
MOST = 160  # points of a line


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to units along one side of the drawing."""

    low: float
    high: float
    start: float  # where `low` is drawn
    end: float
    log: bool = False
    names: tuple[str, ...] = ()  # of a named axis: value i is names[i]

    def number(self, value: Any) -> float | None:
        """A value as it lies on the axis; None for one that does not."""
        if self.names:
            return float(self.names.index(str(value))) if str(value) in self.names else None
        if not isinstance(value, int | float) or not math.isfinite(value) or (self.log and value <= 0):
            return None
        return math.log10(value) if self.log else float(value)

    def place(self, value: Any) -> float | None:
        number = self.number(value)
        if number is None:
            return None
        share = (number - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, given: Mapping[str, Any], most: int) -> list[tuple[float, str]]:
        """(place, text) of the marks: those that the figure asks for, else round numbers."""
        if self.names:
            return [(place, name) for name in self.names if (place := self.place(name)) is not None]
        if given.get("tickmode") == "array":
            asked = zip(given["tickvals"], given["ticktext"], strict=True)
            return [(place, text) for value, text in asked if (place := self.place(value)) is not None]
        step = given.get("dtick") or _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        values = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(place, _short(value)) for value in values if (place := self.place(value)) is not None]


def still(figure: Mapping[str, Any], title: str, *, wide: bool = False) -> Markup:
    """The SVG of a figure as `pictures` makes it."""
    layout, traces = figure["layout"], [t for t in figure["data"] if t.get("type") == "scatter"]
    width, height = WIDTH * (2 if wide or layout["height"] > 250 else 1), float(layout["height"])
    shapes = layout.get("shapes") or []
    x = _axis(layout["xaxis"], [v for t in traces for v in t["x"]], LEFT, width - RIGHT)
    y = _axis(layout["yaxis"], _all_y(traces, shapes), height - BOTTOM, TOP)
    parts = [*_grid(x, y, layout, width, height), *(_shape(s, x, y, width, height) for s in shapes)]
    parts += [part for trace in traces for part in _trace(trace, x, y)]
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )


def _axis(given: Mapping[str, Any], values: Sequence[Any], start: float, end: float) -> _Axis:
    log = given.get("type") == "log"
    if given.get("type") == "category":
        names = tuple(dict.fromkeys(map(str, values)))
        return _Axis(-0.5, len(names) - 0.5, start, end, names=names)
    bare = _Axis(0, 1, start, end, log)
    numbers = [number for value in values if (number := bare.number(value)) is not None]
    low, high = given.get("range") or (min(numbers, default=0.0), max(numbers, default=1.0))
    if not given.get("range"):
        room = (high - low) * 0.06 or max(abs(high) * 0.06, 0.1)
        low, high = low - room, high + room
    return _Axis(low, high, start, end, log)


def _all_y(traces: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Values, the ends of their error bars, and levels."""
    found: list[Any] = [shape["y0"] for shape in shapes if shape.get("yref") != "paper"]
    for trace in traces:
        found += trace["y"]
        bars = trace.get("error_y") or {}
        if bars.get("array") and bars.get("visible", True):
            found += [a + b for a, b in zip(trace["y"], bars["array"]) if a is not None]
            found += [a - b for a, b in zip(trace["y"], bars["arrayminus"]) if a is not None]
    return found


def _grid(x: _Axis, y: _Axis, layout: Mapping[str, Any], width: float, height: float) -> list[str]:
    parts, base = list[str](), height - BOTTOM
    for place, text in y.ticks(layout["yaxis"], 5):
        parts.append(_segment(LEFT, place, width - RIGHT, place, "--grid", 1))
        parts.append(_text(LEFT - 5, place + 3.5, text, anchor="end"))
    parts.append(_segment(LEFT, base, width - RIGHT, base, "--rule", 1))
    for place, text in x.ticks(layout["xaxis"], 5 if width > WIDTH else 4):
        parts.append(_text(place, base + 14, text))
    parts.append(_text((LEFT + width - RIGHT) / 2, height - 5, layout["xaxis"]["title"]["text"]))
    return parts


def _shape(shape: Mapping[str, Any], x: _Axis, y: _Axis, width: float, height: float) -> str:
    """A level, or a line from point to point."""
    across = {0: LEFT, 1: width - RIGHT} if shape.get("xref") == "paper" else None
    up = {0: height - BOTTOM, 1: TOP} if shape.get("yref") == "paper" else None
    ends = [
        (across[shape[f"x{i}"]] if across else x.place(shape[f"x{i}"]),
         up[shape[f"y{i}"]] if up else y.place(shape[f"y{i}"]))
        for i in (0, 1)
    ]  # fmt: skip
    (x0, y0), (x1, y1) = ends
    if x0 is None or y0 is None or x1 is None or y1 is None:
        return ""
    return _segment(x0, y0, x1, y1, shape["line"]["color"], 1, dash=True)


def _trace(trace: Mapping[str, Any], x: _Axis, y: _Axis) -> list[str]:
    places = [(x.place(a), y.place(b)) for a, b in zip(trace["x"], trace["y"])]
    mode, parts = trace["mode"], list[str]()
    if "lines" in mode:
        parts.append(_line(places, trace["line"]))
    for name, axis, along in (("error_x", x, 0), ("error_y", y, 1)):
        parts += _bars(trace.get(name), trace["x" if along == 0 else "y"], places, axis, along)
    if "markers" in mode:
        marker = trace["marker"]
        colours = marker["color"] if isinstance(marker["color"], list) else [marker["color"]] * len(places)
        edge = marker.get("line", {}).get("color")
        for (a, b), colour in zip(places, colours):
            if a is not None and b is not None:
                parts.append(_dot(a, b, marker["size"] / 2, colour, edge, marker.get("opacity", 1)))
    if "text" in mode:
        parts += _names(trace, places)
    return parts


def _line(places: Sequence[tuple[float | None, float | None]], line: Mapping[str, Any]) -> str:
    """A polyline with a gap where a value is missing; of many points some."""
    every = -(-len(places) // MOST) or 1
    kept = [*places[::every], *(places[-1:] if (len(places) - 1) % every else [])]
    path, down = "", False
    for a, b in kept:
        if a is None or b is None:
            down = False
            continue
        path += f"{'L' if down else 'M'}{_n(a)} {_n(b)}"
        down = True
    dash = ' stroke-dasharray="3 3"' if line.get("dash") in ("dot", "dash") else ""
    style = f"stroke: {_colour(line['color'])}; stroke-width: {line['width'] * 0.8:g}"
    return f'<path d="{path}" fill="none" style="{style}"{dash}/>' if path else ""


def _bars(
    bars: Mapping[str, Any] | None,
    values: Sequence[Any],
    places: Sequence[tuple[float | None, float | None]],
    axis: _Axis,
    along: int,
) -> list[str]:
    if not bars or not bars.get("visible", True) or not bars.get("array"):
        return []
    parts = list[str]()
    for value, above, below, place in zip(values, bars["array"], bars["arrayminus"], places):
        fixed = place[1 - along]
        ends = [axis.place(value + above), axis.place(value - below)] if value is not None else [None]
        if fixed is None or None in ends:
            continue
        low, high = (end for end in ends if end is not None)
        points = (low, fixed, high, fixed) if along == 0 else (fixed, low, fixed, high)
        parts.append(_segment(*points, bars["color"], bars["thickness"]))
    return parts


def _names(trace: Mapping[str, Any], places: Sequence[tuple[float | None, float | None]]) -> list[str]:
    where = trace.get("textposition", "top right")
    wheres, parts = where if isinstance(where, list) else [where] * len(places), list[str]()
    for text, (a, b), at in zip(trace["text"], places, wheres):
        if text and a is not None and b is not None:
            anchor = "end" if "left" in at else "start" if "right" in at else "middle"
            shift = {"end": -5, "start": 5}.get(anchor, 0)
            parts.append(_text(a + shift, b - 8 if "top" in at else b + 16, unescape(text), anchor, "--ink"))
    return parts


def _dot(x: float, y: float, radius: float, colour: str, edge: str | None, opacity: float) -> str:
    border = f"; stroke: {_colour(edge)}; stroke-width: 2" if edge else ""
    style = f"fill: {_colour(colour)}{border}; opacity: {opacity:g}"
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius * 0.9)}" style="{style}"/>'


def _segment(
    x0: float, y0: float, x1: float, y1: float, colour: str, width: float, *, dash: bool = False
) -> str:
    dashes = ' stroke-dasharray="4 3"' if dash else ""
    style = f"stroke: {_colour(colour)}; stroke-width: {width:g}"
    return f'<path d="M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}" style="{style}"{dashes}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "--quiet") -> str:
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" style="fill: {_colour(colour)}">'
        f"{escape(text)}</text>"
    )


def _colour(name: str) -> str:
    return f"var({name})" if name.startswith("--") else "currentColor"


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least this."""
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _short(value: float) -> str:
    text = f"{value:.10g}" if abs(value) < 1e5 and (value == 0 or abs(value) >= 1e-3) else f"{value:.2g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
