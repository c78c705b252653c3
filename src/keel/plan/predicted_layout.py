"""What a model will read, foreseen from the lengths of its rows alone.

Whether rows are read as one and where the last layer is computed is decided by `prefixes` and `last_layer`,
on rows of made-up tokens. Where it cannot be known before the model is there (of a type that keel does not
know block by block, under a quantised layer), each row is taken to be read by itself and the last layer to be
computed everywhere, which takes more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

from keel.accel import batch_layout, last_layer
from keel.accel.batch_layout import BatchLayout, ReadStrategy
from keel.accel.branch_attention import Branches
from keel.accel.last_layer import weight_of
from keel.data.batches import by_length
from keel.plan.model_memory import Forward, Model

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain() -> Iterator[None]:
    """Within it rows are read as the model's own code reads them, all in one forward: weights that are cut
    over ranks are computed with that way."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence by its tokens."""

    begins: int  # rows with the same number, from 0, begin alike
    common: int  # tokens with which they do
    length: int
    asked: int  # positions next to each other at which the states are wanted
    end: int  # the position behind these


def answer(begins: int, prompt: int, answer: int) -> Row:
    """A prompt and an answer, each token of which is predicted."""
    length = prompt + answer
    return Row(begins, prompt, length, min(answer, length - 1), length - 1)


def scored(begins: int, prompt: int, answer: int) -> Row:
    """A prompt and an answer of which the last token's state is scored."""
    return Row(begins, prompt, prompt + answer, 1, prompt + answer)


def parts(rows: Sequence[Row], at_once: int | None, tokens: int | None = None) -> list[list[Row]]:
    """The rows as `by_length` puts them together: so many rows or tokens in a part."""
    found = by_length([row.length for row in rows], at_once, tokens, [row.begins for row in rows])
    return [[rows[i] for i in part] for part in found]


def forward(model: Model, rows: Sequence[Row]) -> Forward:
    """One forward of these rows."""
    if _plain.get():
        return Forward(len(rows), max(row.length for row in rows))
    return _forward(model, _renumbered(rows))


def best_rows(model: Model) -> int:
    if _plain.get():
        return sys.maxsize
    return batch_layout.best_rows(model.shape.kind, model.shape.window, draws=model.draws)


def _renumbered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with beginnings numbered as they come, so that like parts are equal."""
    numbers = {begins: number for number, begins in enumerate(dict.fromkeys(row.begins for row in rows))}
    return tuple(replace(row, begins=numbers[row.begins]) for row in rows)


@lru_cache(maxsize=1000)
def _forward(model: Model, rows: tuple[Row, ...]) -> Forward:
    found = _arranged(model, rows)
    if found.together and found.unpadded:  # each is a row for attention, where what is shared stands again
        groups = [([rows[i] for i in group.rows], group.common) for group in found.groups]
        count, longest = sum(len(group) for group, _ in groups), max(row.end for row in rows)
        read = Forward(count, longest, unpadded=found.tokens, scores=_scores(model, groups))
        asked = [n for group, common in groups for n in _asked_of_each(group, common)]
    elif found.together or found.unpadded:
        asked = [_asked([rows[i] for i in group.rows], group.common) for group in found.groups]
        unpadded = found.tokens if found.unpadded else None
        read = Forward(len(found.groups), found.width, masked=found.together, unpadded=unpadded)
    else:
        read, asked = Forward(len(rows), max(row.length for row in rows)), [row.asked for row in rows]
    shape, most, looked = model.shape, max(asked), sum(asked)
    weight = weight_of(shape.hidden, shape.intermediate)
    if not looked or not _narrows(model):
        return read
    worth = last_layer.worth_it(read.rows, read.length, read.tokens, looked, most, weight)
    return replace(read, looked=looked, most=most) if worth else read


def _scores(model: Model, groups: Sequence[tuple[Sequence[Row], int]]) -> int:
    """Of groups and how many tokens each begins with in common: the scores that attention computes where it
    asks once for these; 0 where it reads each sequence by itself."""
    if model.device != "cpu" or model.dtype != "float32":
        return 0
    alone = [([], [range(group[0].end)]) for group, _ in groups if len(group) == 1]
    shared = [
        (range(common), [range(row.end - common) for row in group])
        for group, common in groups
        if len(group) > 1
    ]
    branches = Branches.of([*shared, *alone])
    return branches.scores() if branches.are_short(model.shape.heads, model.bytes) else 0


def _asked(rows: Sequence[Row], common: int) -> int:
    """Different positions at which the states of rows are wanted that have their first `common` tokens in
    common."""
    return sum(_asked_of_each(rows, common))


def _asked_of_each(rows: Sequence[Row], common: int) -> list[int]:
    """The same, row by row; those that are shared are the first's."""
    asked = [min(row.asked, row.end - common) for row in rows]
    asked[0] += max(0, max(common - (row.end - row.asked) for row in rows))
    return asked


def _arranged(model: Model, rows: Sequence[Row]) -> BatchLayout:
    shape = model.shape
    can = ReadStrategy(False, False)
    if shape.kind in batch_layout.KINDS and not model.draws and len(rows) > 1:
        can = ReadStrategy(unpadded=shape.kind in batch_layout.UNPADDED)
    sequences: list[list[int]] = []
    for i, row in enumerate(rows):
        common = min(row.common, row.end)
        sequences.append([row.begins] * common + [-1 - i] * (row.end - common))
    weight = weight_of(shape.hidden, shape.intermediate)
    return batch_layout.arranged(sequences, weight, model.bytes, shape.window, can)


def _narrows(model: Model) -> bool:
    """Whether the last layer is one that can be computed at some positions alone."""
    shape = model.shape
    drops = model.dropout and shape.attention_dropout
    quantised = model.dtype in ("int8", "int4")
    return shape.kind in last_layer.KINDS and shape.window is None and not drops and not quantised
