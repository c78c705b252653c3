"""Rows of training that are made of tokens when they are asked for: lists where they are few, else a view of
a file. Both hold the same rows in the same order."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from keel.data import chat
from keel.data.stored.arrow import Array
from keel.data.stored.records import Rows, base_of, release
from keel.data.stored.tokens import TokenRows, Tokens, each, tokenised
from keel.distributed import group
from keel.errors import DataError
from keel.stages.prepare import TooLong
from keel.types import Prompt, PromptRecord, Record, TextRecord


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt, as tokens for the policy and as text for everybody else."""

    prompt: Prompt
    ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns, for reward functions
    environment: Any = None  # of the episode that begins with it, where there are tools


RowT = TypeVar("RowT")
Build = Callable[[int, Tokens], RowT]  # the number of a record among those given, and its tokens → a row


class LazyRows(Sequence[RowT], Generic[RowT]):
    """`count` rows, number i of which is `get(i)`. sizes: the tokens of each, where they are known."""

    def __init__(self, count: int, get: Callable[[int], RowT], sizes: Array | None = None) -> None:
        self._count, self._get, self.sizes = count, get, sizes

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> RowT: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RowT]: ...
    def __getitem__(self, index: int | slice) -> RowT | Sequence[RowT]:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        return self._get(index % self._count)


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    too_long: TooLong,
    fits: Callable[[Record, Tokens], bool],
    build: Build[RowT],
    *,
    needed: bool = True,
) -> Sequence[RowT]:
    """The rows that records become. DataError when nothing is left of them and they are `needed`.

    fits: whether a record's tokens are kept. Where records are read from a file, it is asked only for entries
    that are longer than `too_long.limit`, have fewer than two tokens, or two replies of the same length: all
    others it must keep, and those that are too long where such rows are skipped it must leave out.
    build: the row, its tokens within the limit; called again each time that a row is asked for.
    """
    rows: Sequence[RowT]
    if isinstance(records, Rows):
        rows = _stored(records, tokenizer, too_long, fits, build)
    else:
        rows = [
            build(number, tokens)
            for number, record, tokens in each(tokenizer, records)
            if fits(record, tokens)
        ]
    if len(records) and not len(rows) and needed:
        raise DataError(f"stage {too_long.stage_run.name!r}: no usable row is left of {len(records)}")
    return rows


def _stored(
    records: Rows,
    tokenizer: PreTrainedTokenizerBase,
    too_long: TooLong,
    fits: Callable[[Record, Tokens], bool],
    build: Build[RowT],
) -> LazyRows[RowT]:
    run = too_long.stage_run
    whole, taken = base_of(records)  # all rows of the files: the same for every stage and split
    tokens = group.first_then_all(
        lambda: tokenised(whole, tokenizer, run.preparation, f"{run.name}: tokenising")
    )
    entries, numbers = entries_of(tokens.record(), taken)
    lengths = sizes_of(tokens, isinstance(records[0], TextRecord))[entries]
    doubtful = (lengths < 2) | alike_of(tokens)[entries]
    kept = np.ones(len(entries), dtype=bool)
    if too_long.limit is not None:
        long = lengths > too_long.limit
        if too_long.policy == "skip":  # no need to read what is left out whatever it holds
            kept, doubtful = ~long, doubtful & ~long
            too_long.left_out += int(long.sum())
        else:
            doubtful |= long
    for index in np.flatnonzero(doubtful).tolist():
        kept[index] = fits(records[int(numbers[index])], tokens[entries[index]])
    tokens.release()
    records.release()
    entries, numbers, lengths = entries[kept], numbers[kept], lengths[kept]
    sizes = lengths if too_long.limit is None else np.minimum(lengths, too_long.limit)
    return LazyRows(len(entries), lambda i: build(int(numbers[i]), tokens[entries[i]]), sizes)


def of_prompts(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    too_long: TooLong,
    build: Callable[[PromptRecord, tuple[int, ...]], RowT],
    render: Callable[[Prompt], Prompt] = lambda prompt: prompt,
) -> Sequence[RowT]:
    """A row for each prompt that fits, made of the record and its ids, cut from their start; of records in a
    file when it is asked for. render: what of a prompt is shown to the template. DataError when nothing is
    left."""
    stored, limit = isinstance(records, Rows), too_long.limit

    def ids_of(record: PromptRecord) -> tuple[int, ...]:
        return tuple(chat.prompt_ids(tokenizer, render(record.prompt)))

    def cut(ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids if limit is None else ids[-limit:]

    rows: list[RowT] = []
    kept, lengths = array("q"), array("q")
    for number, record in enumerate(records):
        assert isinstance(record, PromptRecord)
        ids = ids_of(record)
        if not too_long.fits(record, len(ids)):
            continue
        kept.append(number)
        lengths.append(len(cut(ids)))
        if not stored:
            rows.append(build(record, cut(ids)))
    if len(records) and not kept:
        raise DataError(f"stage {too_long.stage_run.name!r}: no usable row is left of {len(records)}")
    if not stored:
        return rows

    def made(index: int) -> RowT:
        record = records[kept[index]]
        assert isinstance(record, PromptRecord)
        return build(record, cut(ids_of(record)))

    release(records)
    return LazyRows(len(kept), made, np.array(lengths))


def entries_of(record: Array, taken: Array) -> tuple[Array, Array]:
    """The entries of the `taken` records, and of each the number of its record among those. record: (E,) the
    record of each entry, ascending."""
    first, behind = np.searchsorted(record, taken, "left"), np.searchsorted(record, taken, "right")
    counts = behind - first
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first - before, counts), np.repeat(
        np.arange(len(taken)), counts
    )


def sizes_of(tokens: TokenRows, texts: bool) -> Any:
    """(N,) tokens of each entry: of a text its own, else those of the prompt and the longest reply."""
    lengths = tokens.lengths()
    return lengths[:, 0] if texts else lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)


def alike_of(tokens: TokenRows) -> Array:
    """(N,) whether an entry's two replies have the same length."""
    lengths = tokens.lengths()
    return lengths[:, 1] == lengths[:, 2] if lengths.shape[1] == 3 else np.zeros(len(lengths), dtype=bool)


def sizes(rows: Sequence[Any], size: Callable[[Any], int]) -> Sequence[int]:
    """Tokens of every row; of rows in a file without reading them."""
    known = getattr(rows, "sizes", None)
    return [size(row) for row in rows] if known is None else known.tolist()
