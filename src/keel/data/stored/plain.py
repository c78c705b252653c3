"""Texts as a classifier reads them: conversations as "role: content" lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from keel.data import chat
from keel.data.identity import RowKeys, as_keys
from keel.data.stored.arrow import Array
from keel.data.stored.records import Rows, facts_of, numbers_of, release
from keel.types import Record, TextRecord


class PlainRows(Rows):
    """Texts of which conversations are made plain when they are asked for."""

    def __init__(self, rows: Sequence[Record]) -> None:
        self.rows = rows
        self.facts = {**facts_of(rows), "forms": ["standard"]}
        self._keys: RowKeys | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainRows, (self.rows,)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Record:
        return _plain(self.rows[index])

    def __iter__(self) -> Iterator[Record]:
        return map(_plain, self.rows)

    def numbers(self, name: str) -> Array:
        """As of `Rows`. The keys are those of the plain texts, which is a pass over all of them."""
        if name not in ("prompts", "rows", "verdicts"):
            return numbers_of(self.rows, name)
        self._keys = self._keys or RowKeys.of(self)
        return np.array(as_keys(getattr(self._keys, name)))

    def release(self) -> None:
        release(self.rows)


def plain_texts(rows: Sequence[Record]) -> Sequence[Record]:
    """The texts with their conversations made plain: a list where they lie in memory."""
    if not isinstance(rows, Rows):
        return [_plain(record) for record in rows]
    return PlainRows(rows) if "conversational" in rows.facts["forms"] else rows


def _plain(record: Record) -> Record:
    assert isinstance(record, TextRecord)
    return (
        record if isinstance(record.text, str) else replace(record, text=chat.prompt_text(None, record.text))
    )
