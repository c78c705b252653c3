"""Rules against values worked out by hand."""

from __future__ import annotations

import random
import sys
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.errors import UsageError
from keel.rewards import rules


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """keel's own check alone, whether or not the package is there; tests of the package take this back."""
    monkeypatch.setitem(sys.modules, "math_verify", None)


def rate(reward: rules.Reward, *completions: Any, **columns: Any) -> list[float | None]:
    return reward(prompts=["?"] * len(completions), completions=list(completions), **columns)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("72", "72"), ("72", "72.0"), ("72", "72.00"), ("72", "072"),
        ("72", "+72"), ("72", " 72. "), ("72", "72."),
        ("1200", "1,200"), ("1,200", "$1200"), ("1200", "$1,200.00"),
        ("1200", "1{,}200"), ("1200", r"\$1,200"),
        ("-3", "−3"), ("-3", "- 3"), ("-3", "-$3"), ("-3", "$-3"),
        ("0.5", "1/2"), ("1/2", "2/4"), ("1/2", ".5"),
        ("-1/2", r"-\frac{1}{2}"), (r"\dfrac{3}{4}", "0.75"),
        ("1.5", "1 1/2"), ("-1.5", "-1 1/2"), ("50", "50%"),
        ("50%", "50"), ("0.5", r"50\%"), ("50 %", "1/2"), ("0", "-0"),
        ("5", r"\text{5}"), ("5", "**5**"), ("5", "$5$"),
        ("1000", "1e3"), ("0.005", "5E-3"), ("6.02e23", r"6.02 \times 10^{23}"), ("300", "3·10^2"),
        ("1.5", "1½"), ("-1.5", "-1½"), ("3/4", "¾"), ("2.5", r"2\frac{1}{2}"), ("1000000", "1 000 000"),
        ("5", r"\(5\)"), ("Paris", "paris."), ("New  York", "new york"), (r"\left(1, 2\right)", "(1, 2)"),
    ],
)  # fmt: skip
def test_equal_answers(reference: str, answer: str) -> None:
    assert rules.same_answer(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("72", "73"), ("72", "-72"), ("72", "7.2"), ("72", "72 or 73"),
        ("72", ""), ("", ""), ("72", "seventy-two"),
        ("1200", "1,20"), ("1200", "12,00"), ("1/3", "0.333333"),
        ("50", "0.5"), ("5000%", "5"), ("1/2", "1/0"),
        ("1/0", "2/0"), ("Paris", "pairs"), ("1", "1e3"), ("5", "5e-3"),
        ("1", "2 1/2"), ("1", r"2\frac{1}{2}"), ("1", "1½"), ("1.5", "-1½"), ("0", "1 0"), ("10", "1 0"),
        ("1000", "1 00"),
        ("9" * 50, "9" * 49 + "8"), ("1", "9" * 5000), ("2", "x^2"),
    ],
)  # fmt: skip
def test_different_answers(reference: str, answer: str) -> None:
    assert not rules.same_answer(reference, answer)


def test_long_numbers_are_compared_exactly() -> None:
    """0.1 + 0.2 and 0.3 differ as floats; 2⁵³ and 2⁵³ + 1 are one float."""
    assert rules.same_answer("3/10", "0.30000")
    assert not rules.same_answer(str(2**53), str(2**53 + 1))


@given(st.fractions(max_denominator=10**6), st.booleans())
def test_a_fraction_equals_itself_in_any_form_and_nothing_else(value: Fraction, latex: bool) -> None:
    sign, over, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    text = rf"{sign}\frac{{{over}}}{{{under}}}" if latex else f"{sign}{over:,}/{under:,}"
    assert rules.same_answer(str(value), text)
    assert not rules.same_answer(str(value + 1), text)


@settings(deadline=None)
@given(st.text(alphabet="0123456789.,/%$-+ \\{}()frac#boxedanswer<>\n", max_size=60), st.text(max_size=20))
def test_no_text_breaks_the_check_and_the_check_is_symmetric_without_math_verify(
    one: str, other: str
) -> None:
    assert rules.same_answer(one, other) == rules.same_answer(other, one)
    for from_ in ("marker", "last_number"):
        (value,) = rate(rules.final_answer(from_=from_), one, answer=["1"])
        assert value in (0.0, 1.0)


