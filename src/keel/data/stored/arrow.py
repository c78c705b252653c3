"""Blocks of rows in Arrow files that are mapped into memory.

A mapped page counts as the process's memory for as long as it is mapped, though it can be read again at any
time. So a reader lets go of all pages after a while: what is resident stays small, however large the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

BLOCK = 1024  # rows of a block, all but a file's last
_READS = 256  # blocks that are read between two releases
Array = np.ndarray[Any, Any]


class BlockWriter:
    """Writes blocks of one schema to a file."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        self.schema = schema
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_file(self._sink, schema)

    def write(self, columns: Mapping[str, Any]) -> None:
        """One block: column → its values, a list or an Arrow array."""
        arrays = [
            value if isinstance(value, pyarrow.Array) else pyarrow.array(value, self.schema.field(name).type)
            for name, value in columns.items()
        ]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=self.schema))

    def close(self) -> None:
        self._writer.close()
        self._sink.close()


class Blocks:
    """The blocks of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._file = pyarrow.ipc.open_file(pyarrow.py_buffer(self._map))
        self._newest: tuple[int, pyarrow.RecordBatch] | None = None
        self._reads = 0

    def __len__(self) -> int:
        return self._file.num_record_batches

    def block(self, index: int) -> pyarrow.RecordBatch:
        """One block, nothing of it copied."""
        if self._newest is None or self._newest[0] != index:
            self._reads += 1
            if self._reads % _READS == 0:
                self.release()
            self._newest = index, self._file.get_batch(index)
        return self._newest[1]

    def release(self) -> None:
        """Let go of every page; what is read again comes from the file."""
        self._newest = None
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def list_of(values: list[list[int]], kind: pyarrow.DataType) -> pyarrow.ListArray:
    """Lists as one Arrow array of lists."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.fromiter((item for value in values for item in value), np.int64, int(offsets[-1]))
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat).cast(kind))


def offsets_of(column: pyarrow.Array) -> Array:
    """(n + 1,) where each of a column's lists or binaries begins, and where the last one ends."""
    width = np.int64 if pyarrow.types.is_large_binary(column.type) else np.int32
    whole = np.frombuffer(column.buffers()[1], dtype=width)
    return whole[column.offset : column.offset + len(column) + 1]
