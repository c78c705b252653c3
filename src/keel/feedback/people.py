"""Each annotator's numbers: reliability, agreement with others, gold items, pace, and what biases them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keel.evaluation import clustered
from keel.evaluation.annotators import Array, Votes
from keel.evaluation.measures import wilson
from keel.evaluation.reliability import SMOOTHING, dawid_skene
from keel.feedback.compared import both_sides, comparisons, ratings, reading, verdict
from keel.votes.answers import agrees
from keel.votes.kinds import Project, VoteRow


def table(rows: Sequence[VoteRow], project: Project) -> list[dict[str, Any]]:
    """A row an annotator, the most reliable first; whose reliability cannot be told come last."""
    reliability = reliabilities(rows, project)
    same = with_others(rows, project)
    by_name: dict[str, list[VoteRow]] = {}
    for row in rows:
        by_name.setdefault(row.person, []).append(row)
    found = [_person(name, own, project, reliability, same) for name, own in by_name.items()]
    unknown = -1.0
    return sorted(
        found, key=lambda p: (-(unknown if p["reliability"] is None else p["reliability"]), p["name"])
    )


def _person(
    name: str,
    rows: Sequence[VoteRow],
    project: Project,
    reliability: dict[str, float],
    same: dict[int, float | None],
) -> dict[str, Any]:
    known = [a for row in rows if (a := same[id(row)]) is not None]
    taken = [row.seconds for row in rows if row.seconds]
    sides = [c for c in comparisons(rows) if c.points != 0.5 and c.shown_first is not None]
    choices = [verdict(row) for row in rows]
    return {
        "name": name,
        "is_model": rows[0].is_model,
        "votes": len(rows),
        "reliability": reliability.get(name),
        "agrees": wilson(sum(known), len(known)) if known else None,
        "gold": gold_share(rows, project),
        "seconds": float(np.median(taken)) if taken else None,
        "first_side": clustered.share(
            np.array([c.points if c.shown_first else 1 - c.points for c in sides]),
            np.array([c.row.item for c in sides]),
        ),
        "ties": choices.count("tie") + choices.count("both_bad"),
        "cannot_judge": choices.count("cannot_judge"),
        "first_at": min(row.at for row in rows),
        "last_at": max(row.at for row in rows),
    }


# ---------------------------------------------------------------- reliability


def reliabilities(rows: Sequence[VoteRow], project: Project) -> dict[str, float]:
    """Name → reliability, for those who judged something that somebody else judged too.

    Pairs, rankings, thumbs: the probability that they name the better side, by Dawid & Skene's EM over
    people's votes (a tie is one half). Ratings: the mean over scales of the correlation of their values with
    the mean of the others' on the same items (at least 5 items), cut at 0. A language model is measured
    against what people's votes alone say.
    """
    people = [row for row in rows if not row.is_model]
    if project.task == "edit":
        return {}
    if project.task == "rating":
        return {**_correlations(people, people, project), **_correlations(_models(rows), people, project)}
    found = reading(rows, project).get("choice")
    return _by_em(found, {row.person for row in rows if row.is_model}) if found is not None else {}


def _by_em(votes: Votes, models: set[str]) -> dict[str, float]:
    votes = both_sides(votes)
    human = np.array([name not in models for name in votes.names], dtype=bool)
    by_people = human[votes.annotator]
    shared = _voters(votes, by_people)
    if not by_people.any() or not (shared[votes.item[by_people]] > 1).any():
        return {}
    fitted = dawid_skene(_only(votes, by_people), smoothing=SMOOTHING)
    known = shared[votes.item] > np.where(by_people, 1, 0)
    found: dict[str, float] = {}
    for index, name in enumerate(votes.names):
        own = votes.annotator == index
        if (own & known).any():
            found[name] = _right_side(votes, own & (shared[votes.item] > 0), fitted.posterior)
    return found


def _right_side(votes: Votes, own: Array, posterior: Array) -> float:
    """One annotator's probability to name the better side, ties one half, from what is held to be true."""
    kinds = votes.categories
    said = np.zeros((kinds, kinds))
    np.add.at(said.T, votes.choice[own], posterior[votes.item[own]])
    best = said[kinds - 1] + SMOOTHING
    return float(best @ np.linspace(0, 1, kinds) / best.sum())


def _only(votes: Votes, keep: Array) -> Votes:
    return Votes(
        votes.item[keep],
        votes.annotator[keep],
        votes.choice[keep],
        votes.items,
        votes.categories,
        votes.names,
    )


def _voters(votes: Votes, keep: Array) -> Array:
    """(N,) how many different annotators voted on each item."""
    pairs = np.unique(np.stack([votes.item[keep], votes.annotator[keep]]), axis=1)
    return np.bincount(pairs[0], minlength=votes.items)


def _models(rows: Sequence[VoteRow]) -> list[VoteRow]:
    return [row for row in rows if row.is_model]


def _correlations(rows: Sequence[VoteRow], others: Sequence[VoteRow], project: Project) -> dict[str, float]:
    """Name → mean over scales of Pearson's r with the mean of the others on the same items."""
    given: dict[tuple[int, str], dict[str, float]] = {}
    for row in others:
        for scale, value in ratings(row, project).items():
            given.setdefault((row.item, scale), {})[row.person] = value
    paired: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for scale, value in ratings(row, project).items():
            rest = [v for who, v in given.get((row.item, scale), {}).items() if who != row.person]
            if rest:
                paired.setdefault(row.person, {}).setdefault(scale, []).append((value, sum(rest) / len(rest)))
    found: dict[str, float] = {}
    for name, by_scale in paired.items():
        values = [r for pairs in by_scale.values() if (r := _pearson(pairs)) is not None]
        if values:
            found[name] = max(0.0, sum(values) / len(values))
    return found


def _pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < 5:
        return None
    one, other = np.array(pairs).T
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


# ---------------------------------------------------------------- agreement, gold


def with_others(rows: Sequence[VoteRow], project: Project) -> dict[int, float | None]:
    """id(row) → how far a vote is what most other people said of the item: 1, 0, or ½ where it or they are
    undecided; None where nobody else judged it, and for ratings and edits. Of a ranking, the mean over its
    pairs."""
    shares: dict[int, list[float]] = {id(row): [] for row in rows}
    judged: dict[Any, list[tuple[VoteRow, float]]] = {}
    for one in comparisons(rows):
        judged.setdefault((one.row.item, one.pair), []).append((one.row, one.points))
    if project.task == "thumbs":
        for row in rows:
            for value in ratings(row, project).values():
                judged.setdefault(row.item, []).append((row, value))
    for votes in judged.values():
        human = [(row, points) for row, points in votes if not row.is_model]
        total = sum(points for _, points in human)
        for row, points in votes:
            count = len(human) - (not row.is_model)
            if count:
                rest = (total - (0 if row.is_model else points)) / count
                shares[id(row)].append(_same(points, rest))
    return {key: sum(values) / len(values) if values else None for key, values in shares.items()}


def _same(points: float, rest: float) -> float:
    """points: of one vote; rest: the others' mean."""
    if points == 0.5 or rest == 0.5:
        return 1.0 if points == rest == 0.5 else 0.5
    return float((points > 0.5) == (rest > 0.5))


def gold_share(rows: Sequence[VoteRow], project: Project) -> dict[str, float] | None:
    """The share of answers to gold items that are right; None where there were none."""
    right = [agrees(project, row.gold, row.answer) for row in rows if row.gold is not None]
    return wilson(sum(right), len(right)) if right else None
