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

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

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
    Vote,
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
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ONCE_A_ROW = ("tools", "chat_template_kwargs")  # what belongs to a conversation; it rides on its first turn
_PICTURES = ("images", "image", "videos", "audio")
_ROLES_ELSEWHERE = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
_CHOICES = ("chosen", "rejected", "tie")
_HH_TURN = "\n\nAssistant:"  # Anthropic's HH-RLHF writes its dialogues as one string
_VOTE_TOLERANCE = 0.005  # a share rounded to two decimals still agrees with its votes


class _Invalid(Exception):
    """What is wrong with a row; `parse` adds where the row is."""


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
        return _parse(_with_settings(row), kind, origin)
    except _Invalid as error:
        raise DataError(f"{origin}: {error}") from None


def _parse(row: Mapping[str, Any], kind: RecordType, origin: str) -> Record:
    if kind == "text":
        name = "messages" if "messages" in row else "text"
        value = _value(row, name)
        if isinstance(value, str) != (name == "text"):
            raise _Invalid(f'"{name}" must be {"text" if name == "text" else "a list of turns"}')
        return TextRecord(value, _others(row, name), origin)

    row = _with_explicit_prompt(row)
    prompt = _prompt(row)
    if kind == "prompt":
        if isinstance(prompt, str) and any(_is_list(row.get(name)) for name in ("completion", "chosen")):
            prompt = (Message(role="user", content=prompt),)  # as the whole row would have it
        return PromptRecord(prompt, _others(row, "prompt"), origin)
    if kind == "demonstration":
        name = "chosen" if "chosen" in row and "rejected" in row else "completion"
        prompt, completion = _aligned(prompt, _value(row, name), name)
        return DemonstrationRecord(prompt, completion, _others(row, "prompt", name), origin)
    if kind == "unpaired":
        prompt, completion = _aligned(prompt, _value(row, "completion"), "completion")
        columns = _others(row, "prompt", "completion", "label")
        return UnpairedRecord(prompt, completion, _label(_required(row, "label")), columns, origin)

    sides = _value(row, "chosen"), _value(row, "rejected")
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise _Invalid('one of "chosen" and "rejected" is text and the other a list of turns')
    aligned, chosen = _aligned(prompt, sides[0], "chosen")
    _, rejected = _aligned(prompt, sides[1], "rejected")
    if chosen == rejected:
        raise _Invalid('"chosen" and "rejected" are equal: the pair says nothing')
    votes = _votes(row["votes"]) if "votes" in row else ()
    return PreferenceRecord(
        prompt=aligned,
        chosen=chosen,
        rejected=rejected,
        p_chosen=_p_chosen(row, votes),
        margin=_number("margin", row["margin"]) if "margin" in row else None,
        votes=votes,
        columns=_others(row, "prompt", "chosen", "rejected", *OPTIONAL_COLUMNS),
        origin=origin,
    )


# ---------------------------------------------------------------- prompts and replies


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
        raise _Invalid('one of "chosen" and "rejected" is text and the other a list of turns')
    if not length:
        raise _Invalid('there is no "prompt", and "chosen" and "rejected" do not begin alike')
    sides = {"chosen": chosen[length:], "rejected": rejected[length:]}
    for name, rest in sides.items():
        if not rest:
            raise _Invalid(f'"{name}" is empty after the prompt that both sides begin with')
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
            raise _Invalid("the last turn of \"prompt\" is the assistant's; it must be the user's")
        if prompt[-1]["role"] in ("system", "developer"):
            raise _Invalid(f'"prompt" has no user turn after the {prompt[-1]["role"]} turn')
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
        raise _Invalid(f'"{name}" has nothing but the prompt')
    roles = [turn["role"] for turn in reply]
    if roles != ["assistant"]:
        raise _Invalid(f'"{name}" must be one assistant turn after the prompt; it has {", ".join(roles)}')
    return prompt, reply


# ---------------------------------------------------------------- single values


