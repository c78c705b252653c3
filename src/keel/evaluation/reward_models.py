"""Judging a reward model on comparisons: where it is right, how sure it is, what it is drawn to, what it
cannot know.

Nothing here depends on which side of a pair is called chosen, which people's votes decide: what has a sign
that could as well be the other one is read from both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.evaluation.measures import Measure, accuracy, mean_interval, points_share

BINS = 10  # of a reliability diagram, of equal width between ½ and 1
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Compared:
    """P pairs as the M members of a reward model score them (M is 1 without an ensemble)."""

    chosen: Array  # (M, P) raw scores r_φ
    rejected: Array  # (M, P)
    means: Array  # (M,) the scale that each member was given
    stds: Array  # (M,)
    p_chosen: Sequence[float | None]  # share of the votes; None when nobody's votes are known
    votes: Sequence[int]  # how many votes are known of each pair
    prompts: Sequence[str] | Sequence[int]  # texts or hashes: equal ones are one prompt
    lengths: Array  # (2, P) of the chosen and of the rejected replies, in characters
    subsets: Sequence[str | None] = ()  # kinds of pairs; None for a pair without
    chosen_first: Sequence[bool | None] = ()  # whether the chosen reply stood first when people voted

    @property
    def scaled(self) -> tuple[Array, Array]:
        """(M, P) each: scores on the members' own scales."""
        mean, std = self.means[:, None], self.stds[:, None]
        return (self.chosen - mean) / std, (self.rejected - mean) / std

    @property
    def scores(self) -> tuple[Array, Array]:
        """(P,) each: the mean of the members on their scales, which is the ensemble's score."""
        chosen, rejected = self.scaled
        return chosen.mean(axis=0), rejected.mean(axis=0)

    @property
    def labels(self) -> Array:
        """(P,) the share of the votes; 1 when nobody's votes are known."""
        return np.array([1.0 if p is None else p for p in self.p_chosen])


def judge(compared: Compared) -> dict[str, Any]:
    """Everything below that applies; `accuracy` first, absent when every pair is undecided."""
    measures: dict[str, Any] = _by_group(compared, {"accuracy": range(len(compared.votes))})
    for name, groups in (("by_margin", margins(compared)), ("by_subset", subsets(compared))):
        if parts := _by_group(compared, groups):
            measures[name] = parts
    measures["calibration"] = calibration(compared)
    measures["length"] = with_length(compared)
    if any(first is not None for first in compared.chosen_first):
        measures["position"] = with_position(compared)
    if len(compared.chosen) > 1:
        measures["disagreement"] = disagreement(compared)
    measures["offset"] = offset(*compared.scores, compared.prompts)
    return measures


# ---------------------------------------------------------------- where it is right


def _by_group(compared: Compared, groups: Mapping[str, Sequence[int]]) -> dict[str, Measure]:
    """Accuracy of each group of pairs that has one whose votes are decided."""
    chosen, rejected = (side.tolist() for side in compared.scores)
    accuracies: dict[str, Measure] = {}
    for name, rows in groups.items():
        shares = [compared.p_chosen[i] for i in rows]
        if any(p != 0.5 for p in shares):
            accuracies[name] = accuracy([chosen[i] for i in rows], [rejected[i] for i in rows], shares)
    return accuracies


def margins(compared: Compared) -> dict[str, Sequence[int]]:
    """Pairs of two votes or more by how clear these are: `unanimous` for one side, or `split` (ties split
    them too)."""
    known = [(i, p) for i, (p, n) in enumerate(zip(compared.p_chosen, compared.votes)) if n > 1]
    return {
        "unanimous": [i for i, p in known if p in (0, 1)],
        "split": [i for i, p in known if p not in (0, 1)],
    }


def subsets(compared: Compared) -> dict[str, Sequence[int]]:
    """Pairs by their kind, in the order of its name."""
    rows_of: dict[str, list[int]] = {}
    for i, kind in enumerate(compared.subsets):
        if kind is not None:
            rows_of.setdefault(kind, []).append(i)
    return dict(sorted(rows_of.items()))


# ---------------------------------------------------------------- how sure it is


def calibration(compared: Compared, bins: int = BINS) -> dict[str, Any]:
    """Whether P(chosen ≻ rejected) = σ(r_chosen − r_rejected) is the share of people who prefer it.

    r: raw scores, of an ensemble the members' mean. Read from the side that the model prefers: `confidence`
    is its probability, in [½, 1], and `share` that of the votes for this side.

    `ece`: Σ_b (n_b / n)·|share_b − confidence_b| over the bins (1706.04599, eq. 3; soft labels in place of
    hits). `brier`: mean (p − share)² with its interval. `bins`: those that have pairs, with their ends.
    """
    difference = (compared.chosen - compared.rejected).mean(axis=0)
    share = np.where(difference >= 0, compared.labels, 1 - compared.labels)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled_bins, error = [], 0.0
    for b in range(bins):
        rows = bin_of == b
        n = int(rows.sum())
        if n:
            sure, agreed = float(confidence[rows].mean()), points_share(share[rows].tolist())
            error += n / len(share) * abs(agreed["mean"] - sure)
            ends = {"low": 0.5 + b / (2 * bins), "high": 0.5 + (b + 1) / (2 * bins)}
            filled_bins.append({**ends, "confidence": sure, "share": agreed})
    return {"ece": error, "brier": mean_interval(np.square(confidence - share).tolist()), "bins": filled_bins}


