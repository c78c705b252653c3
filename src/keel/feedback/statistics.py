"""What the votes of a project say: how far people agree, who is reliable, what biases them, whether they
drift, and how many more votes would change the order of the models. How each number is computed stands in
docs/human-loop.md.

Everything here is a function of plain rows; `of_project` alone opens nothing but the store that it is given.
Gold items are counted under `gold` and by reliability, and left out of everything else: they are chosen to be
easy. Language models that annotate have numbers of their own and count in none of people's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keel.evaluation import clustered, order
from keel.evaluation.annotators import alpha_interval
from keel.evaluation.measures import wilson
from keel.feedback import people
from keel.feedback.compared import comparisons, length, ratings, reading, verdict
from keel.votes.kinds import Project, VoteRow

if TYPE_CHECKING:
    from keel.votes.store import Store

WINDOWS = 10  # parts that the votes are cut into, in their order, to see a drift


def of_project(store: Store, name: str) -> dict[str, Any]:
    """Every number of a project, as JSON has it. NotFound where there is no such project."""
    return of_votes(list(store.votes(name)), store.project(name))


def of_votes(rows: Sequence[VoteRow], project: Project) -> dict[str, Any]:
    """The numbers of these votes; each is None, or its list empty, where there is too little to tell."""
    by_people = [row for row in rows if not row.is_model and row.gold is None]
    return {
        "counts": counts(rows),
        "agreement": agreement(by_people, project),
        "people": people.table(rows, project),
        "seconds": seconds(by_people),
        "sides": side_bias(by_people),
        "length": length_bias(by_people),
        "drift": drift(by_people, project),
        "gold": people.gold_share([row for row in rows if not row.is_model], project),
        "order": order_of_sources(by_people),
        "scales": scales_by_source(by_people, project),
    }


def counts(rows: Sequence[VoteRow]) -> dict[str, Any]:
    """How many votes, by whom, of what."""
    return {
        "votes": len(rows),
        "counted": sum(row.counted for row in rows),
        "surplus": sum(not row.counted for row in rows),
        "items": len({row.item for row in rows}),
        "people": len({row.person for row in rows if not row.is_model}),
        "models": len({row.person for row in rows if row.is_model}),
        "by_models": sum(row.is_model for row in rows),
        "gold": sum(row.gold is not None for row in rows),
        "comments": sum(bool(row.answer.comment.strip()) for row in rows),
        "choices": dict(Counter(verdict(row) for row in rows if verdict(row)).most_common()),
    }


def agreement(rows: Sequence[VoteRow], project: Project) -> dict[str, Any] | None:
    """Krippendorff's α, by what is judged: "choice" of pairs, thumbs and rankings, or each scale's name.
    Pairs of replies are read from both sides, since which one is called A means nothing."""
    found: dict[str, Any] = {}
    for name, votes in reading(rows, project).items():
        level = "nominal" if project.task == "thumbs" else "ordinal"
        both = project.task in ("pairwise", "ranking")
        alpha = alpha_interval(votes.counts(), level, from_both_sides=both)
        if alpha is not None:
            found[name] = {**alpha, "level": level, "unanimous": _unanimous(votes.counts())}
    return found or None


def _unanimous(table: Any) -> dict[str, float] | None:
    """The share of items with two votes or more whose votes are all the same."""
    several = table[table.sum(axis=1) > 1]
    return (
        wilson(int((several.max(axis=1) == several.sum(axis=1)).sum()), len(several))
        if len(several)
        else None
    )


def seconds(rows: Sequence[VoteRow]) -> dict[str, float] | None:
    """Seconds from an item's being shown to its vote: median, the middle four fifths, and their sum."""
    taken = np.array([row.seconds for row in rows if row.seconds is not None and row.seconds > 0])
    if not len(taken):
        return None
    low, median, high = (float(v) for v in np.percentile(taken, [10, 50, 90]))
    return {"median": median, "p10": low, "p90": high, "total": float(taken.sum()), "n": len(taken)}


# ---------------------------------------------------------------- biases


def side_bias(rows: Sequence[VoteRow]) -> dict[str, float] | None:
    """The share of decided votes on pairs that prefer the reply shown first. Sides are shown in either order
    equally often, so that ½ means no bias, whatever the replies."""
    decided = [c for c in comparisons(rows) if c.points != 0.5 and c.shown_first is not None]
    points = np.array([c.points if c.shown_first else 1 - c.points for c in decided])
    return clustered.share(points, np.array([c.row.item for c in decided]))


