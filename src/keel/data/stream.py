"""Texts that are read as they are trained on: a folder of shards of any size, never in memory as a whole.

The shards of a pass come in a seeded order. Their texts go through a buffer: it is filled, shuffled by a
seed, and emptied before it is filled again. So where a stream stands is a few numbers (`Cursor`): the row at
which the buffer's filling began, the text in it, the token in that. A stream that is set there goes on with
the same tokens, at the cost of reading the shard up to that row once more.

Departure from `batches.pack_stream` on all texts at once: neighbours in a shard stay within a buffer's length
of each other.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from keel.data import chat, files, records
from keel.data.batches import derive_seed, permutation
from keel.data.formats import Conversion
from keel.data.rewriting import Rewriter, renamed, with_system
from keel.data.unread import UnreadKeys
from keel.errors import DataError, UsageError
from keel.types import DataSource, TextRecord

SUFFIXES = (".jsonl", ".txt", ".parquet")
_CHARACTERS = 1 << 26  # at most in a buffer, whatever the number of texts
_AT_ONCE = 64  # texts that are tokenised in one call
_SAMPLE = 1 << 18  # bytes of a shard from which its tokens are estimated
_SAMPLED = 8  # shards that are looked into for that


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a source."""

    source: DataSource
    path: Path
    name: str  # that messages call it by


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a stream stands: `token` of text `text` of the buffer that was filled from row `row` of shard
    number `shard` in the order of pass `epoch`."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    text: int = 0
    token: int = 0


def shards_of(sources: Sequence[DataSource]) -> list[Shard]:
    """The files of all sources. UsageError for what cannot be streamed."""
    found: list[Shard] = []
    for source in sources:
        paths = files.locate(source.source)
        if paths is None or any(files.suffix_of(path) not in SUFFIXES for path in paths):
            raise UsageError(
                f"{source.source}: `stream` reads files and folders of {' '.join(SUFFIXES)}, each also .gz; "
                "set stream: false, or bring the texts into one of these forms"
            )
        if source.where:
            raise UsageError(f"{source.source}: `where` chooses no rows of a stream; set stream: false")
        found += [Shard(source, path, str(path) if len(paths) > 1 else source.source) for path in paths]
    return found


def described(sources: Sequence[DataSource]) -> str:
    """The sources in a line. DataError if the first row of one of their files cannot be trained on."""
    shards = shards_of(sources)
    for shard in shards:
        first = next(texts_in(shard, files.read(shard.path, shard.name, shard.source.columns)), None)
        if isinstance(first, DataError) and shard.source.on_bad == "error":
            raise first
    size = sum(shard.path.stat().st_size for shard in shards) / 2**20
    names = " + ".join(source.source for source in sources)
    return f"{len(shards):,} files, {size:,.0f} MiB, read as a stream · language modelling · {names}"


def texts_in(shard: Shard, rows: Iterator[files.RawRow]) -> Iterator[TextRecord | DataError]:
    """The texts of raw rows; what is wrong with one, in its place."""
    source = shard.source
    rewriter, conversion, unread = Rewriter(source), Conversion(source, ("text",)), UnreadKeys(source, "text")
    for origin, row in conversion(renamed(origin, row, source.columns) for origin, row in rows):
        origin, row = rewriter(origin, row)
        try:
            if isinstance(row, DataError):
                raise row
            record = with_system(records.parse(row, "text", origin), shard.source.system)
            assert isinstance(record, TextRecord)
            unread.count(record, origin)
            yield record
        except DataError as error:
            yield error


