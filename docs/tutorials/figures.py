"""Two kinds of figure as plain SVG, so that the tutorials need no plotting library: curves, and means with
intervals.

A figure shows itself in a notebook; `build.py` writes it beside the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46  # margins of the drawing
COLOURS = ("#0b63a5", "#c2410c", "#15803d", "#7e22ce", "#525252")


@dataclass(frozen=True)
class Figure:
    """A finished drawing."""

    title: str
    svg: str

    def _repr_svg_(self) -> str:
        return self.svg


def curves(
    title: str, lines: Mapping[str, Iterable[tuple[float, float]]], x: str = "step", y: str = ""
) -> Figure:
    """One line through the (x, y) points of each name. pandas' `Series.items()` gives such points."""
    drawn = {name: [(float(a), float(b)) for a, b in points if b == b] for name, points in lines.items()}
    xs, ys = ([point[i] for points in drawn.values() for point in points] for i in (0, 1))
    across, up = _Scale(xs, LEFT, WIDTH - RIGHT), _Scale(ys, HEIGHT - BOTTOM, TOP)
    parts, right = (
        _axes(across, up, x, y),
        WIDTH - RIGHT,
    )  # the names stand in the title's line, from the right
    for number, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(right, 20, name, colour, "end"))
        right -= 7 * len(name) + 14
    return _figure(title, parts, HEIGHT)


def intervals(title: str, measures: Mapping[str, Sequence[float]], x: str = "") -> Figure:
    """One row a name: its (mean, low, high) as a dot with a bar."""
    height = TOP + BOTTOM + 34 * len(measures)
    left = LEFT + 7 * max(map(len, measures))
    across = _Scale([value for row in measures.values() for value in row], left, WIDTH - RIGHT)
    parts = [
        f'<line x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}" '
        'stroke="#e5e5e5"/>' + _text(across(tick), height - BOTTOM + 16, f"{tick:g}", "#525252", "middle")
        for tick in across.ticks()
    ]
    for number, (name, (mean, low, high)) in enumerate(measures.items()):
        level, colour = TOP + 17 + 34 * number, COLOURS[number % len(COLOURS)]
        ends = f'x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{level}" y2="{level}"'
        parts.append(_text(left - 12, level + 4, name, "#171717", "end"))
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<circle cx="{across(mean):.1f}" cy="{level}" r="5" fill="{colour}"/>')
    parts.append(_text((left + WIDTH) / 2, height - 10, x, "#525252", "middle"))
    return _figure(title, parts, height)


class _Scale:
    """From values to places on the page, with a little air at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        air = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        self.low, self.high, self.start, self.end = low - air, high + air, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round numbers."""
        span, step = self.high - self.low, 1.0
        while step > span / 4:
            step /= 10
        while step <= span / 40:
            step *= 10
        step = next((step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8), step)
        first = int(self.low // step) + 1
        return [round(i * step, 10) for i in range(first, int(self.high // step) + 1)]


def _axes(across: _Scale, up: _Scale, x: str, y: str) -> list[str]:
    parts = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" stroke="#e5e5e5"/>'
        + _text(LEFT - 6, up(tick) + 4, f"{tick:g}", "#525252", "end")
        for tick in up.ticks()
    ]
    parts += [_text(across(t), HEIGHT - BOTTOM + 16, f"{t:g}", "#525252", "middle") for t in across.ticks()]
    label = f"{y} by {x}" if y else x
    return [*parts, _text((LEFT + WIDTH) / 2, HEIGHT - 10, label, "#525252", "middle")]


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, parts: Sequence[str], height: int) -> Figure:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    heading = f'<text x="{LEFT}" y="20" font-weight="bold" fill="#171717">{escape(title)}</text>'
    return Figure(title, "\n".join([head, heading, *parts, "</svg>", ""]))