@pytest.mark.parametrize(
    ("completion", "marker", "last_number"),
    [
        ("6 · 12 = 72\n#### 72", 1, 1),
        ("#### 72\nWhich is 6 dozens.", 1, 1),
        ("#### 70\nno:\n#### 72", 1, 1),
        ("#### 72\nno:\n#### 70", 0, 0),
        (r"so \boxed{72}", 1, 1),
        (r"so \boxed{\frac{144}{2}} of 80", 1, 1),
        (r"\boxed{70} and then \boxed {72}", 1, 1),
        ("<think>70</think><answer> 72 </answer> bye 5", 1, 1),
        (r"<answer>\boxed{72}</answer>", 1, 1),
        ("<answer>#### 72</answer>", 1, 1),
        (r"#### \boxed{72}", 1, 1),
        (r"\boxed{72} #### 71", 0, 0),
        ("the answer is 72", 0, 1),
        ("it costs $72.", 0, 1),
        ("80-8 = 72, as I said", 0, 1),
        ("at 10 it is 144/2", 0, 1),
        ("from 5 to -72", 0, 0),
        ("a range of 10-72", 0, 1),
        ("now x72", 0, 0),
        ("72 or 73", 0, 0),
        (r"\boxed{72 never closed", 0, 1),
        ("<answer>72", 0, 1),
        ("####", 0, 0),
        ("", 0, 0),
    ],
)
def test_where_the_final_answer_stands(completion: str, marker: float, last_number: float) -> None:
    reference = ["Six dozens are 6 · 12 = 71 + 1\n#### 72"]
    assert rate(rules.final_answer(), completion, answer=reference) == [marker]
    assert rate(rules.final_answer(from_="last_number"), completion, answer=reference) == [last_number]


def test_a_reference_without_a_marker_is_the_answer_and_a_row_without_one_is_left_out() -> None:
    reward = rules.final_answer("solution")
    found = rate(reward, *["#### 5"] * 6, solution=["5", 5, 5.0, None, " ", "6"], answer=["6"] * 6)
    assert found == [1, 1, 1, None, None, 0]


def test_a_conversation_is_read_like_text() -> None:
    reply = [{"role": "assistant", "content": "#### 5"}]
    assert rate(rules.final_answer(), reply, answer=["5"]) == [1.0]
    assert rate(rules.regex("^#"), reply) == [1.0]


def test_a_column_that_is_nowhere_is_named() -> None:
    with pytest.raises(UsageError, match="no column 'answr'; did you mean 'answer'"):
        rate(rules.final_answer("answr"), "x", answer=["1"])
    with pytest.raises(UsageError, match="no column 'answer'; there are level, task"):
        rate(rules.final_answer(), "x", task=["1"], level=[1])


# ---------------------------------------------------------------- formats and patterns


@pytest.mark.parametrize(
    ("completion", "whole", "share"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1, 1),
        ("<think></think><answer></answer>", 1, 1),
        ("<think>a < b</think><answer><b>b</b></answer>", 1, 1),
        ("so: <think>a</think><answer>b</answer>", 0, 1),
        ("<think>a</think> so <answer>b</answer>", 0, 1),
        ("<think>a</think><answer>b</answer>!", 0, 1),
        ("<think>a</think><answer>b", 0, 0.75),
        ("<think>a</think><think>a</think><answer>b</answer>", 0, 0.5),
        ("<answer>b</answer><think>a</think>", 0, 0.5),
        ("<think>a<answer>b</answer></think>", 0, 0.75),
        ("a", 0, 0),
        ("<THINK>a</THINK><answer>b</answer>", 0, 0.5),
    ],
)
def test_format_tags(completion: str, whole: float, share: float) -> None:
    assert rate(rules.format_tags(), completion) == [whole]
    assert rate(rules.format_tags(partial=True), completion) == [share]


def test_a_tag_that_the_prompt_has_opened_counts_as_the_completions_own() -> None:
    """Templates of thinking models end in <think>; every good reply would else get 0."""
    one, both = rules.format_tags(("think",)), rules.format_tags()
    assert one(["Sum?<think>\n"], ["2 and 2\n</think>"]) == [1.0]
    assert one(["Sum?"], ["2 and 2\n</think>"]) == [0.0]
    turns = ({"role": "user", "content": "Sum?"},)
    reply = ({"role": "assistant", "content": "a</think><answer>4</answer>"},)
    assert both([turns], [reply], prompt_tags=["<think>\n"]) == [1.0]
    assert both([turns, turns], [reply, reply], prompt_tags=["<think>", ""]) == [1.0, 0.0]
    assert both([turns], [reply], prompt_tags=["<other>"]) == [0.0]


