"""Rows kept from training to evaluate on, chosen by prompt: none of their prompts is trained on.

Comparisons of one prompt share their answers, demonstrations of one prompt resemble each other. Rows drawn by
themselves would measure what was learned by heart.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel.data.batches import derive_seed, permutation
from keel.data.identity import RowKeys, as_keys
from keel.data.stored.records import facts_of
from keel.errors import DataError
from keel.types import Record

GROUP = "group"  # the column that is looked at where the settings name none
AT_MOST = 1000
Keys = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of rows, each list in order."""

    train: list[int]
    held_out: list[int]
    groups: int  # different prompts (or groups) of the rows held out


def holdout_count(rows: int, share: float, at_most: int = AT_MOST) -> int:
    """Rows that `split_holdout` aims to hold out."""
    return min(at_most, max(1, round(rows * share))) if share > 0 and rows > 1 else 0


def split_holdout(keys: Keys, share: float, seed: int, at_most: int = AT_MOST) -> Split:
    """Rows with equal keys go to one side. The keys are taken in an order drawn by `seed`, each where it
    brings the number of rows nearer to `share` of them; at least one is held out, and one is trained on.

    at_most: hold out no more rows, unless the smallest group has more. ValueError for rows that all have one
    key, of which no share can be held out.
    """
    rows, target = len(keys), holdout_count(len(keys), share, at_most)
    if not target:
        return Split(list(range(rows)), [], 0)
    group_of_row = numbered(keys)
    sizes = np.bincount(group_of_row)
    if len(sizes) < 2:
        raise ValueError("all rows have one key")
    taken, count = [], 0
    order = permutation(len(sizes), derive_seed("holdout", seed), 0)
    for group in order:
        if count >= target or len(taken) == len(sizes) - 1:
            break
        size = int(sizes[group])
        if size < 2 * (target - count) and count + size <= at_most:
            taken.append(group)
            count += size
    if not taken:
        taken = [min(order, key=lambda group: sizes[group])]
    held = np.isin(group_of_row, taken)
    return Split(np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist(), len(taken))


def hold_out(
    records: Sequence[Record],
    keys: RowKeys,
    share: float,
    seed: int,
    group: str | None = GROUP,
    where: str = "",
) -> Split:
    """The records to train on and to evaluate on. What has one prompt, or one value in the column `group`, is
    on one side.

    group: None looks at prompts alone; a name other than the default must be a column of every record.
    where: how errors call what asks. DataError if one prompt (or group) is all there is.
    """
    if not holdout_count(len(records), share):
        return split_holdout(keys.prompts, 0.0, seed)
    columns: list[Sequence[int]] = [keys.prompts]
    if group is not None and (values := _group_keys(records, group, where)) is not None:
        columns.append(values)
    try:
        return split_holdout(together(*columns), share, seed)
    except ValueError:
        what = "prompt" if len(columns) == 1 else f"prompt or `{group}`"
        raise DataError(
            f"{where}all {len(records):,} rows have one {what}, so that none can be held out apart from "
            "those trained on; give `eval_data`, or set `holdout: 0`"
        ) from None


def together(*columns: Sequence[int]) -> NDArray[np.int64]:
    """(rows,) numbers that are equal for rows that are linked by equal keys, in whichever column and over
    however many rows."""
    inverses = [numbered(column) for column in columns]
    label = np.arange(len(columns[0]))
    while True:
        before = label
        for inverse in inverses:
            lowest = np.full(len(label), len(label))
            np.minimum.at(lowest, inverse, label)
            label = lowest[inverse]
        if np.array_equal(label, before):
            return label


def numbered(keys: Keys) -> NDArray[np.int64]:
    """(rows,) keys as numbers from 0, in the order in which they first appear."""
    whole = as_keys(keys) if isinstance(keys, array) else np.asarray(keys)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _group_keys(records: Sequence[Record], group: str, where: str) -> list[int] | None:
    """A number for each value in the column; None where no record has it. Rows without a value stand for
    themselves."""
    if group == GROUP and GROUP not in facts_of(records)["columns"]:
        return None
    numbers: dict[str, int] = {}
    values: list[int] = []
    for index, record in enumerate(records):
        value = record.columns.get(group)
        if value is None and group != GROUP:
            raise DataError(f"{where}{record.origin} has no column {group!r}, which `group` names")
        values.append(-1 - index if value is None else numbers.setdefault(repr(value), len(numbers)))
    return values if numbers else None
