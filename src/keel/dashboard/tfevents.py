"""The scalars of TensorBoard's event files, read without TensorBoard.

A file is TFRecords: the length of a record as 8 bytes, a checksum of it in 4, the record, a checksum in 4.
A record is an Event of protocol buffers (tensorflow/core/util/event.proto): wall_time = 1, step = 2,
summary = 5; a Summary has values = 1 with tag = 1, simple_value = 2 and tensor = 8; a scalar tensor has
dtype = 1, tensor_content = 4, float_val = 5, double_val = 6. All else is passed over, text and images too.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from keel.dashboard.tail import BLOCK, open_plain

MARK = "events.out.tfevents."  # what the name of such a file begins with
_HEAD, _TAIL = 12, 4  # bytes around a record
LONGEST = 256 * 2**20  # bytes of a record; more is no length but noise
_DTYPES = {1: "f", 2: "d"}  # DT_FLOAT, DT_DOUBLE

Field = tuple[int, int | bytes]  # number, value


class BrokenRecord(ValueError):
    """Bytes that are no record."""


class EventFile:
    """One event file, read on as it grows. A file that became shorter or another one is read anew, which
    `read` says by `reset`; bytes that are no record end the reading of the file for good."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = False
        self.reset = False
        self._offset = 0
        self._file: tuple[int, int] | None = None

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Step and scalars of the records that are new."""
        self.reset = False
        handle = open_plain(self.path, follow=True)  # models' hubs keep files as links
        if handle is None:
            return []
        with handle:
            state = os.fstat(handle.fileno())
            file = (state.st_dev, state.st_ino)
            if (self._file is not None and file != self._file) or state.st_size < self._offset:
                self._offset, self.broken, self.reset = 0, False, True
            self._file = file
            rows: list[tuple[int, dict[str, float]]] = []
            while not self.broken and self._offset + _HEAD <= state.st_size:
                handle.seek(self._offset)
                before, data = self._offset, handle.read(BLOCK)
                rows += self._records(data)
                if self._offset == before:  # a record longer than a block, or one half written
                    length = struct.unpack_from("<Q", data)[0]
                    if length > LONGEST:
                        self.broken = True
                    if length > LONGEST or before + _HEAD + length + _TAIL > state.st_size:
                        break
                    self._offset = before + _HEAD + length + _TAIL  # no scalar is that long
            return rows

    def _records(self, data: bytes) -> Iterator[tuple[int, dict[str, float]]]:
        at = 0
        while at + _HEAD <= len(data):
            length = struct.unpack_from("<Q", data, at)[0]
            end = at + _HEAD + length
            if not length:  # zeros, of which a file can claim to hold any number
                self.broken = True
                return
            if end + _TAIL > len(data):
                return
            try:
                step, scalars = event(data[at + _HEAD : end])
            except BrokenRecord:
                self.broken = True
                return
            self._offset += end + _TAIL - at
            at = end + _TAIL
            if scalars:
                yield step, scalars


def event(data: bytes) -> tuple[int, dict[str, float]]:
    """Step and scalars of an Event. BrokenRecord for bytes that are none."""
    step, scalars = 0, {}
    for number, value in _fields(data):
        if number == 2 and isinstance(value, int):
            step = value - 2**64 if value >= 2**63 else value
        elif number == 5 and isinstance(value, bytes):
            for inner, summary in _fields(value):
                if inner == 1 and isinstance(summary, bytes):
                    scalars |= _scalar(summary)
    return step, scalars


def _scalar(data: bytes) -> dict[str, float]:
    """{tag: value} of a Summary.Value; {} where it is no scalar."""
    tag, found = "", None
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            tag = value.decode("utf-8", "replace")
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            found = struct.unpack("<f", value)[0]
        elif number == 8 and isinstance(value, bytes):
            found = _tensor(value)
    return {tag: found} if tag and found is not None else {}


def _tensor(data: bytes) -> float | None:
    """The number of a TensorProto that holds one float or double."""
    dtype, content, listed = 0, b"", {5: b"", 6: b""}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 4 and isinstance(value, bytes):
            content = value
        elif number in listed and isinstance(value, bytes):
            listed[number] += value
    letter = _DTYPES.get(dtype)
    if letter is None:
        return None
    held = content or listed[5 if letter == "f" else 6]
    return struct.unpack(f"<{letter}", held)[0] if len(held) == struct.calcsize(letter) else None


def _fields(data: bytes) -> Iterator[Field]:
    """Number and value of each field of a message: whole numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(data):
            raise BrokenRecord
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BrokenRecord
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
