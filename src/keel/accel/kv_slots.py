"""The key–value cache of rows that come and go.

A row of the batch is a slot. All rows write the same column, the newest one, so that what is written is one
slice and the distance between two tokens is the distance of their columns, whatever the row: masks that look
back over a window stay right. A row's tokens reach from its own start to the newest column; what lies before
its start is not its own.

**Rows of different age.** A row that came late looks back less far than the others, and attention on a CPU
takes as long as it takes to read the columns. So rows stand in the order of their age, roughly, and those
that look back about equally far are read together, from the first column that any of them has (`blocks`). In
a stream of responses of up to 2,000 tokens 1.05 times the columns that are needed are read; without the
order, where each block of 16 has an old row among young ones, 1.8 times (reckoned, 64 slots). What it costs:
where a row leaves, one of each group behind it moves up, which is half a percent of what is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from keel.accel.processor import cache_dtype

GROUP = 4  # rows that are read together at least
WORTH = 2**19  # bytes of a layer's keys and values: as long as they take to read, another operation takes
FAR = 64  # columns: rows that came within so many of each other stay as they are


class Slots:
    """Rows 0 … n − 1 are in use. `cache` is what a transformers model takes as its past."""

    def __init__(
        self, capacity: int, columns: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: of what is kept; that of the first prompts' values where None. Numbers rounded to bfloat16
        are kept as float32 where attention is faster so (`processor.cache_dtype`)."""
        self.rounded = dtype  # to which everything is rounded that is kept, as training rounds it
        self.dtype = cache_dtype(device) if dtype == torch.bfloat16 else dtype
        self.capacity, self.columns = capacity, columns
        self.column = 0  # the next one to be written
        self.low = 0  # the first one that any row has
        self.starts = torch.zeros(0, dtype=torch.long, device=device)  # (n,) each row's first column
        self._blocks: list[tuple[slice, int]] | None = None  # not looked at yet
        self._moved = 0  # columns by which everything was moved to the left
        self.layers: list[_Layer] = []
        self._held: list[Tensor] = []  # what they keep, (any number, slots, heads, columns, D) each
        self.lent: Sequence[tuple[Tensor, Tensor]] = ()  # each layer's k, v, at least as large as needed
        self.cache = Cache(layers=self.layers)  # pyright: ignore[reportArgumentType]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def positions(self) -> Tensor:
        """(n,) position in its own sequence of the token that each row writes next."""
        return self.column - self.starts

    def mask(self) -> Tensor | None:
        """(n, S) True at the columns `low` … `column` that are a row's own; None when all are."""
        if self._even:
            return None
        columns = torch.arange(self.low, self.column + 1, device=self.starts.device)
        return columns[None, :] >= self.starts[:, None]

    def blocks(self) -> list[tuple[slice, int]]:
        """Rows that look back about equally far, and the first column that any of them has. On the CPU, where
        attention takes as long as it takes to read the columns; all rows at once elsewhere."""
        if self._blocks is None:
            self._blocks = self._found_blocks() if self._sorts else [(slice(0, len(self)), self.low)]
        return self._blocks

    @property
    def _sorts(self) -> bool:
        """Whether it matters which rows stand beside each other."""
        return self.starts.device.type == "cpu"

    def _found_blocks(self) -> list[tuple[slice, int]]:
        """Groups one after the other, as long as what is read in vain takes less than another operation."""
        worth = WORTH / self._column_bytes
        blocks: list[tuple[slice, int]] = []
        first, low, in_vain = 0, self.column, 0.0
        for number, starts in enumerate(self.starts.split(GROUP)):
            at, own = GROUP * number, int(starts.min())
            more = len(starts) * (own - low) if own > low else (at - first) * (low - own)
            if at and in_vain + more > worth:
                blocks.append((slice(first, at), low))
                first, low, in_vain = at, own, 0.0
            else:
                low, in_vain = min(low, own), in_vain + more
        return [*blocks, (slice(first, len(self)), low)]

    @property
    def _column_bytes(self) -> int:
        """Of a row's keys and values in one layer."""
        kept = [held for layer in self.layers[:1] for held in (layer.k, layer.v)]
        return sum(held.shape[1] * held.shape[3] * held.element_size() for held in kept) or 1

    def admit(self, prompts: DynamicCache, lengths: Sequence[int], source: Sequence[int]) -> bool:
        """Give new rows the keys and values of prompts, which are padded on the left; `source` says which
        prompt each row has. False if the model left no keys and values to take (it is no attention model)."""
        if not _holds(prompts, max(lengths)):
            return False
        layers: Any = prompts.layers
        kept = [(layer.keys, layer.values) for layer in layers]
        self.take(kept, lengths, source)
        return True

    def take(
        self, kept: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int], source: Sequence[int]
    ) -> None:
        """As `admit`, of each layer's keys and values, (prompts, heads, max(lengths), d)."""
        width = max(lengths)
        if not self.layers:
            lent = self.lent or self._room(kept)
            self.layers.extend(_Layer(self, k, v) for k, v in lent)
            if self.lent:
                self._held = [side[None] for sides in lent for side in sides]
        if self.column < width:
            self._move(width)
        first, end = len(self), len(self) + len(source)
        each_once = [*source] == [*range(len(lengths))]
        index = torch.tensor(source, device=self.starts.device)
        for layer, sides in zip(self.layers, kept, strict=True):
            for held, given in zip((layer.k, layer.v), sides, strict=True):
                given = given if each_once else given[index]
                held[first:end, :, self.column - width : self.column] = self.round(given)
        own = torch.tensor([self.column - lengths[i] for i in source], device=self.starts.device)
        self._set(torch.cat([self.starts, own]))

    def round(self, x: Tensor) -> Tensor:
        """Keys or values as precise as they are kept, and no more."""
        return x if self.rounded is None else x.to(self.rounded)

    def keep(self, going: Tensor) -> Tensor:
        """(n,) bool → (m,) the rows that now stand at 0 … m − 1: those that go on, older ones in front of
        younger ones by groups. As few are moved as that takes."""
        left = int(going.sum())
        order = self._in_order(going, left) if self._sorts else None
        if order is None:
            gaps = (~going[:left]).nonzero().flatten()
            order = torch.arange(left, device=going.device)
            order[gaps] = left + going[left:].nonzero().flatten()
        gaps = (order != torch.arange(left, device=order.device)).nonzero().flatten()
        if len(gaps):
            self._move_rows(order[gaps], gaps)
        self._set(self.starts[order])
        return order

    def _move_rows(self, moved: Tensor, gaps: Tensor) -> None:
        """Rows to other places. On the CPU one after the other, which takes a third of the time that an index
        takes, unless one of them stands where another goes."""
        pairs = list(zip(gaps.tolist(), moved.tolist(), strict=True)) if self._sorts else []
        if pairs and not {place for place, _ in pairs} & {row for _, row in pairs}:
            starts = self.starts.tolist()
            for held in self._held:
                for place, row in pairs:
                    own = slice(starts[row], self.column)
                    held[:, place, :, own] = held[:, row, :, own]
            return
        low = int(self.starts[moved].min()) if self._sorts else self.low
        for held in self._held:
            held[:, gaps, :, low : self.column] = held[:, moved, :, low : self.column]

    def _in_order(self, going: Tensor, left: int) -> Tensor | None:
        """(m,) as `keep` returns it; None where all that go on came at about the same time."""
        starts, rows = self.starts.tolist(), going.nonzero().flatten().tolist()
        own = [starts[row] for row in rows]
        if not own or max(own) - min(own) < FAR:
            return None
        age = {row: (starts[row] + self._moved) // FAR for row in rows}
        groups = {
            row: rank // GROUP for rank, row in enumerate(sorted(rows, key=lambda row: (age[row], row)))
        }
        order, free = [-1] * left, dict[int, list[int]]()
        stay = {row for row in rows if row < left and row // GROUP == groups[row]}
        for place in range(left):
            if place in stay:
                order[place] = place
            else:
                free.setdefault(place // GROUP, []).append(place)
        for row in rows:
            if row not in stay:
                order[free[groups[row]].pop(0)] = row
        return torch.tensor(order, device=going.device)

    def step(self) -> None:
        """The newest column is written by all rows."""
        self.column += 1

    def make_room(self) -> None:
        """Move everything to the left when the next column would be one too many."""
        if self.column == self.columns:
            self.close_up()

    def close_up(self) -> None:
        """Move everything to the left, so that nothing is before the first column in use."""
        self._move(self.column - self.low)

    def _room(self, kept: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """For all slots, like each layer's keys and values of prompts; side by side where all are alike, so
        that a row is moved at once. Zeros: rows read columns that none of them has written (they came later,
        or another had the slot), and what is masked counts as nothing only where it is finite."""
        # rotations may leave keys in float32 where values are in half precision: that is not kept
        kinds = [
            (side.shape[1], side.shape[3], self.dtype or values.dtype)
            for keys, values in kept
            for side in (keys, values)
        ]
        alike = len(set(kinds)) == 1
        counts = [(len(kinds), kinds[0])] if alike else [(1, kind) for kind in kinds]
        self._held = [
            kept[0][0].new_zeros(count, self.capacity, heads, self.columns, width, dtype=dtype)
            for count, (heads, width, dtype) in counts
        ]
        sides = [side for held in self._held for side in held]
        return [*zip(sides[::2], sides[1::2], strict=True)]

    def _move(self, column: int) -> None:
        """Shift the columns in use so that `column` is the next one to be written: some rows at a time, as
        the old and the new place overlap; on the CPU each row's own columns alone."""
        by, n = column - self.column, len(self)
        parts = [(first, min(first + GROUP, n), self.low) for first in range(0, n, GROUP)]
        if self._sorts:
            parts = [(row, row + 1, start) for row, start in enumerate(self.starts.tolist())]
        for held in self._held:
            for first, end, low in parts:
                own = held[:, first:end, :, low : self.column].clone()
                held[:, first:end, :, low + by : column] = own
        self.column = column
        self._moved -= by
        self._set(self.starts + by)

    def _set(self, starts: Tensor) -> None:
        self.starts = starts
        self.low = int(starts.min()) if len(starts) else self.column
        self._blocks = None
        self._even = not len(starts) or int(starts.max()) == self.low


class _Layer(DynamicLayer):
    """One layer's keys and values: k, v (slots, heads, columns, head dimension)."""

    def __init__(self, slots: Slots, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self._slots = weakref.proxy(slots)  # a cycle would keep all keys and values until the collector comes
        self.k, self.v = k, v
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """(n, heads, 1, d) of the newest token → all of each row's window."""
        slots = self._slots
        rows, column = slice(len(slots)), slots.column
        self.k[rows, :, column : column + 1] = slots.round(key_states)
        self.v[rows, :, column : column + 1] = slots.round(value_states)
        return self.k[rows, :, slots.low : column + 1], self.v[rows, :, slots.low : column + 1]

    def get_seq_length(self) -> int:
        return self._slots.column - self._slots.low


def _holds(cache: DynamicCache, width: int) -> bool:
    """Whether every layer of a cache has plain keys and values of so many columns."""
    return bool(cache.layers) and all(
        type(layer) is DynamicLayer
        and layer.is_initialized
        and layer.keys is not None
        and layer.keys.dim() == 4
        and layer.keys.shape[2] == width
        for layer in cache.layers
    )
