"""Calls of tools, as a chat template writes them: what a prompt with tools is, which calls a reply makes, and
what stands between a reply that calls and the next one.

How a template writes a call is found by having it write one. Where that is JSON between marks, as most do,
the marks are read off; else a known form, or the tokenizer's own `response_template` (transformers), has to
read the same call back. A template whose calls nothing reads is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

from transformers import PreTrainedTokenizerBase

from keel.data.chat.encoding import continuation, encode_text
from keel.data.chat.placeholders import Text
from keel.data.chat.reply import end_pattern, reply_end
from keel.data.chat.special import eos_ids, special_pattern, string_of
from keel.data.chat.template import Transcript, template_facts
from keel.errors import UsageError
from keel.types import Conversation, Message

REMEMBERED = 4096  # answers of tools whose tokens are kept
_ASKED, _ANSWERED = "keelaskedwhat", "keelansweredthis"  # words of a conversation that is only rendered
_ID = "call00001"  # of a call, where a template wants one (Mistral's must have nine characters)
_NAME = re.compile(r"[\w.-]{1,64}")  # of a tool, which a model may have made up
_THOUGHT = re.compile(
    r"^\s*(?:<think>|<thought>|\[THINK\])?(.*?)(?:</think>|</thought>|\[/THINK\])\s*", re.DOTALL
)

# Forms of calls that are no JSON as a whole, as transformers' response templates.
_XML: tuple[dict[str, Any], ...] = (
    {  # Qwen 3.5 and later, Nemotron 3
        "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
        "close_pattern": r"</tool_call>\s*",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
            "value_parser": {"name": "text"},
        },
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    },
    {  # GLM 4.5 and later
        "open_pattern": r"<tool_call>(?P<name>[^\s<]+)\n?",
        "close_pattern": r"</tool_call>\s*",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            "value_parser": {"name": "text"},
        },
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    },
)


class Call(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


class Said(NamedTuple):
    """What a model's turn says."""

    content: str
    calls: tuple[Call, ...] = ()
    problem: str = ""  # why what looks like a call is none; there are no calls then
    thought: str = ""

    def message(self) -> Message:
        """As a turn of a conversation."""
        turn: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thought:
            turn["reasoning_content"] = self.thought
        if self.calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return cast(Message, turn)


class Reader(Protocol):
    """What finds the calls in a turn."""

    def read(self, text: str, prompt: Callable[[], str]) -> Said:
        """text: the turn, special tokens and all, without the token that ends it. prompt: what stood before
        it."""
        ...


# ---------------------------------------------------------------- readers


@dataclass(frozen=True, slots=True)
class JsonReader:
    """Calls as JSON objects, or lists of them, between marks."""

    opening: str  # what stands before it; "" where a turn that is JSON is a call
    closing: str
    name: tuple[str, ...]  # where in an object the name stands
    arguments: tuple[str, ...]

    def read(self, text: str, prompt: Callable[[], str]) -> Said:
        """As of `Reader`."""
        thought, text = _thought(text)
        start = text.find(self.opening) if self.opening else 0 if text.lstrip()[:1] in ("{", "[") else -1
        if start < 0:
            return Said(text.strip(), thought=thought)
        parts, at, calls = [text[:start]], start, list[Call]()
        try:
            while at >= 0:
                value, at = _decoded(text, at + len(self.opening))
                calls += [self._call(one) for one in (value if isinstance(value, list) else [value])]
                rest = text[at:].lstrip()
                at = len(text) - len(rest)
                if self.closing and not rest.startswith(self.closing):
                    raise ValueError(f"the call does not end with {self.closing}")
                done = at + len(self.closing)
                if self.opening:
                    at = text.find(self.opening, done)
                else:  # Llama's: one after the other
                    at = done if text[done:].lstrip()[:1] == "{" else -1
                parts.append(text[done:] if at < 0 else text[done:at])
        except (ValueError, RecursionError) as error:
            if not self.opening and not calls:  # JSON that is no call is a reply
                return Said(text.strip(), thought=thought)
            return Said(text.strip(), problem=f"the call cannot be read: {error}", thought=thought)
        content = "\n".join(filter(None, map(str.strip, parts)))
        return Said(content, tuple(calls), thought=thought)

    def _call(self, value: object) -> Call:
        name, arguments = _at(value, self.name), _at(value, self.arguments)
        if not isinstance(name, str):
            raise ValueError(f"it has no {json.dumps(self.name[-1])}")
        return Call(_plain(name), _arguments(arguments, self.arguments[-1]))