def _required(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    close = nearest(name, row)
    hint = f'; did you mean "{close}"?' if close else ""
    raise _Invalid(f'"{name}" is missing; the row has {", ".join(map(str, row)) or "no columns"}{hint}')


def _value(row: Mapping[str, Any], name: str) -> str | Conversation:
    """A column that holds text or turns, validated."""
    value = _required(row, name)
    return _turns(name, value) if _is_list(value) else _text(f'"{name}"', value)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Invalid(f"{where} is {_shown(value)}, not text")
    if not value.strip():
        raise _Invalid(f"{where} is {'empty' if not value else 'only whitespace'}")
    _check_unicode(where, value)
    return value


def _check_unicode(where: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise _Invalid(
            f"{where} holds a lone surrogate (\\u{code:04x}), which is not valid Unicode"
        ) from None


def _turns(name: str, value: Sequence[Any]) -> Conversation:
    if not value:
        raise _Invalid(f'"{name}" has no turns')
    turns: list[Message] = []
    for number, turn in enumerate(value, 1):
        where = f'"{name}" turn {number}'
        if not isinstance(turn, Mapping):
            raise _Invalid(f'{where} is {_shown(turn)}, not {{"role", "content"}}')
        calls = turn.get("tool_calls") or ()
        if "role" not in turn or ("content" not in turn and not calls):
            raise _Invalid(
                f'{where} has {", ".join(map(str, turn)) or "no keys"}; it needs "role" and "content"'
            )
        role, content = turn["role"], _content(where, turn.get("content"))
        if not isinstance(role, str) or role not in _ROLES:
            meant = _ROLES_ELSEWHERE.get(str(role).lower()) or nearest(str(role), _ROLES)
            hint = f'; did you mean "{meant}"?' if meant else ""
            raise _Invalid(f"{where} has the role {role!r}, not one of {', '.join(_ROLES)}{hint}")
        if calls and content is None:
            content = ""  # the calls are what is said
        if isinstance(content, str) and (role in ("system", "developer", "tool") or calls):
            _check_unicode(where, content)  # it may be empty
        else:
            _text(where, content)
        _check_keys(where, turn)
        # keys without a value are as good as none: tables write null where a row lacks one
        more = {str(key): value for key, value in turn.items() if value is not None}
        turns.append(cast(Message, {**more, "role": role, "content": content}))
    _check_order(name, turns)
    return tuple(turns)


def unknown_turn_keys(rows: Iterable[Record]) -> dict[str, int]:
    """How many turns have each key that keel does not know. Templates are given those, too."""
    known = {*Message.__annotations__, "role", "content"}
    parts = (
        getattr(row, name, ())
        for row in rows
        for name in ("text", "prompt", "completion", "chosen", "rejected")
    )
    turns = (turn for part in parts if not isinstance(part, str) for turn in part)
    counts = Counter(key for turn in turns for key in turn if key not in known)
    return dict(sorted(counts.items()))


def _content(where: str, value: Any) -> Any:
    """A turn's content; of a list of text parts, their text."""
    if not _is_list(value):
        return value
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or "text" not in part:
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise _Invalid(
                f"{where} has a part of type {kind!r}: keel reads text alone, no pictures or sound"
            )
    return "".join(_text(where, part["text"]) for part in value)


def _check_keys(where: str, turn: Mapping[str, Any]) -> None:
    """What is known of a turn's other keys must have the right type; the rest reaches the template as it
    is."""
    for key in ("reasoning_content", "thinking", "reasoning", "name", "tool_call_id"):
        value = turn.get(key)
        if value is not None and not isinstance(value, str):
            raise _Invalid(f'{where}: "{key}" is {_shown(value)}, not text')
        _check_unicode(f'{where}: "{key}"', value or "")
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (not isinstance(weight, Real) or weight not in (0, 1)):
        raise _Invalid(f'{where}: "weight" is {_shown(weight)}; a turn is in the loss (1) or not (0)')
    if train is not None and not isinstance(train, bool):
        raise _Invalid(f'{where}: "train" is {_shown(train)}, not true or false')
    calls = turn.get("tool_calls")
    if calls is not None and not (_is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise _Invalid(f'{where}: "tool_calls" is {_shown(calls)}, not a list of calls')
    if calls and turn.get("role") != "assistant":
        raise _Invalid(f'{where}: only the assistant has "tool_calls"')


def _with_settings(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `tools` and `chat_template_kwargs` on the first turn of its conversations, where the
    template finds them. A plain prompt has no template, and keeps them as columns."""
    for name in _PICTURES:
        if row.get(name):
            raise _Invalid(f'"{name}": keel reads text alone, no pictures or sound')
    settings = {name: row[name] for name in _ONCE_A_ROW if row.get(name)}
    names = ("messages", "prompt", "completion", "chosen", "rejected")
    opened = {name: row[name] for name in names if settings and _is_list(row.get(name)) and row[name]}
    opened = {
        name: turns
        for name, turns in opened.items()
        if isinstance(turns[0], Mapping) and turns[0].get("role") != "assistant"
    }
    if not opened:
        return row
    if isinstance(settings.get("tools"), str):
        settings["tools"] = _json("tools", settings["tools"])
    if not isinstance(settings.get("chat_template_kwargs", {}), Mapping):
        raise _Invalid(f'"chat_template_kwargs" is {_shown(settings["chat_template_kwargs"])}, not an object')
    if not _is_list(settings.get("tools", [])):
        raise _Invalid(f'"tools" is {_shown(settings["tools"])}, not a list')
    placed = {name: [{**turns[0], **settings}, *turns[1:]] for name, turns in opened.items()}
    return {key: value for key, value in row.items() if key not in _ONCE_A_ROW} | placed


def _json(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise _Invalid(f'"{name}" is text that is no JSON: {error}') from None


def _check_order(name: str, turns: Sequence[Message]) -> None:
    for index, turn in enumerate(turns):
        before = turns[index - 1]["role"] if index else ""
        if turn["role"] == "system" and index:
            raise _Invalid(f'"{name}" turn {index + 1}: a system turn may only come first')
        # Completions begin with the assistant's turn; everything else begins with the user's.
        if turn["role"] == "assistant" and before == "assistant":
            raise _Invalid(f'"{name}" turns {index} and {index + 1} are both the assistant\'s')
        if turn["role"] == "assistant" and (
            before in ("system", "developer") or (not index and name in ("messages", "prompt"))
        ):
            raise _Invalid(f'"{name}" turn {index + 1}: the assistant speaks before any user')


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise _Invalid(f'"{name}" is {_shown(value)}, not a finite number')
    return float(value)


def _label(value: object) -> bool:
    if isinstance(value, (bool, Real)) and value in (0, 1):
        return bool(value)
    raise _Invalid(f'"label" is {_shown(value)}, not true or false (or 1 or 0)')


def _votes(value: Any) -> tuple[Vote, ...]:
    """Votes from [{"annotator", "choice"}, …], or from counts by choice (their annotators are unknown:
    "")."""
    if isinstance(value, Mapping):
        votes: list[Vote] = []
        for choice, count in value.items():
            if choice not in _CHOICES:
                raise _Invalid(f'"votes" counts {choice!r}; it may count {", ".join(_CHOICES)}')
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise _Invalid(f'"votes" has {_shown(count)} for {choice!r}, not a count')
            votes.extend([Vote("", choice)] * count)
        return tuple(votes)
    if not _is_list(value):
        raise _Invalid(
            f'"votes" is {_shown(value)}, not a list of {{"annotator", "choice"}} or counts by choice'
        )
    votes = []
    for number, vote in enumerate(value, 1):
        if not isinstance(vote, Mapping) or "annotator" not in vote or "choice" not in vote:
            raise _Invalid(f'"votes" entry {number} is {_shown(vote)}; it needs "annotator" and "choice"')
        annotator, choice = vote["annotator"], vote["choice"]
        if choice not in _CHOICES:
            raise _Invalid(f'"votes" entry {number} chose {choice!r}, not one of {", ".join(_CHOICES)}')
        if isinstance(annotator, (bool, float)) or not isinstance(annotator, (str, int)):
            raise _Invalid(
                f'"votes" entry {number} has {_shown(annotator)} as annotator, not a name or number'
            )
        votes.append(Vote(str(annotator), choice))
    return tuple(votes)


def _p_chosen(row: Mapping[str, Any], votes: Sequence[Vote]) -> float | None:
    """The share that preferred `chosen`, ties one half: as given, or from the votes. Both must agree."""
    points = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
    share = sum(points[vote.choice] for vote in votes) / len(votes) if votes else None
    if "p_chosen" not in row:
        return share
    given = _number("p_chosen", row["p_chosen"])
    if not 0 <= given <= 1:
        raise _Invalid(f'"p_chosen" is {given:g}, not between 0 and 1')
    if share is not None and abs(share - given) > _VOTE_TOLERANCE:
        raise _Invalid(f'"p_chosen" is {given:g}, but the votes give {share:.3g}; leave one of them out')
    return given if share is None else share


def _others(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The name among `known` that `word` was probably meant to be, if any is close."""
    return next(iter(difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.6)), None)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shown(value: object) -> str:
    """A value as a message shows it, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real):
        return "NaN" if math.isnan(value) else f"the number {value}"
    if isinstance(value, Mapping):
        return "an object"
    if _is_list(value):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