@pytest.mark.parametrize(
    ("tags", "end", "reply", "right"),
    [
        (("think", "answer"), "<think>\n\n</think>\n\n", "<answer>4</answer>", 1),  # thoughts switched off
        (("think", "answer"), "<think>\n\n</think>\n\n", "<think></think><answer>4</answer>", 0),
        (("plan", "answer"), "<plan>", "a</plan><answer>4</answer>", 1),  # any tag, not only thoughts
        (("think", "answer"), "<think></think><answer>", "4</answer>", 1),
        (("answer",), "<think></think>", "<answer>4</answer>", 1),  # another's tags are none of its own
        (("answer",), "<think>", "<answer>4</answer>", 1),
        (("think", "answer"), "</think>", "<answer>4</answer>", 0),
        (("think", "answer"), "<answer></think>", "<answer>4</answer>", 0),
    ],
)
def test_what_a_template_has_begun_is_gone_on_with(
    tags: tuple[str, ...], end: str, reply: str, right: float
) -> None:
    turns = ({"role": "user", "content": "Sum?"},)
    assert rules.format_tags(tags)([turns], [reply], prompt_tags=[end]) == [right]
    assert rules.format_tags(tags)([f"Sum? {end}"], [reply]) == [right]


def test_format_tags_of_other_names() -> None:
    assert rate(rules.format_tags(("a.c",)), "<a.c>1</a.c>", "<abc>1</abc>") == [1, 0]


@given(st.integers(0, 2**32))
def test_the_whole_format_has_every_tag_in_place(seed: int) -> None:
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "x", "\n"]
    order = random.Random(seed)
    text = "".join(order.choice(pieces) for _ in range(order.randint(0, 8)))
    (whole,), (share,) = rate(rules.format_tags(), text), rate(rules.format_tags(partial=True), text)
    assert whole is not None
    assert share is not None
    assert whole <= share <= 1
    blank = text.replace("x", "").replace("\n", "")
    assert whole == 0 or blank == "<think></think><answer></answer>"


def test_regex_is_found_anywhere_or_must_be_all() -> None:
    assert rate(rules.regex(r"\d+"), "a 12 b", "none", "12") == [1, 0, 1]
    assert rate(rules.regex(r"\d+", full=True), "a 12 b", "none", "12") == [0, 0, 1]
    assert rate(rules.regex("a.b"), "a\nb") == [1]
    assert rate(rules.regex("(?-s:a.b)"), "a\nb") == [0]


def test_keywords_are_whole_words() -> None:
    texts = ["The cat sat.", "A CAT and a dog", "concatenate dogs", "ice  cream, C++!"]
    words = ["cat", "dog"]
    assert rate(rules.keywords(words), *texts) == [1, 1, 0, 0]
    assert rate(rules.keywords(words, "all"), *texts) == [0, 1, 0, 0]
    assert rate(rules.keywords(words, "share"), *texts) == [0.5, 1, 0, 0]
    assert rate(rules.keywords(words, "none"), *texts) == [0, 0, 1, 1]
    assert rate(rules.keywords(words, "share", ignore_case=False), *texts) == [0.5, 0.5, 0, 0]
    assert rate(rules.keywords(["ice cream", "C++"], "all"), *texts) == [0, 0, 0, 1]


# ---------------------------------------------------------------- length and repetition


def test_length_band() -> None:
    reward = rules.length_band(3, 5, slack=4)
    ids = [[0] * n for n in (0, 1, 3, 5, 6, 8, 9, 20)]
    assert rate(reward, *["x"] * 8, completion_ids=ids) == [0.25, 0.5, 1, 1, 0.75, 0.25, 0, 0]
    assert rate(rules.length_band(2, 3, "words"), "a", "a b", "a  b\nc", "a b c d") == [0, 1, 1, 0]
    assert rate(rules.length_band(2, 3, "characters", slack=2), "a", "äb", "abcd", "abcde") == [
        0.5,
        1,
        0.5,
        0,
    ]


