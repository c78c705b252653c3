"""Conversations through a tokenizer's chat template, and what the template itself says about turns.

A template is asked with a short conversation of known words, once: which token ends a reply, what it writes
to have one begin, whether that opens a thought, whether contents are lists of parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from keel.data.chat.placeholders import Placeholders, Text, mapped, placeholders, texts_of
from keel.data.chat.rendering import apply, apply_marked, today
from keel.data.chat.special import (
    eos_ids,
    named_specials,
    pattern_of,
    special_pattern,
    special_strings,
    string_of,
    token_string,
    without_final_eos,
)
from keel.data.values import json_value
from keel.errors import UsageError
from keel.types import Conversation, Message

DEFAULT_CHAT_TEMPLATE = (  # ends with EOS, so that whoever renders a conversation scores what keel scores
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn that hold its thought
_SETTINGS = ("weight", "train", "tools", "chat_template_kwargs")  # keys of a turn that are no part of it
_OPEN_THOUGHT = re.compile(
    r"(<[\w:.-]*(?:think|thought|reasoning)[\w:.-]*>|\[THINK\]|<\|START_THINKING\|>)(\s*)$", re.IGNORECASE
)
_THOUGHT = re.compile(r"think|thought|reasoning", re.IGNORECASE)
_ASKS, _SAYS, _ASKS_MORE, _THINKS = (
    "keelaskedone",
    "keelsaidtwo",
    "keelaskedthree",
    "keelthoughtfour",
)  # words of the probe
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_facts: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, dict[str, TemplateFacts]]] = (
    WeakKeyDictionary()
)
_SOME_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "keeltool", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a chat template does with turns, found by rendering a conversation of known words."""

    source: str  # the template itself
    refuses: str  # what it says of the probe; "" where it renders it
    end: str  # the special token that ends a reply: a rollout has to emit it; "" where the template has none
    writes_end: bool  # False: it stands nowhere behind a last reply (the next turn's header is the end)
    generation: str  # what it writes to have a reply begin
    standing: str  # what it writes behind a last question in any case
    structure: frozenset[str]  # special tokens around turns
    tags: frozenset[
        str
    ]  # special tokens within a reply (`<think>`), which stay special where a reply's text has them
    written: re.Pattern[str] = field(
        repr=False
    )  # every other special token: in a reply's text it is characters
    as_parts: bool  # contents must be lists of {"type": "text"} parts
    marks: bool  # it marks what the assistant said, by {% generation %}
    writes_bos: bool
    shows_replies: bool  # False: what the assistant says is left out
    thought_close: str  # what it writes between a thought and the reply to it; "" where it shows no thought

    @property
    def opens(self) -> str:
        """The tag of a thought that the generation prompt leaves open, as "<think>"; "" where it opens
        none."""
        match = _OPEN_THOUGHT.search(self.generation)
        return match[1] if match else ""


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, given DEFAULT_CHAT_TEMPLATE if it has no template of its own."""
    if not tokenizer.chat_template:
        eos_ids(tokenizer)
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def template_facts(
    tokenizer: PreTrainedTokenizerBase, more: Mapping[str, Any] | None = None
) -> TemplateFacts:
    """What the tokenizer's template does. Found once a template, vocabulary and settings; UsageError without
    one.

    more: `tools` and `chat_template_kwargs` of a conversation, which may change what the template writes.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "the data are conversations, but the tokenizer has no chat template: set `chat_template`"
        )
    state = (str(tokenizer.chat_template), len(tokenizer), eos_ids(tokenizer), today())
    known = _facts.get(tokenizer)
    if known is None or known[0] != state:
        known = _facts[tokenizer] = (state, {})
    settings = json.dumps(more, sort_keys=True, default=str) if more else ""
    if settings not in known[1]:
        known[1][settings] = _probe(tokenizer, more or {})
    return known[1][settings]


def opened_tag(prompt: str) -> str:
    """The tag of a thought that a rendered prompt leaves open at its end, as "<think>"; "" where none is."""
    match = _OPEN_THOUGHT.search(prompt)
    return match[1] if match else ""


def closing_tag(tag: str) -> str:
    """`<think>` → `</think>`, `[THINK]` → `[/THINK]`, `<|START_THINKING|>` → `<|END_THINKING|>`."""
    return tag.replace("START_", "END_") if tag.startswith("<|") else f"{tag[0]}/{tag[1:]}"


