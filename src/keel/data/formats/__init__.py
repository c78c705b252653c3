"""Well-known data sets by name: their rows as rows of keel's, whichever names, scores and shapes they have.

A format is found by the columns of the first row, or named in the config (`format: shp`). Nothing is
guessed: each mapping says which value prefers which side, and a value that it does not know is an error.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.data import records
from keel.data.formats.base import Format, LeftOut, Made, Tied
from keel.data.formats.chats import CHATS
from keel.data.formats.labelled import labelled
from keel.data.formats.pairs import PAIRS
from keel.data.formats.rankings import RANKINGS
from keel.data.values import nearest
from keel.errors import DataError, UsageError
from keel.types import DataSource, RecordType

RawRow = tuple[str, dict[str, Any] | DataError]
PLAIN = "keel"  # the name that says: rows as they are
FORMATS: dict[str, Format] = {one.name: one for one in (*PAIRS, *RANKINGS, *CHATS)}
_PLURALS = {"preference": "pairs", "demonstration": "demonstrations", "text": "conversations"}


def detect(row: Mapping[str, Any], accept: Sequence[RecordType]) -> Format | None:
    """The data set that a row with these columns is of, if what becomes of it is wanted; None for keel's own
    types and whatever is not known.

    A row that is readable as a wanted type by itself, where the format's is not wanted, is left as it is.
    """
    for one in FORMATS.values():
        if one.columns and all(name in row for name in one.columns) and one.shape(row):
            wanted = any(kind in accept for kind in readable_from(one.kind))
            as_it_is = any(kind in accept for kind in records.readable_as(row))
            return one if wanted or not as_it_is else None
    return None


def readable_from(kind: RecordType) -> tuple[RecordType, ...]:
    """What rows of this type can be read as."""
    return {
        "preference": ("preference", "demonstration", "prompt"),
        "demonstration": ("demonstration", "prompt"),
    }.get(kind, (kind,))


def of_source(source: DataSource) -> Format | None:
    """The format that a source names. UsageError for an unknown name, or settings without effect."""
    if source.pairs and source.format is not None:
        raise UsageError(
            f"{source.source}: `pairs` and `format` both say how rows are judged: give one of them"
        )
    try:
        if source.pairs:
            return labelled(source.pairs)
        return FORMATS.get(known_format(source.format)) if source.format is not None else None
    except ValueError as error:
        raise UsageError(f"{source.source}: {error}") from None


def known_format(name: str) -> str:
    """The name itself. ValueError, with the nearest one, if it is none of a format."""
    if name in FORMATS or name == PLAIN:
        return name
    close = nearest(name, [*FORMATS, PLAIN])
    hint = f"did you mean {close}? " if close else ""
    raise ValueError(f"there is no format {name!r}; {hint}Known: {', '.join([*FORMATS, PLAIN])}")


@dataclass
class Conversion:
    """Maps a source's rows, one after the other, and counts what becomes of them."""

    source: DataSource
    accept: Sequence[RecordType]
    format: Format | None = None
    rows: int = 0
    made: int = 0
    left_out: Counter[str] = field(default_factory=lambda: Counter())

    def __call__(self, rows: Iterable[RawRow]) -> Iterator[RawRow]:
        """The rows of keel's. They are called by where theirs stand; the second of one row has its number."""
        self.format = of_source(self.source)
        rows = iter(rows)
        if self.format is None and self.source.format is None:
            passed: list[RawRow] = []
            for origin, row in rows:
                passed.append((origin, row))
                if not isinstance(row, DataError):
                    self.format = detect(row, self.accept)
                    break
            rows = itertools.chain(passed, rows)
        if self.format is None:
            if self.source.ties == "keep":
                raise UsageError(
                    f"{self.source.source}: `ties` has no effect: the rows are of no known format; name it "
                    "(`format`), or say how they are judged (`pairs`)"
                )
            return rows
        return self._mapped(self.format, rows)

    def line(self) -> str:
        """What became of the rows: "format PandaLM: 999 rows → 914 pairs, 85 ties left out"; "" for rows that
        were taken as they are."""
        if self.format is None:
            return ""
        made = f"{self.made:,} {_PLURALS.get(self.format.kind, 'rows')}"
        left = [
            f"{count:,} {_plural(reason, count)} left out" for reason, count in sorted(self.left_out.items())
        ]
        return ", ".join([f"format {self.format.title}: {self.rows:,} rows → {made}", *left])

    def _mapped(self, known: Format, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        for group in _groups(known, rows):
            origin, first = group[0]
            self.rows += len(group)
            if isinstance(first, DataError):
                yield origin, first
                continue
            number = 0
            try:
                for made in known.rows([row for _, row in group if not isinstance(row, DataError)]):
                    if (row := self._kept(made)) is not None:
                        number += 1
                        yield (origin if number == 1 else f"{origin} ({number})"), row
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                said = (
                    str(error)
                    if type(error) is ValueError
                    else f"unknown shape ({type(error).__name__}: {error})"
                )
                yield origin, DataError(f"{origin}: format {known.title}: {said}")

    def _kept(self, made: Made) -> dict[str, Any] | None:
        if isinstance(made, Tied) and self.source.ties == "skip":
            made = LeftOut("tie")
        if isinstance(made, LeftOut):
            self.left_out[made.reason] += 1
            return None
        self.made += 1
        return made.row if isinstance(made, Tied) else made


def _groups(known: Format, rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """Rows that become keel's together: each alone, or neighbours with one key. What cannot be read stands
    alone."""
    if known.key is None:
        yield from ([row] for row in rows)
        return
    key = known.key

    def together(item: RawRow) -> Any:
        return item[0] if isinstance(item[1], DataError) else (key(item[1]),)

    for _, group in itertools.groupby(rows, together):
        yield list(group)


def _plural(reason: str, count: int) -> str:
    head, space, tail = reason.partition(" ")
    ending = "ies" if head.endswith("y") and head != "reply" else f"{head}s"
    word = {"reply": "replies", "equal": "equal"}.get(head, ending)
    if head == "equal":
        tail = "pair" if count == 1 else "pairs"
    return f"{head if count == 1 else word}{space}{tail}"
