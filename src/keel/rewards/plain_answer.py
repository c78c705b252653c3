"""An answer's text in one way of writing: LaTeX's layout, Unicode's signs and Markdown taken out."""

from __future__ import annotations

import re
import unicodedata

EMPTY = "\\emptyset"
_SIGNS = {
    **dict.fromkeys("\u2212\u2012\u2013\u2014\ufe63\uff0d\u2010\u2011", "-"),
    **dict.fromkeys("\u00d7\u2a2f\u2715", "\\times "), **dict.fromkeys("\u00b7\u22c5\u2219", "\\cdot "),
    "\u00f7": "\\div ", **dict.fromkeys("\u2044\u2215", "/"), "\u2217": "*",
    "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u00b1": "\\pm ", "\u222a": "\\cup ", "\u2208": "\\in ",
    "\u2205": EMPTY, "\u00f8": EMPTY, "\u00d8": EMPTY, "\u00ba": "°", "\u02da": "°", "\u03bc": "µ",
    "\u2264": "\\le ",
    "\u2265": "\\ge ", "\u2260": "\\ne ", "\u03b8": "\\theta ", "\u03b1": "\\alpha ", "\u03b2": "\\beta ",
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008", " "),
    **dict.fromkeys("\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    "\u2032": "'", "\u2019": "'", "\uff0c": ",", "\u3001": ",",
}  # fmt: skip
_TRANSLATED = str.maketrans(_SIGNS)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
_UP = str.maketrans(_SUPERSCRIPTS, "0123456789-+")
_LAYOUT = re.compile(
    r"\\(?:[,;:!]|(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|quad|qquad|hspace\{[^{}]*\})(?![a-zA-Z]))|~"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|operatorname|mbox|emph|boldsymbol|"
    r"bf|rm)\s*\{([^{}]*)\}"
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_ARGUMENT = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_FRACTION = re.compile(rf"\\frac\s*(?:{_ARGUMENT}|(\d|[a-z]))\s*(?:{_ARGUMENT}|(\d|[a-z]))")
_ROOT = re.compile(r"(?:\\sqrt|√)\s*(?:(\d+(?:\.\d+)?)|([a-z])(?![a-z]))(?!\])")


def plain(text: str) -> str:
    """The answer without LaTeX's spacing and delimiters, signs of money, final dots and repeated spaces;
    fractions as ((a)/(b)) or a/b, roots as \\sqrt{a}."""
    text = re.sub(r"[\uff01-\uff5e]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(rf"[{_SUPERSCRIPTS}]+", lambda m: f"^{{{m[0].translate(_UP)}}}", text)
    text = re.sub(r"[¼-¾⅐-⅞]", _written_out, text.translate(_TRANSLATED)).replace("{,}", ",")
    text = re.sub(r"\\(?:[dtc]frac)(?![a-z])", r"\\frac", text).replace(r"\%", "%").replace("\\ ", " ")
    text = _LAYOUT.sub("", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degree(?![a-z])", "°", text)
    text = re.sub(r"\\(?:varnothing|emptyset)(?![a-z])", lambda _: EMPTY, text)
    text = re.sub(r"\\leq(?![a-z])", r"\\le", re.sub(r"\\geq(?![a-z])", r"\\ge", text))
    text = re.sub(r"\\?\$|[€£¥₹]|\\[()\[\]]|\*\*", "", text)
    for _ in range(6):  # from the inside out
        before = text
        text = _BOX.sub(r"\1", _TEXT.sub(r"\1", text))
        text = _FRACTION.sub(_fraction, text)
        if text == before:
            break
    text = _ROOT.sub(r"\\sqrt{\1\2}", text).replace("√", "\\sqrt")
    text = re.sub(r"\^\s*\{\s*(\w)\s*\}", r"^\1", text)
    text = text.replace("\\{", "{").replace("\\}", "}")
    return " ".join(text.split()).rstrip(". ")


def _fraction(match: re.Match[str]) -> str:
    """a/b for numbers, with a space before it behind a number (2\\frac{1}{3} is 2 1/3); else ((a)/(b))."""
    over, under = (match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()
    before = match.string[: match.start()].rstrip()
    if re.fullmatch(r"[\d.,]+", over) and re.fullmatch(r"[\d.,]+", under):
        space = " " if before[-1:].isdigit() else ""
        return f"{space}{over}/{under}"
    return f"(({over})/({under}))"


def _written_out(fraction: re.Match[str]) -> str:
    """½ as 1/2, with a space before it behind a number: 1½ is 1 1/2."""
    behind_number = fraction.start() > 0 and fraction.string[fraction.start() - 1].isdigit()
    return " " * behind_number + unicodedata.normalize("NFKC", fraction[0]).replace("\u2044", "/")
