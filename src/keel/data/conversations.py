"""Conversations of a row: turns, and what belongs to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

from keel.data.values import Invalid, check_unicode, is_list, nearest, parse_json, shown, text_value
from keel.types import Conversation, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SETTINGS = ("tools", "chat_template_kwargs")  # what belongs to a conversation; it rides on its first turn
PICTURES = ("images", "image", "videos", "audio")
_ROLES_ELSEWHERE = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}


def parse_turns(name: str, value: Sequence[Any]) -> Conversation:
    if not value:
        raise Invalid(f'"{name}" has no turns')
    turns: list[Message] = []
    for number, turn in enumerate(value, 1):
        where = f'"{name}" turn {number}'
        if not isinstance(turn, Mapping):
            raise Invalid(f'{where} is {shown(turn)}, not {{"role", "content"}}')
        calls = turn.get("tool_calls") or ()
        if "role" not in turn or ("content" not in turn and not calls):
            raise Invalid(
                f'{where} has {", ".join(map(str, turn)) or "no keys"}; it needs "role" and "content"'
            )
        role, content = turn["role"], _content(where, turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            meant = _ROLES_ELSEWHERE.get(str(role).lower()) or nearest(str(role), ROLES)
            hint = f'; did you mean "{meant}"?' if meant else ""
            raise Invalid(f"{where} has the role {role!r}, not one of {', '.join(ROLES)}{hint}")
        if calls and content is None:
            content = ""  # the calls are what is said
        if isinstance(content, str) and (role in ("system", "developer", "tool") or calls):
            check_unicode(where, content)  # it may be empty
        else:
            text_value(where, content)
        _check_keys(where, turn)
        # keys without a value are as good as none: tables write null where a row lacks one
        more = {str(key): value for key, value in turn.items() if value is not None}
        turns.append(cast(Message, {**more, "role": role, "content": content}))
    _check_order(name, turns)
    return tuple(turns)


def _content(where: str, value: Any) -> Any:
    """A turn's content; of a list of text parts, their text."""
    if not is_list(value):
        return value
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or "text" not in part:
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise Invalid(f"{where} has a part of type {kind!r}: keel reads text alone, no pictures or sound")
    return "".join(text_value(where, part["text"]) for part in value)


def _check_keys(where: str, turn: Mapping[str, Any]) -> None:
    """What is known of a turn's other keys must have the right type; the rest reaches the template as it
    is."""
    for key in ("reasoning_content", "thinking", "reasoning", "name", "tool_call_id"):
        value = turn.get(key)
        if value is not None and not isinstance(value, str):
            raise Invalid(f'{where}: "{key}" is {shown(value)}, not text')
        check_unicode(f'{where}: "{key}"', value or "")
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (not isinstance(weight, Real) or weight not in (0, 1)):
        raise Invalid(f'{where}: "weight" is {shown(weight)}; a turn is in the loss (1) or not (0)')
    if train is not None and not isinstance(train, bool):
        raise Invalid(f'{where}: "train" is {shown(train)}, not true or false')
    calls = turn.get("tool_calls")
    if calls is not None and not (is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise Invalid(f'{where}: "tool_calls" is {shown(calls)}, not a list of calls')
    if calls and turn.get("role") != "assistant":
        raise Invalid(f'{where}: only the assistant has "tool_calls"')


def with_settings(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `tools` and `chat_template_kwargs` on the first turn of its conversations, where the
    template finds them. A plain prompt has no template, and keeps them as columns."""
    for name in PICTURES:
        if row.get(name):
            raise Invalid(f'"{name}": keel reads text alone, no pictures or sound')
    settings = {name: row[name] for name in SETTINGS if row.get(name)}
    names = ("messages", "prompt", "completion", "chosen", "rejected")
    opened = {name: row[name] for name in names if settings and is_list(row.get(name)) and row[name]}
    opened = {
        name: turns
        for name, turns in opened.items()
        if isinstance(turns[0], Mapping) and turns[0].get("role") != "assistant"
    }
    if not opened:
        return row
    if isinstance(settings.get("tools"), str):
        settings["tools"] = parse_json("tools", settings["tools"])
    if not isinstance(settings.get("chat_template_kwargs", {}), Mapping):
        raise Invalid(f'"chat_template_kwargs" is {shown(settings["chat_template_kwargs"])}, not an object')
    if not is_list(settings.get("tools", [])):
        raise Invalid(f'"tools" is {shown(settings["tools"])}, not a list')
    placed = {name: [{**turns[0], **settings}, *turns[1:]] for name, turns in opened.items()}
    return {key: value for key, value in row.items() if key not in SETTINGS} | placed


def _check_order(name: str, turns: Sequence[Message]) -> None:
    for index, turn in enumerate(turns):
        before = turns[index - 1]["role"] if index else ""
        if turn["role"] == "system" and index:
            raise Invalid(f'"{name}" turn {index + 1}: a system turn may only come first')
        # Completions begin with the assistant's turn; everything else begins with the user's.
        if turn["role"] == "assistant" and before == "assistant":
            raise Invalid(f'"{name}" turns {index} and {index + 1} are both the assistant\'s')
        if turn["role"] == "assistant" and (
            before in ("system", "developer") or (not index and name in ("messages", "prompt"))
        ):
            raise Invalid(f'"{name}" turn {index + 1}: the assistant speaks before any user')
