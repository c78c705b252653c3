"""Rows that come one by one: in memory while they are few, in a folder of the cache from then on."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow

from keel.data.stored.arrow import BLOCK, BlockWriter
from keel.data.stored.cache import FACTS, Cache

RowT = TypeVar("RowT")
SinkT = TypeVar("SinkT", bound="Sink[Any]")


class Sink(ABC, Generic[RowT]):
    """Takes rows. Once there are more than `in_memory` they lie in a folder, there whole or not at all."""

    file: str  # that the rows lie in
    schema: pyarrow.Schema

    def __init__(self, cache: Cache, name: Callable[[], str], in_memory: int) -> None:
        """name: of the folder, asked for when there is to be one."""
        self.cache, self._name, self._in_memory = cache, name, in_memory
        self.name, self.count = "", 0
        self._waiting: list[RowT] = []
        self._making: Any = None
        self._writer: BlockWriter | None = None

    def __enter__(self: SinkT) -> SinkT:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._making.__exit__(*error)

    def add(self, row: RowT) -> None:
        """One more row."""
        self.count += 1
        self._waiting.append(row)
        if self._writer is not None and len(self._waiting) == BLOCK:
            self._write_first(BLOCK)
        elif self._writer is None and self.count > self._in_memory:
            self.name = self._name()
            self._making = self.cache.making(self.name)
            self._folder: Path = self._making.__enter__()
            self._writer = BlockWriter(self._folder / self.file, self.schema)
            while len(self._waiting) >= BLOCK:
                self._write_first(BLOCK)

    @abstractmethod
    def write(self, writer: BlockWriter, rows: list[RowT], first: int) -> None:
        """Write a block of rows, the first of which is number `first`."""

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What is kept with a file, now that all rows are in it."""

    def finished(self, more: Mapping[str, Any]) -> Path | None:
        """The folder with all rows and facts, `more` among them; None where all of them are in memory."""
        if self._writer is None:
            return None
        if self._waiting:
            self._write_first(len(self._waiting))
        self._writer.close()
        self._writer = None
        (self._folder / FACTS).write_text(json.dumps({**more, **self.facts()}), encoding="utf-8")
        self._making.__exit__(None, None, None)
        return self.cache.place / self.name

    def _write_first(self, count: int) -> None:
        rows, self._waiting = self._waiting[:count], self._waiting[count:]
        assert self._writer is not None
        self.write(self._writer, rows, self.count - len(self._waiting) - count)
