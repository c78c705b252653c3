"""Rows in TRL's types, with each vote and who cast it: what a stage trains on, and read back as it was.

    preference     {"prompt", "chosen", "rejected", "votes"}      of pairs
    unpaired       {"prompt", "completion", "label", "votes"}     of thumbs; of pairs and ratings too
    ranked         {"prompt", "completions", "ranks", "votes"}    of rankings; `format: ranked` in a config
    demonstration  {"prompt", "completion", "annotator"}          of edits
    ratings        {"prompt", "completion", "ratings", "votes"}   of ratings

What the type has no place for (the item's key, sources, who abstained, comments) stands under "item" and in
the votes beside what TRL reads, so that nothing is lost. Rows without a decision are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from keel.errors import UsageError
from keel.feedback.compared import POINTS
from keel.feedback.formats.base import (
    Invalid,
    Labels,
    Row,
    answer_json,
    answer_of,
    circumstances,
    key_of,
    name_of_item,
    text_or_turns,
)
from keel.votes.kinds import NewItem, PastJudgement, Reply, Scale, Task, Text

ITEM = "item"  # the column that holds what a type has no place for
Votes = Sequence[PastJudgement]


def write(labels: Labels, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of a type. UsageError where the task makes none."""
    makers: dict[str, dict[Task, Callable[[NewItem, Votes], Iterable[dict[str, Any]]]]] = {
        "preference": {"pairwise": _preference},
        "unpaired": {"thumbs": _thumbs, "pairwise": _sides, "rating": partial(_rated_sides, labels.scales)},
        "ranked": {"ranking": _ranked},
        "demonstration": {"edit": _demonstrations},
        "ratings": {"rating": _rated},
    }
    if labels.task not in makers[kind]:
        able = [name for name, by_task in makers.items() if labels.task in by_task]
        raise UsageError(f"a {labels.task} task makes no {kind} rows; it makes {', '.join(able)}")
    maker, votes_of = makers[kind][labels.task], labels.votes_of()
    for item in labels.items:
        for row in maker(item, votes_of.get(item.key, ())):
            if item.key in labels.adjudicated:
                who, answer, note = labels.adjudicated[item.key]
                row[ITEM]["adjudicated"] = {"person": who, "note": note, **answer_json(answer)}
            yield {**item.columns, **row}


def reads(row: Row) -> str | None:
    """The type of a row that `write` wrote, or of a training row of anyone's."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    if "completions" in row and "ranks" in row and "prompt" in row:
        return "ranked"
    if "completion" in row and "prompt" in row:
        if "label" in row:
            return "unpaired"
        return "ratings" if "ratings" in row else "demonstration"
    return None


def read(row: Row, kind: str) -> tuple[Task, NewItem, list[PastJudgement]]:
    """The task, the item and its votes of one row."""
    return {
        "preference": _read_preference,
        "unpaired": _read_thumbs,
        "ranked": _read_ranked,
        "demonstration": _read_demonstration,
        "ratings": _read_rated,
    }[kind](row)


# ---------------------------------------------------------------- pairs


def _preference(item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    decided = [vote for vote in votes if vote.answer.choice in POINTS]
    if not decided:
        return
    names = _names(decided)
    sides = {names[side]: _content(item.replies[i]) for i, side in enumerate("ab")}
    extra = _item(item, a=names["a"])
    if abstained := [_vote(vote, {}) for vote in votes if vote not in decided]:
        extra["abstained"] = abstained
    yield {
        "prompt": item.prompt,
        "chosen": sides["chosen"],
        "rejected": sides["rejected"],
        "votes": [_vote(vote, names) for vote in decided],
        ITEM: extra,
    }


def _names(decided: Votes) -> dict[str, str]:
    """What each side of a pair is called: the one that more votes prefer is chosen, the first where as many
    prefer either."""
    a_wins = sum(POINTS[str(vote.answer.choice)] - 0.5 for vote in decided) >= 0
    return {"a": "chosen", "b": "rejected"} if a_wins else {"a": "rejected", "b": "chosen"}


def _sides(item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    """A decided pair as two thumbs."""
    decided = [vote for vote in votes if vote.answer.choice in POINTS]
    if sum(POINTS[str(vote.answer.choice)] - 0.5 for vote in decided) == 0:
        return
    names = _names(decided)
    for i, side in enumerate("ab"):
        up = names[side] == "chosen"
        extra = _item(item, replies=[item.replies[i]])
        yield {
            "prompt": item.prompt,
            "completion": _content(item.replies[i]),
            "label": up,
            ITEM: {**extra, "key": f"{item.key}/{i + 1}"},
        }


def _read_preference(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    extra = _extra(row)
    a = extra.get("a", "chosen" if int(key_of(row.get("prompt"), row["chosen"]), 16) % 2 else "rejected")
    names = {"a": a, "b": "rejected" if a == "chosen" else "chosen"}
    contents = [text_or_turns(row[names[side]], names[side]) for side in "ab"]
    item = _made(row, extra, contents, "chosen", "rejected")
    sides = {name: side for side, name in names.items()}
    given = row.get("votes") or ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise Invalid('"votes" is no list of votes with an annotator each')
    votes = [_judgement(vote, item.key, sides) for vote in given]
    votes += [_judgement(vote, item.key, {}) for vote in extra.get("abstained") or ()]
    return "pairwise", item, votes


def _vote(vote: PastJudgement, names: dict[str, str]) -> dict[str, Any]:
    """A vote as TRL's readers take it, with what else is known of it."""
    answer = answer_json(vote.answer)
    choice = answer.pop("choice", None)
    row: dict[str, Any] = {"annotator": vote.person}
    if names:
        row["choice"] = names.get(str(choice), "tie")
        if choice == "both_bad":
            row["verdict"] = choice
    elif choice is not None:
        row["choice"] = choice
    row |= answer
    return row | circumstances(vote)


