"""Files of metrics as they grow: what is read, what is read again, and that nothing is read twice."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from keel.dashboard.table import LogTable, Position
from keel.dashboard.tail import Tail, last_lines, read_text


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def pieces(tail: Tail) -> list[tuple[bytes, bool]]:
    return [(piece.data, piece.reset) for piece in tail.read()]


def test_only_what_is_new_is_read(tmp_path):
    path = tmp_path / "log"
    tail = Tail(path)
    assert pieces(tail) == []
    path.write_bytes(b"a\nb\nhalf")
    assert pieces(tail) == [(b"a\nb\n", False)]
    assert pieces(tail) == []
    with path.open("ab") as handle:
        handle.write(b" a line\nc\n")
    assert pieces(tail) == [(b"half a line\nc\n", False)]


def test_a_line_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("keel.dashboard.tail.BLOCK", 8)
    path = tmp_path / "log"
    path.write_bytes(b"x" * 30 + b"\nyy\n" + b"z" * 20)
    assert b"".join(data for data, _ in pieces(Tail(path))) == b"x" * 30 + b"\nyy\n"


@pytest.mark.parametrize("how", ["cut", "replaced", "cut and written on", "gone"])
def test_what_is_void_is_read_again(tmp_path, how):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree\n")
    tail = Tail(path)
    pieces(tail)
    if how == "cut":
        os.truncate(path, 4)
        expected = b"one\n"
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(b"one\ntwo\nthree\nfour\n")  # the same beginning, and another file
        other.replace(path)
        expected = b"one\ntwo\nthree\nfour\n"
    elif how == "cut and written on":
        path.write_bytes(b"one\n2\n3\nfour and more\n")
        expected = b"one\n2\n3\nfour and more\n"
    else:
        path.unlink()
        expected = b""
    found = pieces(tail)
    assert found[0][1]
    assert b"".join(data for data, _ in found) == expected


def test_a_resumed_run_that_writes_the_same_lines_goes_on(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree\n")
    tail = Tail(path)
    pieces(tail)
    os.truncate(path, 4)
    with path.open("ab") as handle:
        handle.write(b"two\nthree\nfour\n")
    assert pieces(tail) == [(b"four\n", False)]


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "log")
    assert pieces(Tail(tmp_path / "log")) == []  # opening it would wait for ever
    assert last_lines(tmp_path / "log") == []


def test_last_lines_are_whole(tmp_path):
    (tmp_path / "log").write_bytes(b"first\nsecond\nthird\nhalf")
    assert last_lines(tmp_path / "log") == [b"first", b"second", b"third"]
    assert last_lines(tmp_path / "log", 13) == [b"third"]


# ---------------------------------------------------------------- tables


def test_numbers_by_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = '{"step": 3, "note": "x", "on": true}\n'
    path.write_text(line(1, loss=2.0) + line(2, loss=1.5, eval_loss=1.6) + odd)
    table = LogTable(Tail(path))
    table.refresh()
    assert set(table.columns) == {"loss", "eval_loss"}
    steps, values = table.points("loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [2.0, 1.5])
    assert table.points("eval_loss")[0].tolist() == [2]
    assert table.position == Position(0, 3)
    with path.open("a") as handle:
        handle.write(line(4, loss=1.0, fresh=7.0))
    table.refresh()
    assert table.points("loss", since=3)[0].tolist() == [4]
    assert table.points("fresh")[1].tolist() == [7.0]  # a metric that nobody knew of
    assert table.points("nothing")[0].tolist() == []


def test_broken_lines_cost_only_themselves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    deep = "[" * 100_000
    path.write_bytes(
        line(1, loss=1.0).encode() + b'{"step": 2, "loss": \n\xff\xfe\n[3]\n' + deep.encode() + b"\n"
        + b'{"step": 3, "loss": NaN}\n{"step": 4, "loss": 1e999}\n{"step": "x", "loss": 5}\n'
        + b'{"step": 6, "loss": 1' + b"0" * 400 + b"}\n"
    )  # fmt: skip
    table = LogTable(Tail(path))
    table.refresh()
    steps, values = table.points("loss")
    assert table.broken_lines == 4
    assert steps.tolist() == [1, 3, 4, 6]
    assert np.isfinite(values).tolist() == [True, False, True, False]


def test_arrow_reads_what_the_lines_say(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    rows = []
    for step in range(1, 4001):
        row = {"step": step, "loss": 1 / step, "whole": step % 7, "on": True, "name": "x", "none": None}
        row |= {"eval_loss": step / 3} if step % 100 == 0 else {}
        row |= {"late": 0.25 * step} if step > 3990 else {}
        row |= {"mixed": 1 if step < 2000 else 0.5}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    fast = LogTable(Tail(path))
    fast.refresh()
    monkeypatch.setattr(LogTable, "_add_by_arrow", lambda self, data: False)
    slow = LogTable(Tail(path))
    slow.refresh()
    assert set(fast.columns) == set(slow.columns) == {"loss", "whole", "eval_loss", "late", "mixed"}
    for name in slow.columns:
        for one, other in zip(fast.points(name), slow.points(name), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "odd", ['{"step": 5, "loss": NaN}\n', "no json\n", '{"step": 5, "loss": "x"}\n', '{"loss": 1}\n']
)
def test_lines_that_arrow_does_not_read_are_read_one_by_one(tmp_path, odd):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, loss=1.0) for step in range(3000)) + odd)
    table = LogTable(Tail(path))
    table.refresh()
    assert len(table.points("loss")[0]) in (3000, 3001)


def test_the_last_value_of_a_step_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, loss=1.0) + line(3, loss=3.0) + line(2, loss=2.0) + line(3, loss=4.0))
    table = LogTable(Tail(path))
    table.refresh()
    steps, values = table.points("loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [1.0, 2.0, 4.0])


def test_a_log_that_was_cut_back_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, loss=1.0) + line(2, loss=2.0))
    table = LogTable(Tail(path))
    table.refresh()
    path.write_text(line(1, loss=5.0))
    table.refresh()
    assert table.position == Position(1, 1)
    assert table.points("loss")[1].tolist() == [5.0]


def test_a_line_without_end_ends_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("keel.dashboard.tail.BLOCK", 1 << 12)
    monkeypatch.setattr("keel.dashboard.tail.LONGEST_LINE", 1 << 14)
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, a=1.0))
    with path.open("r+b") as handle:
        handle.truncate(1 << 40)  # claims a terabyte, and holds a few bytes
    table = LogTable(Tail(path))
    before = time.monotonic()
    for _ in range(3):
        table.refresh()
        assert (len(table.columns["a"]), table.broken_lines) == (1, 1)
    with path.open("r+b") as handle:
        handle.truncate((1 << 40) + 1)  # nor is it read again when it grows
    table.refresh()
    assert time.monotonic() - before < 5
    path.write_text(line(1, a=1.0) + line(2, a=2.0))  # until it is another one
    table.refresh()
    assert (len(table.columns["a"]), table.broken_lines) == (2, 0)


def test_a_file_that_is_a_link_is_not_read(tmp_path):
    (tmp_path / "secret").write_text(line(1, a=1.0))
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "secret")
    table = LogTable(Tail(tmp_path / "metrics.jsonl"))
    table.refresh()
    assert table.columns == {}
    assert last_lines(tmp_path / "metrics.jsonl") == []
    assert read_text(tmp_path / "metrics.jsonl", 100) == ""
    assert read_text(tmp_path / "metrics.jsonl", 100, follow=True)
