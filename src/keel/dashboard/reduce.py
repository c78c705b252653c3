"""As few points as a screen can show, and no spike less.

A curve of n points is cut into equal pieces; of each its lowest and its highest point stay (M4 without its
first and last points: Jugel et al., VLDB 2014). What is drawn between them lies within the line that all the
points would give, so a spike of a single point is as high as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MEANS = 100  # pieces of a curve whose means make its middle line


class Points(NamedTuple):
    """Steps and values, by step; NaN where a value is no finite number."""

    steps: np.ndarray  # (n,) int64
    values: np.ndarray  # (n,) float64


class Band(NamedTuple):
    """Several runs as one: the middle one and the ends."""

    steps: np.ndarray  # (n,)
    middle: np.ndarray  # (n,) median over runs of each one's mean in the piece
    low: np.ndarray  # (n,) lowest value of any
    high: np.ndarray  # (n,) highest value of any
    runs: np.ndarray  # (n,) how many runs have a value in the piece


def within(points: Points, low: float | None, high: float | None) -> Points:
    """The points from step `low` to step `high`, and one beyond either end: a line reaches the edge."""
    first = 0 if low is None else max(int(np.searchsorted(points.steps, low)) - 1, 0)
    last = len(points.steps) if high is None else int(np.searchsorted(points.steps, high, side="right")) + 1
    return Points(points.steps[first:last], points.values[first:last])


def extremes(points: Points, most: int) -> Points:
    """At most `most` points (4 at least): the first, the last, and of each piece the lowest and highest. The
    first value that is not finite stays as well in a piece that has one, so that the gap is seen."""
    count = len(points.steps)
    if count <= most:
        return points
    finite = np.isfinite(points.values)
    of_each = 2 if finite.all() else 3
    pieces = min(max((most - 2) // of_each, 1), count)
    edges = np.linspace(0, count, pieces + 1).astype(np.int64)
    starts, sizes = edges[:-1], np.diff(edges)
    kept = [np.array([0, count - 1])]
    for sign in (1.0, -1.0):
        keys = np.where(finite, sign * points.values, np.inf)
        lowest = np.repeat(np.minimum.reduceat(keys, starts), sizes)
        at = np.flatnonzero((keys == lowest) & finite)
        kept.append(at[_first_of_each(np.searchsorted(edges, at, side="right"))])
    gaps = np.flatnonzero(~finite)
    kept.append(gaps[_first_of_each(np.searchsorted(edges, gaps, side="right"))])
    chosen = np.unique(np.concatenate(kept))
    return Points(points.steps[chosen], points.values[chosen])


def _first_of_each(groups: np.ndarray) -> np.ndarray:
    """Where each group begins, of groups in order."""
    if not len(groups):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))


def band(runs: Sequence[Points], most: int) -> Band:
    """Runs that differ in their seed as a band: piece by piece the range of all their values, and the median
    over runs of each one's mean there. Pieces are single steps while there are at most `most` of them."""
    runs = [Points(run.steps[ok], run.values[ok]) for run in runs if (ok := np.isfinite(run.values)).any()]
    if not runs:
        return Band(np.empty(0, np.int64), np.empty(0), np.empty(0), np.empty(0), np.empty(0, np.int64))
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    if len(steps) > most:
        edges = np.linspace(0, len(steps), most + 1).astype(np.int64)
        ends = steps[edges[1:] - 1]
    else:
        ends = steps
    means = np.full((len(runs), len(ends)), np.nan)
    low, high = np.full(len(ends), np.inf), np.full(len(ends), -np.inf)
    for row, run in enumerate(runs):
        piece = np.searchsorted(ends, run.steps)
        np.minimum.at(low, piece, run.values)
        np.maximum.at(high, piece, run.values)
        totals = np.bincount(piece, run.values, len(ends))
        counts = np.bincount(piece, minlength=len(ends))
        np.divide(totals, counts, out=means[row], where=counts > 0)
    return Band(ends, np.nanmedian(means, axis=0), low, high, np.isfinite(means).sum(axis=0))


def as_json(points: Points, most: int, *, middle: bool = True) -> list[list[Any]]:
    """[steps, values] in at most `most` points, null where a value is no finite number. Where points were
    left out, two more lists follow, if `middle`: steps and means of pieces, for the line through
    the middle."""
    few = extremes(points, most)
    found: list[list[Any]] = [few.steps.tolist(), numbers_json(few.values)]
    if middle and len(few.steps) < len(points.steps):
        pieces = means(points, MEANS)
        found += [pieces.steps.tolist(), numbers_json(pieces.values)]
    return found


def means(points: Points, pieces: int) -> Points:
    """The mean of each of `pieces` equal pieces of a curve, at its middle point; NaN where it has none."""
    edges = np.linspace(0, len(points.steps), pieces + 1).astype(np.int64)
    starts = edges[:-1]
    finite = np.isfinite(points.values)
    with np.errstate(over="ignore"):
        totals = np.add.reduceat(np.where(finite, points.values, 0.0), starts)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    found = np.full(pieces, np.nan)
    np.divide(totals, counts, out=found, where=counts > 0)
    return Points(points.steps[(starts + edges[1:] - 1) // 2], found)


def numbers_json(values: np.ndarray) -> list[float | None]:
    """Values with eight significant digits, as many as a chart and its labels need; None where one is not
    finite, as a mean of the largest numbers may be."""
    return [float(f"{value:.8g}") if math.isfinite(value) else None for value in values.tolist()]
