"""Rows of similar length share a micro-batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keel.data.batches import by_length

LENGTHS = [5, 2, 9, 2, 30, 4, 1]


def test_parts_by_rows_and_by_tokens_by_hand() -> None:
    assert by_length(LENGTHS) == [[6, 1, 3, 5, 0, 2, 4]]
    assert by_length(LENGTHS, rows=3) == [[6, 1, 3], [5, 0, 2], [4]]
    # 3 × 2, 2 × 5 (a third would make 3 × 9), 1 × 9, and 30 alone, though it is more than 12
    assert by_length(LENGTHS, tokens=12) == [[6, 1, 3], [5, 0], [2], [4]]
    assert by_length([], tokens=12) == []


@given(
    st.lists(st.integers(1, 40), max_size=30), st.none() | st.integers(1, 9), st.none() | st.integers(8, 100)
)
def test_every_row_is_in_one_part_which_is_within_its_limits(
    lengths: list[int], rows: int | None, tokens: int | None
) -> None:
    parts = by_length(lengths, rows, tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert [lengths[i] for part in parts for i in part] == sorted(lengths)
    for part in parts:
        assert rows is None or len(part) <= rows
        assert tokens is None or len(part) == 1 or len(part) * max(lengths[i] for i in part) <= tokens
