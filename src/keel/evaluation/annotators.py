"""Votes as data: who said what of which pair, and how far people agree beyond chance.

The functions on counts know nothing of pairs. What is special about pairs stands in `of_pairs`: which side is
called "chosen" usually depends on the votes themselves, so the votes are read from both sides. Otherwise
"chosen" would be the more frequent choice by construction, which looks like agreement to be expected by
chance and like a prior for the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from keel.evaluation.measures import wilson
from keel.types import PreferenceRecord

CHOICES = ("rejected", "tie", "chosen")  # the categories of a vote on a pair, in their order
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Votes:
    """V votes, one by one, of A annotators on N items in K categories. Not everyone votes on everything."""

    item: Array  # (V,) which item, 0 … N − 1
    annotator: Array  # (V,) who, an index into `names`
    choice: Array  # (V,) what, 0 … K − 1
    items: int  # N
    categories: int  # K
    names: tuple[str, ...]  # (A,) "" where nobody knows who voted

    def counts(self) -> Array:
        """(N, K) votes for each category."""
        cells = np.bincount(self.item * self.categories + self.choice, minlength=self.items * self.categories)
        return cells.reshape(self.items, self.categories)


def of_table(table: Sequence[Sequence[int | None]], categories: int, names: Sequence[str]) -> Votes:
    """Votes from a table with a row an item and a column an annotator; None where one did not vote."""
    votes = [(i, a, c) for i, row in enumerate(table) for a, c in enumerate(row) if c is not None]
    item, annotator, choice = np.array(votes, dtype=np.int64).reshape(-1, 3).T
    return Votes(item, annotator, choice, len(table), categories, tuple(names))


def of_pairs(records: Sequence[PreferenceRecord], *, named: bool = False) -> Votes:
    """The votes on N pairs, read from both sides: items 0 … N − 1 as the records stand, N … 2N − 1 with their
    sides exchanged. So nothing that is made of them depends on which side a record calls chosen.

    named: only the votes whose annotator is known.
    """
    votes = [(i, v) for i, r in enumerate(records) for v in r.votes if v.annotator or not named]
    names = tuple(dict.fromkeys(sorted(v.annotator for _, v in votes)))
    index_of = {name: a for a, name in enumerate(names)}
    item = np.array([i for i, _ in votes], dtype=np.int64)
    annotator = np.array([index_of[v.annotator] for _, v in votes], dtype=np.int64)
    choice = np.array([CHOICES.index(v.choice) for _, v in votes], dtype=np.int64)
    return Votes(
        np.concatenate([item, item + len(records)]),
        np.concatenate([annotator, annotator]),
        np.concatenate([choice, len(CHOICES) - 1 - choice]),
        2 * len(records),
        len(CHOICES),
        names,
    )


def krippendorff_alpha(counts: Array, level: Literal["nominal", "ordinal"] = "nominal") -> float | None:
    """Krippendorff's α = 1 − D_o / D_e (Content Analysis, 2004, chapter 11): 1 is agreement, 0 what chance
    would give.

    counts: (N, K) votes for each category of each item; items with fewer than two votes are left out. level
    "ordinal" takes the categories as ordered: those further apart disagree more. None where all votes are of
    one category, so that chance would agree as well.
    """
    return _alpha(_coincidences(_voted_twice(counts)).sum(axis=0), level)


def alpha_interval(
    counts: Array,
    level: Literal["nominal", "ordinal"] = "nominal",
    *,
    from_both_sides: bool = False,
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, float | None] | None:
    """Krippendorff's α with the 95 % percentile interval of the bootstrap over items: `mean` (α itself),
    `low`, `high` (None where fewer than ten items have two votes: there is too little to draw from),
    `n` items with two votes. None where there is no α.

    from_both_sides: counts are of pairs whose sides mean nothing, and each item is read with its categories
    in both orders, as `of_pairs` does; it stays one item. Items with equal counts are drawn together.
    """
    patterns, items = np.unique(_voted_twice(counts), axis=0, return_counts=True)
    one = _coincidences(patterns)
    if from_both_sides:
        one = one + one[:, ::-1, ::-1]
    alpha = _alpha(np.tensordot(items, one, 1), level) if len(patterns) else None
    if alpha is None:
        return None
    n = int(items.sum())
    if n < 10:
        return {"mean": alpha, "low": None, "high": None, "n": n}
    drawn = np.random.default_rng(seed).multinomial(n, items / n, size=draws)
    alphas = [a for times in drawn if (a := _alpha(np.tensordot(times, one, 1), level)) is not None]
    low, high = np.percentile(alphas or [alpha], [2.5, 97.5])
    return {"mean": alpha, "low": float(low), "high": float(high), "n": n}


def _coincidences(counts: Array) -> Array:
    """(N, K, K) what each item adds to the coincidences o_ck: pairs of its votes, over their number less
    one."""
    size = counts.sum(axis=1, keepdims=True)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    return pairs / (size - 1)[:, :, None]


def _alpha(coincidence: Array, level: Literal["nominal", "ordinal"]) -> float | None:
    """α of (K, K) coincidences."""
    total = coincidence.sum(axis=0)  # (K,), n_c
    distance = _ordinal(total) if level == "ordinal" else 1 - np.eye(len(total))
    expected = (np.outer(total, total) * distance).sum()
    if expected == 0:
        return None
    return float(1 - (total.sum() - 1) * (coincidence * distance).sum() / expected)


def _ordinal(total: Array) -> Array:
    """(K, K) δ²_ck = (Σ_{g=c…k} n_g − (n_c + n_k)/2)²."""
    reach = np.cumsum(total) - total / 2
    return np.square(reach[:, None] - reach[None, :])


def fleiss_kappa(counts: Array) -> float | None:
    """Fleiss' κ = (P̄ − P̄_e) / (1 − P̄_e) (Psychological Bulletin 76, 1971).

    counts: (N, K). Departure: items may have different numbers of votes, two or more; each weighs the same in
    P̄ and each vote the same in P̄_e. With equal numbers this is Fleiss' own. None where all votes are of one
    category.
    """
    counts = _voted_twice(counts)
    size = counts.sum(axis=1)
    agreed = ((np.square(counts).sum(axis=1) - size) / (size * (size - 1))).mean() if len(counts) else 1.0
    chance = np.square(counts.sum(axis=0) / max(counts.sum(), 1.0)).sum()
    return float((agreed - chance) / (1 - chance)) if len(counts) and chance < 1 else None


def cohen_kappa(one: Sequence[int] | Array, other: Sequence[int] | Array, categories: int) -> float | None:
    """Cohen's κ = (p_o − p_e) / (1 − p_e) of two annotators on the same items (Educ. Psychol. Meas. 20,
    1960).

    one, other: (n,) categories 0 … K − 1. None where both always say the same one category, or for no items.
    """
    table = np.zeros((categories, categories))
    np.add.at(table, (np.asarray(one, dtype=np.int64), np.asarray(other, dtype=np.int64)), 1.0)
    if not table.any():
        return None
    table /= table.sum()
    chance = float(table.sum(axis=1) @ table.sum(axis=0))
    return (float(np.trace(table)) - chance) / (1 - chance) if chance < 1 else None


def pairwise_kappa(votes: Votes) -> dict[tuple[str, str], tuple[float | None, int]]:
    """Cohen's κ of every two annotators who voted on some item together, and on how many; of an annotator's
    several votes on one item the first counts."""
    by_item: dict[int, dict[int, int]] = {}
    for item, annotator, choice in zip(votes.item.tolist(), votes.annotator.tolist(), votes.choice.tolist()):
        by_item.setdefault(item, {}).setdefault(annotator, choice)
    shared: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for said in by_item.values():
        for a, b in combinations(sorted(said), 2):
            shared.setdefault((a, b), []).append((said[a], said[b]))
    return {
        (votes.names[a], votes.names[b]): (
            cohen_kappa(*np.array(both).T, categories=votes.categories), len(both)
        )
        for (a, b), both in sorted(shared.items())
    }  # fmt: skip


def agreement(records: Sequence[PreferenceRecord]) -> dict[str, Any] | None:
    """How far the voters on these pairs agree; None where no pair has two votes.

    `pairs` with two votes or more, their `votes`, the share of `unanimous` ones, `alpha` (nominal, ordinal),
    `fleiss`, and `cohen`: the mean over pairs of annotators, weighted by the pairs that both saw (where
    annotators are known).
    """
    several = [record for record in records if len(record.votes) > 1]
    if not several:
        return None
    counts = of_pairs(several).counts()
    same = sum(len({vote.choice for vote in record.votes}) == 1 for record in several)
    kappas = [(k, n) for k, n in pairwise_kappa(of_pairs(several, named=True)).values() if k is not None]
    return {
        "pairs": len(several),
        "votes": sum(len(record.votes) for record in several),
        "unanimous": wilson(same, len(several)),
        "alpha": {level: krippendorff_alpha(counts, level) for level in ("nominal", "ordinal")},
        "fleiss": fleiss_kappa(counts),
        "cohen": sum(k * n for k, n in kappas) / sum(n for _, n in kappas) if kappas else None,
    }


def _voted_twice(counts: Array) -> Array:
    counts = np.asarray(counts, dtype=np.float64)
    return counts[counts.sum(axis=1) > 1]
