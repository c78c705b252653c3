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
from keel.data.stored.arrow import Array, BlockWriter
from keel.data.stored.cache import FACTS, Cache, name_of
from keel.data.stored.sink import Sink
from keel.data.stored.tokens import SCHEMA, TokenRows, write_block

Inputs = dict[str, list[int]]


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


class InputSink(Sink[Inputs]):
    """Takes inputs one by one: a list of them in the end, or from `records.IN_MEMORY` on a file. All have the
    same keys."""

    file, schema = "inputs.arrow", SCHEMA

    def __init__(self, cache: Cache, name: Callable[[], str]) -> None:
        super().__init__(cache, name, records.IN_MEMORY)
        self._keys: list[str] = []

    def write(self, writer: BlockWriter, rows: list[Inputs], first: int) -> None:
        self._keys = self._keys or list(rows[0])
        entries = [(first + i, tuple(row[key] for key in self._keys)) for i, row in enumerate(rows)]
        write_block(writer, entries)

    def facts(self) -> Mapping[str, Any]:
        return {"keys": self._keys, "files": [self.file], "entries": [self.count], "parts": len(self._keys)}

    def done(self, more: Mapping[str, Any] | None = None) -> Sequence[Inputs]:
        """All of them. more: facts that are kept with a file of them."""
        folder = self.finished(more or {})
        return self._waiting if folder is None else StoredInputs(folder, self.cache)
