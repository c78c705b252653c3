"""Final answers: which pairs are equal, which are not, and which references hold none."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.rewards import answers, rules
from keel.rewards.isolated import Process

EQUAL = [
    # numbers and signs
    ("5", "{5}"), ("5", "(5)"), ("5", "{{5}}"), ("-4", "–4"), ("-4", "—4"), ("-4", "－4"), ("12", "１２"),
    ("0.5", ".50"), ("7", "7.000"), ("3", "+3"), ("0", "0.0"), ("1024", "2^{10}"), ("1/8", "2^{-3}"),
    # separators of thousands and decimals
    ("1234.5", "1,234.5"), ("1234.5", "1.234,5"), ("1234.5", "1 234,5"), ("1234", "1 234"),
    ("1234567", "1.234.567"), ("1234567", "1,234,567"), ("1234567", "1'234'567"), ("1234567", "1 234 567"),
    ("1234567", "1\u202f234\u202f567"), ("1234567", "12,34,567"), ("0.5", "0,5"), ("12.25", "12,25"),
    ("1234567", "1{,}234{,}567"), ("1234", r"1\,234"),
    # fractions and mixed numbers
    ("7/3", r"2\frac{1}{3}"), ("7/3", "2 1/3"), ("7/3", "2⅓"), ("-7/3", r"-2\frac13"), ("1/2", r"\frac12"),
    ("1/2", r"\tfrac{1}{2}"), ("1/2", r"\cfrac{2}{4}"), ("1/2", r"\frac 1 2"), ("1/2", "½"), ("0.75", "3⁄4"),
    ("1/2", r"\frac1{2}"), ("1/2", r"\frac{1}2"), ("-1/2", r"\frac{-1}{2}"), ("-1/2", r"-\dfrac{1}{2}"),
    ("1/6", r"\frac{\frac{1}{2}}{3}"), ("100/7", r"\frac{100}{7}"),
    # powers of ten and number words
    ("3000", r"3\times10^3"), ("3000", "3×10³"), ("0.003", "3·10⁻³"), ("0.003", r"3 \cdot 10^{-3}"),
    ("5000000", "5 million"), ("24", "2 dozen"), ("2500", "2.5e3"), ("1000", "10^3"),
    # percent
    ("12.5%", "12.5 percent"), ("0.125", r"12.5\%"), ("12,5 %", "12.5%"), ("1/4", "25%"),
    # money and units
    ("18", "$18"), ("18", r"\$18.00"), ("18", "18 dollars"), ("$18", "18 dollars"), ("18", "€18"),
    ("18", "18 €"),
    ("5", "5 apples"), ("12", "12 cm"), ("12", "12cm"), ("12", r"12\text{ cm}"), ("12 cm", "12 centimeters"),
    ("12", r"12\ \text{cm}^2"), ("12 cm^2", "12 square centimeters"), ("30", r"30^\circ"), ("30", "30°"),
    ("30", "30 degrees"), (r"30^{\circ}", "30 degrees"), ("60", "60 km/h"), ("60 km/h", "60 km per hour"),
    ("9.8", "9.8 m/s^2"), ("3", "3 hours"), ("3 hours", "3 h"), ("1200", "1,200 square feet"),
    # π, roots
    (r"2\pi", "2π"), (r"\frac{\pi}{2}", "π/2"), (r"\frac{\pi}{2}", r"0.5\pi"), ("2√3", r"2\sqrt{3}"),
    (r"\sqrt{12}", r"2\sqrt3"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"1+\sqrt{2}", r"\sqrt2 + 1"),
    (r"\sqrt{16}", "4"), (r"\frac{1+\sqrt{5}}{2}", r"\frac12+\frac{\sqrt5}{2}"), ("4π", r"4 \cdot \pi"),
    (r"25\pi \text{ cm}^2", r"25\pi"), (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"), ("2^{1/2}", r"\sqrt{2}"),
    # names and sentences around it
    ("5", "x = 5"), ("x=5", "5"), ("x = 5", "x=5.0"), ("5", "Answer: 5"), ("5", "The answer is 5."),
    ("5", "the final answer is: 5"), ("5", r"\boxed{5}"), ("5", r"\fbox{5}"), (r"\mathbf{5}", "5"),
    ("2x+1", "y = 2x + 1"),
    ("5", r"\displaystyle 5"), ("5", r"\left(5\right)"), ("5", "**5**"), (r"\$5", "5"), ("5", "$$5$$"),
    # lists, sets, tuples, intervals
    ("{1,2}", r"\{1, 2\}"), ("{1,2}", "{2, 1}"), ("1, 2", "2, 1"), ("1, 2", "1 and 2"),
    ("5 or 6", "x = 5 or x = 6"),
    ("5, 6", "{5, 6}"), ("1, 2, 3", "1, 2, and 3"), ("(1, 2)", r"\left( 1,\ 2 \right)"),
    ("(1/2, 3)", r"(0.5,3)"),
    ("[0, 1)", r"\left[0,1\right)"), (r"(-\infty, 3]", "(−∞,3]"), (r"[0,\infty)", "[0, ∞)"),
    (r"(-\infty,1)\cup(2,\infty)", "(2,∞) ∪ (−∞,1)"), (r"\pm 2", "2, -2"), ("±2", r"\{-2, 2\}"),
    (r"3\pm\sqrt{2}", r"3+\sqrt{2}, 3-\sqrt{2}"), (r"\emptyset", "∅"), (r"\varnothing", r"\{\}"),
    ("(3, \\frac{\\pi}{2})", "(3, π/2)"), (r"x \in [0,1]", "[0, 1]"),
    # text
    ("Paris", "paris"), ("Paris", '"Paris"'), (r"\text{Paris}", "Paris"), ("A", "(A)"), (r"\text{(C)}", "C"),
    ("B", "b."),
    ("Yes", "yes!"), ("3:4", "3 : 4"), ("x+1", "x + 1"), ("New York", "new  york"), ("12:30", "12:30"),
    ("x^2", "x²"), (r"x \le 3", "x ≤ 3"), ("x_1", "x_1"), (r"\frac{x}{2}", r"\dfrac{x}{2}"),
]  # fmt: skip

DIFFERENT = [
    ("5", "5 or 6"), ("5 or 6", "5"), ("5", "5, 5"), ("12", "1,2"), ("1,2", "12"), ("12", "1 2"), ("5", "-5"),
    ("5", "5x"),
    ("5", "x + 5"), ("5", "5/2"), ("7", r"2\frac{1}{3}"), ("21/3", r"2\frac{1}{3}"), ("2/3", r"2\frac{1}{3}"),
    ("1234", "1.234"), ("1234", "12,34"), ("1200", "1,2"), ("0.5", "0.05"), ("0.5", "5"), ("0.125", "12.5"),
    ("3", "3%%"),
    ("5 cm", "5 m"), ("5 cm", "5 cm^2"), ("5 apples", "5 oranges"), ("3 hours", "3 minutes"),
    ("5", "5 apples and 3 pears"),
    ("5", "five"), ("5", "5!"), ("5", "not 5"), ("5", "5 or so"), ("5", "5 to 6"), ("5", "5-6"),
    ("-2", "10-12"), ("-1", "5-6"),
    ("6", "2 × 3"), ("5", "2+3"), (r"2\pi", "6.28"), (r"2\pi", "2"), (r"\pi", "3.14159"),
    (r"\sqrt{2}", "1.414"),
    (r"\sqrt{2}", "2"), (r"\sqrt{12}", r"3\sqrt{2}"), (r"1+\sqrt{2}", r"1-\sqrt{2}"), (r"\pi/2", r"2/\pi"),
    ("3000", "3·10²"),
    ("10^3", "10^{-3}"), ("(1, 2)", "(2, 1)"), ("(1, 2)", "[1, 2]"), ("[1, 2)", "(1, 2]"),
    ("{1, 2}", "{1, 2, 3}"),
    ("{1, 2}", "{1}"), ("1", "{1, 2}"), ("1, 2", "1, 2, 3"), (r"\pm 2", "2"), (r"\emptyset", "0"),
    (r"(-\infty, 3]", "(-∞, 3)"),
    (r"(-\infty,1)\cup(2,\infty)", "(2,∞)"), ("x = 5", "y = 5"), ("x = 5", "x = 6"), ("Paris", "London"),
    ("A", "B"),
    ("A", "A or B"), ("(A)", "(A), (B)"), ("Yes", "No"), ("3:4", "4:3"), ("12:30", "12:31"), ("x+1", "x-1"),
    ("x^2", "x2"),
    ("x^2", "2x"), ("New York", "newyork"), ("1/2", "1/0"), ("5", ""), ("5", r"\boxed{}"), ("5", "....5...."),
    ("5", "5.5.5"),
    ("1000000", "1,000,00"), ("7/3", "2 3"), ("10", "1 0"), ("5", "5 5"), ("12", "12 12"), ("2", "2 of 3"),
    ("5", "x > 5"),
    ("5", "x = 5 or 6"), ("18", "18 dollars and 20 cents"), ("30", "30 x"), ("1e3", "1e4"), ("25%", "75%"),
    ("5", "5^2"),
]  # fmt: skip


@pytest.fixture
def without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal(without_math_verify: None, reference: str, answer: str) -> None:
    assert answers.same_answer(reference, answer)
    assert answers.same_answer(answer, reference)


@pytest.mark.parametrize("with_math_verify", [False, True])
@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different(
    monkeypatch: pytest.MonkeyPatch, reference: str, answer: str, with_math_verify: bool
) -> None:
    """Neither keel's parser nor math-verify is fooled."""
    if with_math_verify:
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setitem(sys.modules, "math_verify", None)
    assert not answers.same_answer(reference, answer)
    assert not answers.same_answer(answer, reference)


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        ("", "is blank"), (" \n", "is blank"), ("so it is\n####", "holds no answer"),
        (r"\boxed{}", "holds no answer"),
        ("$$", "holds no answer"), (r"\frac{1}{2", "braces of"), (r"\boxed{\frac{1}}{2}}", ""),
        ("1/0", "divides by zero"),
        (r"\frac{1}{0}", "divides by zero"), ("nan", "has no answer"), ("None", "has no answer"),
        ("word " * 100, "no final answer is marked"), ("word " * 100 + "#### 5", ""),
        ("word " * 100 + r"\boxed{5}", ""),
        ("5", ""), ("Paris", ""), ("(1, 2]", ""), ("{1, 2}", ""), (r"\{1, 2\}", ""), ("1/20", ""),
        ("<b>", ""),
    ],
)  # fmt: skip
def test_a_reference_without_an_answer_says_why(reference: str, wrong: str) -> None:
    found = answers.problem(reference)
    assert (wrong in found) if wrong else found == ""


