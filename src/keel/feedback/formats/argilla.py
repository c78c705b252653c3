"""Argilla 2's records, as `dataset.records.to_json` writes them, and its tables on the hub.

    fields     prompt, response-1, response-2 …     (one reply: response)
    questions  preference (label: response-1, response-2, tie, both_bad, cannot_judge), strength (rating),
               thumbs (label), ranking (ranking), one rating a scale, edited (text), comment (text)

The item as it is stands in the metadata `keel`, as JSON; what a vote has besides its answers in the metadata
`keel_votes`. Argilla knows its own users only, by their UUIDs: for an import there, `user_id` must be one.

Source: argilla 2, src/argilla/records/_resource.py (`Record.to_dict`) and _io/_datasets.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keel.data.values import is_list, shown
from keel.feedback.formats.base import (
    Invalid,
    Row,
    answer_of,
    circumstances,
    item_json,
    item_of,
    key_of,
    plain_text,
    text_or_turns,
)
from keel.votes.kinds import NewItem, PastJudgement, Reply, Task

_PROMPTS = ("prompt", "instruction", "question")
_REPLIES = ("response", "reply", "answer", "completion", "generation")
_SIDES = {"tie": "tie", "both_bad": "both_bad", "cannot_judge": "cannot_judge"}


def is_record(row: Row) -> bool:
    nested = isinstance(row.get("fields"), Mapping) and "responses" in row
    return nested or any(str(name).endswith(".responses") for name in row)


# ---------------------------------------------------------------- out


def write(
    items: Sequence[NewItem], votes_of: Mapping[str, Sequence[PastJudgement]], task: Task
) -> Iterator[dict[str, Any]]:
    """A record an item, with a response for each question that a vote answers."""
    for item in items:
        names = _names(item)
        votes = votes_of.get(item.key, ())
        responses: dict[str, list[dict[str, Any]]] = {}
        for vote in votes:
            for question, value in _answers(vote, names, task):
                entry = {"value": value, "user_id": vote.person, "status": "submitted"}
                responses.setdefault(question, []).append(entry)
        about = {vote.person: circumstances(vote) for vote in votes if circumstances(vote)}
        yield {
            "id": item.key,
            "fields": {
                "prompt": plain_text(item.prompt),
                **{n: plain_text(reply.content) for n, reply in zip(names, item.replies, strict=True)},
            },
            "metadata": {
                "keel": json.dumps({**item_json(item), "task": task}, ensure_ascii=False),
                **({"keel_votes": json.dumps(about, ensure_ascii=False)} if about else {}),
            },
            "suggestions": {},
            "responses": responses,
            "vectors": {},
        }


def _names(item: NewItem) -> list[str]:
    count = len(item.replies)
    return [f"response-{n}" for n in range(1, count + 1)] if count > 1 else ["response"]


def _answers(vote: PastJudgement, names: Sequence[str], task: Task) -> Iterator[tuple[str, Any]]:
    answer = vote.answer
    if answer.choice is not None:
        sides = {"a": names[0], "b": names[-1]} if task == "pairwise" else {}
        yield ("preference" if task == "pairwise" else "thumbs"), sides.get(answer.choice, answer.choice)
    if answer.strength is not None:
        yield "strength", answer.strength
    yield from (answer.ratings or {}).items()
    if answer.ranking is not None:
        yield (
            "ranking",
            [
                {"value": names[reply], "rank": place}
                for place, group in enumerate(answer.ranking, 1)
                for reply in group
            ],
        )
    if answer.text is not None:
        yield "edited", answer.text
    if answer.comment:
        yield "comment", answer.comment


# ---------------------------------------------------------------- in


def read(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    """A record's item and the votes of its submitted responses."""
    fields, metadata, responses = _nested(row)
    kept = _json(metadata.get("keel"))
    about = _json(metadata.get("keel_votes"))
    names = _reply_names(fields)
    given: dict[str, dict[str, Any]] = {}
    for question, entries in responses.items():
        for entry in entries:
            if entry.get("status", "submitted") in ("submitted", None) and entry.get("value") is not None:
                given.setdefault(str(entry.get("user_id") or "unknown"), {})[question] = entry["value"]
    if "key" in kept:
        item, task = item_of(kept), kept.get("task", "pairwise")
    else:
        item = _item(row, fields, metadata, names)
        task = _task(given, len(names))
    votes: list[PastJudgement] = []
    for person, answers in given.items():
        values = _answer(answers, names, task)
        if values:
            more = about.get(person, {})
            shown_order = more.get("shown")
            votes.append(
                PastJudgement(
                    item.key,
                    person,
                    answer_of(values),
                    more.get("at"),
                    more.get("seconds"),
                    tuple(shown_order) if shown_order is not None else None,
                    bool(more.get("is_model")),
                )
            )
    return task, item, votes