def test_repetition() -> None:
    """ "a b a b a" has the 3-grams aba, bab, aba: 2 of 3 distinct. The second is TRL's own example, −0.75, in
    words."""
    assert rate(rules.repetition(3), "a b a b A") == [pytest.approx(-1 / 3)]
    assert rate(rules.repetition(2), "1 2 3 4", "5 5 5 5 5", "5", "") == [0, -0.75, 0, 0]
    assert rate(rules.repetition(1), "no no no yes") == [-0.5]


def test_overlong() -> None:
    """DAPO's eq. 13 with L_max 100 and a buffer of 20; 90 is TRL's own example."""
    ids = [[0] * n for n in (0, 80, 81, 90, 100, 101, 500)]
    assert rate(rules.overlong(100, 20), *["x"] * 7, completion_ids=ids) == [0, 0, -0.05, -0.5, -1, -1, -1]
    assert rate(rules.overlong(100, 0), *["x"] * 2, completion_ids=[[0] * 100, [0] * 101]) == [0, -1]


@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 400))
def test_overlong_never_rises_with_the_length(max_length: int, buffer: int, length: int) -> None:
    reward = rules.overlong(max_length, min(buffer, max_length))
    now, longer = rate(reward, "x", "x", completion_ids=[[0] * length, [0] * (length + 1)])
    assert now is not None
    assert longer is not None
    assert -1 <= longer <= now <= 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rules.final_answer(from_="last"), "from_: 'last' is not one of marker, last_number"),
        (lambda: rules.regex("("), r"'\(' is no regular expression"),
        (lambda: rules.keywords("cat"), "words: 'cat' must be a list"),
        (lambda: rules.keywords([]), "must be a list of at least one word"),
        (lambda: rules.keywords(["a"], "most"), "mode: 'most'"),
        (lambda: rules.format_tags("think"), "tags: 'think' must be a list"),
        (lambda: rules.length_band(5, 3), "low 5 and high 3"),
        (lambda: rules.length_band(1, 3, slack=-1), "slack -1"),
        (lambda: rules.length_band(1, 3, "bytes"), "unit: 'bytes'"),
        (lambda: rules.repetition(0), "n 0"),
        (lambda: rules.overlong(10, 11), "buffer 11 and max_length 10"),
        (lambda: rules.overlong(10, -1), "buffer -1"),
        (lambda: rules.overlong(0, 0), "max_length 0"),
    ],
)
def test_settings_without_sense_are_refused_at_once(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("So \\boxed{18}.\n\n#### Check\n9*2 = 18", 1.0),  # a heading behind the box
        ("#### Steps\n9 + 9\n#### 18", 1.0),
        ("#### 18\nThat is all.", 1.0),  # no other marker
        ("\\fbox{18}", 1.0),
        ("It is \\boxed 18.", 1.0),
        ("\\boxed{17}\n\n#### 18", 1.0),
        ("\\boxed{18}\n\n#### 17", 0.0),
    ],
)
def test_a_heading_of_markdown_is_no_answer(completion: str, expected: float) -> None:
    assert rules.final_answer("answer")(["q"], [completion], answer=["18"]) == [expected]


def test_a_dot_of_a_pattern_matches_newlines() -> None:
    assert rules.regex("<a>.*</a>")(["q"], ["<a>\n1\n</a>"]) == [1.0]
    assert rules.regex("<a>(?-s:.*)</a>")(["q"], ["<a>\n1\n</a>"]) == [0.0]


def test_of_an_episode_its_own_words_are_judged_with_its_thought_and_without_empty_turns() -> None:
    """As of a reply that is text, whether the prompt's template has opened the thought or not."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    episode = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "<think>a tool's</think>"},
        {"role": "assistant", "content": "<answer>7</answer>", "reasoning_content": "so"},
    )
    assert rate(rules.format_tags(), episode) == [1.0]
    assert rate(rules.regex(r"<think>\nso\n</think>\n<answer>7</answer>", full=True), episode) == [1.0]
    alone = episode[2:]
    assert rate(rules.format_tags(), alone, prompt_tags=["<think>"]) == [1.0]
    assert rate(rules.format_tags(), alone, prompt_tags=[""]) == [1.0]
    assert rate(rules.format_tags(), "<think>so</think><answer>7</answer>", prompt_tags=["<think>"]) == [0.0]