class Transcript:
    """A conversation as a template renders it, turn by turn. Special tokens that people wrote are taken out
    before, and are characters in the `text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> None:
        self.tokenizer, self.facts = tokenizer, template_facts(tokenizer, _settings(turns))
        ends = (self.facts.end,) if self.facts.end else ()
        self.turns = tuple(_trimmed(tokenizer, turn, ends) for turn in turns)
        people, reply = special_pattern(tokenizer), self.facts.written
        texts = [text for turn in self.turns for text in texts_of(turn)]
        tags = [
            match[0]
            for turn in self.turns
            for text in texts_of(turn)
            for match in (reply if turn["role"] == "assistant" else people).finditer(text)
        ]
        self.words = placeholders(tags, "\n".join([self.facts.source, *texts]) if tags else "")
        self.copies = [
            tuple(_covered(turn, words, people, reply) for turn in self.turns) for words in self.words
        ]
        self._rendered: dict[tuple[int, bool], str] = {}

    def render(self, count: int, *, generation: bool = False) -> str:
        """The first `count` turns as the template renders them, with words in the place of written tags.

        UsageError where the template refuses them, leaves out a system turn, tools or calls, or takes the
        words apart.
        """
        if (count, generation) not in self._rendered:
            self._rendered[count, generation] = self._render(count, generation)
        return self._rendered[count, generation]

    def _render(self, count: int, generation: bool) -> str:
        first, *others = (
            render(self.tokenizer, turns[:count], generation=generation, facts=self.facts)
            for turns in self.copies
        )
        if any(
            words.back(text) != self.words[0].back(first)
            for words, text in zip(self.words[1:], others, strict=True)
        ):
            tags = ", ".join(sorted(set(self.words[0].tags.values())))
            raise UsageError(
                f"the chat template changes the special tokens that a turn's text holds ({tags})"
            )
        return first

    def marked(self, count: int) -> list[tuple[int, int]]:
        """Spans of the rendered `count` turns that the template marks as generated."""
        messages, more = _request(self.copies[0][:count], self.facts)
        return apply_marked(self.tokenizer, messages, more)

    def text(self, rendered: str) -> Text:
        """Rendered text with the written tags in their places again."""
        return self.words[0].back(rendered)

    def shows_thought(self, index: int) -> bool:
        """Whether the template renders turn `index` otherwise for its thought."""
        turns = self.copies[0][: index + 1]
        without = {key: value for key, value in turns[index].items() if key not in THOUGHTS}
        plain = (*turns[:index], cast(Message, without))
        return render(self.tokenizer, plain, facts=self.facts, checked=False) != self.render(index + 1)

    def probe_reply(self, index: int, word: str) -> str:
        """As `render(index + 1)`, with another text in the place of the last turn's content and thought."""
        turn = mapped(dict(self.copies[0][index]), lambda _: word)
        turns = (*self.copies[0][:index], cast(Message, turn))
        return render(self.tokenizer, turns, facts=self.facts, checked=False)


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Conversation,
    *,
    generation: bool = False,
    facts: TemplateFacts | None = None,
    checked: bool = True,
) -> str:
    """What the template makes of the turns; with the generation prompt if asked.

    UsageError where the template refuses them. checked: and where it leaves out a system turn, tools or
    calls.
    """
    facts = facts or template_facts(tokenizer, _settings(turns))
    messages, more = _request(turns, facts)
    try:
        text = _apply(tokenizer, messages, generation, more)
    except UsageError:
        if not any(turn.get("tool_calls") for turn in turns):
            raise
        text = _apply(tokenizer, mapped_arguments(messages, _as_string), generation, more)
    else:
        if any(_repr_shows(turn, text) for turn in messages):  # it expects the arguments as a JSON string
            text = _apply(tokenizer, mapped_arguments(messages, _as_string), generation, more)
    if checked:
        _check_shown(turns, more, text)
    return text


# ---------------------------------------------------------------- inside


def _request(turns: Conversation, facts: TemplateFacts) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and further arguments as templates take them."""
    return [_message(turn, facts.as_parts) for turn in turns], _settings(turns)


def _settings(turns: Conversation) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs`, which ride on a turn, as arguments of the template."""
    more: dict[str, Any] = {}
    for turn in turns:
        more |= turn.get("chat_template_kwargs") or {}
        if tools := turn.get("tools"):
            more["tools"] = tools
    return more


