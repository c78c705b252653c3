"""Votes read as what statistics count: comparisons of two replies, ratings, and categories of items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from keel.evaluation.annotators import Votes
from keel.votes.answers import scales_of
from keel.votes.kinds import Project, Reply, VoteRow

POINTS = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}  # of a pair's first reply


@dataclass(frozen=True, slots=True)
class Compared:
    """One judgement of two of an item's replies: a vote on a pair, or two places of a ranking."""

    row: VoteRow
    pair: tuple[int, int]  # the replies' numbers, the smaller one first
    points: float  # 1 where the first is preferred, 0 where the second is, ½ for neither
    shown_first: bool | None  # whether the first stood before the second on the page; None: not known

    @property
    def first(self) -> Reply:
        return self.row.replies[self.pair[0]]

    @property
    def second(self) -> Reply:
        return self.row.replies[self.pair[1]]

    @property
    def sources(self) -> tuple[str | None, str | None]:
        return self.first.source, self.second.source


def comparisons(rows: Sequence[VoteRow]) -> list[Compared]:
    """Every judgement of two replies in these votes; "cannot judge" is none."""
    return [one for row in rows for one in _of_row(row)]


def _of_row(row: VoteRow) -> Iterator[Compared]:
    shown = {reply: position for position, reply in enumerate(row.shown)} if row.shown else {}
    if row.answer.ranking is not None:
        place = {reply: level for level, group in enumerate(row.answer.ranking) for reply in group}
        for first, second in combinations(sorted(place), 2):
            ahead = place[second] - place[first]
            points = 1.0 if ahead > 0 else 0.0 if ahead < 0 else 0.5
            yield Compared(row, (first, second), points, _before(shown, first, second))
    elif len(row.replies) == 2 and row.answer.choice in POINTS:
        yield Compared(row, (0, 1), POINTS[row.answer.choice], _before(shown, 0, 1))


def _before(shown: Mapping[int, int], first: int, second: int) -> bool | None:
    return shown[first] < shown[second] if first in shown and second in shown else None


def ratings(row: VoteRow, project: Project) -> dict[str, float]:
    """Scale → value of a rating; of a thumb `thumbs`: 1 for up, 0 for down."""
    if project.task == "thumbs":
        value = {"up": 1.0, "down": 0.0}.get(row.answer.choice or "")
        return {} if value is None else {"thumbs": value}
    return {name: float(value) for name, value in (row.answer.ratings or {}).items()}


def reading(rows: Sequence[VoteRow], project: Project) -> dict[str, Votes]:
    """What is judged → its votes in categories. Pairs and rankings: "choice" with second, tie, first of each
    two replies; thumbs: "choice" with down, up; ratings: each scale with its values."""
    if project.task in ("pairwise", "ranking"):
        judged = comparisons(rows)
        if not judged:
            return {}
        entries = [((c.row.item, c.pair), c.row.person, int(2 * c.points)) for c in judged]
        return {"choice": _votes(entries, 3)}
    entries_of: dict[str, list[tuple[Any, str, int]]] = {}
    lows = {scale.name: scale.low for scale in scales_of(project)}
    kinds = {scale.name: scale.high - scale.low + 1 for scale in scales_of(project)}
    for row in rows:
        for name, value in ratings(row, project).items():
            entries_of.setdefault(name, []).append((row.item, row.person, int(value) - lows.get(name, 0)))
    named = {"thumbs": "choice"} if project.task == "thumbs" else {}
    return {
        named.get(name, name): _votes(entries, kinds.get(name, max(c for _, _, c in entries) + 1))
        for name, entries in entries_of.items()
    }


def _votes(entries: Sequence[tuple[Any, str, int]], categories: int) -> Votes:
    """(item, who, category) as arrays."""
    items = {item: i for i, item in enumerate(dict.fromkeys(item for item, _, _ in entries))}
    names = sorted({who for _, who, _ in entries})
    index = {name: i for i, name in enumerate(names)}
    return Votes(
        np.array([items[item] for item, _, _ in entries], dtype=np.int64),
        np.array([index[who] for _, who, _ in entries], dtype=np.int64),
        np.array([choice for _, _, choice in entries], dtype=np.int64),
        len(items),
        max(categories, 2),
        tuple(names),
    )


def both_sides(votes: Votes) -> Votes:
    """Votes on pairs read from both sides, as `keel.evaluation.annotators.of_pairs` reads them."""
    return Votes(
        np.concatenate([votes.item, votes.item + votes.items]),
        np.concatenate([votes.annotator, votes.annotator]),
        np.concatenate([votes.choice, votes.categories - 1 - votes.choice]),
        2 * votes.items,
        votes.categories,
        votes.names,
    )


def verdict(row: VoteRow) -> str:
    """An answer in a word, for counting: its choice, "ranked", "edited", "rated"; "" for an empty one."""
    answer = row.answer
    if answer.choice is not None:
        return answer.choice
    if answer.ranking is not None:
        return "ranked"
    if answer.text is not None:
        return "edited"
    return "rated" if answer.ratings else ""


def length(reply: Reply) -> int:
    """Characters of a reply; of a conversation, of all its turns."""
    if isinstance(reply.content, str):
        return len(reply.content)
    return sum(len(str(turn.get("content") or "")) for turn in reply.content)
