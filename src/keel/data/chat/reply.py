"""One reply of a conversation: what a rollout is asked with, and what it would have to emit.

Mostly the template renders the turn as the prompt and what follows it. Where it does not (it asks with an
open thought, cuts thoughts from what was said, writes a header otherwise), prompt and turn are laid beside
each other at the header, and what is missing of the thought is written as the template writes one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from keel.data.chat.encoding import encode_prompt, reply_after
from keel.data.chat.placeholders import Text
from keel.data.chat.special import (
    eos_id,
    eos_ids,
    first_id,
    id_of,
    pattern_of,
    special_pattern,
    string_of,
)
from keel.data.chat.template import Transcript, closing_tag, opened_tag, template_facts, thought_of
from keel.errors import UsageError

_CLOSED_THOUGHT = re.compile(
    r"</[\w:.-]*(?:think|thought|reasoning)[\w:.-]*>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>", re.IGNORECASE
)
_EMPTY_THOUGHT = re.compile(rf"\s*(?:<[^<>/\s]+>)?(\s*)(?:{_CLOSED_THOUGHT.pattern})\s*", re.IGNORECASE)
_TAIL = 60  # characters at a prompt's end within which a closed thought is looked for
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")


def reply_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a reply of a conversation: the one that the template writes, else EOS."""
    end = template_facts(tokenizer).end if tokenizer.chat_template else ""
    return id_of(tokenizer, end) if end else eos_id(tokenizer)


