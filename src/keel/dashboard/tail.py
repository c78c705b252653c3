"""A text file that another process writes, read line by line as it grows."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 16 * 2**20  # bytes that are read at once
LONGEST_LINE = 64 * 2**20  # bytes; a longer line is none that a run writes: the file is read up to there
_MARK = 64  # bytes before the place up to which a file was read, by which it is known again


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole lines that are new, and whether everything before them is void."""

    data: bytes  # ends with a line's end
    offset: int  # of its first byte in the file
    reset: bool


class Tail:
    """Whole new lines of a file, by its length: what was read is not read again.

    A file that became shorter, was replaced by another one, or no longer holds what was read from it, is read
    from its beginning: a run that goes on from a checkpoint cuts its logs back and writes on. The last line
    is left alone until its end is written. A line without end (of noise, or of a file that claims to be huge)
    ends the reading: `broken`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0  # bytes of whole lines that were read
        self.broken = False
        self._file: tuple[int, int] | None = None  # device and inode
        self._mark = b""
        self._seen: tuple[int, int] | None = None  # size and time of change at the last look

    def read(self) -> Iterator[Piece]:
        """What is new, in pieces of at most about BLOCK bytes. Empty for a file that is not there."""
        handle = open_plain(self.path)
        if handle is None:
            if self.offset:
                self._forget()
                yield Piece(b"", 0, True)
            return
        with handle:
            state = os.fstat(handle.fileno())
            seen, file = (state.st_size, state.st_mtime_ns), (state.st_dev, state.st_ino)
            if (seen, file) == (self._seen, self._file):
                return
            reset = bool(self.offset) and not self._is_the_same(handle, file, state.st_size)
            if reset:
                self._forget()
            self._file = file
            self.broken = self.broken and state.st_size - self.offset >= LONGEST_LINE
            if self.broken:
                self._seen = seen
                return
            yield from self._pieces(handle, state.st_size, reset)
            self._seen = seen

    def _pieces(self, handle: BinaryIO, size: int, reset: bool) -> Iterator[Piece]:
        handle.seek(self.offset)
        rest = b""
        while self.offset + len(rest) < size:
            block = handle.read(min(BLOCK, size - self.offset - len(rest)))
            if not block:
                break
            rest += block
            end = rest.rfind(b"\n") + 1
            if not end:
                self.broken = len(rest) >= LONGEST_LINE
                if self.broken:
                    break
                continue
            data, rest, start = rest[:end], rest[end:], self.offset
            self.offset += end
            self._mark = (self._mark + data)[-_MARK:]
            yield Piece(data, start, reset)
            reset = False
        if reset:
            yield Piece(b"", 0, True)

    def _is_the_same(self, handle: BinaryIO, file: tuple[int, int], size: int) -> bool:
        if file != self._file or size < self.offset:
            return False
        handle.seek(self.offset - len(self._mark))
        return handle.read(len(self._mark)) == self._mark

    def _forget(self) -> None:
        self.offset, self._mark, self._seen, self._file = 0, b"", None, None
        self.broken = False


def open_plain(path: Path, *, follow: bool = False) -> BinaryIO | None:
    """A file opened to read; None where there is none, or something that is no plain file: opening a pipe
    that nobody writes to would wait for ever, and a link may lead to a file that is none of the run's.
    follow: take a link all the same."""
    flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
    try:
        number = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        return None
    return os.fdopen(number, "rb")


def read_text(path: Path, most: int, *, follow: bool = False) -> str:
    """A small text file, at most `most` bytes of it; "" where it cannot be read, or is a link (`follow`)."""
    handle = open_plain(path, follow=follow)
    if handle is None:
        return ""
    with handle:
        return handle.read(most).decode("utf-8", "replace")


def last_lines(path: Path, most: int = 65536) -> list[bytes]:
    """The last whole lines of a file, at most `most` bytes of them."""
    handle = open_plain(path)
    if handle is None:
        return []
    with handle:
        size = handle.seek(0, os.SEEK_END)
        start = max(size - most, 0)
        handle.seek(start)
        data = handle.read(most)
    data = data[: data.rfind(b"\n") + 1]
    lines = data.splitlines()
    return lines[1:] if start else lines
