"""What a judge has said and what it cost, in a file of the run: a run that goes on asks nothing twice.

`judge.jsonl` in the run's directory has a line an answer: the hash of the question (model, text, sampling),
the answer, who asked, the tokens. A request that brought no answer is a line too, since it may have cost
something. Each line ends with a sum of itself; one that was cut off or changed is passed over, and asked
again. Equal questions have one answer, also at a temperature above 0.

Several processes of a run write into one file, each line in one write, and read what the others have added
before they ask or spend: a budget is that of all of them. Where calls are limited, a request is a line when
it begins, too, written under a lock of the file, so that processes that ask at once do not both take the last
call; a request that was cut off has been spent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keel.errors import BudgetError

FILE = "judge.jsonl"


def key_of(about: Mapping[str, Any]) -> str:
    """The hash of a question and of who is asked how."""
    text = json.dumps(about, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Ledger:
    """The answers in a file, and what `who` has spent. path: None keeps them in memory alone."""

    def __init__(
        self,
        path: Path | None,
        who: str,
        *,
        calls: int | None = None,
        tokens: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.who, self.most_calls, self.most_tokens = path, who, calls, tokens
        self.answers: dict[str, str] = {}
        self.calls = self.tokens = 0  # that `who` has spent, in all attempts at this run
        self.waiting = 0  # requests of this process that are under way, and no line yet
        self._read_to = 0  # bytes of the file
        broken = self.catch_up()
        if path is not None and path.exists() and path.stat().st_size > self._read_to:
            broken += 1  # the last line has no end
        if broken:
            say(f"{path}: {broken} broken lines are passed over; what they held is asked again")

    def catch_up(self) -> int:
        """Take in what was written since, by whomever: the number of broken lines in it."""
        if self.path is None or not self.path.exists() or self.path.stat().st_size == self._read_to:
            return 0
        with self.path.open("rb") as handle:
            if handle.seek(0, os.SEEK_END) < self._read_to:  # somebody removed it, to ask again
                self._read_to = 0
            handle.seek(self._read_to)
            content = handle.read()
        content = content[: content.rfind(b"\n") + 1]  # one without an end is being written, or broken
        self._read_to += len(content)
        rows = [_row(line) for line in content.split(b"\n") if line]
        for row in rows:
            if row is not None:
                self._take(row)
        return rows.count(None)

    def _take(self, row: Mapping[str, Any]) -> None:
        if row["told"] is not None:
            self.answers[row["key"]] = row["told"]
        if row["who"] == self.who:
            self.calls += row.get("part") != "end"
            self.tokens += row["tokens"]

    @property
    def _in_parts(self) -> bool:
        """Whether the beginning of a request is a line of its own."""
        return self.path is not None and self.most_calls is not None

    def begin(self, key: str) -> None:
        """Before a request. BudgetError where it would be one too many."""
        if not self._in_parts:
            self.catch_up()
            self._check()
            self.waiting += 1
            return
        with self._locked():
            self.catch_up()
            self._check()
            self._write({"key": key, "told": None, "who": self.who, "tokens": 0, "part": "begin"})

    def _check(self) -> None:
        """BudgetError where nothing is left."""
        over = [
            f"{spent:,} of {most:,} {what}"
            for what, spent, most in (
                ("calls", self.calls + self.waiting, self.most_calls),
                ("tokens", self.tokens, self.most_tokens),
            )
            if most is not None and spent >= most
        ]
        if over:
            raise BudgetError(
                f"{self.who}: its budget is spent ({' and '.join(over)}); what is done is kept: raise "
                "`budget` and the same command goes on"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Within it no other process begins a request. A file system without locks goes without."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as handle:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def end(self, key: str, told: str | None, tokens: int) -> None:
        """After a request: keep what was told, or that nothing usable was."""
        row = {"key": key, "told": told, "who": self.who, "tokens": tokens}
        if self._in_parts:
            row["part"] = "end"
        else:
            self.waiting -= 1
        self._write(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            self._take(row)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _append(self.path, _line(row))
        self.catch_up()


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=True)
    return f'{text[:-1]}, "sum": "{_sum(text)}"}}\n'.encode()


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None for a broken one."""
    try:
        row = json.loads(line)
        sum_ = row.pop("sum")
        if _sum(json.dumps(row, ensure_ascii=True)) != sum_:
            return None
        sound = isinstance(row["key"], str) and isinstance(row["told"], str | None)
        return row if sound and isinstance(row["tokens"], int) and "who" in row else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _append(path: Path, line: bytes) -> None:
    """A line at the end of the file, in one write where the disk takes it; on its own behind one that was
    torn. (Where another process has not ended its line yet, an empty one comes in between.)"""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if (size := os.fstat(handle).st_size) and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:
            line = line[os.write(handle, line) :]
    finally:
        os.close(handle)
