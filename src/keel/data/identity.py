"""Which rows are the same: a key for a row's prompt, for the whole row, and for which way it is judged.

A key has 8 bytes and no text is kept, so that a million rows take 24 MB and can be added in a stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.types import (
    Conversation,
    DemonstrationRecord,
    PreferenceRecord,
    Record,
    RecordType,
    TextRecord,
    UnpairedRecord,
)

_PART, _TURN = "\x1f", "\x1e"  # between the parts of what is hashed


@dataclass(frozen=True, slots=True)
class Repeats:
    """How far the rows of a data set repeat each other."""

    rows: int
    prompts: int  # different ones; of plain text, different texts
    duplicates: int  # rows that say what an earlier row says, labels and votes included
    contradictions: int  # pairs (or responses) that one row prefers and another one rejects

    def describe(self, kind: RecordType) -> list[str]:
        """What of it is worth a word in the line of the data."""
        said: list[str] = []
        if self.prompts < self.rows and kind != "text":
            said.append(f"{self.prompts:,} prompt{'s' * (self.prompts != 1)}")
        if self.duplicates:
            said.append(
                f"{self.duplicates:,} row{'s repeat' if self.duplicates != 1 else ' repeats'} earlier ones"
            )
        if self.contradictions:
            what = ("response", "responses") if kind == "unpaired" else ("pair", "pairs")
            said.append(f"{self.contradictions:,} {what[self.contradictions != 1]} labelled both ways")
        return said


@dataclass(slots=True)
class RowKeys:
    """64-bit keys of rows, one after the other. Equal rows have equal keys, on every machine."""

    prompts: array[int] = field(default_factory=lambda: array("Q"))
    rows: array[int] = field(default_factory=lambda: array("Q"))
    # What is judged, whichever side is preferred, and in the lowest bit which one is; 0 without a verdict.
    verdicts: array[int] = field(default_factory=lambda: array("Q"))

    @classmethod
    def of(cls, records: Iterable[Record]) -> RowKeys:
        """The keys of `records`."""
        keys = cls()
        for record in records:
            keys.add(record)
        return keys

    def add(self, record: Record) -> None:
        """Count one more row."""
        prompt, row, verdict = keys_of(record)
        self.prompts.append(prompt)
        self.rows.append(row)
        self.verdicts.append(verdict)

    def __len__(self) -> int:
        return len(self.rows)

    def repeats(self) -> Repeats:
        """How far these rows repeat each other."""
        judged = distinct(as_keys(self.verdicts))
        both_ways = judged[judged != 0] >> np.uint64(1)
        return Repeats(
            rows=len(self),
            prompts=len(distinct(as_keys(self.prompts))),
            duplicates=len(self) - len(distinct(as_keys(self.rows))),
            contradictions=len(both_ways) - len(distinct(both_ways)),
        )


def keys_of(record: Record) -> tuple[int, int, int]:
    """Keys of the record's prompt, of the whole record, and of its verdict (`RowKeys`)."""
    prompt = prompt_key(record)
    if isinstance(record, TextRecord):
        return prompt, _hash(_whole(record.text)), 0
    if isinstance(record, UnpairedRecord):
        reply = _hash(_whole(record.completion))
        return prompt, _combined(prompt, reply, record.label), _combined(prompt, reply) & ~1 | record.label
    if isinstance(record, PreferenceRecord):
        chosen, rejected = _hash(_whole(record.chosen)), _hash(_whole(record.rejected))
        votes = [(vote.annotator, vote.choice) for vote in record.votes]
        row = _combined(prompt, chosen, rejected, record.p_chosen, record.margin, votes)
        p_chosen = 1.0 if record.p_chosen is None else record.p_chosen
        if p_chosen == 0.5:
            return prompt, row, 0
        better, (first, second) = chosen if p_chosen > 0.5 else rejected, sorted((chosen, rejected))
        return prompt, row, _combined(prompt, first, second) & ~1 | (better == second)
    reply = _hash(_whole(record.completion)) if isinstance(record, DemonstrationRecord) else 0
    return prompt, _combined(prompt, reply), 0


def prompt_key(record: Record) -> int:
    """A key of what the model is asked: the prompt, a conversation's turns before its first reply, or a plain
    text as a whole. Whitespace does not count, and a text is the same as a user's only turn with it."""
    asked = record.text if isinstance(record, TextRecord) else record.prompt
    if not isinstance(asked, str) and isinstance(record, TextRecord):
        replies = (index for index, turn in enumerate(asked) if turn["role"] == "assistant")
        asked = asked[: next(replies, len(asked))]
    if not isinstance(asked, str) and len(asked) == 1 and asked[0]["role"] == "user":
        asked = asked[0]["content"]
    if not isinstance(asked, str):
        asked = _TURN.join(f"{turn['role']}{_PART}{turn['content']}" for turn in asked)
    return _hash(asked, b" \t\n\r\x0b\x0c")


def as_keys(values: array[int]) -> NDArray[np.uint64]:
    """(rows,) the same keys as an array, without a copy."""
    return np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, dtype=np.uint64)


def shared(rows: array[int], others: array[int]) -> int:
    """How many of `rows` have a key that is among `others`."""
    return int(np.isin(as_keys(rows), as_keys(others)).sum())


def _whole(text: str | Conversation) -> str:
    """Everything that the text or the turns say, keys of turns included."""
    return text if isinstance(text, str) else _TURN.join(_turn(turn) for turn in text)


def _turn(turn: Any) -> str:
    return _PART.join(f"{key}={turn[key]!r}" for key in sorted(turn))


def _hash(text: str, without: bytes = b"") -> int:
    """64 bits of a text, of which some bytes are passed over."""
    content = text.encode("utf-8", "surrogatepass")
    content = content.translate(None, without) if without else content
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def _combined(*parts: object) -> int:
    return _hash(repr(parts))


def distinct(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(at most N,) every key once, ascending. As `np.unique`, which takes 19 times as long for a million keys
    since it counts them in a hash table."""
    ascending, first = np.sort(keys), np.ones(len(keys), dtype=bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return ascending[first]
