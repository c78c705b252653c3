"""Numbers by step, in columns that grow: what a file of metrics comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.dashboard.tail import Tail

SMALL = 65536  # bytes of lines that are read one by one; more are read by Arrow, all columns at once
MOST_COLUMNS = 2000  # of a table: a file of others may hold anything
_LARGEST = 2**53  # a step beyond it is no step


class Growing:
    """A one-dimensional array that grows at its end."""

    def __init__(self, dtype: Any) -> None:
        self._data = np.empty(64, dtype)
        self.length = 0

    def extend(self, values: Any) -> None:
        """Append an array."""
        needed = self.length + len(values)
        if needed > len(self._data):
            larger = np.empty(max(needed, 2 * len(self._data)), self._data.dtype)
            larger[: self.length] = self._data[: self.length]
            self._data = larger
        self._data[self.length : needed] = values
        self.length = needed

    @property
    def values(self) -> np.ndarray:
        return self._data[: self.length]


class Column:
    """One metric: its values, and in which rows of the table they stand. While it has a value in every row,
    their numbers are not kept."""

    def __init__(self) -> None:
        self._values = Growing(np.float64)
        self._rows: Growing | None = None

    def extend(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Append values of later rows."""
        count = self._values.length
        if self._rows is None and not np.array_equal(rows, np.arange(count, count + len(rows))):
            self._rows = Growing(np.int64)
            self._rows.extend(np.arange(count))
        if self._rows is not None:
            self._rows.extend(rows)
        self._values.extend(values)

    def since(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and values from row number `row` on."""
        values = self._values.values
        if self._rows is None:
            first = min(row, len(values))
            return np.arange(first, len(values)), values[first:]
        rows = self._rows.values
        first = int(np.searchsorted(rows, row))
        return rows[first:], values[first:]

    def __len__(self) -> int:
        return self._values.length


@dataclass(frozen=True, slots=True)
class Position:
    """How far somebody has read a table. `epoch` changes when what was read before is void."""

    epoch: int = -1
    rows: int = 0


class Table:
    """Columns over rows, each with its step. Values that are no finite number are NaN."""

    def __init__(self) -> None:
        self.epoch = 0
        self.columns: dict[str, Column] = {}
        self.broken_lines = 0
        self._steps = Growing(np.int64)

    @property
    def position(self) -> Position:
        return Position(self.epoch, self._steps.length)

    @property
    def last_step(self) -> int | None:
        return int(self._steps.values[-1]) if self._steps.length else None

    def clear(self) -> None:
        """Forget everything: what was read before is void."""
        self.epoch += 1
        self.columns, self.broken_lines, self._steps = {}, 0, Growing(np.int64)

    def add(self, steps: np.ndarray, columns: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Append rows. columns: name → the numbers of its rows among these, and the values."""
        before = self._steps.length
        self._steps.extend(steps)
        for name, (rows, values) in columns.items():
            column = self.columns.get(name)
            if column is None:
                if len(self.columns) >= MOST_COLUMNS:
                    continue
                column = self.columns[name] = Column()
            values = np.where(np.isfinite(values), values, np.nan)
            column.extend(rows + before, values)

    def add_rows(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Append rows given one by one, as step and numbers."""
        steps: list[int] = []
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for number, (step, values) in enumerate(rows):
            steps.append(step)
            for name, value in values.items():
                column = columns.setdefault(name, ([], []))
                column[0].append(number)
                column[1].append(value)
        found = {
            name: (np.array(numbers, np.int64), np.array(values, np.float64))
            for name, (numbers, values) in columns.items()
        }
        self.add(np.array(steps, np.int64), found)

    def points(self, name: str, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column from row `since` on, by step; the last one of a step counts. Empty for
        a name that is not there."""
        column = self.columns.get(name)
        if column is None:
            return np.empty(0, np.int64), np.empty(0)
        rows, values = column.since(since)
        steps = self._steps.values[rows]
        if len(steps) > 1 and not np.all(steps[1:] > steps[:-1]):
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
            last = np.append(steps[1:] != steps[:-1], True)
            steps, values = steps[last], values[last]
        return steps, values

    def mean_of_last(self, name: str, count: int) -> float | None:
        """Mean of the last finite values of a column; None without any."""
        _, values = self.points(name)
        last = values[-count:]
        last = last[np.isfinite(last)]
        with np.errstate(over="ignore"):
            mean = float(last.mean()) if len(last) else math.nan
        return mean if math.isfinite(mean) else None


class LogTable(Table):
    """The numbers of a file of JSON lines that is still being written. Broken lines are counted and left out;
    what is no number is left out."""

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self._tail = tail
        self._cut_off = False  # whether a line without end was counted

    def refresh(self) -> None:
        """Read what is new."""
        for piece in self._tail.read():
            if piece.reset:
                self.clear()
                self._cut_off = False
            if len(piece.data) < SMALL or not self._add_by_arrow(piece.data):
                self._add_lines(piece.data)
        self.broken_lines += self._tail.broken - self._cut_off
        self._cut_off = self._tail.broken

    def _add_lines(self, data: bytes) -> None:
        rows: list[tuple[int, dict[str, float]]] = []
        for line in data.splitlines():
            if not line.strip():
                continue
            row = parse_object(line)
            if row is None:
                self.broken_lines += 1
                continue
            rows.append((step_of(row, self._steps.length + len(rows) + 1), numbers(row)))
        self.add_rows(rows)

    def _add_by_arrow(self, data: bytes) -> bool:
        """Some six times faster than line by line. False where the lines are not all of the plain kind that
        Arrow reads: then nothing was added."""
        import pyarrow as pa
        from pyarrow import json as arrow_json

        try:
            found = arrow_json.read_json(pa.BufferReader(data))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError):
            return False
        if "step" not in found.column_names or len(found.column_names) != len(set(found.column_names)):
            return False
        steps = found.column("step")
        if not pa.types.is_integer(steps.type) or steps.null_count:
            return False
        columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in found.column_names:
            column = found.column(name)
            if name == "step" or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
                continue
            values = column.cast(pa.float64(), safe=False)
            there = np.asarray(values.is_valid().to_numpy())
            rows = np.flatnonzero(there)
            columns[name] = rows, np.asarray(values.drop_null().to_numpy(), np.float64)
        self.add(np.asarray(steps.to_numpy(), np.int64), columns)
        return True


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step; one too large for a float is infinite. A null is left out."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except OverflowError:
                found[name] = math.inf
    return found


def step_of(row: Mapping[str, Any], otherwise: int) -> int:
    """The step of a row; `otherwise` where it has none that is a whole number."""
    step = row.get("step")
    if isinstance(step, float) and step.is_integer():
        step = int(step)
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) > _LARGEST:
        return otherwise
    return step
