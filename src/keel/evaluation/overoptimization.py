"""Over-optimisation of a proxy (2210.10760): how gold reward goes with the distance d = √KL from the starting
model.

Gold reward is taken relative to the starting model's, so every law goes through the origin. Both laws are
linear in α and β, so their least squares have a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keel.evaluation.measures import Measure, Z

Law = Literal["best_of_n", "rl"]
WORDS: dict[Law, str] = {"best_of_n": "d·(α − β·d)", "rl": "d·(α − β·log d)"}


@dataclass(frozen=True, slots=True)
class LawFit:
    """One of the two laws with its coefficients."""

    law: Law
    alpha: float  # what the first bit of distance buys
    beta: float  # how fast that wears off; negative where it does not
    r2: float | None  # 1 − SS_residual / SS_total about the mean; None where gold does not vary
    n: int  # points

    def at(self, d: float) -> float:
        """Gold reward at distance d ≥ 0, relative to the start."""
        if d == 0:
            return 0.0
        return d * (self.alpha - self.beta * (d if self.law == "best_of_n" else math.log(d)))

    @property
    def peak(self) -> float | None:
        """The distance where the law is highest: α/(2β), or exp(α/β − 1); None where it has no such place."""
        if self.beta <= 0 or (self.law == "best_of_n" and self.alpha <= 0):
            return None
        exponent = self.alpha / self.beta - 1
        if self.law == "best_of_n":
            return self.alpha / (2 * self.beta)
        return math.exp(exponent) if exponent < 700 else None


def fit(law: Law, d: Sequence[float], gold: Sequence[float]) -> LawFit:
    """Least squares of R(d) = d(α − β·d) (best of n) or d(α − β·log d) (reinforcement learning), 2210.10760,
    section 3.1.

    d: (N,) √KL, ≥ 0. gold: (N,) gold reward minus the starting model's. ValueError for numbers that are not
    finite, and for fewer than two different positive distances, which leave α and β open.
    """
    x, y = np.asarray(d, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError("a distance and a gold reward for each point")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all()):
        raise ValueError("distances must be finite and not negative, gold rewards finite")
    if len(np.unique(x[x > 0])) < 2:
        raise ValueError("fewer than two different distances say nothing of a curve")
    bend = x if law == "best_of_n" else np.log(np.where(x > 0, x, 1.0))
    a, b = x, -x * bend
    aa, ab, bb = a @ a, a @ b, b @ b
    alpha, beta = np.linalg.solve(np.array([[aa, ab], [ab, bb]]), np.array([a @ y, b @ y]))
    spread = float(np.square(y - y.mean()).sum())
    missed = float(np.square(y - alpha * a - beta * b).sum())
    return LawFit(law, float(alpha), float(beta), 1 - missed / spread if spread > 0 else None, len(x))


@dataclass(frozen=True, slots=True)
class Course:
    """How a measure went over a run: its highest place and its end, each a mean over a window of
    evaluations."""

    at: int  # place of the middle of the window where it is highest; the first of equals
    peak: float
    end: float  # mean of the last window

    @property
    def fall(self) -> float:
        """From the peak to the end; 0 where it ends at its peak."""
        return self.peak - self.end


def course(values: Sequence[float], window: int = 3) -> Course:
    """The peak and the end of (N,) values in the order of the run. A single evaluation is noisy, and the
    highest of many noisy ones is too high; so both are means over `window` neighbours (all, where there are
    fewer). ValueError for none.
    """
    if not values:
        raise ValueError("no values")
    width = min(window, len(values))
    means = [math.fsum(values[i : i + width]) / width for i in range(len(values) - width + 1)]
    best = max(range(len(means)), key=lambda i: (means[i], -i))
    return Course(best + width // 2, means[best], means[-1])


def spread(measure: Measure) -> float:
    """The standard deviation of single values behind the 95 % interval of their mean: half the width is
    1.96·s/√n."""
    return (measure["high"] - measure["low"]) / 2 / Z * math.sqrt(measure["n"])
