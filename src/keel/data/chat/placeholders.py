"""Words that stand for special tokens in what people wrote, while a template renders it.

A template may split a text at a tag, trim it, or look into it. So the tags are not marked but taken out: each
one becomes a plain word of letters, which a template treats like any other word, and after rendering each
word becomes the tag again, known to be text. The words come in two alphabets that differ in every letter.
Rendering with both must give the same; then no letter of a word is left anywhere, whatever the template did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.types import Message

_ALPHABETS = ("qbcdfghjk", "zmnprstvw")  # the first letter begins a word and stands nowhere else in it
_DIGITS = 9  # of a word, each of eight letters
_SETTINGS = ("role", "type", "weight", "train", "chat_template_kwargs")  # keys that hold no text of a person


@dataclass(frozen=True, slots=True)
class Text:
    """A text some of whose characters are not to be read as special tokens: the spans, in order."""

    string: str
    inert: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Text) -> Text:
        shifted = ((a + len(self.string), b + len(self.string)) for a, b in other.inert)
        return Text(self.string + other.string, (*self.inert, *shifted))


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Words of one alphabet and the tags they stand for."""

    tags: Mapping[str, str]  # word → tag

    def put(self, text: str, pattern: re.Pattern[str]) -> str:
        """The text with a word in the place of every tag that the pattern matches."""
        words = {tag: word for word, tag in self.tags.items()}
        return pattern.sub(lambda match: words[match[0]], text)

    def back(self, text: str) -> Text:
        """The text with the tags in their places again, which are inert."""
        if not self.tags:
            return Text(text)
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        for index, part in enumerate(re.split("(" + "|".join(self.tags) + ")", text)):
            part = self.tags[part] if index % 2 else part
            if index % 2:
                spans.append((length, length + len(part)))
            parts.append(part)
            length += len(part)
        return Text("".join(parts), tuple(spans))


def placeholders(tags: Iterable[str], known: str) -> tuple[Placeholders, ...]:
    """Words for the tags in two alphabets, none of which stands in the `known` text."""
    distinct = sorted(set(tags))
    if not distinct:
        return (Placeholders({}),)
    salt = 1
    while any(_word(salt * len(distinct) + i, a) in known for i in range(len(distinct)) for a in (0, 1)):
        salt += 1
    return tuple(
        Placeholders({_word(salt * len(distinct) + i, a): tag for i, tag in enumerate(distinct)})
        for a in (0, 1)
    )


def _word(number: int, alphabet: int) -> str:
    first, *letters = _ALPHABETS[alphabet]
    return first + "".join(letters[number >> 3 * place & 7] for place in range(_DIGITS))


def texts_of(turn: Message) -> list[str]:
    """Every text in a turn that a person or a model wrote."""
    texts: list[str] = []
    mapped(turn, lambda text: texts.append(text) or text)
    return texts


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, settings excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k in _SETTINGS else mapped(v, change) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [mapped(item, change) for item in value]
    return value
