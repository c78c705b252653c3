"""Shares and slopes with 95 % intervals where observations come in clusters: several votes on one item say
less than as many votes on as many items."""

from __future__ import annotations

from typing import Any

import numpy as np

from keel.evaluation.measures import Measure, Z, wilson

Array = np.ndarray[Any, Any]
RIDGE = 0.01  # precision of the normal prior on a slope, so that one is found where the data separate


def share(points: Array, cluster: Array) -> Measure | None:
    """(V,) points in [0, 1] and (V,) which cluster each is of → their mean with Wilson's interval for as many
    independent trials as they are worth; None for no points. `n` counts the points.

    The variance of the mean is that of the clusters' sums (linearisation, as in survey sampling):
    v = C/(C − 1) Σ_c (Σ_{v∈c} (x_v − p))² / V². They are worth n' = p(1 − p)/v trials (Korn & Graubard,
    Survey Methodology 24, 1998), at most V; where all points are equal, C.
    """
    points = np.asarray(points, dtype=np.float64)
    if not len(points):
        return None
    p = float(points.mean())
    sums = sums_by(cluster, points - p)
    clusters = len(sums)
    variance = float(np.square(sums).sum()) / len(points) ** 2 * clusters / max(clusters - 1, 1)
    spread = p * (1 - p)
    worth = float(clusters) if clusters < 2 or spread == 0 or variance == 0 else spread / variance
    worth = max(1.0, min(worth, float(len(points))))
    return {**wilson(p * worth, worth), "mean": p, "n": len(points)}


def logistic_slope(x: Array, y: Array, cluster: Array, *, intercept: bool = False) -> Measure | None:
    """Slope b of P(y = 1) = σ(a + b·x), with the interval b ± 1.96·s by the sandwich over clusters; None for
    fewer than two clusters, or an x that does not vary.

    x: (V,) numbers; y: (V,) in [0, 1], ½ for a draw. intercept: False takes a = 0, for a question that two
    sides are symmetric in. A weak normal prior (`RIDGE`) keeps the slope finite.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) == 0 or len(np.unique(cluster)) < 2 or (np.ptp(x) == 0 if intercept else not x.any()):
        return None
    design = np.stack([x, np.ones_like(x)], axis=1) if intercept else x[:, None]
    beta = np.zeros(design.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
        gradient = design.T @ (y - p) - RIDGE * beta
        step = np.linalg.solve(_curvature(design, p), gradient)
        beta = beta + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
    bread = np.linalg.inv(_curvature(design, p))
    scores = np.stack([sums_by(cluster, column * (y - p)) for column in design.T], axis=1)
    clusters = len(scores)
    variance = bread @ (scores.T @ scores * clusters / (clusters - 1)) @ bread
    half = Z * float(np.sqrt(variance[0, 0]))
    return {"mean": float(beta[0]), "low": float(beta[0]) - half, "high": float(beta[0]) + half, "n": len(x)}


def linear_slope(x: Array, y: Array, cluster: Array) -> Measure | None:
    """Slope of the least-squares line y = a + b·x with the interval b ± 1.96·s by the sandwich over clusters;
    None for fewer than two clusters, or an x that does not vary."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or len(np.unique(cluster)) < 2:
        return None
    off = x - x.mean()
    slope = float(off @ y / (off @ off))
    residual = y - y.mean() - slope * off
    sums = sums_by(cluster, off * residual)
    clusters = len(sums)
    half = Z * float(np.sqrt(np.square(sums).sum() * clusters / (clusters - 1))) / float(off @ off)
    return {"mean": slope, "low": slope - half, "high": slope + half, "n": len(x)}


def mean(values: Array, cluster: Array) -> Measure | None:
    """(V,) values → their mean ± 1.96·s, s by the clusters' sums as in `share`; None for no values."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    centre = float(values.mean())
    sums = sums_by(cluster, values - centre)
    clusters = len(sums)
    half = Z * float(np.sqrt(np.square(sums).sum() * clusters / max(clusters - 1, 1))) / len(values)
    return {"mean": centre, "low": centre - half, "high": centre + half, "n": len(values)}


def sums_by(cluster: Array, values: Array) -> Array:
    """(C,) the sum of each cluster's values, in the order of the clusters' names."""
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    return np.bincount(index, values)


def _curvature(design: Array, p: Array) -> Array:
    return design.T @ (design * (p * (1 - p))[:, None]) + RIDGE * np.eye(design.shape[1])
