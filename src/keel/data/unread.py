"""Columns of rows and keys of turns that nothing reads: counted and said, or refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from keel.data.conversations import PICTURES, SETTINGS
from keel.data.labels import PREFIX
from keel.data.records import COLUMNS, OPTIONAL_COLUMNS, unknown_turn_keys
from keel.data.values import nearest
from keel.data.verdicts import COLUMN as VERDICT
from keel.data.verdicts import columns_of
from keel.errors import DataError
from keel.types import DataSource, Message, Record, RecordType

_NAMED = 5  # so many names are said
# what a row may have beside the columns of its type: they are looked at elsewhere
_ELSEWHERE = ("source", "group", VERDICT, *SETTINGS, *PICTURES, *OPTIONAL_COLUMNS)


@dataclass(slots=True)
class UnreadKeys:
    """Counts what one source's rows have and nothing reads.

    A row's columns are looked at where the row is trained on by itself: those of a prompt reach the rewards.
    A column that the settings name in `columns` is wanted; those of a world and of a project of votes are its
    own.
    """

    source: DataSource
    kind: RecordType
    columns: Counter[str] = field(default_factory=lambda: Counter())
    keys: Counter[str] = field(default_factory=lambda: Counter())

    def count(self, record: Record, origin: str) -> None:
        """Count one row's. DataError for the first one with `strict`."""
        keys = unknown_turn_keys([record])
        columns = [name for name in map(str, record.columns) if self._unread(name)]
        if self.source.strict and keys:
            raise DataError(
                f"{origin}: {_unknown('a turn has the key', next(iter(keys)))}; `strict` refuses it"
            )
        if self.source.strict and columns:
            raise DataError(
                f"{origin}: {_unknown('the row has the column', columns[0])}; `strict` refuses it. Name "
                f"it in `columns` ({{{columns[0]}: {columns[0]}}}) if it is wanted"
            )
        self.keys.update(keys)
        self.columns.update(columns)

    def notes(self) -> list[str]:
        """What is worth a word in the line of the data."""
        notes: list[str] = []
        if self.columns:
            notes.append(f"columns that training does not read: {_names(self.columns)} rows")
        if self.keys:
            counted = _names(self.keys)
            notes.append(f"keys that keel does not know, which the chat template is given: {counted} turns")
        return notes

    def _unread(self, name: str) -> bool:
        kinds: tuple[RecordType, ...] = (self.kind,)
        if self.kind == "demonstration":
            kinds = ("demonstration", "preference")  # whose chosen side may be what is shown
        known = {name for kind in kinds for group in COLUMNS[kind] for name in group}
        asked = columns_of(self.source.verdicts)
        wanted = (*_ELSEWHERE, *known, *asked, *self.source.columns, *self.source.where)
        return (
            self.kind != "prompt"
            and name not in wanted
            and not self.source.source.startswith(("world:", "gym:", PREFIX))
        )


def _names(counts: Counter[str]) -> str:
    named = [f'"{name}" in {count:,}' for name, count in sorted(counts.items())]
    more = [f"{len(named) - _NAMED} others"] if len(named) > _NAMED else []
    return ", ".join(named[:_NAMED] + more)


def _unknown(what: str, name: str) -> str:
    known = {
        *Message.__annotations__,
        "role",
        "content",
        *(n for groups in COLUMNS.values() for g in groups for n in g),
    }
    close = nearest(name, sorted(known))
    hint = f' (did you mean "{close}"?)' if close else ""
    return f'{what} "{name}", which keel does not know{hint}'
