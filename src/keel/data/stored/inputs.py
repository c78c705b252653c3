"""What a classifier or a reward model reads of each text (`input_ids`, and `token_type_ids` for some): lists
while they are few, in a file from then on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, overload

from keel.data.stored import records
from keel.data.stored.arrow import BLOCK, Array, BlockWriter
from keel.data.stored.cache import FACTS, Cache, name_of
from keel.data.stored.tokens import SCHEMA, TokenRows, write_block

Inputs = dict[str, list[int]]
_FILE = "inputs.arrow"


def name_of_inputs(makers: Sequence[ModuleType], *parts: object) -> str:
    """A name for inputs that are made from these parts by the code of these modules, which stand outside of
    `keel.data`: after an edit of it they are others."""
    code = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in makers]
    return name_of("inputs", code, *parts)


class StoredInputs(Sequence[Inputs]):
    """The inputs of a folder."""

    def __init__(self, folder: Path, cache: Cache | None = None) -> None:
        self.facts: Mapping[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self._keys: list[str] = self.facts["keys"]
        self._rows = TokenRows(folder, cache)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Inputs]: ...
    def __getitem__(self, index: int | slice) -> Inputs | Sequence[Inputs]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return dict(zip(self._keys, self._rows[index % len(self)], strict=True))

    def sizes(self) -> Array:
        """(N,) tokens of each."""
        return self._rows.lengths()[:, 0]

    def release(self) -> None:
        """Let go of the memory that reading has taken."""
        self._rows.release()


class InputSink:
    """Takes inputs one by one: a list of them in the end, or from `records.IN_MEMORY` on a file. All have the
    same keys."""

    def __init__(self, cache: Cache, name: Callable[[], str]) -> None:
        """name: of the folder, asked for when there is to be one."""
        self.cache, self._name, self.name = cache, name, ""
        self.count = 0
        self._waiting: list[Inputs] = []
        self._making: Any = None
        self._writer: BlockWriter | None = None
        self._keys: list[str] = []

    def __enter__(self) -> InputSink:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._making.__exit__(*error)

    def add(self, inputs: Inputs) -> None:
        """One more."""
        self.count += 1
        self._waiting.append(inputs)
        if self._writer is not None and len(self._waiting) == BLOCK:
            self._write(BLOCK)
        elif self._writer is None and self.count > records.IN_MEMORY:
            self._keys = list(inputs)
            self.name = self._name()
            self._making = self.cache.making(self.name)
            self._folder: Path = self._making.__enter__()
            self._writer = BlockWriter(self._folder / _FILE, SCHEMA)
            while len(self._waiting) >= BLOCK:
                self._write(BLOCK)

    def done(self, more: Mapping[str, Any] | None = None) -> Sequence[Inputs]:
        """All of them. more: facts that are kept with a file of them."""
        if self._writer is None:
            return self._waiting
        if self._waiting:
            self._write(len(self._waiting))
        self._writer.close()
        self._writer = None
        facts = {"keys": self._keys, "files": [_FILE], "entries": [self.count], "parts": len(self._keys)}
        (self._folder / FACTS).write_text(json.dumps({**(more or {}), **facts}), encoding="utf-8")
        self._making.__exit__(None, None, None)
        return StoredInputs(self.cache.place / self.name, self.cache)

    def _write(self, count: int) -> None:
        block, self._waiting = self._waiting[:count], self._waiting[count:]
        assert self._writer is not None
        first = self.count - len(self._waiting) - count
        entries = [(first + i, tuple(row[key] for key in self._keys)) for i, row in enumerate(block)]
        write_block(self._writer, entries)
