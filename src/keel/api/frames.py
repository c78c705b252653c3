# pyright: strict
"""Rows as data frames. pandas comes with datasets; it is imported when the first frame is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keel.errors import KeelError

if TYPE_CHECKING:
    from pandas import DataFrame as DataFrame  # pyright: ignore[reportMissingTypeStubs]


def data_frame(
    rows: Iterable[Mapping[str, Any]], index: str | Sequence[str] = (), columns: Sequence[str] | None = None
) -> DataFrame:
    """Rows as a data frame. index: the columns that name a row. columns: those to show, in order; None: all
    that any row has, in the order of their first appearance. KeelError where pandas is missing."""
    try:
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
    except ModuleNotFoundError as error:
        raise KeelError("data frames need pandas: install it with `pip install pandas`") from error
    keys = [index] if isinstance(index, str) else list(index)
    wanted = None if columns is None else [*keys, *columns]
    frame: Any = pd.DataFrame([dict(row) for row in rows], columns=wanted)
    return frame.set_index(keys) if keys else frame
