"""Validated rows as a sequence of records: in memory while they are few, in a file from then on."""

from __future__ import annotations

import datetime
import decimal
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow

from keel.data.identity import RowKeys, keys_of
from keel.data.stored.arrow import BLOCK, Array, Blocks, BlockWriter
from keel.data.stored.cache import FACTS, Cache
from keel.data.stored.sink import Sink
from keel.types import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedRecord,
    Vote,
)

IN_MEMORY = 20_000  # rows up to which a data set is kept in memory
_KINDS: tuple[type[Record], ...] = (
    TextRecord,
    PromptRecord,
    DemonstrationRecord,
    PreferenceRecord,
    UnpairedRecord,
)
_FIELDS = ("text", "prompt", "completion", "chosen", "rejected")
_NUMBERS = ("p_chosen", "margin", "label")  # columns of numbers that can be had for all rows at once
_KEYS = ("prompts", "rows", "verdicts")  # the keys of `identity.RowKeys`
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_NUMBERS, (pyarrow.float64(), np.float64)),
    "votes": (pyarrow.int32(), np.int32),
    **dict.fromkeys(_KEYS, (pyarrow.uint64(), np.uint64)),
}
_SCHEMA = pyarrow.schema([("row", pyarrow.binary()), *((name, kind) for name, (kind, _) in _TYPES.items())])
_FILE, _MARK = "rows.arrow", "keel"


class Rows(Sequence[Record]):
    """A sequence of records that need not lie in memory, with what is known of all of them."""

    facts: Mapping[str, Any]  # `forms` and names of `columns` of all rows

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(index % len(self))

    def row(self, index: int) -> Record:
        """Record number `index`."""
        raise NotImplementedError

    def numbers(self, name: str) -> Array:
        """(N,) a column of numbers, as `numbers_of` has them."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the memory that reading has taken."""


