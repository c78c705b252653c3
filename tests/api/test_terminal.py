"""What reaches a terminal: text, and no commands to it; in any encoding."""

from __future__ import annotations

import io
import json

import pytest

from keel.api.progress import TextProgress
from keel.api.terminal import inert, show


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x1b]0;title\x07b", "a\\u001b[2J\\u001b]0;title\\u0007b"),
        ("new\x9b31m", "new\\u009b31m"),  # ESC [ in one character
        ("over\rwritten\x08", "over\\u000dwritten\\u0008"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("tab\tand\nlines, β, 猫, سلام, 👩‍🚀", "tab\tand\nlines, β, 猫, سلام, 👩‍🚀"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert inert(text) == shown
    stream = io.StringIO()
    TextProgress(stream, redraw=False).say(text)
    assert stream.getvalue() == shown + "\n"


def test_an_ascii_locale_gets_everything_and_json_stays_json() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    value = {"β": "猫 👩 \x9b", "file": "a\udc80"}
    show(json.dumps(value, ensure_ascii=False), stream)
    assert json.loads(raw.getvalue().decode("ascii")) == value