class Reply:
    """One reply of a conversation: what a rollout is asked with, and what it would have to emit."""

    def __init__(self, transcript: Transcript, index: int) -> None:
        self.transcript, self.index = transcript, index
        self.tokenizer, self.facts = transcript.tokenizer, transcript.facts
        self.turn = transcript.copies[0][index]
        self.before = transcript.render(index, generation=True)
        self.after = transcript.render(index + 1)
        if len(_TAG.findall(self.facts.standing)) > 1:  # more than the end of a question
            self.after = self._without_standing_tail()
        self.nested = self.after.startswith(self.before)
        rendered = self.after[len(self.before) :] if self.nested else self._aligned()
        text = self._with_thought(rendered)
        self.nested = self.nested and text == rendered
        end = end_pattern(transcript).search(text)
        self.reply = text[: end.end()] if end else text
        self.end = None if end else self._unwritten_end()
        self._check_whole(text)

    def _check_whole(self, text: str) -> None:
        """UsageError where what the turn says is left out, or stands behind the token that ends a rollout."""
        said = _CLOSED_THOUGHT.split(str(self.turn["content"]))[-1].strip()
        if said and not self.facts.shows_replies and said not in self.reply:
            raise UsageError(
                "the chat template leaves out what the assistant says; give another `chat_template`"
            )
        if said in self.after and said not in self.reply:
            ending = self.reply[-20:]
            raise UsageError(
                f"the chat template writes what ends a rollout ({ending!r}) before the end of a reply, so "
                "the rest would never be sampled; give another `chat_template`, or data without thoughts"
                if said in text
                else "the chat template renders a reply so that it cannot be told from its prompt; "
                "give a plainer one as `chat_template`"
            )
        calls = [call.get("function", call) for call in self.turn.get("tool_calls") or ()]
        if any(str(call.get("name", "")) not in self.reply for call in calls):
            raise UsageError(
                'the chat template shows no "tool_calls" of a reply; give another `chat_template`'
            )

    @cached_property
    def opening(self) -> str:
        """What the prompt writes to have this reply begin."""
        history = self.transcript.render(self.index)
        opening = self.before[len(history) :] if self.before.startswith(history) else self.facts.generation
        return opening or self._tail

    @cached_property
    def _tail(self) -> str:
        """What stands behind the last question whether a reply is asked for or not; "" behind another
        turn."""
        standing = self.facts.standing
        return standing if self.transcript.render(self.index).endswith(standing) else ""

    def _without_standing_tail(self) -> str:
        """The rendered turn without what some templates write at the end of every conversation, asked or not:
        instructions, the header of a reply."""
        ends = end_pattern(self.transcript)
        for tag in _TAG.finditer(self._tail):
            standing = self._tail[tag.start() :]
            if self.after.endswith(standing) and any(
                not ends.fullmatch(found) for found in _TAG.findall(standing)
            ):
                return self.after.removesuffix(standing)
        return self.after

    def ids(self) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the reply, its end included."""
        prompt, reply = self.transcript.text(self.before), self.transcript.text(self.reply)
        asked = encode_prompt(self.tokenizer, prompt)
        if not asked:
            asked, prompt = [first_id(self.tokenizer)], Text("")
        said = reply_after(self.tokenizer, asked, prompt, reply)
        return asked, said if self.end is None else [*said, self.end]

    def counts(self, reply: Sequence[int]) -> list[bool]:
        """Which of the reply's tokens count: all, save those that the template's {% generation %} marks leave
        out. What it marks outside of the reply never counts."""
        if not (self.facts.marks and self.nested):
            return [True] * len(reply)
        start, stop = len(self.before), len(self.before) + len(self.reply)
        spans = [(a, b) for a, b in self.transcript.marked(self.index + 1) if b > start and a < stop]
        first = max(spans[0][0] - start, 0) if len(spans) == 1 else 0
        unmarked = 0
        if first:  # the marks begin behind the reply's first characters
            head = self.transcript.text(self.before), self.transcript.text(self.reply[:first])
            asked = encode_prompt(self.tokenizer, head[0])
            unmarked = len(reply_after(self.tokenizer, asked, *head))
        return [False] * unmarked + [True] * (len(reply) - unmarked)

    def _unwritten_end(self) -> int:
        """The id that ends a reply behind which the template writes no end: of the next turn's header, if a
        rollout stops there, else the template's usual one, else EOS."""
        turns, stops = self.transcript.turns, set(eos_ids(self.tokenizer))
        stops.add(reply_end(self.tokenizer))
        if self.index + 1 < len(turns):
            more = self.transcript.render(self.index + 2)
            following = special_pattern(self.tokenizer).match(more[len(self.after) :].lstrip())
            if more.startswith(self.after) and following is not None:
                token = id_of(self.tokenizer, following[0])
                if token in stops:
                    return token
        return reply_end(self.tokenizer)

    def _aligned(self) -> str:
        """The reply where the rendered turn does not begin with the prompt."""
        others = (
            self.transcript.probe_reply(self.index, word) for word in ("keelsaidother", "otherkeelsaid")
        )
        content = min(_shared_length(self.after, other) for other in others)
        for header in self._headers():
            at = self.after.rfind(header, 0, content)
            if at >= 0 and not self.after[at + len(header) : content].strip():
                return self.after[at + len(header) :]  # the reply begins behind the same header
        shared = _whole_tags(self.before, _shared_length(self.before, self.after))
        if shared >= len(self.before) - len(self.opening):
            return self._joined(self.before[shared:], self.after[shared:])
        # history itself is rendered otherwise: find where in `after` this turn begins
        for length in range(len(self.opening), 0, -1):
            part = self.opening[: _whole_tags(self.opening, length)]
            at = self.after.rfind(part, 0, content)
            if at >= 0 and any(c.isalnum() for c in part):
                return self._joined(self.opening[len(part) :], self.after[at + len(part) :])
        raise UsageError(
            "the chat template renders a reply without what it asks with for one, so prompt and "
            "reply cannot be told apart; give a plainer one as `chat_template`"
        )

    def _headers(self) -> list[str]:
        """What the prompt writes to have a reply begin, and its ends from each tag on."""
        starts = [0, *(tag.start() for tag in _TAG.finditer(self.opening))]
        return [self.opening[start:] for start in dict.fromkeys(starts) if self.opening[start:]]

    def _joined(self, asked: str, said: str) -> str:
        """The reply, where the prompt goes on with `asked` and the rendered turn with `said` from the same
        place on."""
        if not asked.strip():
            return said.lstrip() if asked and said[:1].isspace() else said
        if tag := opened_tag(asked):
            return said.removeprefix(tag) if closing_tag(tag) in said else said
        if closed := _CLOSED_THOUGHT.search(asked):  # the prompt has had its thought: none is to be emitted
            end = end_pattern(self.transcript).search(said)
            closes = closed[0] in (said[: end.start()] if end else said)
            return said.partition(closed[0])[2].lstrip() if closes else said
        if tags := _TAG.findall(asked):
            if set(tags) <= self.facts.structure and asked in self._headers():
                return said  # a header: the rendered reply goes on where an earlier one ended
            raise UsageError(
                f"the chat template asks with {tags[0]!r} for a reply, and renders replies without it; "
                "give a plainer one as `chat_template`"
            )
        close = self.facts.thought_close  # the prompt opens a thought in words: it ends before the reply
        return said if close.strip() in said else close + said

    @cached_property
    def _is_closed(self) -> bool:
        """Whether the prompt has had a thought that is over, so that none is to be emitted."""
        return _CLOSED_THOUGHT.search(self.opening) is not None

    def _with_thought(self, text: str) -> str:
        """The reply with the turn's thought at its head, where the template leaves it out of a reply."""
        tag, thought = opened_tag(self.before), thought_of(self.turn)
        content = str(self.turn["content"])
        written = _CLOSED_THOUGHT.search(content)
        head = content[: written.end()] if written else ""
        if not tag and _CLOSED_THOUGHT.search(self.before, len(self.before) - _TAIL) and self._is_closed:
            if thought or (head and head not in text):
                raise UsageError(
                    "the chat template asks for a reply without a thought, and the turn has one; set "
                    "chat_template_kwargs (as enable_thinking: true), or leave the thought out"
                )
            return text
        empty = _EMPTY_THOUGHT.match(text)
        if head and head in text:  # the template takes the thought for content
            at = text.index(head)
            text = text[at:] if _EMPTY_THOUGHT.fullmatch(text[:at]) else text
            return _without_opening(text, tag, self.before) if tag else text
        if thought and self.transcript.shows_thought(self.index):
            return text
        if thought and empty:  # the template shows an empty one
            line, at = empty[1][: len(empty[1]) // 2], empty.start(1)
            return f"{text[:at]}{line}{thought}{line}{text[empty.end(1) :]}"
        if _CLOSED_THOUGHT.search(text):
            return text
        if written:  # the template has cut it
            rest = content[written.end() :]
            space = rest[: len(rest) - len(rest.lstrip())]
            if tag:
                return _without_opening(head, tag, self.before) + ("" if text[:1].isspace() else space) + text
            lead = text[: len(text) - len(text.lstrip(" "))]
            return lead + head + space + text.lstrip()
        line = "\n" if self.before.endswith("\n") else ""
        if tag:  # an empty thought is a thought too
            close = closing_tag(tag)
            return (
                thought
                + (
                    self.facts.thought_close
                    if close in self.facts.thought_close
                    else f"{line}{close}{line * 2}"
                )
                + text
            )
        if thought and "</think>" in self.facts.source:
            lead = text[: len(text) - len(text.lstrip(" "))]
            return f"{lead}<think>\n{thought}\n</think>\n\n{text.lstrip()}"
        if thought:
            raise UsageError(
                'the chat template shows no "reasoning_content" of a reply; write the thought into its '
                '"content", or give another `chat_template`'
            )
        return text


def _without_opening(text: str, tag: str, before: str) -> str:
    """A thought without the tag that the prompt has opened already, and without the line break behind it."""
    if not text.lstrip().startswith(tag):
        return text
    text = text.lstrip().removeprefix(tag)
    return text.removeprefix("\n") if before.endswith("\n") else text


def end_pattern(transcript: Transcript) -> re.Pattern[str]:
    """What matches a token that ends a reply, where a template wrote it."""
    tokenizer = transcript.tokenizer
    strings = {string_of(tokenizer, i) for i in eos_ids(tokenizer)}
    return pattern_of((strings | {transcript.facts.end}) - {""})


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts have in common from their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _whole_tags(text: str, length: int) -> int:
    """`length`, or less of it where it would cut a tag in two."""
    return next((m.start() for m in _TAG.finditer(text) if m.start() < length < m.end()), length)
