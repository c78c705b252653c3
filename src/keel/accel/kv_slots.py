"""The key–value cache of rows that come and go.

A row of the batch is a slot. All rows write the same column, the newest one, so that what is written is one
slice and the distance between two tokens is the distance of their columns, whatever the row: masks that look
back over a window stay right. A row's tokens reach from its own start to the newest column; what lies before
its start is not its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

BLOCK = 16  # rows whose columns are read together
NEAR = 8  # columns that are not worth another operation


class Slots:
    """Rows 0 … n − 1 are in use. `cache` is what a transformers model takes as its past."""

    def __init__(
        self, capacity: int, columns: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: of what is kept; that of the first prompts' values where None."""
        self.dtype = dtype
        self.capacity, self.columns = capacity, columns
        self.column = 0  # the next one to be written
        self.low = 0  # the first one that any row has
        self.starts = torch.zeros(0, dtype=torch.long, device=device)  # (n,) each row's first column
        self._blocks: list[tuple[slice, int]] | None = None  # not looked at yet
        self.layers: list[_Layer] = []
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
        """Rows that look back equally far, and the first column that any of them has. On the CPU, where
        attention takes as long as it takes to read the columns; all rows at once elsewhere."""
        if self._blocks is None:
            on_cpu = self.starts.device.type == "cpu"
            lows = [int(part.min()) for part in self.starts.split(BLOCK)] if on_cpu else [self.low]
            if max(lows) - self.low < NEAR:
                self._blocks = [(slice(0, len(self)), self.low)]
            else:
                ends = [min(BLOCK * (i + 1), len(self)) for i in range(len(lows))]
                self._blocks = [(slice(BLOCK * i, end), low) for i, (end, low) in enumerate(zip(ends, lows))]
        return self._blocks

    def admit(self, prompts: DynamicCache, lengths: Sequence[int], source: Sequence[int]) -> bool:
        """Give new rows the keys and values of prompts, which are padded on the left; `source` says which
        prompt each row has. False if the model left no keys and values to take (it is no attention model)."""
        width = max(lengths)
        if not _holds(prompts, width):
            return False
        if not self.layers:
            lent = self.lent or [self._room(layer.keys, layer.values) for layer in prompts.layers]  # pyright: ignore
            self.layers.extend(_Layer(self, k, v) for k, v in lent)
        if self.column < width:
            self._move(width)
        first, end = len(self), len(self) + len(source)
        index = torch.tensor(source, device=self.starts.device)
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            layer.k[first:end, :, self.column - width : self.column] = prompt.keys[index]  # pyright: ignore
            layer.v[first:end, :, self.column - width : self.column] = prompt.values[index]  # pyright: ignore
        own = torch.tensor([self.column - lengths[i] for i in source], device=self.starts.device)
        self._set(torch.cat([self.starts, own]))
        return True

    def keep(self, going: Tensor) -> Tensor:
        """(n,) bool → (m,) the rows that now stand at 0 … m − 1: those that go on, of which only as many are
        moved as there are gaps below m."""
        left = int(going.sum())
        gaps = (~going[:left]).nonzero().flatten()
        moved = left + going[left:].nonzero().flatten()
        order = torch.arange(left, device=going.device)
        order[gaps] = moved
        if len(gaps):
            for layer in self.layers:
                for held in (layer.k, layer.v):
                    held[gaps, :, self.low : self.column] = held[moved, :, self.low : self.column]
        self._set(self.starts[order])
        return order

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

    def _room(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """For all slots, like a layer's keys and values of prompts. Zeros: rows read columns that none of
        them has written (they came later, or another had the slot), and what is masked counts as nothing only
        where it is finite."""
        # rotations may leave keys in float32 where values are in half precision: that is not kept
        dtype = self.dtype or values.dtype
        return tuple(
            held.new_zeros(self.capacity, held.shape[1], self.columns, held.shape[3], dtype=dtype)
            for held in (keys, values)
        )  # pyright: ignore[reportReturnType]

    def _move(self, column: int) -> None:
        """Shift the columns in use so that `column` is the next one to be written."""
        by = column - self.column
        for layer in self.layers:
            for held in (layer.k, layer.v):
                used = held[: len(self), :, self.low : self.column].clone()
                held[: len(self), :, self.low + by : column] = used
        self.column = column
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
        self.k[rows, :, column : column + 1] = key_states
        self.v[rows, :, column : column + 1] = value_states
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
