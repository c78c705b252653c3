"""Numbers with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

Measure = dict[str, float]  # mean, low, high, n
Z = 1.959963984540054  # the normal distribution's 97.5 % point


def mean_interval(values: Sequence[float]) -> Measure:
    """Mean with the interval mean ± 1.96·s/√n (s with n − 1); a single value has no width to tell."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / n
    half = Z * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def across_runs(means: Sequence[float]) -> Measure:
    """Mean over runs (seeds) with Student's interval, mean ± t·s/√n with n − 1 degrees of freedom; `n` counts
    the runs.

    What varies is the training, not only the prompts; with few runs the interval is wide, as it must be.
    ValueError for fewer than two runs, which say nothing of how runs vary.
    """
    n = len(means)
    if n < 2:
        raise ValueError(f"{n} runs have no spread")
    mean = math.fsum(means) / n
    half = t_point(n - 1) * math.sqrt(math.fsum((m - mean) ** 2 for m in means) / (n - 1) / n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def t_point(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution, from its exact distribution function for whole degrees of
    freedom (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom")

    def within(angle: float) -> float:
        """P(|t| < √ν·tan θ)."""
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = degrees % 2
        term, total = (cosine if odd else 1.0), 0.0
        for k in range(1 + odd, degrees, 2):  # a sum of powers of cos θ, of which every second one is there
            total += term
            term *= cosine**2 * k / (k + 1)
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection, to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def wilson(successes: float, n: float) -> Measure:
    """A share with Wilson's score interval, which stays within [0, 1] and is honest for few trials."""
    if n == 0:
        raise ValueError("no trials to count")
    share = successes / n
    scale = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / scale
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / scale
    return {"mean": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def points_share(points: Sequence[float]) -> Measure:
    """Mean of wins (1), draws (½) and losses (0), with Wilson's interval for as many trials as they are
    worth.

    Draws vary less than wins and losses do, so n trials with draws say as much as n' = n·p(1 − p)/s² without;
    p and s² are taken with two wins and two losses more (as Agresti & Coull do), so that draws alone are not
    held for certain. Without draws n' = n: `wilson`. ValueError when there are none, or one lies outside of
    [0, 1].
    """
    n = len(points)
    if any(not 0 <= point <= 1 for point in points):
        raise ValueError("points lie between 0 and 1")
    total = math.fsum(points)
    if n == 0 or all(point in (0, 1) for point in points):
        return wilson(total, n)
    p = (total + 2) / (n + 4)
    variance = (math.fsum(point**2 for point in points) + 2) / (n + 4) - p**2
    worth = n * p * (1 - p) / variance
    return {**wilson(total / n * worth, worth), "mean": total / n, "n": n}


def accuracy(chosen: Sequence[float], rejected: Sequence[float], p_chosen: Sequence[float | None]) -> Measure:
    """Share of pairs ranked as the votes did, over all pairs; an undecided vote (½) does not count, an equal
    score counts half.

    ValueError when every pair is undecided.
    """
    hits = [
        0.5 if c == r else float((c > r) == (p is None or p > 0.5))
        for c, r, p in zip(chosen, rejected, p_chosen, strict=True)
        if p is None or p != 0.5
    ]
    return points_share(hits)


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (1510.03055): different n-grams of words over all n-grams of all texts; 0 when there are
    none."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
