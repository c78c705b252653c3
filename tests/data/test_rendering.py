"""A template from a stranger: what it raises, what it takes, and which day it believes it is."""

from __future__ import annotations

import datetime
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from keel.data import chat
from keel.data.chat import rendering
from keel.errors import UsageError

TURNS: Any = ({"role": "user", "content": "hi"},)
HEAD = "{%- for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\n"


@pytest.fixture
def tiny_tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def render(tiny_tokenizer: Any) -> Any:
    def rendered(template: str) -> str:
        tiny_tokenizer.chat_template = template
        return rendering.apply(tiny_tokenizer, list(TURNS), True, {})

    return rendered


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "{{ raise_exception('no tools here') }}",
            r"refuses the roles user: no tools here \(line 4 of the template\)",
        ),
        ("{{ 1 // 0 }}", r"ZeroDivisionError: .*\(line 4"),
        ("{{ messages + 1 }}", r"TypeError: .*\(line 4"),
        ("{{ messages.a.b.c }}", r"has no attribute 'a' \(line 4"),
        ("{{ range(10**9) }}", r"OverflowError: .*\(line 4"),
        ("{% include 'x' %}", r"TypeError: .*\(line 4"),
        ("{% import 'x' as x %}", r"TypeError: .*\(line 4"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"RecursionError: .*\(line 4"),
        ("{{ messages[0].append(1) }}", r"\(line 4"),
        ("{% for %}", r"TemplateSyntaxError: .*\(line 4"),
        ("{{ 'a' | nothing }}", r"No filter named 'nothing'.*\(line 4"),
        ("{{ '%d' % 'x' }}", r"TypeError: .*\(line 4"),
        ("{{ 'x'.__class__.__mro__ }}", r"SecurityError: .*\(line 4"),
        ("{{ [3, 'a'] | sort }}", r"TypeError: .*\(line 4"),
        ("{{ messages | tojson(indent='x' * 3, sort_keys=1, separators=3) }}", r"TypeError: .*\(line 4"),
    ],
)
def test_what_a_template_raises_is_one_line_with_its_place(render: Any, code: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        render(f"{HEAD}\n{code}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


SLOW = [
    "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(24) }}",
]


@pytest.mark.parametrize("code", SLOW)
@pytest.mark.parametrize("threaded", [False, True])
def test_a_template_that_takes_too_long_is_stopped(
    render: Any, monkeypatch: pytest.MonkeyPatch, code: str, threaded: bool
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    found: list[str] = []

    def attempt() -> None:
        with pytest.raises(UsageError) as caught:
            render(f"{HEAD}\n{code}")
        found.append(str(caught.value))

    start = time.monotonic()
    if threaded:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join(20)
    else:
        attempt()
    assert time.monotonic() - start < 10
    assert found[0].startswith("the chat template takes more than 0.3 s over one conversation (line 4")
    monkeypatch.undo()
    assert render(HEAD) == "user: hi\n"  # nothing is left that would stop the next one


@pytest.mark.parametrize(
    "code",
    [
        "{{ 'a' * 10 ** 11 }}",
        "{% set n = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
def test_a_template_that_fills_the_memory_is_stopped(render: Any, code: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UsageError, match=r"takes more than 1024 MiB of memory over one conversation"):
        render(f"{HEAD}\n{code}")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


# ---------------------------------------------------------------- the date

ASKS = HEAD + "{{ strftime_now('%d %b %Y %H:%M') }}"
TAKES = (
    HEAD
    + "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
)
LLAMA = (
    HEAD + "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string }}"
)
DAY = datetime.date(2026, 3, 7)


def test_a_template_writes_the_date_that_it_is_given(render: Any) -> None:
    with chat.on_date(DAY):
        assert render(ASKS).endswith("07 Mar 2026 00:00")
        assert render(LLAMA).endswith("07 Mar 2026")
        assert render(TAKES).endswith("26 Jul 2024")  # its own, as where keel is not asked
        with chat.on_date(DAY, given=True):
            assert render(TAKES).endswith("07 Mar 2026")
            assert render(LLAMA).endswith("07 Mar 2026")
        with chat.on_date(None):
            assert render(ASKS)[:-5].endswith(datetime.datetime.now().strftime("%d %b %Y "))
    assert render(ASKS)[:-5].endswith(datetime.datetime.now().strftime("%d %b %Y "))


def test_a_row_s_own_date_string_comes_first(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = TAKES
    with chat.on_date(DAY, given=True):
        text = rendering.apply(tiny_tokenizer, list(TURNS), True, {"date_string": "1 Jan"})
    assert text.endswith("1 Jan")


def test_which_templates_depend_on_the_date() -> None:
    assert [chat.asks_for_date(t) for t in (ASKS, LLAMA, TAKES, HEAD)] == [True, True, False, False]
    assert [chat.asks_for_date(t, given=True) for t in (ASKS, LLAMA, TAKES, HEAD)] == [
        True,
        True,
        True,
        False,
    ]
