"""A raw row (a mapping) into a validated record: TRL's five types, each standard (text) or conversational
(turns).

    text           {"text"} or {"messages"}
    prompt         {"prompt"}
    demonstration  {"prompt", "completion"}
    preference     {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"}, which both begin with the
                   prompt; optionally "votes", "p_chosen", "margin"
    unpaired       {"prompt", "completion", "label"}

Whatever else a row has is kept in the record's `columns`, which reward functions receive.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from keel.data.conversations import parse_turns, with_settings
from keel.data.values import (
    Invalid,
    is_list,
    label_value,
    nearest,
    number_value,
    parse_json,
    parse_votes,
    share_of_votes,
    text_value,
)
from keel.errors import DataError
from keel.types import (
    Conversation,
    DemonstrationRecord,
    Message,
    PreferenceRecord,
    Prompt,
    PromptRecord,
    Record,
    RecordType,
    TextRecord,
    UnpairedRecord,
)

# What a type needs: one of these groups of columns.
COLUMNS: dict[RecordType, tuple[tuple[str, ...], ...]] = {
    "text": (("text",), ("messages",)),
    "prompt": (("prompt",),),
    "demonstration": (("prompt", "completion"),),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"),),
}
OPTIONAL_COLUMNS = ("votes", "p_chosen", "margin")
_NAMES: dict[RecordType, str] = {
    "text": "language modelling",
    "prompt": "prompt-only",
    "demonstration": "prompt-completion",
    "preference": "preference",
    "unpaired": "unpaired preference",
}
_HH_TURN = "\n\nAssistant:"  # Anthropic's HH-RLHF writes its dialogues as one string


def describe(kind: RecordType, conversational: bool) -> str:
    """The type in TRL's words: "preference, standard", "prompt-only, conversational"."""
    return f"{_NAMES[kind]}, {'conversational' if conversational else 'standard'}"


def detect(row: Mapping[str, Any]) -> RecordType:
    """The record type that the row's columns make up. DataError if they make up none."""
    kinds = readable_as(row)
    if not kinds:
        raise DataError(f"no record type has the columns {', '.join(map(str, row)) or '(none)'}")
    return kinds[0]


def readable_as(row: Mapping[str, Any]) -> tuple[RecordType, ...]:
    """Every type the row can be read as, its own first.

    A row with more columns than a type needs can be narrowed to it: any row with a prompt to that prompt, a
    preference to its chosen side as a demonstration. Unpaired rows are never demonstrations, since some of
    them show what not to do; and a demonstration is never plain text, since that would train on the prompt.
    """
    pair = "chosen" in row and "rejected" in row
    answered = "prompt" in row and "completion" in row
    kinds: list[RecordType] = []
    if pair:
        kinds.append("preference")
    if answered:
        kinds.append("unpaired" if "label" in row else "demonstration")
    if "text" in row or "messages" in row:
        kinds.append("text")
    if pair and "demonstration" not in kinds:
        kinds.append("demonstration")
    if pair or "prompt" in row:
        kinds.append("prompt")
    return tuple(kinds)


def parse(row: Mapping[str, Any], kind: RecordType, origin: str) -> Record:
    """The row as a record of type `kind`, which may be narrower than the row's own (see `readable_as`).

    Raises DataError `ORIGIN: reason` for a missing column, a wrong type, an empty or whitespace-only text,
    null, NaN or infinity in a column that is used, roles out of order, equal sides of a pair, votes that do
    not give `p_chosen`, text that is not valid Unicode.
    """
    try:
        return _parse(with_settings(row), kind, origin)
    except Invalid as error:
        raise DataError(f"{origin}: {error}") from None


def _parse(row: Mapping[str, Any], kind: RecordType, origin: str) -> Record:
    if kind == "text":
        name = "messages" if "messages" in row else "text"
        if name == "messages" and isinstance(row[name], str) and row[name].lstrip().startswith("["):
            row = {**row, name: parse_json(name, row[name])}  # turns as tables keep them
        value = _value(row, name)
        if isinstance(value, str) != (name == "text"):
            raise Invalid(f'"{name}" must be {"text" if name == "text" else "a list of turns"}')
        return TextRecord(value, _others(row, name), origin)

    row = _with_explicit_prompt(row)
    prompt = _prompt(row)
    if kind == "prompt":
        if isinstance(prompt, str) and any(is_list(row.get(name)) for name in ("completion", "chosen")):
            prompt = (Message(role="user", content=prompt),)  # as the whole row would have it
        return PromptRecord(prompt, _others(row, "prompt"), origin)
    if kind == "demonstration":
        if "label" in row and "chosen" not in row:
            raise Invalid(
                'it has a "label", the rows before it have none: an unpaired row may show what not to do'
            )
        name = "chosen" if "chosen" in row and "rejected" in row else "completion"
        prompt, completion = _aligned(prompt, _value(row, name), name)
        return DemonstrationRecord(prompt, completion, _others(row, "prompt", name), origin)
    if kind == "unpaired":
        prompt, completion = _aligned(prompt, _value(row, "completion"), "completion")
        columns = _others(row, "prompt", "completion", "label")
        return UnpairedRecord(prompt, completion, label_value(_required(row, "label")), columns, origin)

    sides = _value(row, "chosen"), _value(row, "rejected")
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise Invalid('one of "chosen" and "rejected" is text and the other a list of turns')
    aligned, chosen = _aligned(prompt, sides[0], "chosen")
    _, rejected = _aligned(prompt, sides[1], "rejected")
    if chosen == rejected:
        raise Invalid('"chosen" and "rejected" are equal: the pair says nothing')
    votes = parse_votes(row["votes"]) if "votes" in row else ()
    return PreferenceRecord(
        prompt=aligned,
        chosen=chosen,
        rejected=rejected,
        p_chosen=share_of_votes(row, votes),
        margin=number_value("margin", row["margin"]) if "margin" in row else None,
        votes=votes,
        columns=_others(row, "prompt", "chosen", "rejected", *OPTIONAL_COLUMNS),
        origin=origin,
    )