@pytest.mark.parametrize(
    ("gold", "reply", "right"),
    [
        ("7", r"\boxed{2\frac{1}{3}}", 0), ("7/3", r"\boxed{2\frac{1}{3}}", 1), ("5", r"\boxed{{5}}", 1),
        ("5", r"\fbox{5}", 1), ("5", r"\boxed 5", 1), ("5", r"\boxed{x = 5}", 1), ("5", "#### Answer: 5", 1),
        ("5", "#### 5 apples", 1), (r"We get \boxed{18}, as was asked.", r"so \boxed{18}", 1),
        ("<answer>4</answer>", "#### 4", 1),
        (r"We get \boxed{18}.", r"so \boxed{19}", 0),
    ],
)  # fmt: skip
def test_answers_are_found_in_references_and_replies(gold: str, reply: str, right: int) -> None:
    assert rules.final_answer()(["q"], [reply], answer=[gold]) == [right]


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="0123456789.,/%^-+ \\{}()[]frac sqrt pi or\u221a\u03c0\u00bd\u00b2=x", max_size=40))
def test_any_text_is_read_without_an_error_and_equals_itself(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "math_verify", None)
        answers.problem(text)
        assert answers.same_answer(text, text) == bool(answers.plain(text))


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "10^{400}^{400}", "((((" * 70, "1," * 140, "\\frac" * 60, "{" * 500, "√" * 90,
     "5 " + "a" * 600 + "!", "5 " + "a b " * 99 + "!", "\\boxed{",
     "<answer>", "####\n", "\\boxed ", "5 " + "9," * 99],
)  # fmt: skip
def test_no_answer_takes_long(without_math_verify: None, text: str) -> None:
    start = time.perf_counter()
    answers.same_answer("5", text)
    answers.marked(text * 2000)
    assert time.perf_counter() - start < 2