@dataclass(frozen=True)
class TemplateReader:
    """Calls by a response template of transformers, the tokenizer's own or one of a known form."""

    tokenizer: PreTrainedTokenizerBase
    template: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    own: bool  # it is the tokenizer's, which may ask what stood before

    def read(self, text: str, prompt: Callable[[], str]) -> Said:
        """As of `Reader`."""
        prefix = prompt() if self.own else ""
        try:
            parsed = cast(Any, self.tokenizer).parse_response(
                text, schema=dict(self.template), prefix=prefix, tools=[dict(tool) for tool in self.tools]
            )
            calls = tuple(_call_of(call) for call in parsed.get("tool_calls") or ())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return Said(text.strip(), problem=f"the call cannot be read: {error}")
        content = str(parsed.get("content") or "")
        for end in (string_of(self.tokenizer, i) for i in eos_ids(self.tokenizer)):
            content = content.removesuffix(end) if end else content
        thought = str(parsed.get("reasoning_content") or parsed.get("thinking") or "")
        if not calls and self._opens(text):
            return Said(content.strip(), problem="the call cannot be read: it has no end", thought=thought)
        return Said(content.strip(), calls, thought=thought)

    def _opens(self, text: str) -> bool:
        """Whether a call begins in the text."""
        settings = self.template.get("fields", {}).get("tool_calls", {})
        opened = settings.get("open")
        marks = [opened] if isinstance(opened, str) else list(opened or ())
        if pattern := settings.get("open_pattern"):
            return re.search(pattern, text) is not None
        return any(mark in text for mark in marks)


def _call_of(value: Mapping[str, Any]) -> Call:
    """A call as TRL checks it: a name that is text, and arguments, which may be left out."""
    function = value.get("function", value)
    if not isinstance(name := function.get("name"), str):
        raise ValueError('it has no "name"')
    return Call(_plain(name), _arguments(function.get("arguments"), "arguments"))


def _arguments(value: object, key: str) -> dict[str, Any]:
    """Arguments by name: an object, JSON of one, or nothing at all."""
    value = _decoded(value, 0)[0] if isinstance(value, str) and value else value or {}
    if not isinstance(value, dict):
        raise ValueError(f"its {json.dumps(key)} are no object")
    return _plain(value)