@dataclass
class TextStream:
    """The texts of shards, without end: pass after pass, each in another order."""

    shards: Sequence[Shard]
    seed: int
    buffer: int  # texts
    left_out: frozenset[int] = frozenset()  # hashes of texts that are held out
    bad: dict[str, str] = field(default_factory=dict)  # origin → what is wrong with a row that was skipped
    _place: tuple[int, int, int] = (0, 0, 0)  # of the reader: epoch, shard, row
    _reader: Iterator[TextRecord | DataError] | None = None

    def window(self, epoch: int, shard: int, row: int) -> tuple[list[TextRecord], tuple[int, int, int]]:
        """The texts of the buffer whose filling begins at this row, shuffled; and where the next one
        begins."""
        begins = (epoch, shard, row)
        if self._reader is None or self._place != begins:
            self._place, self._reader = begins, None
        texts: list[TextRecord] = []
        characters = 0
        while len(texts) < self.buffer and characters < _CHARACTERS:
            record = next(self._open(), None)
            epoch, shard, row = self._place
            if (
                record is None
            ):  # the shard ends; a buffer may reach into the next one, but not into the next pass
                self._reader = None
                last = shard + 1 == len(self.shards)
                self._place = (epoch + 1, 0, 0) if last else (epoch, shard + 1, 0)
                if last:
                    break
                continue
            self._place = (epoch, shard, row + 1)
            if isinstance(record, DataError):
                if self._shard(epoch, shard).source.on_bad == "error":
                    raise record
                self.bad.setdefault(str(record).partition(": ")[0], str(record))
            elif text_key(record) not in self.left_out:
                texts.append(record)
                characters += len(record.text) if isinstance(record.text, str) else 1000
        order = permutation(len(texts), derive_seed("buffer", self.seed, *begins), 0)
        return [texts[i] for i in order], self._place

    def texts(self, characters: int) -> Iterator[str]:
        """The first texts of the stream, some `characters` of them, as a tokenizer is trained on."""
        at, passes = (0, 0, 0), 0
        while characters > 0 and at[0] == passes:
            window, at = self.window(*at)
            for record in window:
                text = chat.prompt_text(None, record.text)
                characters -= len(text)
                yield text
                if characters <= 0:
                    break

    def _shard(self, epoch: int, number: int) -> Shard:
        order = permutation(len(self.shards), derive_seed("shards", self.seed), epoch)
        return self.shards[order[number]]

    def _open(self) -> Iterator[TextRecord | DataError]:
        """The reader of the shard that the stream is in, at its row."""
        if self._reader is None:
            epoch, number, row = self._place
            shard = self._shard(epoch, number)
            rows = files.read(shard.path, shard.name, shard.source.columns)
            self._reader = itertools.islice(texts_in(shard, rows), row, None)
        return self._reader


