"""Data sets of conversations and instructions: other names for keel's turns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from keel.data.formats.base import (
    Format,
    Made,
    Row,
    Turns,
    answered,
    asked,
    has_mapping,
    list_of,
    one,
    pair,
    rest,
    text_of,
    value_of,
)
from keel.data.values import is_list, shown

_SHAREGPT = {
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def _sharegpt(row: Row) -> Iterable[Made]:
    """from, value of each turn (or role, content, with these speakers); function_call holds a call as
    JSON."""
    yield {**rest(row, "conversations", "system"), "messages": _sharegpt_turns(row)}


def _sharegpt_preference(row: Row) -> Iterable[Made]:
    """chosen is the better reply to the conversation."""
    first, second = ([_sharegpt_turn(row[name])] for name in ("chosen", "rejected"))
    yield pair(_sharegpt_turns(row), first, second, 1, columns=rest(row, "conversations", "system"))


def _sharegpt_turns(row: Row) -> Turns:
    turns = [_sharegpt_turn(turn) for turn in list_of(row, "conversations")]
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return turns


def _sharegpt_turn(turn: Any) -> dict[str, Any]:
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    speaker, said = value_of(turn, who), text_of(turn, what)
    more = {key: value for key, value in turn.items() if key not in (who, what)}
    if speaker == "function_call":
        return {**more, "role": "assistant", "content": "", "tool_calls": [_call(said)]}
    if speaker not in _SHAREGPT:
        raise ValueError(
            f'a turn is of "{who}" {shown(speaker)}, not one of {", ".join([*_SHAREGPT, "function_call"])}'
        )
    return {**more, "role": _SHAREGPT[speaker], "content": said}


def _call(text: str) -> dict[str, Any]:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or "name" not in call:
        raise ValueError(f'a function_call is {shown(text)}, not JSON with "name" and "arguments"')
    return {"type": "function", "function": dict(call)}


def _alpaca(row: Row) -> Iterable[Made]:
    """instruction and, below it, input are the user's turn; output is the reply."""
    below = text_of(row, "input") if row.get("input") is not None else None
    prompt = asked(text_of(row, "instruction"), below)
    if isinstance(row.get("system"), str) and row["system"].strip():
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    history = [turn for said, reply in row.get("history") or () for turn in (*asked(said), *answered(reply))]
    at = len(prompt) - 1
    prompt = [*prompt[:at], *history, *prompt[at:]]
    columns = rest(row, "instruction", "input", "output", "system", "history")
    yield {**columns, "prompt": prompt, "completion": answered(text_of(row, "output"))}


def _openai(row: Row) -> Iterable[Made]:
    """messages with tools, calls' arguments as JSON in text; or input with preferred_output and
    non_preferred_output, the first preferred."""
    if "preferred_output" in row:
        asks = value_of(row, "input")
        settings = {"tools": asks["tools"]} if asks.get("tools") else {}
        prompt = [_openai_turn(turn) for turn in list_of(asks, "messages")]
        first, second = (
            [_openai_turn(turn) for turn in list_of(row, name)]
            for name in ("preferred_output", "non_preferred_output")
        )
        columns = {**rest(row, "input", "preferred_output", "non_preferred_output"), **settings}
        yield pair(prompt, first, second, 1, columns=columns)
        return
    tools = row.get("tools") or [{"type": "function", "function": f} for f in row.get("functions") or ()]
    columns = rest(row, "messages", "tools", "functions", "parallel_tool_calls", "function_call")
    messages = [_openai_turn(turn) for turn in list_of(row, "messages")]
    yield {**columns, **({"tools": tools} if tools else {}), "messages": messages}


def _openai_turn(turn: Any) -> dict[str, Any]:
    """A turn with its calls' arguments as objects: templates write them as JSON, and text twice over."""
    made = dict(turn)
    called = made.pop("function_call", None)
    if called:
        made["tool_calls"] = [{"type": "function", "function": called}]
    if made.get("role") == "function":
        made["role"] = "tool"
    if made.get("tool_calls"):
        made["tool_calls"] = [_parsed(call) for call in made["tool_calls"]]
        if made.get("content") is None:
            made["content"] = ""
    return made


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise ValueError(f"the arguments of a call are {shown(function['arguments'])}, not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _has_tools(row: Row) -> bool:
    return is_list(row["messages"]) and any(
        name in row for name in ("tools", "functions", "parallel_tool_calls")
    )


CHATS = (
    Format(
        "sharegpt_preference",
        "ShareGPT preference",
        "preference",
        ("conversations", "chosen", "rejected"),
        one(_sharegpt_preference),
        lambda row: has_mapping(row, "conversations", "from", "value") and isinstance(row["chosen"], Mapping),
    ),
    Format(
        "sharegpt",
        "ShareGPT",
        "text",
        ("conversations",),
        one(_sharegpt),
        lambda row: has_mapping(row, "conversations", "from", "value"),
    ),
    Format("alpaca", "Alpaca", "demonstration", ("instruction", "output"), one(_alpaca)),
    Format("openai", "OpenAI messages", "text", ("messages",), one(_openai), _has_tools),
    Format(
        "openai_preference",
        "OpenAI preference",
        "preference",
        ("input", "preferred_output", "non_preferred_output"),
        one(_openai),
    ),
)