def _nested(row: Row) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """(fields, metadata, responses) of a record, or of a row of a table on the hub."""
    if isinstance(row.get("fields"), Mapping):
        found = row.get("responses") or {}
        return row["fields"], row.get("metadata") or {}, found
    responses: dict[str, list[dict[str, Any]]] = {}
    for name, values in row.items():
        if str(name).endswith(".responses") and is_list(values):
            people = row.get(f"{name}.users") or [None] * len(values)
            states = row.get(f"{name}.status") or ["submitted"] * len(values)
            responses[name.removesuffix(".responses")] = [
                {"value": value, "user_id": person, "status": state}
                for value, person, state in zip(values, people, states, strict=True)
            ]
    questions = tuple(responses)
    fields = {
        n: v
        for n, v in row.items()
        if isinstance(v, str | list)
        and not n.startswith(questions)
        and "." not in n
        and n not in ("id", "status")
    }
    return fields, {n: v for n, v in row.items() if n.startswith("keel")}, responses


def _reply_names(fields: Row) -> list[str]:
    names = [n for n in fields if n.rstrip("0123456789").rstrip("-_ ").lower() in _REPLIES]
    return sorted(names, key=lambda n: int("".join(c for c in n if c.isdigit()) or 0))


def _item(row: Row, fields: Row, metadata: Row, names: Sequence[str]) -> NewItem:
    asks = next((name for name in _PROMPTS if name in fields), None)
    if asks is None or not names:
        raise Invalid(
            f"fields prompt and response-1, response-2 are wanted; it has {', '.join(map(str, fields))}"
        )
    contents = [text_or_turns(fields[name], name) for name in names]
    key = row.get("id")
    return NewItem(
        key=str(key) if key is not None else key_of(fields[asks], contents),
        prompt=text_or_turns(fields[asks], asks),
        replies=[Reply(content) for content in contents],
        columns={k: v for k, v in metadata.items() if v is not None},
    )


def _task(given: Mapping[str, Mapping[str, Any]], replies: int) -> Task:
    values = [value for answers in given.values() for value in answers.values()]
    if replies > 2:
        return "ranking"
    if replies == 2:
        return "pairwise"
    if any(isinstance(value, int) for value in values):
        return "rating"
    return "thumbs" if any(str(v).lower() in ("up", "down") for v in values) else "edit"


def _answer(answers: Row, names: Sequence[str], task: Task) -> dict[str, Any]:
    """What one person said to all questions, as the parts of an answer."""
    values: dict[str, Any] = {}
    for question, value in answers.items():
        if is_list(value) and task in ("pairwise", "ranking"):
            values |= _ranked(value, names, task)
        elif isinstance(value, int) and not isinstance(value, bool):
            if task == "rating":
                values.setdefault("ratings", {})[question] = value
            elif question == "strength":
                values["strength"] = value
        elif isinstance(value, str):
            values |= _text(question, value, names, task)
    return values


def _text(question: str, value: str, names: Sequence[str], task: Task) -> dict[str, Any]:
    lowered = value.strip().lower().replace(" ", "_")
    if question == "comment":
        return {"comment": value}
    if task == "pairwise":
        if value in names:
            return {"choice": "ab"[names.index(value)]}
        if lowered in _SIDES:
            return {"choice": lowered}
        if question == "preference":
            raise Invalid(f"an answer is {shown(value)}: it must name {' or '.join(names)}, or tie")
    if task == "thumbs" and lowered in ("up", "down", "cannot_judge"):
        return {"choice": lowered}
    return {"text": value} if task == "edit" else {"comment": value}


def _ranked(value: Sequence[Any], names: Sequence[str], task: Task) -> dict[str, Any]:
    places = {entry.get("value"): entry.get("rank") for entry in value if isinstance(entry, Mapping)}
    if set(places) != set(names) or not all(isinstance(rank, int) for rank in places.values()):
        raise Invalid(f"a ranking must give each of {', '.join(names)} a rank")
    ranks: list[Any] = sorted({places[name] for name in names})
    groups = [[i for i, name in enumerate(names) if places[name] == rank] for rank in ranks]
    if task == "ranking":
        return {"ranking": groups}
    return {"choice": "tie" if len(groups) == 1 else "ab"[groups[0][0]]}


def _json(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return dict(value) if isinstance(value, Mapping) else {}
