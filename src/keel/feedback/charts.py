"""Small pictures as SVG without styles or scripts, for pages whose content policy allows neither."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

Interval = tuple[str, float, float, float]  # name, low, value, high
WIDTH, NAMES, ROW = 640, 220, 26
LINE = 360  # width of a curve


def intervals(rows: Sequence[Interval], *, low: float, high: float, zero: float | None, title: str) -> Markup:
    """One line a row: a point with its interval on a common axis from `low` to `high`."""
    if not rows or not low < high:
        return Markup("")
    height = ROW * len(rows) + 28

    def x(value: float) -> float:
        return NAMES + (WIDTH - NAMES - 20) * (min(max(value, low), high) - low) / (high - low)

    parts = [_head(height, title)]
    bottom = height - 22
    if zero is not None and low <= zero <= high:
        parts.append(f'<line class="zero" x1="{x(zero):.1f}" x2="{x(zero):.1f}" y1="4" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{bottom}" y2="{bottom}"/>')
    for value in (low, (low + high) / 2, high):
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{_number(value)}</text>'
        )
    for index, (name, left, value, right) in enumerate(rows):
        y = ROW * index + 16
        shown = name if len(name) <= 31 else name[:30] + "…"
        parts.append(
            f'<text class="name" x="{NAMES - 14}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>'
        )
        parts.append(f'<line class="bar" x1="{x(left):.1f}" x2="{x(right):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{y}" r="5"/>')
    return Markup("".join(parts) + "</svg>")


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def line(values: Sequence[float | None], *, low: float, high: float, title: str) -> Markup:
    """Values in order, from left to right; a gap where there is none."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or not low < high:
        return Markup("")
    height, left, right = 130, 40, LINE - 8

    def point(index: int, value: float) -> str:
        x = left + (right - left) * index / (len(values) - 1)
        return f"{x:.1f},{12 + (height - 34) * (high - min(max(value, low), high)) / (high - low):.1f}"

    parts = [_head(height, title, LINE)]
    for value in (low, high):
        y = point(0, value).split(",")[1]
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    run: list[str] = []
    for index, value in enumerate([*values, None]):
        if value is not None:
            run.append(point(index, value))
            continue
        if run:
            parts.append(f'<polyline class="line" points="{" ".join(run)}"/>')
        run = []
    for index, value in enumerate(values):
        if value is not None:
            x, y = point(index, value).split(",")
            parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>')
    return Markup("".join(parts) + "</svg>")


def _head(height: int, title: str, width: int = WIDTH) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