def _plain(value: Any) -> Any:
    """A value that can be written as JSON in UTF-8: half characters become question marks. ValueError for
    numbers that are none."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _thought(text: str) -> tuple[str, str]:
    """What is thought before a reply, and the reply."""
    match = _THOUGHT.match(text)
    return (match[1].strip(), text[match.end() :]) if match else ("", text)


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The JSON value behind `at`, and where it ends. ValueError for none."""
    at = len(text) - len(text[at:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos - at}") from None


def _at(value: object, path: Sequence[str]) -> Any:
    for key in path:
        value = cast(Any, value).get(key) if isinstance(value, Mapping) else None
    return value


# ---------------------------------------------------------------- a template with tools


@dataclass
class ToolTemplate:
    """A tokenizer's chat template with the tools of some episodes."""

    tokenizer: PreTrainedTokenizerBase
    tools: tuple[Mapping[str, Any], ...]  # their JSON schemas
    reader: Reader
    _answers: dict[tuple[tuple[str, str], ...], tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]) -> ToolTemplate:
        """UsageError where the template shows no tools, calls or answers, or writes calls that nothing
        reads."""
        made = cls(tokenizer, tuple(tools), _reader(tokenizer, tools))
        answered = made.answer_ids([("keel", _ANSWERED)])
        if _ANSWERED not in str(tokenizer.decode(list(answered))):
            raise UsageError(
                "the chat template does not show what tools answer; give another `chat_template`"
            )
        return made

    def with_tools(self, prompt: Conversation) -> Conversation:
        """A prompt whose template is told of the tools."""
        return (cast(Message, {**prompt[0], "tools": list(self.tools)}), *prompt[1:])

    def said(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Said:
        """What a turn of the model says. prompt_ids: all tokens before it."""
        ends = {*eos_ids(self.tokenizer), reply_end(self.tokenizer)}
        own = list(ids[:-1]) if ids and ids[-1] in ends else list(ids)
        return self.reader.read(self._text(own), lambda: self._text(list(prompt_ids)))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def answer_ids(self, answers: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """The tokens that stand between a turn of the model, its end included, and its next one, where tools
        have answered: (name, text) of each. What an answer says is text: a special token in it is the
        characters that it is made of.

        UsageError where the template writes a call otherwise once they are there: what a model was asked with
        could not be told.
        """
        known = (name if _NAME.fullmatch(name) else "unknown" for name, _ in answers)
        key = tuple((name, _plain(text)) for name, (_, text) in zip(known, answers, strict=True))
        if key not in self._answers:
            if len(self._answers) >= REMEMBERED:
                self._answers.clear()
            self._answers[key] = tuple(self._answer_ids(key))
        return self._answers[key]

    def _answer_ids(self, answers: Sequence[tuple[str, str]]) -> list[int]:
        called = [{"name": name, "arguments": {}} for name, _ in answers]
        calls = [
            {"type": "function", "id": f"call{number:05d}", "function": call}
            for number, call in enumerate(called, 1)
        ]
        turns: list[Any] = [*_calling(self.tools, calls)]
        turns += [
            {"role": "tool", "name": name, "tool_call_id": call["id"], "content": content}
            for call, (name, content) in zip(calls, answers, strict=True)
        ]
        transcript = Transcript(self.tokenizer, tuple(turns))
        before = transcript.render(2)
        ends = list(end_pattern(transcript).finditer(before, _asked(transcript)))
        cut = ends[-1].end() if ends else len(before)
        after = transcript.render(len(turns), generation=True)
        if after[:cut] != before[:cut]:
            raise UsageError(
                "the chat template writes a call otherwise once a tool has answered, so that what a model "
                "was asked with could not be told; give another `chat_template`"
            )
        behind = _behind(transcript.text(after), cut)
        if not ends:  # the header of what comes next ends a turn, and the model has written it
            header = special_pattern(self.tokenizer).match(behind.string.lstrip())
            known = {string_of(self.tokenizer, i) for i in eos_ids(self.tokenizer)} | {transcript.facts.end}
            if header is not None and header[0] in known:
                behind = _behind(behind, behind.string.index(header[0]) + len(header[0]))
        return self._encoded(behind, before[ends[-1].start() : cut] if ends else "")

    def _encoded(self, text: Text, end: str) -> list[int]:
        """Tokens of a text that stands behind the end of a turn."""
        if end:
            alone, whole = (encode_text(self.tokenizer, Text(end) + more) for more in (Text(""), text))
            if whole[: len(alone)] == alone:
                return whole[len(alone) :]
        return continuation(self.tokenizer, text)


def _behind(text: Text, start: int) -> Text:
    """The part of a text from `start` on."""
    spans = ((a - start, b - start) for a, b in text.inert if a >= start)
    return Text(text.string[start:], tuple(spans))


def _calling(tools: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]]) -> Conversation:
    """A conversation in which the model calls."""
    turns = (
        {"role": "user", "content": _ASKED, "tools": list(tools)},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
    )
    return cast(Conversation, turns)


# ---------------------------------------------------------------- how a template writes a call


