"""Data sets of several replies to a prompt, scored or ranked: each two of them with different scores are a
pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from numbers import Real
from typing import Any

from keel.data.formats.base import (
    Format,
    LeftOut,
    Made,
    Row,
    Turns,
    answered,
    asked,
    dialogue,
    has_mapping,
    list_of,
    number_of,
    one,
    pair,
    rest,
    text_of,
)
from keel.data.formats.pairs import helpsteer_prompt
from keel.data.values import as_finite, is_list, shown

_Scored = tuple[str, float, Mapping[str, Any]]  # a reply, how good it is, columns of its own


def _pairs(prompt: Turns, replies: Sequence[_Scored], columns: Mapping[str, Any]) -> Iterable[Made]:
    """Each two replies, the higher score preferred (InstructGPT's way, 2203.02155, section 3.5)."""
    for (first, high, _), (second, low, _) in combinations(replies, 2):
        yield pair(prompt, answered(first), answered(second), high - low, columns=columns)


def _ultrafeedback(row: Row) -> Iterable[Made]:
    """The mean rating over instruction following, truthfulness, honesty and helpfulness, as far as there are
    ratings; the higher is preferred. Not overall_score, which is wrong in part: a 1 was written as 10."""
    replies: list[_Scored] = []
    for completion in list_of(row, "completions"):
        ratings = [_rating(aspect) for aspect in (completion.get("annotations") or {}).values()]
        known = [rating for rating in ratings if rating is not None]
        if not known:
            raise ValueError('a completion has no "annotations" with a "Rating"')
        replies.append((text_of(completion, "response"), sum(known) / len(known), {}))
    yield from _pairs(
        asked(text_of(row, "instruction")), replies, rest(row, "instruction", "completions", "models")
    )


def _rating(aspect: Any) -> float | None:
    """The rating of one aspect; None for "N/A". An aspect may be a list of one."""
    if is_list(aspect) and len(aspect) == 1:
        aspect = aspect[0]
    value = aspect.get("Rating") if isinstance(aspect, Mapping) else None
    return float(value) if isinstance(value, str) and value.strip().isdigit() else None


def _helpsteer(rows: Sequence[Row]) -> Iterable[Made]:
    """helpfulness from 0 to 4: of two replies to one prompt, which stand in neighbouring rows, the higher is
    preferred."""
    if len(rows) == 1:
        yield LeftOut("reply without another one to its prompt beside it")
    replies = [(text_of(row, "response"), number_of(row, "helpfulness"), {}) for row in rows]
    columns = {name: rows[0][name] for name in ("split",) if name in rows[0]}
    yield from _pairs(helpsteer_prompt(text_of(rows[0], "prompt")), replies, columns)


def _nectar(row: Row) -> Iterable[Made]:
    """rank: 1 is the best reply."""
    replies = [
        (text_of(answer, "answer"), -number_of(answer, "rank"), {}) for answer in list_of(row, "answers")
    ]
    prompt = dialogue(text_of(row, "prompt"), "\n\nHuman:", "\n\nAssistant:")
    yield from _pairs(prompt, replies, rest(row, "answers"))


def _tree(row: Row) -> Iterable[Made]:
    """OASST: rank 0 is the best reply to a prompt; replies without a rank are in no pair."""
    prompt = row["prompt"]
    columns = {"message_tree_id": row["message_tree_id"]}
    if not isinstance(prompt, Mapping):
        raise ValueError(f'"prompt" is {shown(prompt)}, not the first message of a tree')
    waiting: list[tuple[Turns, Mapping[str, Any]]] = [([], prompt)]
    pairs = 0
    while waiting:
        before, message = waiting.pop()
        role = {"prompter": "user", "assistant": "assistant"}.get(message.get("role", ""))
        if role is None:
            raise ValueError(f'"role" is {shown(message.get("role"))}, not prompter or assistant')
        history = [*before, {"role": role, "content": text_of(message, "text")}]
        replies = [reply for reply in message.get("replies") or () if not reply.get("deleted")]
        if role == "user":
            ranked = [
                (text_of(r, "text"), -number_of(r, "rank"), {}) for r in replies if _is_number(r.get("rank"))
            ]
            pairs += len(ranked) > 1
            yield from _pairs(history, ranked, columns)
        waiting += [(history, reply) for reply in reversed(replies)]
    if not pairs:
        yield LeftOut("tree without ranked replies")


def _messages(rows: Sequence[Row]) -> Iterable[Made]:
    """The messages of one tree, one a row, as `_tree` reads them."""
    replies: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        replies.setdefault(row.get("parent_id"), []).append(dict(row))
    for messages in replies.values():
        for message in messages:
            message["replies"] = replies.get(message["message_id"], [])
    roots = replies.get(None, [])
    if len(roots) != 1:
        raise ValueError(
            f"the tree {rows[0]['message_tree_id']!r} has {len(roots)} messages without a parent in these "
            "rows, not one; its messages must stand one after the other"
        )
    known = {row["message_id"] for row in rows}
    for row in rows:
        if row.get("parent_id") is not None and row["parent_id"] not in known:
            yield LeftOut("message without its parent")
    yield from _tree({"message_tree_id": rows[0]["message_tree_id"], "prompt": roots[0]})


def _ranked(row: Row) -> Iterable[Made]:
    """completions, and ranks of as many numbers: 1 is the best reply, and equal ones share a rank."""
    replies, ranks = list_of(row, "completions"), list_of(row, "ranks")
    if len(replies) != len(ranks) or any(as_finite(rank) is None for rank in ranks):
        raise ValueError(
            f'"ranks" are {len(ranks)} for {len(replies)} completions; give each a finite number'
        )
    for (first, high), (second, low) in combinations(zip(replies, ranks, strict=True), 2):
        yield pair(row["prompt"], first, second, low - high, columns=rest(row, "completions", "ranks"))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


RANKINGS = (
    Format("ranked", "ranked replies", "preference", ("prompt", "completions", "ranks"), one(_ranked)),
    Format(
        "ultrafeedback",
        "UltraFeedback",
        "preference",
        ("instruction", "completions"),
        one(_ultrafeedback),
        lambda row: has_mapping(row, "completions", "response", "annotations"),
    ),
    Format(
        "helpsteer",
        "HelpSteer",
        "preference",
        ("prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"),
        _helpsteer,
        key=lambda row: row.get("prompt"),
    ),
    Format(
        "nectar",
        "Nectar",
        "preference",
        ("prompt", "answers"),
        one(_nectar),
        lambda row: has_mapping(row, "answers", "answer", "rank"),
    ),
    Format(
        "oasst",
        "OASST trees",
        "preference",
        ("message_tree_id", "prompt"),
        one(_tree),
        lambda row: isinstance(row["prompt"], Mapping) and "role" in row["prompt"],
    ),
    Format(
        "oasst_messages",
        "OASST messages",
        "preference",
        ("message_id", "parent_id", "message_tree_id", "text", "role", "rank"),
        _messages,
        key=lambda row: row.get("message_tree_id"),
    ),
)