def length_bias(rows: Sequence[VoteRow]) -> dict[str, Any] | None:
    """`longer`: the share of decided votes that prefer the longer reply. `slope`: of the log-odds to prefer a
    reply over the logarithm of how many times as long it is (0.7 doubles the odds when e times as long).
    Neither says why: longer replies may be better ones."""
    decided = [c for c in comparisons(rows) if c.points != 0.5]
    ratio = np.log([max(length(c.first), 1) / max(length(c.second), 1) for c in decided])
    points = np.array([c.points for c in decided])
    items = np.array([c.row.item for c in decided])
    unequal = ratio != 0
    longer = np.where(ratio > 0, points, 1 - points)[unequal] if len(decided) else points
    share = clustered.share(longer, items[unequal])
    if share is None:
        return None
    return {
        "longer": share,
        "slope": clustered.logistic_slope(ratio[unequal], points[unequal], items[unequal]),
    }


# ---------------------------------------------------------------- time


def drift(rows: Sequence[VoteRow], project: Project) -> dict[str, Any] | None:
    """Whether votes change as time goes on: in `WINDOWS` parts of equal size, in order, the share that agrees
    with the other voters on the item, the share that prefers the side shown first, and the median of the
    seconds; and the change of agreement (log-odds) and of the logarithm of the seconds over the whole time,
    with their intervals."""
    ordered = sorted(rows, key=lambda row: (row.at, row.item, row.person))
    if len(ordered) < 2 * WINDOWS:
        return None
    agrees = people.with_others(ordered, project)
    parts = [ordered[len(ordered) * k // WINDOWS : len(ordered) * (k + 1) // WINDOWS] for k in range(WINDOWS)]
    windows: list[dict[str, Any]] = []
    for part in parts:
        known = [(agrees[id(row)], row.item) for row in part if agrees[id(row)] is not None]
        windows.append(
            {
                "from": part[0].at,
                "to": part[-1].at,
                "votes": len(part),
                "agrees": clustered.share(np.array([a for a, _ in known]), np.array([i for _, i in known])),
                "first_side": side_bias(part),
                "seconds": (seconds(part) or {}).get("median"),
            }
        )
    return {"windows": windows, "change": _changes(ordered, agrees)}


def _changes(ordered: Sequence[VoteRow], agrees: dict[int, float | None]) -> dict[str, Any]:
    """Slopes over the votes' places in time, from 0 for the first to 1 for the last."""
    place = np.linspace(0, 1, len(ordered))
    items = np.array([row.item for row in ordered])
    known = np.array([agrees[id(row)] is not None for row in ordered])
    points = np.array([agrees[id(row)] or 0.0 for row in ordered])
    timed = np.array([row.seconds is not None and row.seconds > 0 for row in ordered])
    taken = np.log(np.array([row.seconds or 1.0 for row in ordered]))
    return {
        "agrees": clustered.logistic_slope(place[known], points[known], items[known], intercept=True),
        "seconds": clustered.linear_slope(place[timed], taken[timed], items[timed]),
    }


# ---------------------------------------------------------------- models


def order_of_sources(rows: Sequence[VoteRow]) -> dict[str, Any] | None:
    """Bradley–Terry over where the replies come from, as `keel.evaluation.order.order` says it; None where
    the replies have no two sources."""
    apart = [c for c in comparisons(rows) if None not in c.sources and c.sources[0] != c.sources[1]]
    table = [(str(c.sources[0]), str(c.sources[1]), c.points, c.row.item) for c in apart]
    return order.order(order.of_lists(table)) if table else None


def scales_by_source(rows: Sequence[VoteRow], project: Project) -> dict[str, Any] | None:
    """Of ratings and thumbs: scale → source ("" where unknown) → mean with its interval by items, and how
    the values are spread. A thumb up is 1, one down 0."""
    values: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for row in rows:
        for name, value in ratings(row, project).items():
            source = row.replies[0].source or ""
            values.setdefault(name, {}).setdefault(source, []).append((value, row.item))
    return {
        name: {source: _mean(pairs) for source, pairs in sorted(by_source.items())}
        for name, by_source in values.items()
    } or None


def _mean(pairs: Iterable[tuple[float, int]]) -> dict[str, Any]:
    taken, items = (np.array(column) for column in zip(*pairs))
    spread = {f"{value:g}": int(n) for value, n in zip(*np.unique(taken, return_counts=True))}
    return {**(clustered.mean(taken, items) or {}), "spread": spread}
