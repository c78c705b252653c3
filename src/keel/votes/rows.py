# pyright: strict
"""Votes as rows for training, in TRL's types: one function from the votes of a project to plain dicts.

    pairwise   preference       the side that more votes prefer is chosen; `votes` as they were given
    ranking    preference       one row for each two replies of an item (2203.02155, section 3.5)
    rating     unpaired         label: whether the mean rating is above the middle of the scales
    thumbs     unpaired         label: what most say
    edit       demonstration    one row an edit

Left out are gold items and those who could not judge; items without any side, label or vote; and, unless they
are asked for, surplus votes and those of models. "Both bad" is a tie: it prefers neither side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any, Literal

from keel.votes.answers import scales_of
from keel.votes.kinds import Answer, Project, Reply, Text, VoteRow

if TYPE_CHECKING:
    from keel.votes.store import Store

Row = dict[str, Any]
Adjudicated = Literal["label", "beside"]
TYPES = {
    "pairwise": "preference",
    "ranking": "preference",
    "rating": "unpaired",
    "thumbs": "unpaired",
    "edit": "demonstration",
}
_RESERVED = {
    "prompt", "chosen", "rejected", "completion", "label", "votes", "p_chosen", "margin", "messages", "text",
    "strength", "ratings", "score", "adjudicated", "people_votes", "key",
}  # fmt: skip


def rows(
    store: Store,
    project: str,
    *,
    surplus: bool = False,
    models: bool = False,
    adjudicated: Adjudicated = "label",
) -> Iterator[Row]:
    """The rows of a project, in the order of its items.

    surplus, models: take these votes, too. adjudicated "label": what a reviewer said is the label of a pair,
    as `p_chosen`, and the votes are kept under `people_votes`; "beside": the votes are the label, and what
    the reviewer said is the column `adjudicated`.
    """
    words = {word.item: word.answer for word in store.adjudications(project)}
    wanted = (
        vote
        for vote in store.votes(project)
        if vote.gold is None
        and (vote.counted or (vote.is_model and models) or (not vote.is_model and surplus))
    )
    yield from of_votes(store.project(project), wanted, words, adjudicated)


def of_votes(
    project: Project,
    votes: Iterable[VoteRow],
    words: Mapping[int, Answer] | None = None,
    adjudicated: Adjudicated = "label",
) -> Iterator[Row]:
    """Rows of votes that stand item by item. words: item → a reviewer's answer."""
    for item, group in groupby(votes, key=lambda vote: vote.item):
        judged = [vote for vote in group if vote.answer.choice != "cannot_judge"]
        word = (words or {}).get(item)
        if not judged:
            continue
        if project.task == "pairwise":
            yield from _pair(judged, word, adjudicated)
        elif project.task == "ranking":
            yield from _ranked(judged, word, adjudicated)
        elif project.task == "rating":
            yield from _rated(project, judged, word)
        elif project.task == "thumbs":
            yield from _thumbs(judged, word)
        else:
            yield from _edits(judged, word)


# ---------------------------------------------------------------- pairs


def _pair(votes: Sequence[VoteRow], word: Answer | None, adjudicated: Adjudicated) -> Iterator[Row]:
    sides = [(vote, _side(vote.answer)) for vote in votes]
    row = _comparison(sides, (0, 1), None if word is None else _side(word), adjudicated)
    strengths = [
        (1 if vote.answer.choice == row["_first"] else -1) * vote.answer.strength
        for vote in votes
        if vote.answer.strength is not None
    ]
    if strengths:
        row["strength"] = sum(strengths) / len(strengths)  # towards chosen, 1 slightly … 3 much
    row.pop("_first")
    yield row


def _side(answer: Answer) -> int:
    """Which of two replies an answer prefers: 1 the first, −1 the second, 0 neither."""
    return {"a": 1, "b": -1}.get(answer.choice or "", 0)


def _ranked(votes: Sequence[VoteRow], word: Answer | None, adjudicated: Adjudicated) -> Iterator[Row]:
    for i, j in combinations(range(len(votes[0].replies)), 2):
        sides = [(vote, _before(vote.answer, i, j)) for vote in votes]
        row = _comparison(sides, (i, j), None if word is None else _before(word, i, j), adjudicated)
        row.pop("_first")
        yield row