def _judgement(vote: Row, key: str, sides: dict[str, str]) -> PastJudgement:
    values = {k: v for k, v in vote.items() if v is not None}
    if "annotator" not in values:
        raise Invalid('a vote has no "annotator"')
    choice = values.pop("verdict", None) or sides.get(str(values.get("choice")), values.get("choice"))
    rest = {k: v for k, v in values.items() if k in ("strength", "ratings", "text", "comment", "ranking")}
    return PastJudgement(
        key,
        str(values["annotator"]),
        answer_of({**rest, **({"choice": choice} if choice is not None else {})}),
        values.get("at"),
        values.get("seconds"),
        tuple(values["shown"]) if "shown" in values else None,
        bool(values.get("is_model")),
    )


# ---------------------------------------------------------------- thumbs and ratings


def _thumbs(item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    balance = sum({"up": 1, "down": -1}.get(str(vote.answer.choice), 0) for vote in votes)
    if balance:
        yield {
            "prompt": item.prompt, "completion": _content(item.replies[0]), "label": balance > 0,
            "votes": [_vote(vote, {}) for vote in votes], ITEM: _item(item),
        }  # fmt: skip


def _rated(item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    if votes:
        yield {
            "prompt": item.prompt,
            "completion": _content(item.replies[0]),
            "ratings": _means(votes),
            "votes": [_vote(vote, {}) for vote in votes],
            ITEM: _item(item),
        }


def _means(votes: Votes) -> dict[str, float]:
    names = dict.fromkeys(name for vote in votes for name in vote.answer.ratings or {})
    return {
        name: fmean(v.answer.ratings[name] for v in votes if v.answer.ratings and name in v.answer.ratings)
        for name in names
    }


def _rated_sides(scales: Sequence[Scale], item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    """Up where the mean over scales, as a share of each one's range, is above one half."""
    known = {scale.name: scale for scale in scales}
    shares = [
        (mean - scale.low) / (scale.high - scale.low)
        for name, mean in _means(votes).items()
        for scale in (known.get(name) or Scale(name),)
    ]
    if shares and fmean(shares) != 0.5:
        row = next(iter(_rated(item, votes)))
        del row["ratings"]
        yield {**row, "label": fmean(shares) > 0.5}


def _read_thumbs(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    item = _made(row, _extra(row), [text_or_turns(row["completion"], "completion")], "completion", "label")
    votes = [_judgement(vote, item.key, {}) for vote in row.get("votes") or ()]
    return "thumbs", item, votes


def _read_rated(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    item = _made(row, _extra(row), [text_or_turns(row["completion"], "completion")], "completion", "ratings")
    return "rating", item, [_judgement(vote, item.key, {}) for vote in row.get("votes") or ()]


# ---------------------------------------------------------------- rankings, edits


def _ranked(item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    if not votes:
        return
    yield {
        "prompt": item.prompt,
        "completions": [_content(reply) for reply in item.replies],
        "ranks": _ranks([vote.answer.ranking or () for vote in votes], len(item.replies)),
        "votes": [_vote(vote, {}) for vote in votes],
        ITEM: _item(item),
    }


def _ranks(rankings: Sequence[Sequence[Sequence[int]]], count: int) -> list[int]:
    """Each reply's rank, 1 for the best, by the mean of its places; equal means share one."""
    places = [0.0] * count
    for ranking in rankings:
        before = 0
        for group in ranking:
            for reply in group:
                places[reply] += before + (len(group) - 1) / 2
            before += len(group)
    order = sorted(set(places))
    return [order.index(place) + 1 for place in places]


def _read_ranked(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    contents = [text_or_turns(value, "completions") for value in row["completions"]]
    item = _made(row, _extra(row), contents, "completions", "ranks")
    return "ranking", item, [_judgement(vote, item.key, {}) for vote in row.get("votes") or ()]


def _demonstrations(item: NewItem, votes: Votes) -> Iterator[dict[str, Any]]:
    """One for each person who wrote one. A conversation's last reply is what was edited."""
    for vote in votes:
        if vote.answer.text:
            reply: Any = vote.answer.text
            if not isinstance(item.prompt, str):
                reply = [{"role": "assistant", "content": vote.answer.text}]
            extra = _vote(vote, {})
            del extra["text"]
            yield {
                "prompt": item.prompt,
                "completion": reply,
                "annotator": extra.pop("annotator"),
                ITEM: {**_item(item), "reply": _content(item.replies[0]), "vote": extra},
            }


def _read_demonstration(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    """Of an edit the reply that was edited, with the edit as a vote; a demonstration alone is a reply to
    edit."""
    extra = _extra(row)
    edited = text_or_turns(row["completion"], "completion")
    if "reply" not in extra:
        return "edit", _made(row, extra, [edited], "completion", "annotator"), []
    item = _made(row, extra, [text_or_turns(extra["reply"], "reply")], "completion", "annotator")
    text = edited if isinstance(edited, str) else str(edited[-1]["content"])
    vote = {**(extra.get("vote") or {}), "annotator": row.get("annotator"), "text": text}
    return "edit", item, [_judgement(vote, item.key, {})]


# ---------------------------------------------------------------- items


def _item(item: NewItem, *, replies: Sequence[Reply] = (), a: str | None = None) -> dict[str, Any]:
    """What a type has no place for, of an item."""
    extra: dict[str, Any] = {"key": item.key}
    if a is not None:
        extra["a"] = a
    sources = [reply.source for reply in replies or item.replies]
    if any(source is not None for source in sources):
        extra["sources"] = sources
    if item.gold is not None:
        extra["gold"] = answer_json(item.gold)
    if item.priority is not None:
        extra["priority"] = item.priority
    return extra


def _extra(row: Row) -> dict[str, Any]:
    extra = row.get(ITEM)
    return {k: v for k, v in extra.items() if v is not None} if isinstance(extra, dict) else {}


def _made(row: Row, extra: dict[str, Any], contents: list[Text], *used: str) -> NewItem:
    """The item of a row."""
    prompt = text_or_turns(row["prompt"], "prompt") if "prompt" in row else None
    if prompt is None:
        raise Invalid('there is no "prompt"')
    read_here = {"prompt", "votes", ITEM, "p_chosen", "margin", *used}
    if ITEM not in row:
        read_here |= {"key", "id"}
    sources = extra.get("sources") or [None] * len(contents)
    gold = extra.get("gold")
    return NewItem(
        key=str(extra["key"]) if "key" in extra else name_of_item(row, prompt, contents),
        prompt=prompt,
        replies=[Reply(content, source) for content, source in zip(contents, sources, strict=True)],
        columns={k: v for k, v in row.items() if k not in read_here and v is not None},
        gold=answer_of({k: v for k, v in gold.items() if v is not None}) if gold else None,
        priority=extra.get("priority"),
    )


def _content(reply: Reply) -> Text:
    return reply.content