# ---------------------------------------------------------------- math-verify


def test_math_verify_is_asked_about_formulas_that_differ_as_text_and_about_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    def verified(reference: str, answer: str) -> bool:
        asked.append((reference, answer))
        return True

    monkeypatch.setattr(answers, "_math_verify", verified)
    assert answers.same_answer("x+1", r"1+x")
    assert asked == [("x+1", "1+x")]
    assert answers.same_answer("5", "5.0")  # equal already
    assert not answers.same_answer("Paris", "pairs")  # words
    assert not answers.same_answer("x", "y" * 301)
    assert not answers.same_answer("5", "6")
    assert len(asked) == 1
    assert answers.same_answer(r"\sin{2}", "2^{x}")  # a command is no word
    assert len(asked) == 2


def test_math_verify_itself_knows_algebra() -> None:
    pytest.importorskip("math_verify")
    assert answers.same_answer("x+1", "1+x")
    assert answers.same_answer(r"(x-1)(x+1)", r"x^2-1")
    assert not answers.same_answer("x+1", "x+2")
    assert rules.final_answer()(["?"] * 2, [r"\boxed{1+x}", r"\boxed{x}"], answer=["x+1", "x+1"]) == [1, 0]


def test_math_verify_that_never_ends_is_stopped_and_the_answer_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own limits are alarms of Python, which do not interrupt C."""
    endless: Any = Process(
        "math-verify", {"what": "regex", "pattern": "(x+x+)+y", "flags": 0, "full": False}, 0.5
    )
    monkeypatch.setattr(endless, "ask", lambda request, what: Process.ask(endless, ["x" * 60], what))
    monkeypatch.setattr(answers, "_process", endless)
    monkeypatch.setattr(answers, "math_verify_is_here", lambda: True)
    assert not answers.same_answer("x+1", "1+x")