class StoredRows(Rows):
    """The records of a folder."""

    def __init__(self, folder: Path, cache: Cache | None = None) -> None:
        self.folder = folder
        self._cache = cache  # whose temporary folder must outlive this
        self._blocks = Blocks(folder / _FILE)
        self.facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self._count = int(self.facts["rows"])

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.folder,)

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Record:
        block = self._blocks.block(index // BLOCK)
        return _read(block.column(0)[index % BLOCK].as_buffer())

    def __iter__(self) -> Iterator[Record]:
        for number in range(len(self._blocks)):
            block = self._blocks.block(number)
            for index in range(len(block)):
                yield _read(block.column(0)[index].as_buffer())

    def numbers(self, name: str) -> Array:
        parts = [
            self._blocks.block(number).column(name).to_numpy(zero_copy_only=False).copy()
            for number in range(len(self._blocks))
        ]
        self.release()
        return np.concatenate(parts)

    def release(self) -> None:
        self._blocks.release()


class JoinedRows(Rows):
    """Several sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._starts = np.cumsum([0, *map(len, self.parts)])
        known = [facts_of(part) for part in self.parts]
        self.facts = {
            name: sorted({value for facts in known for value in facts[name]}) for name in ("forms", "columns")
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedRows, (self.parts,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Record:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part][index - int(self._starts[part])]

    def __iter__(self) -> Iterator[Record]:
        for part in self.parts:
            yield from part

    def numbers(self, name: str) -> Array:
        return np.concatenate([numbers_of(part, name) for part in self.parts])

    def release(self) -> None:
        for part in self.parts:
            release(part)


class PickedRows(Rows):
    """Some rows of a sequence, in an order of their own."""

    def __init__(self, rows: Sequence[Record], indices: Sequence[int] | Array) -> None:
        self.rows, self.indices = rows, np.asarray(indices, dtype=np.int64)
        self.facts = facts_of(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return PickedRows, (self.rows, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> Record:
        return self.rows[int(self.indices[index])]

    def numbers(self, name: str) -> Array:
        return numbers_of(self.rows, name)[self.indices]

    def release(self) -> None:
        release(self.rows)


class FilledRows(Rows):
    """Rows in which each of some columns is there: None where a row lacks it."""

    def __init__(self, rows: Sequence[Record], names: Sequence[str]) -> None:
        self.rows, self.names = rows, tuple(names)
        known = facts_of(rows)
        self.facts = {**known, "columns": sorted({*known["columns"], *names})}

    def __reduce__(self) -> tuple[Any, ...]:
        return FilledRows, (self.rows, self.names)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Record:
        return filled(self.rows[index], self.names)

    def __iter__(self) -> Iterator[Record]:
        return (filled(record, self.names) for record in self.rows)

    def numbers(self, name: str) -> Array:
        return numbers_of(self.rows, name)

    def release(self) -> None:
        release(self.rows)


def filled(record: Record, names: Sequence[str]) -> Record:
    """The record with None in the columns of these names that it lacks."""
    missing = {name: None for name in names if name not in record.columns}
    return replace(record, columns={**record.columns, **missing}) if missing else record


def picked(rows: Sequence[Record], indices: Sequence[int] | Array) -> Sequence[Record]:
    """The rows of these numbers: a list where they lie in memory."""
    if isinstance(rows, PickedRows):
        return PickedRows(rows.rows, rows.indices[np.asarray(indices, dtype=np.int64)])
    return PickedRows(rows, indices) if isinstance(rows, Rows) else [rows[i] for i in indices]


def base_of(rows: Rows) -> tuple[Rows, Array]:
    """The rows that some were picked from, and their numbers there."""
    if isinstance(rows, PickedRows) and isinstance(rows.rows, Rows):
        return rows.rows, rows.indices
    return rows, np.arange(len(rows))


def joined(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """All rows of the parts, one part after the other: a tuple where they lie in memory."""
    if len(parts) == 1 and isinstance(parts[0], Rows):
        return parts[0]
    if any(isinstance(part, Rows) for part in parts):
        return JoinedRows(parts)
    return tuple(record for part in parts for record in part)


def numbers_of(rows: Sequence[Record], name: str) -> Array:
    """(N,) `p_chosen`, `margin` or `label` of every row, NaN where it has none; `votes`: how many it has;
    `prompts`, `rows` or `verdicts`: its keys (`identity.RowKeys`)."""
    if isinstance(rows, Rows):
        return rows.numbers(name)
    return np.array(_column(rows, name), dtype=_TYPES[name][1])


def keys_of_rows(rows: Sequence[Record]) -> RowKeys:
    """Which of the rows are the same."""
    if not isinstance(rows, Rows):
        return RowKeys.of(rows)
    return RowKeys(*(array("Q", rows.numbers(name).tobytes()) for name in _KEYS))


def facts_of(rows: Sequence[Record]) -> Mapping[str, Any]:
    """`forms` of the rows ("standard", "conversational"), and the names of all `columns` that they have."""
    if isinstance(rows, Rows):
        return rows.facts
    columns = {str(name) for row in rows for name in row.columns}
    return {"forms": sorted({form_of(row) for row in rows}), "columns": sorted(columns)}


def release(rows: Sequence[Any]) -> None:
    """Let go of the memory that reading the rows has taken."""
    if isinstance(rows, Rows):
        rows.release()


def form_of(record: Record) -> str:
    """Whether a record is text ("standard") or turns ("conversational")."""
    value = record.text if isinstance(record, TextRecord) else record.prompt
    return "standard" if isinstance(value, str) else "conversational"


class RecordSink(Sink[Record]):
    """Takes records one by one: a tuple of them in the end, or from `IN_MEMORY` on a file."""

    file, schema = _FILE, _SCHEMA

    def __init__(self, cache: Cache, name: Callable[[], str]) -> None:
        super().__init__(cache, name, IN_MEMORY)
        self._forms: set[str] = set()
        self._columns: set[str] = set()

    def write(self, writer: BlockWriter, rows: list[Record], first: int) -> None:
        keys = np.array([keys_of(record) for record in rows], dtype=np.uint64).T
        numbers = {name: _column(rows, name) for name in (*_NUMBERS, "votes")}
        written = [_written(record) for record in rows]
        writer.write({"row": written, **numbers, **dict(zip(_KEYS, keys, strict=True))})
        facts = facts_of(rows)
        self._forms |= {*facts["forms"]}
        self._columns |= {*facts["columns"]}

    def facts(self) -> Mapping[str, Any]:
        return {"rows": self.count, "forms": sorted(self._forms), "columns": sorted(self._columns)}

    def done(self, more: Mapping[str, Any]) -> Sequence[Record]:
        """All of them. more: facts that are kept with them."""
        folder = self.finished(more)
        return tuple(self._waiting) if folder is None else StoredRows(folder, self.cache)


def _column(rows: Sequence[Record], name: str) -> list[Any]:
    """One column of `numbers_of`, None in the place of NaN."""
    if name == "votes":
        return [len(getattr(record, "votes", ())) for record in rows]
    if name in _KEYS:
        return [keys_of(record)[_KEYS.index(name)] for record in rows]
    values = (getattr(record, name, None) for record in rows)
    return [None if value is None else float(value) for value in values]


# ---------------------------------------------------------------- a record as bytes


def _written(record: Record) -> bytes:
    values: dict[str, Any] = {"": _KINDS.index(type(record)), "origin": record.origin}
    values |= {name: _plain(getattr(record, name)) for name in _FIELDS if hasattr(record, name)}
    values["columns"] = _plain(dict(record.columns))
    if isinstance(record, PreferenceRecord):
        values |= {"p_chosen": record.p_chosen, "margin": record.margin}
        values["votes"] = [[vote.annotator, vote.choice] for vote in record.votes]
    elif isinstance(record, UnpairedRecord):
        values["label"] = record.label
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _read(content: Any) -> Record:
    values = json.loads(bytes(content).decode("utf-8", "surrogatepass"))
    kind: Any = _KINDS[values.pop("")]
    for name in (*_FIELDS, "columns"):
        if name in values and not isinstance(values[name], str):
            values[name] = _back(values[name])
    if kind is PreferenceRecord:
        values["votes"] = tuple(Vote(annotator, choice) for annotator, choice in values["votes"])
    return kind(**values)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; what JSON does not know is marked with its type."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        inner = {key: _plain(item) for key, item in value.items()}
        return {_MARK: "dict", "of": inner} if _MARK in inner else inner
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return {_MARK: "tuple", "of": [_plain(item) for item in value]}
    if isinstance(value, bytes):
        return {_MARK: "bytes", "of": value.hex()}
    if isinstance(value, decimal.Decimal):
        return {_MARK: "decimal", "of": str(value)}
    for kind in (datetime.datetime, datetime.date, datetime.time):
        if isinstance(value, kind):
            return {_MARK: kind.__name__, "of": value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {_MARK: "timedelta", "of": [value.days, value.seconds, value.microseconds]}
    return str(value)


_READERS: dict[str, Any] = {
    "bytes": bytes.fromhex,
    "decimal": decimal.Decimal,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
}


def _back(value: Any) -> Any:
    if isinstance(value, list):
        return [_back(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(_MARK):
        case None:
            return {key: _back(item) for key, item in value.items()}
        case "dict":
            return {key: _back(item) for key, item in value["of"].items()}
        case "tuple":
            return tuple(_back(item) for item in value["of"])
        case kind:
            return _READERS[kind](value["of"])