def _message(turn: Message, as_parts: bool) -> dict[str, Any]:
    message: dict[str, Any] = {key: value for key, value in turn.items() if key not in _SETTINGS}
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(part["text"] for part in content)
    message["content"] = [{"type": "text", "text": content}] if as_parts else content
    if thought := thought_of(turn):
        message |= dict.fromkeys(THOUGHTS, thought)
    return message if not turn.get("tool_calls") else mapped_arguments([message], _as_mapping)[0]


def thought_of(turn: Message) -> str:
    """What a turn's thought is, under whichever key it stands; "" for none."""
    values = (cast(Any, turn.get(key)) for key in THOUGHTS)
    return next((value for value in values if isinstance(value, str) and value), "")


def mapped_arguments(messages: Sequence[Mapping[str, Any]], change: Callable[[Any], Any]) -> list[Any]:
    """The messages with the arguments of their tool calls changed."""

    def call(value: Mapping[str, Any]) -> dict[str, Any]:
        inner = value.get("function", value)
        inner = {**inner, "arguments": change(inner["arguments"])} if "arguments" in inner else inner
        return {**value, "function": inner} if "function" in value else dict(inner)

    return [
        {**message, "tool_calls": [call(one) for one in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json_value(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_string(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _repr_shows(message: Mapping[str, Any], text: str) -> bool:
    """Whether a call's arguments stand in the text as Python would show them, which no model has seen."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    values = [call.get("arguments") for call in calls]
    return any(isinstance(v, Mapping) and v and str(v) in text and str(v) != _as_string(v) for v in values)


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Any, generation: bool, more: Mapping[str, Any]
) -> str:
    return token_string(apply(tokenizer, messages, generation, more))


def _check_shown(turns: Conversation, more: Mapping[str, Any], text: str) -> None:
    """UsageError for what the template leaves out: silently, a model would be trained without it."""
    for turn in turns:
        if turn["role"] in ("system", "developer") and turn["content"].strip() not in text:
            raise UsageError(
                f"the chat template leaves out the {turn['role']} message (of the data, or set as `system`); "
                "give another `chat_template`, or do without the message"
            )
        calls = [call.get("function", call) for call in turn.get("tool_calls") or ()]
        if any(str(call.get("name", "")) not in text for call in calls):
            raise UsageError('the chat template shows no "tool_calls"; give another `chat_template`')
    tools = [tool.get("function", tool) for tool in more.get("tools") or ()]
    if any(str(tool.get("name", "")) not in text for tool in tools):
        raise UsageError('the chat template shows no "tools"; give another `chat_template`')


def _trimmed(tokenizer: PreTrainedTokenizerBase, turn: Message, ends: Sequence[str]) -> Message:
    """A reply without the end of turn that data sets write behind some."""
    content = cast(Any, turn["content"])
    if turn["role"] != "assistant" or not isinstance(content, str):
        return turn
    return cast(Message, {**turn, "content": without_final_eos(tokenizer, content, ends)})


def _covered(turn: Message, words: Placeholders, people: re.Pattern[str], reply: re.Pattern[str]) -> Message:
    if not words.tags:
        return turn
    pattern = reply if turn["role"] == "assistant" else people
    return cast(Message, mapped(turn, lambda text: words.put(text, pattern)))


class _Trial:
    """A template, asked with conversations of known words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: Mapping[str, Any]) -> None:
        """more: `tools` and what else it is given."""
        self.tokenizer, self.settings = tokenizer, dict(more)
        self.refuses = ""  # the first error
        self.as_parts = False  # contents are lists of parts
        self.alone = self._ask_alone()  # what it makes of one question

    def ask(self, *contents: str, generation: bool = False, thought: str = "", call: bool = False) -> str:
        """What it makes of a question, a reply, and so on; "" where it refuses. thought, call: of the last
        turn."""
        turns: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.as_parts else text}
            for role, text in zip(("user", "assistant") * 2, contents)
        ]
        if thought:
            turns[-1] |= dict.fromkeys(THOUGHTS, thought)
        if call:
            function = {"name": _SOME_TOOL["function"]["name"], "arguments": {}}
            turns[-1]["tool_calls"] = [{"type": "function", "id": "call00001", "function": function}]
        try:
            return _apply(self.tokenizer, turns, generation, self.settings)
        except UsageError as error:
            self.refuses = self.refuses or str(error)
            return ""

    def ask_call(self) -> str:
        """What it makes of a reply that calls a tool. Many templates know no tools: that is told where data
        have some."""
        self.settings |= {} if "tools" in self.settings else {"tools": [_SOME_TOOL]}
        refused = self.refuses
        calling = self.ask(_ASKS, "", call=True)
        self.refuses = refused
        return calling

    def _ask_alone(self) -> str:
        """One question, as text, else as parts, else with a tool, which some are written for. UsageError
        where nothing of it is shown."""
        alone = self.ask(_ASKS)
        if _ASKS not in alone:
            self.as_parts = True
            alone = self.ask(_ASKS)
            alone = "" if "'type'" in alone else alone  # a list as Python shows it is no content
        if _ASKS not in alone and "tools" not in self.settings:
            self.as_parts, self.settings["tools"] = False, [_SOME_TOOL]
            alone = self.ask(_ASKS)
        elif self.as_parts and _ASKS in alone:
            self.refuses = ""
        if not self.refuses and _ASKS not in alone:
            raise UsageError("the chat template shows nothing of what a turn says")
        return alone


def _probe(tokenizer: PreTrainedTokenizerBase, more: Mapping[str, Any]) -> TemplateFacts:
    source, trial = cast(str, tokenizer.get_chat_template(tools=more.get("tools"))), _Trial(tokenizer, more)
    alone = trial.alone
    opened = trial.ask(_ASKS, generation=True)
    generation = opened.removeprefix(alone) if opened.startswith(alone) else ""
    generation = generation or opened.partition(_ASKS)[2]  # some write it whether asked to or not
    answered = trial.ask(_ASKS, _SAYS)
    last = answered.partition(_SAYS)[2]
    middle = trial.ask(_ASKS, _SAYS, _ASKS_MORE).partition(_SAYS)[2].partition(_ASKS_MORE)[0]
    end, writes_end = _end_of(tokenizer, alone.partition(_ASKS)[0], last, middle)
    thinking = trial.ask(_ASKS, _SAYS, thought=_THINKS).partition(_ASKS)[2]
    calling = trial.ask_call().partition(_ASKS)[2]
    special = special_pattern(tokenizer)
    headers = {match[0] for match in special.finditer(alone)}
    headers |= {m[0] for m in special.finditer(generation) if not _THOUGHT.search(m[0])}
    structure = frozenset(headers) | named_specials(tokenizer) | ({end} - {""})
    inside = {match[0] for text in (thinking, calling) for match in special.finditer(text)}
    bos = token_string(tokenizer.bos_token)
    strings = special_strings(tokenizer)
    tags = frozenset((inside | _paired(strings)) - structure)
    return TemplateFacts(
        source=source,
        refuses=trial.refuses,
        end=end,
        writes_end=writes_end,
        generation=generation,
        standing=alone.partition(_ASKS)[2],
        structure=structure,
        tags=tags,
        written=pattern_of(strings - tags),
        as_parts=trial.as_parts,
        marks=_GENERATION.search(source) is not None,
        writes_bos=bool(bos) and opened.startswith(bos),
        shows_replies=not answered or _SAYS in answered,
        thought_close=thinking.partition(_SAYS)[0].partition(_THINKS)[2],
    )


def _paired(strings: frozenset[str]) -> set[str]:
    """Those that open and close something: `<think>` and `</think>`, `[THINK]` and `[/THINK]`."""
    opening = {text for text in strings if f"{text[0]}/{text[1:]}" in strings}
    return opening | {f"{text[0]}/{text[1:]}" for text in opening}


def _end_of(tokenizer: PreTrainedTokenizerBase, header: str, last: str, middle: str) -> tuple[str, bool]:
    """The special token that ends a reply, and whether the template writes it behind a last one.

    header: what is written before a question. last: what is written behind the last reply. middle: what is
    written between a reply and the next question. It is what both begin with, the first EOS in it before
    others. Where they begin otherwise, a last turn ends in its own way (gpt-oss). Where nothing is behind a
    last reply, the header of the next turn is the end (GLM).
    """
    known = {string_of(tokenizer, i) for i in eos_ids(tokenizer)} - {""}
    pattern = pattern_of(special_strings(tokenizer) | known)
    behind, between = (pattern.findall(text) for text in (last, middle))
    shared: list[str] = []
    for one, other in zip(behind, between):
        if one != other:
            break
        shared.append(one)
    starts = pattern.findall(header)  # where both go on with a header, the end is before it
    until = next((i for i, token in enumerate(shared) if i and token in starts), len(shared))
    for tokens, usual in ((shared, until - 1), (behind, 0)):
        if tokens:
            return next((token for token in tokens if token in known), tokens[usual]), True
    # no space or text may stand before it: it must be what directly follows the content
    following = pattern.match(middle.lstrip())
    return (following[0], False) if following else ("", False)