def _before(answer: Answer, i: int, j: int) -> int:
    """1 where reply i is ranked before j, −1 where it is after, 0 in one group."""
    place = {index: number for number, group in enumerate(answer.ranking or ()) for index in group}
    return (place[i] < place[j]) - (place[i] > place[j])


def _comparison(
    sides: Sequence[tuple[VoteRow, int]], pair: tuple[int, int], word: int | None, adjudicated: Adjudicated
) -> Row:
    """A preference row of two replies. sides: votes, each with what it prefers (`_side`)."""
    vote = sides[0][0]
    total = sum(side for _, side in sides)
    first = word >= 0 if word is not None and adjudicated == "label" else total >= 0
    chosen, rejected = pair if first else pair[::-1]
    names = {1: "chosen", -1: "rejected", 0: "tie"} if first else {1: "rejected", -1: "chosen", 0: "tie"}
    given = [_vote(one, names[side]) for one, side in sides]
    row = _base(vote)
    row |= {
        "prompt": _prompt(vote),
        "chosen": _completion(vote, vote.replies[chosen]),
        "rejected": _completion(vote, vote.replies[rejected]),
        "_first": "a" if first else "b",
    }
    if word is None or adjudicated == "beside":
        row["votes"] = given
    else:
        row |= {"p_chosen": {"chosen": 1.0, "tie": 0.5}[names[word]], "people_votes": given}
    if word is not None:
        row["adjudicated"] = names[word]
    return row


def _vote(vote: VoteRow, choice: Any) -> Row:
    model = {"is_model": True} if vote.is_model else {}
    return {"annotator": vote.person, "choice": choice, **model}


# ---------------------------------------------------------------- single replies


def _rated(project: Project, votes: Sequence[VoteRow], word: Answer | None) -> Iterator[Row]:
    """The mean of each scale, and over scales as a share of their ranges."""
    answers = [vote.answer for vote in votes] if word is None else [word]
    means = {
        scale.name: sum((answer.ratings or {})[scale.name] for answer in answers) / len(answers)
        for scale in scales_of(project)
    }
    shares = [(means[s.name] - s.low) / (s.high - s.low) for s in scales_of(project)]
    score = sum(shares) / len(shares)
    if score != 0.5:
        yield _single(votes) | {"label": score > 0.5, "ratings": means, "score": score} | _said(word)


def _thumbs(votes: Sequence[VoteRow], word: Answer | None) -> Iterator[Row]:
    total = sum({"up": 1, "down": -1}.get(vote.answer.choice or "", 0) for vote in votes)
    if word is not None and word.choice != "cannot_judge":
        total = 1 if word.choice == "up" else -1
    if total:
        given = [_vote(vote, vote.answer.choice) for vote in votes]
        yield _single(votes) | {"label": total > 0, "people_votes": given} | _said(word)


def _edits(votes: Sequence[VoteRow], word: Answer | None) -> Iterator[Row]:
    texts = [vote.answer.text for vote in votes] if word is None else [word.text]
    for text in dict.fromkeys(text for text in texts if text):
        row = _base(votes[0]) | {
            "prompt": _prompt(votes[0]),
            "completion": _completion(votes[0], Reply(text)),
        }
        yield row | _said(word)


def _single(votes: Sequence[VoteRow]) -> Row:
    vote = votes[0]
    return _base(vote) | {"prompt": _prompt(vote), "completion": _completion(vote, vote.replies[0])}


def _said(word: Answer | None) -> Row:
    return {} if word is None else {"adjudicated": True}


# ---------------------------------------------------------------- texts


def _base(vote: VoteRow) -> Row:
    """The item's own columns, as far as their names are free."""
    return {name: value for name, value in vote.columns.items() if name not in _RESERVED} | {"key": vote.key}


def _conversational(vote: VoteRow) -> bool:
    return any(not isinstance(text, str) for text in (vote.prompt, *(r.content for r in vote.replies)))


def _prompt(vote: VoteRow) -> Text:
    """The prompt; as turns where any text of the item has turns."""
    if isinstance(vote.prompt, str) and _conversational(vote):
        return [{"role": "user", "content": vote.prompt}]
    return vote.prompt


def _completion(vote: VoteRow, reply: Reply) -> Text:
    if isinstance(reply.content, str) and _conversational(vote):
        return [{"role": "assistant", "content": reply.content}]
    return reply.content