def _reader(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]) -> Reader:
    """What reads the calls that the template writes: the first that reads one of each tool back."""
    template_facts(tokenizer)
    some = sorted(map(_some_call, tools), key=lambda call: not call.arguments)  # first one with arguments
    written = [(call, *_written(tokenizer, tools, call)) for call in some]
    readers: list[Reader] = []
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        readers.append(TemplateReader(tokenizer, own, tools, own=True))
    if (found := _json_reader(written[0][2], written[0][0])) is not None:
        readers.append(found)
    rest: dict[str, Any] = {"content": {"content": "text"}}
    base = {"defaults": {"role": "assistant"}, "start_anchor": "\n"}  # which is looked for in no prompt
    readers += [
        TemplateReader(
            tokenizer,
            {**base, "fields": {"tool_calls": form, **rest}},
            tools,
            own=False,
        )
        for form in _XML
    ]

    def reads(reader: Reader) -> bool:
        return all(reader.read(text, partial(str, asked)).calls == (call,) for call, asked, text in written)

    chosen = next((reader for reader in readers if reads(reader)), None)
    if chosen is None:
        raise UsageError(
            f"the chat template writes a call as {written[0][2][:120]!r}, which keel cannot read back; give "
            "the tokenizer a `response_template` (transformers), or another `chat_template`"
        )
    return chosen


def _written(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]], call: Call
) -> tuple[str, str]:
    """What stands before a call, and the call as the template writes it, up to the end of the turn."""
    function = {"name": call.name, "arguments": call.arguments}
    turns = _calling(tools, [{"type": "function", "id": _ID, "function": function}])
    transcript = Transcript(tokenizer, turns)
    whole, start = transcript.render(2), _asked(transcript)
    ends = list(end_pattern(transcript).finditer(whole, start))
    return whole[:start], whole[start : ends[-1].start() if ends else len(whole)]


def _asked(transcript: Transcript) -> int:
    """Where in a rendered conversation of two turns the second begins. UsageError where that cannot be
    told."""
    whole = transcript.render(2)
    for generation in (True, False):  # without: as an open thought, which the rendered turn has closed
        if whole.startswith(asked := transcript.render(1, generation=generation)):
            return len(asked)
    raise UsageError(
        "the chat template writes what came before otherwise once a reply calls a tool; give another "
        "`chat_template`"
    )


def _some_call(tool: Mapping[str, Any]) -> Call:
    """A call of a tool, by its schema."""
    function = tool.get("function", tool)
    properties = cast(Any, function).get("parameters", {}).get("properties", {})
    return Call(str(function["name"]), {name: _value(schema) for name, schema in properties.items()})


def _value(schema: Mapping[str, Any]) -> Any:
    if choices := schema.get("enum"):
        return choices[0]
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) else kind
    return {
        "integer": 7, "number": 2.5, "boolean": True, "array": [], "object": {}, "null": None,
    }.get(kind, "keel word")  # fmt: skip


def _json_reader(text: str, call: Call) -> JsonReader | None:
    """The marks around a call that is written as JSON; None where it is not."""
    for at, letter in enumerate(text):
        if letter not in "{[":
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            continue
        inner = value[0] if isinstance(value, list) and value else value
        name, arguments = _path(inner, call.name), _path(inner, call.arguments)
        if name and arguments:
            opening, closing = text[:at].split(), text[end:].split()
            return JsonReader(opening[-1] if opening else "", closing[0] if closing else "", name, arguments)
    return None


def _path(value: object, wanted: object) -> tuple[str, ...]:
    """Where in nested objects a value stands, or JSON of it; () for nowhere."""
    if not isinstance(value, Mapping):
        return ()
    for key, one in cast("Mapping[str, Any]", value).items():
        if one == wanted or (not isinstance(wanted, str) and one == json.dumps(wanted, ensure_ascii=False)):
            return (key,)
        if inner := _path(one, wanted):
            return (key, *inner)
    return ()
