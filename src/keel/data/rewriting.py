"""What the settings of a source do to its rows: rename columns, rewrite texts, put a system turn first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from keel.data.files import RawRow
from keel.data.values import nearest
from keel.errors import DataError
from keel.types import Conversation, DataSource, Message, Record, TextRecord


@dataclass
class Rewriter:
    """Applies a source's `rewrite`, row by row; remembers which columns it has changed."""

    source: DataSource
    changed: set[str] = field(default_factory=set)

    def __call__(self, origin: str, row: dict[str, Any] | DataError) -> RawRow:
        if isinstance(row, DataError):
            return origin, row
        for column, patterns in self.source.rewrite.items():
            if not isinstance(row.get(column), str):
                problem = "is not text" if column in row else "is not there"
                return origin, DataError(
                    f'{origin}: `rewrite` changes "{column}", which {problem}; '
                    f"the row has {', '.join(map(str, row))}"
                )
            text = row[column]
            for pattern, replacement in patterns.items():
                text = re.sub(pattern, replacement, text)
            if text != row[column]:
                self.changed.add(column)
            row = {**row, column: text}
        return origin, row

    def check(self) -> None:
        """DataError if a column was not changed in any of the rows read: its patterns are not what was
        meant."""
        idle = next((column for column in self.source.rewrite if column not in self.changed), None)
        if idle is not None:
            pattern = next(iter(self.source.rewrite[idle]))
            raise DataError(
                f'{self.source.source}: `rewrite` changes "{idle}" in no row; the pattern is {pattern!r} '
                "(Python's regular expressions). Correct it, or leave it out"
            )


def chosen(source: DataSource, rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """The rows that have what `where` asks for; one without a value is bad. DataError if none is left."""
    if not source.where:
        yield from rows
        return
    seen = kept = 0
    for origin, row in rows:
        seen += 1
        if isinstance(row, DataError):
            kept += 1
            yield origin, row
            continue
        found = {column: label_of(row.get(column)) for column in source.where}
        blank = next((column for column, value in found.items() if value is None), None)
        if blank is not None:
            said = "has no value" if blank in row else "is not there"
            yield origin, DataError(f'{origin}: "{blank}", which `where` or `label` asks for, {said}')
        elif found == dict(source.where):
            kept += 1
            yield origin, row
    if seen and not kept:
        wanted = ", ".join(f'"{column}" {value!r}' for column, value in source.where.items())
        raise DataError(f"{source.source}: none of {seen:,} rows has {wanted} (`where`)")


def label_of(value: object) -> str | None:
    """A label as text: 1, 1.0 and "1" are one, true is not 1. None for what is no label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    return (value.strip() or None) if isinstance(value, str) else None


def with_system(record: Record, system: str | None) -> Record:
    """The record with a system turn first. What was plain text becomes a conversation: the prompt is the
    user's turn, the reply the assistant's.

    DataError for plain text without a prompt, and for a conversation that has a system turn of its own.
    """
    if system is None:
        return record
    turns: str | Conversation = record.text if isinstance(record, TextRecord) else record.prompt
    if isinstance(record, TextRecord) and isinstance(turns, str):
        raise DataError(
            f"{record.origin}: `system` has no effect on plain text: it is for prompts and conversations"
        )
    if isinstance(turns, str):
        turns = (Message(role="user", content=turns),)
    if turns[0]["role"] == "system":
        raise DataError(
            f"{record.origin}: `system` is set, but the row has a system turn of its own; leave one of them "
            "out"
        )
    turns = (Message(role="system", content=system), *turns)
    if isinstance(record, TextRecord):
        return replace(record, text=turns)
    replies = {
        name: (Message(role="assistant", content=reply),)
        for name in ("completion", "chosen", "rejected")
        if isinstance(reply := getattr(record, name, None), str)
    }
    return replace(record, prompt=turns, **replies)


def renamed(origin: str, row: dict[str, Any] | DataError, columns: Mapping[str, str]) -> RawRow:
    """The row with the names that `columns` gives: keel's name → the source's."""
    if isinstance(row, DataError) or not columns:
        return origin, row
    for ours, theirs in columns.items():
        if theirs not in row:
            close = nearest(theirs, row)
            hint = f'; did you mean "{close}"?' if close else ""
            reason = f'`columns` takes "{ours}" from "{theirs}", which the row does not have'
            return origin, DataError(f"{origin}: {reason}; it has {', '.join(map(str, row))}{hint}")
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return origin, {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}
