"""What every format is read into and written from: items with what people said of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from keel.errors import DataError
from keel.votes.kinds import Answer, NewItem, PastJudgement, Reply, Scale, Task, Text

Row = Mapping[str, Any]
ALONE: tuple[Task, ...] = ("rating", "edit", "thumbs")  # tasks about a single reply


@dataclass(frozen=True, slots=True)
class Labels:
    """Items of one task and the votes on them, whoever brought them."""

    task: Task
    items: Sequence[NewItem]
    votes: Sequence[PastJudgement] = ()
    notes: tuple[str, ...] = ()  # what was left out, and why
    adjudicated: Mapping[str, tuple[str, Answer, str]] = field(
        default_factory=dict[str, tuple[str, Answer, str]]
    )  # key → who, what, note
    scales: tuple[Scale, ...] = ()  # of ratings; others go from 1 to 5

    def votes_of(self) -> dict[str, list[PastJudgement]]:
        """Key → its votes, in their order."""
        found: dict[str, list[PastJudgement]] = {}
        for vote in self.votes:
            found.setdefault(vote.key, []).append(vote)
        return found


class Invalid(Exception):
    """What is wrong with a row; the reader adds where the row is."""


def as_task(labels: Labels, task: Task) -> Labels:
    """The same items for another task. A pair becomes two single replies; votes and known answers, which say
    nothing about the other task, are left out. DataError where single replies should be compared."""
    if task == labels.task:
        return labels
    lost = bool(labels.votes) or any(item.gold for item in labels.items)
    notes = (*labels.notes, f"votes of a {labels.task} task are left out") if lost else labels.notes
    items: list[NewItem] = []
    for item in labels.items:
        plain = replace(item, gold=None)
        if task not in ALONE:
            if len(item.replies) < 2 or (task == "pairwise" and len(item.replies) != 2):
                wanted = "two replies" if task == "pairwise" else "two replies or more"
                raise DataError(f"item {item.key}: a {task} task needs {wanted}; it has {len(item.replies)}")
            items.append(plain)
        elif len(item.replies) == 1:
            items.append(plain)
        else:
            items += [
                replace(plain, key=f"{item.key}/{number}", replies=[reply])
                for number, reply in enumerate(item.replies, 1)
            ]
    return Labels(task, items, (), notes)


def key_of(*parts: object) -> str:
    """A name for an item that has none: what it says, as a short hash."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def name_of_item(row: Row, *parts: object) -> str:
    """The row's own key or id, else one of what it says."""
    for name in ("key", "id"):
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
            return str(value)
    return key_of(*parts)


def text_or_turns(value: Any, where: str) -> Text:
    """A prompt or reply: text with something in it, or turns with a role each. Invalid for anything else."""
    if isinstance(value, str):
        if not value.strip():
            raise Invalid(f'"{where}" is empty')
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value:
        turns: list[dict[str, Any]] = []
        for turn in value:
            if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
                raise Invalid(f'"{where}" is a list, but not of turns with a role')
            turns.append({str(key): part for key, part in turn.items() if part is not None})
        return turns
    raise Invalid(f'"{where}" is neither text nor turns')


def plain_text(content: Text) -> str:
    """A prompt or reply as one text, as a page without markup shows it: a turn a paragraph, its role first.
    A single turn of the assistant is its text alone."""
    if isinstance(content, str):
        return content
    if len(content) == 1 and content[0].get("role") in ("assistant", "user"):
        return _content(content[0])
    return "\n\n".join(f"{turn.get('role')}: {_content(turn)}" for turn in content)


def _content(turn: Mapping[str, Any]) -> str:
    said = turn.get("content")
    calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([said if isinstance(said, str) else json.dumps(said or "", ensure_ascii=False), *calls])


def seconds_of(value: object) -> float | None:
    """Seconds since 1970, from a number, an ISO date or {"tstamp": …}."""
    if isinstance(value, Mapping):
        value = value.get("tstamp")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None


def iso(moment: float) -> str:
    """Seconds since 1970 as an ISO date, to the microsecond."""
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="microseconds")


# ---------------------------------------------------------------- what other shapes have no place for


def item_json(item: NewItem) -> dict[str, Any]:
    """An item as JSON, with all that it holds."""
    values: dict[str, Any] = {
        "key": item.key,
        "prompt": _plain(item.prompt),
        "replies": [_without(content=_plain(r.content), source=r.source) for r in item.replies],
    }
    if item.columns:
        values["columns"] = dict(item.columns)
    if item.gold is not None:
        values["gold"] = answer_json(item.gold)
    if item.priority is not None:
        values["priority"] = item.priority
    return values


def item_of(values: Mapping[str, Any]) -> NewItem:
    """The item that `item_json` wrote."""
    gold = values.get("gold")
    return NewItem(
        key=str(values["key"]),
        prompt=values["prompt"],
        replies=[Reply(reply["content"], reply.get("source")) for reply in values["replies"]],
        columns=dict(values.get("columns") or {}),
        gold=answer_of(gold) if gold else None,
        priority=values.get("priority"),
    )


def answer_json(answer: Answer) -> dict[str, Any]:
    """An answer as JSON, without what it does not say."""
    return _without(
        choice=answer.choice,
        strength=answer.strength,
        ratings=dict(answer.ratings) if answer.ratings is not None else None,
        ranking=[list(group) for group in answer.ranking] if answer.ranking is not None else None,
        text=answer.text,
        comment=answer.comment or None,
    )


def answer_of(values: Mapping[str, Any]) -> Answer:
    """The answer that `answer_json` wrote. Invalid for a key that it never writes."""
    known = ("choice", "strength", "ratings", "ranking", "text", "comment")
    odd = next((key for key in values if key not in known), None)
    if odd is not None:
        raise Invalid(f"an answer has no {odd!r}; it has {', '.join(known)}")
    given = {name: values[name] for name in known if values.get(name) is not None}
    return Answer(**given)


def vote_json(vote: PastJudgement) -> dict[str, Any]:
    """A vote as JSON, without its item's key."""
    return _without(
        person=vote.person,
        **answer_json(vote.answer),
        at=vote.at,
        seconds=vote.seconds,
        shown=list(vote.shown) if vote.shown is not None else None,
        is_model=vote.is_model or None,
    )


def vote_of(values: Mapping[str, Any], key: str) -> PastJudgement:
    """The vote that `vote_json` wrote."""
    rest = {k: v for k, v in values.items() if k not in ("person", "at", "seconds", "shown", "is_model")}
    shown = values.get("shown")
    return PastJudgement(
        key=key,
        person=str(values["person"]),
        answer=answer_of(rest),
        at=values.get("at"),
        seconds=values.get("seconds"),
        shown=tuple(shown) if shown is not None else None,
        is_model=bool(values.get("is_model")),
    )


def _plain(content: Text) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [dict(turn) for turn in content]


def _without(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def circumstances(vote: PastJudgement) -> dict[str, Any]:
    """When a vote was cast, how long it took, in which order the replies were shown, whether by a model: what
    is known of it."""
    known: dict[str, Any] = {}
    if vote.at is not None:
        known["at"] = vote.at
    if vote.seconds is not None:
        known["seconds"] = vote.seconds
    if vote.shown is not None:
        known["shown"] = list(vote.shown)
    if vote.is_model:
        known["is_model"] = True
    return known