class TokenStream:
    """The tokens of a text stream in rows of `length`. Each row but the first begins with the last token of
    the one before it, so that every token is predicted once."""

    def __init__(self, texts: TextStream, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.texts, self.tokenizer, self.length = texts, tokenizer, length
        self.seek(Cursor())

    def seek(self, cursor: Cursor) -> None:
        """Go on from where the cursor says."""
        self._begins = (cursor.epoch, cursor.shard, cursor.row)  # of the newest buffer
        self._window, self._next = self.texts.window(*self._begins)
        self._waiting = cursor.text  # the first text of the buffer that is not among the pieces
        self._pieces: deque[tuple[Cursor, list[int]]] = deque()  # texts as tokens, and where each begins
        self._held = 0  # tokens in the pieces
        self._token = cursor.token  # of the first piece: where the next row begins

    def cursor(self) -> Cursor:
        """Where the next row begins."""
        self._fill(1)
        begins = self._pieces[0][0]
        return Cursor(begins.epoch, begins.shard, begins.row, begins.text, self._token)

    def row(self) -> list[int]:
        """The next `length` tokens."""
        self._fill(self.length)
        row: list[int] = []
        start = self._token
        for _, ids in self._pieces:
            row += ids[start : start + self.length - len(row)]
            start = 0
            if len(row) == self.length:
                break
        self._token += self.length - 1
        while self._pieces and self._token >= len(self._pieces[0][1]):
            ids = self._pieces.popleft()[1]
            self._token -= len(ids)
            self._held -= len(ids)
        return row

    def _fill(self, count: int) -> None:
        """Tokenise texts until `count` tokens are there. DataError if the shards hold nothing to read."""
        passes = self._begins[0]
        while self._held - self._token < count:
            if self._waiting >= len(self._window):
                self._begins = self._next
                self._window, self._next = self.texts.window(*self._begins)
                self._waiting = 0
                if not self._held and self._begins[0] > passes + 1:
                    raise DataError("the stream holds no text to train on")
                continue
            some = self._window[self._waiting : self._waiting + _AT_ONCE]
            with chat.batched(self.tokenizer, some):
                for number, record in enumerate(some, self._waiting):
                    ids = chat.document_ids(self.tokenizer, record)
                    self._pieces.append((Cursor(*self._begins, number), ids))
                    self._held += len(ids)
            self._waiting += len(some)


def held_out(stream: TextStream, share: float, at_most: int = 1000) -> list[TextRecord]:
    """Texts to evaluate on: of the first ones of the shards in their own order, a `share` chosen by their
    content. `left_out` of a stream takes their `text_key`."""
    chosen: list[TextRecord] = []
    seen = 0
    limit = math.ceil(at_most / share) if share > 0 else 0
    for shard in stream.shards:
        rows = files.read(shard.path, shard.name, shard.source.columns)
        for record in texts_in(shard, rows):
            if seen >= limit or len(chosen) >= at_most:
                return chosen
            seen += 1
            if isinstance(record, DataError):
                if shard.source.on_bad == "error":
                    raise record
            elif derive_seed("held out", stream.seed, text_key(record)) < share * 2**63:
                chosen.append(record)
    return chosen


def text_key(record: TextRecord) -> int:
    """Eight bytes that stand for a text's content."""
    text = record.text if isinstance(record.text, str) else repr(record.text)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def estimated_tokens(shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of all shards, by the first rows of a few of them."""
    every = max(1, math.ceil(len(shards) / _SAMPLED))
    rates: dict[str, list[float]] = {}
    for shard in shards[::every]:
        tokens, size = _sampled(shard, tokenizer)
        rates.setdefault(files.suffix_of(shard.path), []).append(tokens / max(size, 1))
    usual = sum(map(sum, rates.values())) / max(sum(map(len, rates.values())), 1)
    total = 0.0
    for shard in shards:
        known = rates.get(files.suffix_of(shard.path))
        total += _size(shard.path) * (sum(known) / len(known) if known else usual)
    return max(1, round(total))


def _sampled(shard: Shard, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens of a shard's first rows, and what they come to of its `_size`."""
    suffix = files.suffix_of(shard.path)
    if suffix == ".parquet":
        rows = itertools.islice(files.read(shard.path, shard.name, shard.source.columns), 200)
        lengths = [_length(tokenizer, text) for text in texts_in(shard, rows)]
        return sum(lengths), len(lengths)
    with _opened(shard.path) as handle:
        block = handle.read(_SAMPLE)
    whole = block[: block.rfind(b"\n") + 1] or block
    rows = files.rows_in(suffix, io.BytesIO(whole), shard.name, shard.source.columns)
    return sum(_length(tokenizer, text) for text in texts_in(shard, iter(rows))), len(whole)


def _length(tokenizer: PreTrainedTokenizerBase, text: TextRecord | DataError) -> int:
    return 0 if isinstance(text, DataError) else len(chat.document_ids(tokenizer, text))


def _opened(path: Path) -> IO[bytes] | Any:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _size(path: Path) -> int:
    """Rows of a .parquet file; bytes of another one, once it is unpacked."""
    if files.suffix_of(path) == ".parquet":
        with _opened(path) as handle:
            content = handle if not path.name.lower().endswith(".gz") else io.BytesIO(handle.read())
            return pyarrow.parquet.ParquetFile(content).metadata.num_rows
    if not path.name.lower().endswith(".gz"):
        return path.stat().st_size
    with path.open("rb") as handle:  # gzip keeps the size, modulo 2³², in its last four bytes
        handle.seek(-4, 2)
        return int.from_bytes(handle.read(4), "little")


def as_values(cursor: Cursor) -> dict[str, int]:
    """For a checkpoint."""
    return asdict(cursor)
