"""Which of several models people prefer: Bradley–Terry strengths with intervals, and how many more votes it
takes until their order is clear, or until it changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.evaluation.clustered import sums_by
from keel.evaluation.measures import Measure, Z

Array = np.ndarray[Any, Any]
PRIOR = 0.5  # times that each thing wins and loses against a virtual one of strength 0
MOST = 1_000_000  # further votes above which nobody is told to wait for them


@dataclass(frozen=True, slots=True)
class Comparisons:
    """V comparisons of I things."""

    first: Array  # (V,) 0 … I − 1
    second: Array  # (V,)
    points: Array  # (V,) 1 where the first is preferred, 0 where the second is, ½ for neither
    cluster: Array  # (V,) the item that was judged: votes on one item are not independent
    names: tuple[str, ...]  # (I,)

    def wins(self) -> Array:
        """(I, I) points of each thing against each other one."""
        table = np.zeros((len(self.names), len(self.names)))
        np.add.at(table, (self.first, self.second), self.points)
        np.add.at(table, (self.second, self.first), 1 - self.points)
        return table


@dataclass(frozen=True, slots=True)
class Strengths:
    """What was fitted: P(i is preferred to j) = σ(s_i − s_j)."""

    strength: Array  # (I,) their mean is 0
    by_model: Array  # (I, I) covariance if the votes are independent
    by_items: Array  # (I, I) covariance by the sandwich over items

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """s_i − s_j and its standard error: the larger of the two, since the sandwich is too small for few
        items and the other one for several votes an item."""
        pick = np.zeros(len(self.strength))
        pick[i], pick[j] = 1.0, -1.0
        variance = max(float(pick @ cov @ pick) for cov in (self.by_model, self.by_items))
        return float(self.strength[i] - self.strength[j]), math.sqrt(max(variance, 0.0))


def bradley_terry(votes: Comparisons) -> Strengths:
    """The penalised likelihood's maximum by Newton's method (Bradley & Terry, Biometrika 39, 1952). A tie is
    half a vote for each; every thing wins and loses `PRIOR` times against a virtual one of strength 0."""
    count, wins = len(votes.names), votes.wins()
    strength = _most_likely(wins)
    bread = np.linalg.inv(_derivatives(wins, strength)[1])
    residual = votes.points - _sigmoid(strength[votes.first] - strength[votes.second])
    sign = [(votes.first == i).astype(float) - (votes.second == i) for i in range(count)]
    scores = np.stack([sums_by(votes.cluster, column * residual) for column in sign], axis=1)
    clusters = len(scores)
    meat = scores.T @ scores * (clusters / max(clusters - 1, 1))
    return Strengths(strength - strength.mean(), bread, bread @ meat @ bread)


def order(votes: Comparisons) -> dict[str, Any] | None:
    """The things, best first, each with its `strength` (interval: that of its difference from the mean of
    all), the share of `wins`; and of each two neighbours how clear their order is. None for fewer than two
    things or no votes.

    `until_clear` is the expected number of further votes, spread over pairs as the votes so far, until the
    interval of their difference d leaves 0 out. Its standard error falls as 1/√n, so with n votes
    m = n·((1.96·s/d)² − 1), if the true difference is the one found. None: more than a million.
    `until_changed` is the fewest further votes, all for the lower one over the higher, that would exchange
    the two.
    """
    if len(votes.names) < 2 or not len(votes.points):
        return None
    fitted = bradley_terry(votes)
    ranked = [int(i) for i in np.argsort(-fitted.strength, kind="stable")]
    neighbours = [_neighbours(votes, fitted, i, j) for i, j in itertools.pairwise(ranked)]
    waits = [pair["until_clear"] for pair in neighbours]
    return {
        "votes": len(votes.points),
        "ranked": [_entry(votes, fitted, i) for i in ranked],
        "neighbours": neighbours,
        "until_clear": None if None in waits else max(waits),
        "until_changed": min(pair["until_changed"] for pair in neighbours),
    }


def _neighbours(votes: Comparisons, fitted: Strengths, i: int, j: int) -> dict[str, Any]:
    difference, error = fitted.difference(i, j)
    return {
        "higher": votes.names[i],
        "lower": votes.names[j],
        "difference": _interval(difference, error, len(votes.points)),
        "preferred": float(_sigmoid(difference)),  # P(the higher is preferred to the lower)
        "sure": 0.5 * (1 + math.erf(difference / error / math.sqrt(2))) if error else 1.0,
        "until_clear": further_votes(difference, error, len(votes.points)),
        "until_changed": _until_changed(votes, i, j),
    }


def further_votes(difference: float, error: float, votes: int) -> int | None:
    """m of `order`; 0 where the order is clear, None where it takes more than a million."""
    if abs(difference) > Z * error:
        return 0
    if abs(difference) < 1e-9:
        return None
    more = math.ceil(votes * ((Z * error / difference) ** 2 - 1))
    return more if more <= MOST else None


def _until_changed(votes: Comparisons, higher: int, lower: int) -> int:
    """The fewest votes for `lower` over `higher` that put it above, by doubling and halving."""
    wins = votes.wins()

    def changed(times: int) -> bool:
        more = wins.copy()
        more[lower, higher] += times
        strength = _most_likely(more)
        return bool(strength[lower] > strength[higher])

    high = 1
    while not changed(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if changed(middle) else (middle, high)
    return high


def _entry(votes: Comparisons, fitted: Strengths, i: int) -> dict[str, Any]:
    count = len(votes.names)
    pick = -np.ones(count) / count
    pick[i] += 1
    variance = max(float(pick @ cov @ pick) for cov in (fitted.by_model, fitted.by_items))
    stood = (votes.first == i) | (votes.second == i)
    won = np.where(votes.first == i, votes.points, 1 - votes.points)[stood]
    return {
        "name": votes.names[i],
        "strength": _interval(float(fitted.strength[i]), math.sqrt(max(variance, 0.0)), int(stood.sum())),
        "wins": float(won.mean()) if len(won) else None,
        "votes": int(stood.sum()),
    }


def of_lists(rows: Sequence[tuple[str, str, float, int]]) -> Comparisons:
    """Comparisons from (first's name, second's name, points of the first, item)."""
    names = tuple(sorted({name for row in rows for name in row[:2]}))
    index = {name: i for i, name in enumerate(names)}
    return Comparisons(
        np.array([index[row[0]] for row in rows], dtype=np.int64),
        np.array([index[row[1]] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.float64),
        np.array([row[3] for row in rows], dtype=np.int64),
        names,
    )


def _most_likely(wins: Array) -> Array:
    """(I,) strengths of a table of points."""
    strength = np.zeros(len(wins))
    for _ in range(100):
        gradient, curvature = _derivatives(wins, strength)
        step = np.linalg.solve(curvature, gradient)
        strength = strength + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return strength


def _derivatives(wins: Array, strength: Array) -> tuple[Array, Array]:
    """(I,) gradient of the penalised log-likelihood and (I, I) its negative second derivative."""
    against = _sigmoid(strength)
    p = _sigmoid(strength[:, None] - strength[None, :])
    met = wins + wins.T
    gradient = (wins - met * p).sum(axis=1) + PRIOR * (1 - 2 * against)
    weight = met * p * (1 - p)
    curvature = np.diag(weight.sum(axis=1) + 2 * PRIOR * against * (1 - against)) - weight
    return gradient, curvature


def _sigmoid(value: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(value, -60, 60)))


def _interval(value: float, error: float, n: int) -> Measure:
    return {"mean": value, "low": value - Z * error, "high": value + Z * error, "n": n}
