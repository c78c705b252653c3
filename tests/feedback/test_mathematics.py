"""Mathematics of replies: set as MathML, or left as TeX where it is not understood; never more than that."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.feedback import mathematics, render


def shown(text: str) -> str:
    return str(render.markdown(text))


@pytest.mark.parametrize("text", ["$x < y$", "\\(x < y\\)"])
def test_a_formula_in_a_line(text):
    row = "<mrow><mi>x</mi><mo>&lt;</mo><mi>y</mi></mrow>"
    assert f'<math display="inline">{row}</math>' in shown(text)


@pytest.mark.parametrize(
    "text",
    [
        "$$\nx < y\n$$", "\\[ x < y \\]", "see\n\\[\nx < y\n\\]\nhere", "- a \\[x < y\\]",
        "then $$x < y$$ so", "\\begin{equation}\nx < y\n\\end{equation}",
    ],
)  # fmt: skip
def test_a_displayed_formula_wherever_models_write_it(text):
    assert (
        '<math display="block" tabindex="0"><mrow><mi>x</mi><mo>&lt;</mo><mi>y</mi></mrow></math>'
        in shown(text)
    )


@pytest.mark.parametrize(
    ("tex", "part"),
    [
        ("\\frac{a}{b}", "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>"),
        ("x_i^2", "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>"),
        ("\\sqrt[3]{x}", "<mroot><mrow><mi>x</mi></mrow><mn>3</mn></mroot>"),
        ("\\mathbb{R}", "<mi>ℝ</mi>"),
        ("\\mathbf{xy}", "<mi>𝐱</mi><mi>𝐲</mi>"),
        ("\\mathcal{N}", "<mi>𝒩</mi>"),
        ("\\boxed{42}", '<mrow class="boxed"><mrow><mn>42</mn></mrow></mrow>'),
        ("\\begin{aligned} a &= b \\\\ &= c \\end{aligned}", '<mtd class="right"><mi>a</mi></mtd>'),
        ("\\begin{cases} a & b \\end{cases}", '<mtd class="left"><mi>a</mi></mtd>'),
        ("\\text{if } x", "<mtext>if&nbsp;</mtext>"),
        ("a \\not= b", "<mo>≠</mo>"),
        ("\\textbf{so}", '<mtext class="bold">so</mtext>'),
    ],
)
def test_what_models_write_is_set(tex, part):
    assert part in shown(f"${tex}$")


@pytest.mark.parametrize(
    "tex",
    [
        "\\foo x", "x^", "\\frac{1}", "a & b", "\\begin{cases} a", "\\left( x", "{" * 200 + "}" * 200,
        "x" * (mathematics.LONGEST + 1), "\\href{https://x.example}{y}", "\\newcommand{\\a}{b} \\a",
        "\\unicode{xD800}", "50% of x = y", "a \\\\% b", "\\sqrt{" * 60 + "x" + "}" * 60,
    ],
)  # fmt: skip
def test_what_is_not_understood_stays_tex(tex):
    page = shown(f"${tex}$")
    assert "<math" not in page
    assert '<code class="math">' in page


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 and then $6.", "It costs $5 and $10.", "between $100 and 200$ a month",
        "It is $20 (or US$ 25).", "$5 or $6? I said \\$7", "US$5 million and C$7 million",
    ],
)  # fmt: skip
def test_money_is_no_mathematics(text):
    page = shown(text)
    assert "math" not in page
    assert page.count("$") == text.count("$")


def test_a_length_leaves_nothing_out_of_its_place():
    page = shown(
        "$a\\hspace{99em}b\\kern-50em c\\hspace{1em}d \\raise 40em x \\rule{90em}{90em}$ $\\color{white}x$"
    )
    assert not re.search(r"\d\d+(\.\d+)?(em|ex|px|pt)", re.sub(r"<code.*?</code>", "", page))
    assert "white" not in page
    assert 'width="1em"' in shown("$a\\hspace{1em}b\\hspace{99em}c$")


NESTED = "\\sideset{}{}" * 60 + "x"
BOMB = "\\def\\a{{\\b}{\\b}}\\def\\b{{\\c}{\\c}}\\a"


@pytest.mark.parametrize(
    "piece",
    [
        "{", "\\frac", "\\displaystyle ", "\\text{", "\\operatorname{ ", "\\verb|", "x^", "'", "\\hat",
        "\\not", "\\left(", "\\begin{matrix}", "\\skew{1}", "\\over ", "a_", "\\sqrt[", NESTED, BOMB,
        "\\hbox{$", "9" * 50 + " ",
    ],
)  # fmt: skip
def test_a_formula_that_is_meant_to_cost_time_does_not(piece):
    tex = (piece * mathematics.LONGEST)[: mathematics.LONGEST]
    begun = time.process_time()
    mathematics.typeset.__wrapped__(tex, True)
    assert time.process_time() - begun < 1


def test_the_formulas_of_a_text_have_a_bound_together():
    tex = "\\frac{a}{b}+" * 50
    text = f"${tex}x$ " * 300
    begun = time.process_time()
    page = shown(text)
    assert time.process_time() - begun < 3
    assert page.count("<math") + page.count("<code") == 300
    assert 0 < page.count("<math") <= mathematics.MOST // len(tex)
    spent = mathematics.Budget(seconds=-1.0)
    assert spent.typeset("x", False) is None


PIECES = [
    "\\frac", "{", "}", "^", "_", "x", "1", "\\text{<b>", "\\sum", "&", "\\\\", "<", '"', "\\begin{cases}",
    "\\end{cases}", "\\left(", "\\right)", "\\mathbf", " ", "\\color{", "\\href{", "\\boxed", "\\sqrt", "é",
    "\x00",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_what_is_set_is_well_formed_and_holds_known_elements_alone(parts):
    from xml.etree import ElementTree

    found = mathematics.typeset.__wrapped__("".join(parts), False)
    if found is None:
        return
    assert render.markdown(f"$${''.join(parts)}$$") is not None
    for element in ElementTree.fromstring(str(found).replace("\x00", "")).iter():
        allowed = {*mathematics.ELEMENTS.get(element.tag, ()), "class"}
        assert element.tag in {*mathematics.ELEMENTS, "mpadded"}
        assert set(element.attrib) <= allowed