# ---------------------------------------------------------------- what it is drawn to


def with_length(compared: Compared) -> dict[str, Any]:
    """Correlations with length in characters. `replies`: of all replies' scores with their lengths. `pairs`:
    of the difference in score with the difference in length, pair by pair. `votes`: the same of people's
    votes, which is as far as length deserves it."""
    chosen, rejected = compared.scores
    longer = compared.lengths[0] - compared.lengths[1]
    return {
        "replies": _correlations(np.concatenate([chosen, rejected]), compared.lengths.reshape(-1)),
        "pairs": _correlations(_both_sides(chosen - rejected), _both_sides(longer)),
        "votes": _correlations(_both_sides(compared.labels - 0.5), _both_sides(longer)),
    }


def with_position(compared: Compared) -> dict[str, Any]:
    """Whether what stood first is preferred, by the reward model (`reward`) and by people (`votes`): the
    `first` one's share, ½ without bias, and the correlation of preference with position (1 for first, 0 for
    second), over both sides of the pairs whose order is known."""
    rows = [i for i, first in enumerate(compared.chosen_first) if first is not None]
    chosen, rejected = compared.scores
    result: dict[str, Any] = {}
    for name, prefers in (("reward", (np.sign(chosen - rejected) + 1) / 2), ("votes", compared.labels)):
        first = np.array([prefers[i] if compared.chosen_first[i] else 1 - prefers[i] for i in rows])
        position = np.repeat([1.0, 0.0], len(rows))
        result[name] = {
            "first": points_share(first.tolist()),
            **_correlations(np.concatenate([first, 1 - first]), position),
        }
    return result


def _both_sides(difference: Array) -> Array:
    """(2P,) differences, chosen minus rejected and rejected minus chosen."""
    return np.concatenate([difference, -difference])


def _correlations(x: Array, y: Array) -> dict[str, float | None]:
    return {"pearson": pearson(x, y), "spearman": pearson(ranks(x), ranks(y))}


def pearson(x: Array, y: Array) -> float | None:
    """Pearson's correlation; None where one of them does not vary."""
    a, b = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else None


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs, and so do those that only rounding tells apart."""
    rounded = np.round(values / max(float(np.abs(values).max()), 1e-300), 12)
    _, rank_index, counts = np.unique(rounded, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[rank_index]


# ---------------------------------------------------------------- what it cannot know


def disagreement(compared: Compared) -> dict[str, Any]:
    """Whether the members of an ensemble disagree where it is wrong (2310.02743; 2312.09244).

    Of each decided pair: the members' standard deviation of the difference in score, on their own scales.
    `auroc`: the probability that it is higher for a pair that the ensemble ranks wrong than for one that it
    ranks right, ½ if it says nothing; None where it is right, or wrong, everywhere. `std_right`, `std_wrong`:
    its means.
    """
    chosen, rejected = compared.scaled
    differences = chosen - rejected
    mean, spread = differences.mean(axis=0), differences.std(axis=0)
    decided = (compared.labels != 0.5) & (mean != 0)
    wrong = ((mean > 0) != (compared.labels > 0.5))[decided]
    spread = spread[decided]
    means = {
        name: mean_interval(part.tolist())
        for name, part in (("std_right", spread[~wrong]), ("std_wrong", spread[wrong]))
        if len(part)
    }
    return {"auroc": auroc(spread, wrong), **means}


def auroc(signal: Array, positive: Array) -> float | None:
    """Area under the ROC curve, as P(signal of a positive > that of a negative), equal ones one half
    (Mann–Whitney)."""
    n = int(positive.sum())
    rest = len(positive) - n
    if n == 0 or rest == 0:
        return None
    return (float(ranks(signal)[positive].sum()) - n * (n + 1) / 2) / (n * rest)


def offset(chosen: Array, rejected: Array, prompts: Sequence[str] | Sequence[int]) -> dict[str, float | None]:
    """How much of the scores' variance lies between prompts, where it means nothing: Bradley–Terry learns
    differences within a prompt alone, so each prompt has an arbitrary offset.

    One-way analysis of variance with random effects: `within` is the variance of replies to one prompt,
    `between` that of the prompts' offsets (not below 0), `share` = between / (between + within); None where
    scores do not vary, or there is one prompt only.
    """
    _, group = np.unique(np.array(prompts), return_inverse=True)
    group, scores = np.concatenate([group, group]), np.concatenate([chosen, rejected])
    sizes = np.bincount(group)
    means = np.bincount(group, scores) / sizes
    n, groups = len(scores), len(sizes)
    within = float(np.square(scores - means[group]).sum()) / (n - groups)
    if groups < 2:
        return {"within": within, "between": None, "share": None}
    squares = float((sizes * np.square(means - scores.mean())).sum()) / (groups - 1)
    each = (n - float(np.square(sizes).sum()) / n) / (groups - 1)
    between = max(0.0, (squares - within) / each)
    return {
        "within": within,
        "between": between,
        "share": between / (between + within) if between + within > 0 else None,
    }
