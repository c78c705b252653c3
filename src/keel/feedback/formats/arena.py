"""Logs of votes like Chatbot Arena's: two models, their conversations, who won, and who said so.

    lmsys/chatbot_arena_conversations  conversation_a, conversation_b, winner, judge, turn
    lmsys-arena-human-preference-55k   prompt, response_a, response_b (JSON lists), winner_model_a …

Votes on later rounds are left out: from there on the two sides have different histories.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.data.formats.base import list_of
from keel.data.values import shown
from keel.feedback.formats.base import Invalid, Row, name_of_item, seconds_of
from keel.votes.kinds import Answer, NewItem, PastJudgement, Reply

_TIES = {"tie": "tie", "tie (bothbad)": "both_bad", "both_bad": "both_bad", "bothbad": "both_bad"}
_WON = ("winner_model_a", "winner_model_b", "winner_tie")


def is_vote(row: Row) -> bool:
    talks = "conversation_a" in row and "conversation_b" in row and "winner" in row
    return talks or ("response_a" in row and "response_b" in row and all(name in row for name in _WON))


def read(row: Row) -> tuple[NewItem, list[PastJudgement]] | None:
    """The pair and its vote; None for a vote on a later round."""
    found = _talks(row) if "conversation_a" in row else _table(row)
    if found is None:
        return None
    prompt, replies, choice = found
    names = [row.get("model_a"), row.get("model_b")]
    key = str(row["question_id"]) if row.get("question_id") else name_of_item(row, prompt, replies, names)
    used = (
        "conversation_a",
        "conversation_b",
        "winner",
        "judge",
        "model_a",
        "model_b",
        "prompt",
        "response_a",
    )
    used += ("response_b", *_WON, "id", "key", "question_id", "tstamp", "turn")
    item = NewItem(
        key,
        prompt,
        [
            Reply(reply, str(name) if name is not None else None)
            for reply, name in zip(replies, names, strict=True)
        ],
        {k: v for k, v in row.items() if k not in used and v is not None},
    )
    who = str(row.get("judge") or row.get("annotator") or "unknown")
    return item, [PastJudgement(key, who, Answer(choice=choice), seconds_of(row.get("tstamp")), None, (0, 1))]


def _talks(row: Row) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]], str] | None:
    winner = str(row["winner"])
    choice = {"model_a": "a", "model_b": "b", **_TIES}.get(winner)
    if choice is None:
        raise Invalid(f'"winner" is {shown(row["winner"])}, not model_a, model_b or a tie')
    sides = [_turns(list_of(row, name)) for name in ("conversation_a", "conversation_b")]
    rounds = sum(turn["role"] == "assistant" for turn in sides[0])
    if int(row.get("turn") or rounds) != 1 or rounds != 1:
        return None
    start = next((i for i, turn in enumerate(sides[0]) if turn["role"] == "assistant"), 0)
    if not start or sides[0][:start] != sides[1][:start] or len(sides[1]) <= start:
        raise Invalid('"conversation_a" and "conversation_b" do not ask the same and get a reply')
    return sides[0][:start], [side[start : start + 1] for side in sides], choice


def _turns(turns: list[Any]) -> list[dict[str, Any]]:
    if not all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in turns):
        raise Invalid("a conversation is no list of turns with role and content")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _table(row: Row) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]], str] | None:
    won = [str(row[name]).strip() for name in _WON]
    if sorted(won) != ["0", "0", "1"]:
        raise Invalid("not one of winner_model_a, winner_model_b and winner_tie is 1")
    prompts, first, second = (list_of(row, name) for name in ("prompt", "response_a", "response_b"))
    if not len(prompts) == len(first) == len(second):
        raise Invalid('"prompt", "response_a" and "response_b" have different numbers of rounds')
    if len(prompts) != 1:
        return None
    if not all(isinstance(side[0], str) for side in (first, second)):
        raise Invalid("a response is null")
    replies = [[{"role": "assistant", "content": side[0]}] for side in (first, second)]
    return [{"role": "user", "content": prompts[0]}], replies, ("a", "b", "tie")[won.index("1")]