def _with_explicit_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preference row whose prompt stands at the head of both sides, with the prompt in a column of its
    own."""
    if "prompt" in row or "chosen" not in row or "rejected" not in row:
        return row
    chosen, rejected = _value(row, "chosen"), _value(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        length = _shared_text(chosen, rejected)
    elif not isinstance(chosen, str) and not isinstance(rejected, str):
        length = _shared_turns(chosen, rejected)
    else:
        raise Invalid('one of "chosen" and "rejected" is text and the other a list of turns')
    if not length:
        raise Invalid('there is no "prompt", and "chosen" and "rejected" do not begin alike')
    sides = {"chosen": chosen[length:], "rejected": rejected[length:]}
    for name, rest in sides.items():
        if not rest:
            raise Invalid(f'"{name}" is empty after the prompt that both sides begin with')
    return {**row, "prompt": chosen[:length], **sides}


def _shared_text(chosen: str, rejected: str) -> int:
    """Characters of the implicit prompt: up to HH-RLHF's last shared "Assistant:", else the last shared
    space."""
    length = next((index for index, (a, b) in enumerate(zip(chosen, rejected)) if a != b), None)
    shared = chosen[:length] if length is not None else min(chosen, rejected, key=len)
    turn = shared.rfind(_HH_TURN)
    if turn >= 0:
        return turn + len(_HH_TURN)
    # The whitespace goes to the replies: tokenizers join a space with the word after it.
    spaces = list(re.finditer(r"(?<=\S)\s+", shared))
    return spaces[-1].start() if spaces else 0


def _shared_turns(chosen: Conversation, rejected: Conversation) -> int:
    """Turns of the implicit prompt: the common leading ones, ending with the user's."""
    length = 0
    for ours, theirs in zip(chosen, rejected):
        if ours != theirs:
            break
        length += 1
    while length and chosen[length - 1]["role"] == "assistant":
        length -= 1
    return length


def _prompt(row: Mapping[str, Any]) -> Prompt:
    prompt = _value(row, "prompt")
    if not isinstance(prompt, str):
        if prompt[-1]["role"] == "assistant":
            raise Invalid("the last turn of \"prompt\" is the assistant's; it must be the user's")
        if prompt[-1]["role"] in ("system", "developer"):
            raise Invalid(f'"prompt" has no user turn after the {prompt[-1]["role"]} turn')
    return prompt


def _aligned(prompt: Prompt, reply: str | Conversation, name: str) -> tuple[Prompt, str | Conversation]:
    """Prompt and reply in one form (conversational if either is), the reply without the prompt's turns."""
    if isinstance(prompt, str) and isinstance(reply, str):
        return prompt, reply
    if isinstance(prompt, str):
        prompt = (Message(role="user", content=prompt),)
    if isinstance(reply, str):
        return prompt, (Message(role="assistant", content=reply),)
    if reply[: len(prompt)] == prompt:
        reply = reply[len(prompt) :]
    if not reply:
        raise Invalid(f'"{name}" has nothing but the prompt')
    roles = [turn["role"] for turn in reply]
    if roles != ["assistant"]:
        raise Invalid(f'"{name}" must be one assistant turn after the prompt; it has {", ".join(roles)}')
    return prompt, reply


def _required(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    # "choice" is not meant by "chosen": which side is the better one is never guessed, slips of the pen apart
    close = nearest(name, row, 0.85 if name in ("chosen", "rejected") else 0.6)
    hint = f'; did you mean "{close}"?' if close else ""
    raise Invalid(f'"{name}" is missing; the row has {", ".join(map(str, row)) or "no columns"}{hint}')


def _value(row: Mapping[str, Any], name: str) -> str | Conversation:
    """A column that holds text or turns, validated."""
    value = _required(row, name)
    return parse_turns(name, value) if is_list(value) else text_value(f'"{name}"', value)


def unknown_turn_keys(rows: Iterable[Record]) -> dict[str, int]:
    """How many turns have each key that keel does not know, by name. Templates are given those, too."""
    known = {*Message.__annotations__, "role", "content"}
    parts = (
        getattr(row, name, ())
        for row in rows
        for name in ("text", "prompt", "completion", "chosen", "rejected")
    )
    turns = (turn for part in parts if not isinstance(part, str) for turn in part)
    counts = Counter(key for turn in turns for key in turn if key not in known)
    return dict(sorted(counts.items()))


def _others(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}
