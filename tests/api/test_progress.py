"""Progress as lines, for logs without a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest

from keel.api.progress import TextProgress


def test_lines_have_the_time_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "strftime", lambda form: "12:34:56")
    progress = TextProgress(stream, redraw=False)
    for step in range(1, 101):
        progress("sft", step, 100, {"loss": 0.5})
        now[0] += 70.0
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft 10/100  loss 0.5  [12:34:56, 1:45:00 left]"  # 90 steps of 70 s
    assert lines[8] == "sft 90/100  loss 0.5  [12:34:56, 11:40 left]"
    assert lines[-1] == "sft 100/100  loss 0.5  [12:34:56]"
    assert len(lines) == 10


def test_nothing_is_said_of_the_time_left_at_the_first_step() -> None:
    stream = io.StringIO()
    TextProgress(stream, redraw=False)("sft", 1, 3, {})
    assert re.fullmatch(r"sft 1/3  \[\d\d:\d\d:\d\d\]\n", stream.getvalue())
