"""What a model wrote can do nothing on a page, and is still there to be read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.feedback import difference, render

FORBIDDEN = re.compile(
    r"<\s*(script|img|svg|iframe|form|input|style|object|embed|link|meta|base|video|maction|semantics|mglyph"
    r"|malignmark|annotation|annotation-xml)\b|<m[^>]*\s(xlink:)?href\b|"
    r"<[^>]*\son\w+\s*=|<[^>]*\sstyle\s*=|<[^>]*(href|src)\s*=\s*[\"']?\s*(javascript|data|vbscript)",
    re.IGNORECASE,
)
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&#58;alert(1))",
    "<javascript:alert(1)>",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    '[x](https://a.example "onmouseover=alert(1)")',
    "<svg/onload=alert(1)>",
    "$</code><script>alert(1)</script>$",
    "\\[</code><img src=x onerror=alert(1)>\\]",
    "```<script>\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    "<a href='java\nscript:alert(1)'>x</a>",
    "[x]: javascript:alert(1)\n\n[x]",
    "$\\text{<script>alert(1)</script>}$",
    "$\\text{<img src=x onerror=alert(1)>}$",
    "$\\href{javascript:alert(1)}{x}$ $\\style{position:fixed}{x}$ $\\class{top}{x}$",
    "$\\mathbf{</math><script>alert(1)</script>}$",
    "$\\verb|<svg onload=alert(1)>|$ $\\unicode{x3C}script>$",
    "\\[\\color{red onload=alert(1)}x\\] $\\operatorname{<script>}$",
    "<math><annotation-xml encoding='text/html'><img src=x onerror=alert(1)></annotation-xml></math>",
    "<math href=javascript:alert(1)><maction actiontype='statusline#http://x.example'>x</maction></math>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_markup_of_a_reply_is_inert(text):
    shown = str(render.markdown(text))
    assert not FORBIDDEN.search(shown), shown
    for view in (str(render.raw(text)), *map(str, difference.marked(text, "other"))):
        assert not FORBIDDEN.search(view)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *ATTACKS,
                "<",
                ">",
                '"',
                "'",
                "`",
                "$",
                "\\(",
                "\\)",
                "|",
                "\n",
                "a",
                "&#x3c;",
                "\\text{",
                "}",
                "^",
                "\\[",
            ]
        )
    )
)
def test_no_mixture_of_markup_gets_through(parts):
    assert not FORBIDDEN.search(str(render.markdown("".join(parts))))


def test_markdown_is_read_and_pictures_are_named_only():
    shown = str(render.markdown("# Title\n\n**bold** ![a cat](http://x.example/cat.png)\n\n|a|\n|-|\n|1|"))
    assert '<h4 dir="auto">Title</h4>' in shown
    assert "<strong>bold</strong>" in shown
    assert "<td" in shown
    assert "a cat (http://x.example/cat.png)" in shown


def test_a_text_that_is_too_long_for_markdown_is_shown_as_it_is():
    text = "*a* " * render.LONGEST
    assert str(render.markdown(text)).count("*") == text.count("*")


@pytest.mark.parametrize(
    ("text", "thought", "rest"),
    [
        ("<think>why</think>\n\nso", "why", "so"),
        ("why</think>so", "why", "so"),
        ("<think>cut off", "cut off", ""),
        ("no thought", "", "no thought"),
        ("a <think> inside", "", "a <think> inside"),
    ],
)
def test_a_thought_is_told_from_the_reply(text, thought, rest):
    assert render.split_thought(text) == (thought, rest)


def test_tool_calls_of_both_forms_are_read():
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"name": "g", "arguments": {"b": "<b>"}},
        {"function": {"name": "h", "arguments": "not json"}},
    ]
    (turn,) = render.turns([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert [(call.name, call.arguments.split()) for call in turn.calls] == [
        ("f", ["{", '"a":', "1", "}"]),
        ("g", ["{", '"b":', '"<b>"', "}"]),
        ("h", ["not", "json"]),
    ]


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n.我喜é<", max_size=40), st.text("ab \n.我喜é<", max_size=40))
def test_a_difference_loses_no_character(one, other):
    left, right = difference.segments(one, other)
    assert "".join(text for text, _ in left) == one
    assert "".join(text for text, _ in right) == other
    assert "".join(t for t, same in left if same) == "".join(t for t, same in right if same)


def test_a_difference_is_by_words_and_in_chinese_by_characters():
    assert ("dog ", False) in difference.segments("the dog runs", "the cat runs")[0]
    assert difference.segments("我喜欢猫", "我喜欢狗")[0] == [("我喜欢", True), ("猫", False)]


def test_large_texts_are_compared_by_lines():
    lines = [f"line {i} of a long reply with some words" for i in range(400)]
    changed = [*lines[:200], "another", *lines[201:]]
    left, _ = difference.segments("\n".join(lines), "\n".join(changed))
    assert [text for text, same in left if not same] == ["line 200 of a long reply with some words\n"]
