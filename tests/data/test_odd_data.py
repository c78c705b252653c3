"""Rows that Python has no value for, that lose something when they are read, or that go on for ever: named by
file and row, skipped when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keel.data.files import DEEPEST
from keel.data.load import load
from keel.errors import DataError
from keel.types import DataSource

GOOD = '{"prompt": "a", "completion": "b"}'
ALSO = '{"prompt": "a", "completion": "b", "x": %s}'


def read(path: Path, on_bad: Any = "error") -> Any:
    return load([DataSource(str(path), on_bad=on_bad)], ("demonstration",), 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', 'the key "prompt" appears twice'),
        (ALSO % '[{"y": 1, "y": 2}]', '"x" holds an object in which the key "y" appears twice'),
        (ALSO % ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)), f'"x" holds more than {DEEPEST} lists'),
        (ALSO % ('{"k":' * 600 + "1" + "}" * 600), f'"x" holds more than {DEEPEST} lists'),
        (ALSO % ("[" * 100_000), "not readable as JSON"),
        (ALSO % "[1, {'y': -Infinity}]".replace("'", '"'), '"x" is infinite'),
        (ALSO % "1e999", '"x" is infinite'),
        (ALSO % "[[NaN]]", '"x" is NaN'),
        (ALSO % ("9" * 5000), "not readable as JSON"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_an_odd_row_of_json(tmp_path: Path, row: str, reason: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    unreadable = "not readable" in reason
    if suffix == ".jsonl" or unreadable:  # of an array no part can be read
        path.write_text(f"{GOOD}\n{row}\n{GOOD}\n")
    else:
        path.write_text(f"[{GOOD}, {row}, {GOOD}]")
    with pytest.raises(DataError) as error:
        read(path)
    where = f"{path}:2: " if suffix == ".jsonl" or unreadable else f"{path}:row 2: "
    assert str(error.value).startswith(where + reason)
    assert "on_bad: skip" in str(error.value)
    left = read(path, "skip")
    assert (len(left.records), left.skipped) == (2, 1)


def test_a_row_may_be_as_deep_as_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ALSO % ("[" * DEEPEST + "]" * DEEPEST))
    assert len(read(path).records) == 1


@pytest.mark.parametrize(
    "kind",
    [pyarrow.timestamp("ms"), pyarrow.timestamp("us", "UTC"), pyarrow.date32(), pyarrow.duration("s")],
    ids=str,
)
def test_a_date_out_of_range_is_named_by_its_row(tmp_path: Path, kind: Any) -> None:
    path, far = tmp_path / "rows.parquet", 2**30 if kind == pyarrow.date32() else 2**61
    columns = {"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "when": pyarrow.array([0, far, 1], kind)}), path)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f'{path}:row 2: "when" holds a {kind} that is out of range')
    left = read(path, "skip")
    assert [record.prompt for record in left.records] == ["a", "c"]


def test_text_that_is_nested_json_is_refused_in_its_row(tmp_path: Path) -> None:
    """A column of CSV that is read as a value."""
    path = tmp_path / "rows.csv"
    path.write_text("messages\n" + json.dumps("x") + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"rows\.csv:2"):
        read(path)
