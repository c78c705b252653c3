"""TeX as MathML, which browsers set by themselves: no script, no font and no other host is needed.

`latex2mathml` reads the TeX. What it makes is not used as it is: its text output has what stood in the TeX
as markup (`\\text{<script>}`), and its tree has links, styles and colours. So the tree is written anew here,
with the elements and attributes of MathML Core that say how a formula looks, every text escaped. TeX that is
not understood whole stays TeX: `typeset` gives None.

A sign of per cent without its backslash begins a comment in TeX, and the rest of the line would be missing:
such a formula stays TeX too.

A reply may be meant to cost time or room. Formulas that are long, deep, or define or double things are left
as TeX, and lengths are held to a few em, so that nothing leaves its place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from latex2mathml.converter import convert_to_element
from markupsafe import Markup

LONGEST = 2_000  # characters of one formula
DEEPEST = 40  # elements in one another
MOST = 40_000  # characters of all formulas of a text
SECONDS = 0.5  # that the formulas of a text may take

# elements and the attributes that are kept of each; a class stands for what MathML Core has no attribute for
ELEMENTS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        ("mrow", "mn", "msub", "msup", "msubsup", "msqrt", "mroot", "mtr", "mphantom"), frozenset[str]()
    ),
    "math": frozenset({"display", "tabindex"}),
    "mi": frozenset({"mathvariant"}),
    "mtext": frozenset({"class"}),
    "mo": frozenset(
        {"stretchy", "form", "lspace", "rspace", "minsize", "maxsize", "movablelimits", "largeop"}
    ),
    "mspace": frozenset({"width"}),
    "mfrac": frozenset({"linethickness"}),
    "mover": frozenset({"accent"}),
    "munder": frozenset({"accentunder"}),
    "munderover": frozenset({"accent", "accentunder"}),
    "mtable": frozenset({"class", "displaystyle"}),
    "mtd": frozenset({"class"}),
    "mstyle": frozenset({"displaystyle", "scriptlevel"}),
}
CLASSES = {
    "mtext": {"bold", "italic", "sans", "mono"}, "mtd": {"left", "right"}, "mtable": {"aligned"},
    "mrow": {"boxed", "struck"}, "mpadded": {"slash"},
}  # fmt: skip
_CHILDREN = {
    "mfrac": 2,
    "mroot": 2,
    "msub": 2,
    "msup": 2,
    "mover": 2,
    "munder": 2,
    "msubsup": 3,
    "munderover": 3,
}
_WORDS = re.compile(r"true|false|block|inline|prefix|infix|postfix|normal|[+-]?\d{1,2}")
_LENGTH = re.compile(r"(-?\d{0,3}(?:\.\d{1,4})?)(em|ex|px|pt|mu)?")
_EM = {"em": 1.0, "ex": 0.5, "px": 0.0625, "pt": 0.083, "mu": 0.056, None: 1.0}
_WIDEST = 3.0  # em
_SPACES = {
    "thinmathspace": "0.167em", "mediummathspace": "0.222em", "thickmathspace": "0.278em",
    "negativethinmathspace": "-0.167em", "negativemediummathspace": "-0.222em",
    "negativethickmathspace": "-0.278em",
}  # fmt: skip
_LIMITS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
_WITH_LIMITS = {
    "lim", "max", "min", "sup", "inf", "lim\u2006sup", "lim\u2006inf", "arg\u2009max", "arg\u2009min", "Pr",
    "det", "gcd", *"∑∏∐⋃⋂⨁⨂⋁⋀",
}  # fmt: skip
_SLASH = "\u29f8"  # of \not: the next sign is written over it
# what defines, repeats without end, or stands for something outside of the formula
_REFUSED = re.compile(
    r"\\(?:def|[gex]def|let|(?:re)?newcommand|providecommand|(?:re)?newenvironment|DeclareMathOperator"
    r"|sideset|href|class|style|unicode|rule|includegraphics|input|label|ref)(?![a-zA-Z])"
)
_COMMENT = re.compile(r"(?<!\\)(?:\\\\)*%")  # TeX drops what follows: models write it for per cent
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([a-zA-Z]+\*?)\}")
_RENAMED = {
    "aligned": "align*", "align": "align*", "alignedat": None, "alignat": None, "alignat*": None,
    "dcases": "cases", "displaymath": "", "equation": "", "equation*": "",
    "eqnarray": "matrix", "eqnarray*": "matrix", "gather": "matrix", "gather*": "matrix",
    "gathered": "matrix", "multline": "matrix", "multline*": "matrix",
}  # fmt: skip
_REFERENCE = re.compile(r"&#x([0-9A-Fa-f]{1,6});")


class _NotRead(Exception):
    """This formula is not understood whole, or is none that should be set."""


@lru_cache(maxsize=2048)
def typeset(tex: str, block: bool) -> Markup | None:
    """A formula as MathML; None for one that stays TeX. block: on a line of its own."""
    if len(tex) > LONGEST or _REFUSED.search(tex) or _COMMENT.search(tex):
        return None
    display = "block" if block else "inline"
    try:
        element = convert_to_element(_prepared(tex), display=display)
        text = _written(element, 0)
        text.encode()
    except Exception:  # the reader of TeX raises whatever comes up on TeX that it does not know
        return None
    return Markup(text)


def _prepared(tex: str) -> str:
    """The TeX with environments that the reader knows by another name, and signs that it has only whole."""

    def renamed(match: re.Match[str]) -> str:
        new = _RENAMED.get(match[2], match[2])
        if new is None:
            raise _NotRead
        return f"\\{match[1]}{{{new}}}" if new else ""

    named = re.sub(r"\\arg(?![a-zA-Z])", r"\\operatorname{arg}", _ENVIRONMENT.sub(renamed, tex))
    return re.sub(r"\\not\s*=", r"\\neq ", named)


def _written(element: Any, depth: int) -> str:
    """An element with all that is in it."""
    if depth > DEEPEST or (element.tail or "").strip():
        raise _NotRead
    tag, text = element.tag, _text(element)
    attributes = _attributes(tag, element.attrib)
    if tag == "menclose":
        notation = element.get("notation", "")
        tag, attributes = "mrow", {"class": "boxed" if notation == "box" else "struck"}
    elif tag == "mpadded":
        over = len(element) == 1 and _text(element[0]) == _SLASH
        tag, attributes = ("mpadded", {"class": "slash"}) if over else ("mrow", {})
    elif tag not in ELEMENTS:
        raise _NotRead
    tag = _LIMITS.get(tag, tag) if len(element) and _text(element[0]) in _WITH_LIMITS else tag
    if _CHILDREN.get(tag, len(element)) != len(element):
        raise _NotRead
    if element.tag == "mo" and text in _WITH_LIMITS:
        attributes["movablelimits"] = "true"  # below and above on a line of its own, else beside
    if tag == "math" and attributes.get("display") == "block":
        attributes["tabindex"] = "0"  # a wide one scrolls, by keyboard too
    variant = element.get("mathvariant")
    if variant and tag == "mtext":
        attributes |= _named_class(variant)
    elif variant:
        text = "".join(_in_variant(variant, letter) for letter in text)
    inner = "".join(_written(child, depth + 1) for child in element)
    shown = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f"<{tag}{shown}>{Markup.escape(text)}{inner}</{tag}>"


def _text(element: Any) -> str:
    """An element's own text, its characters as themselves."""
    text = _REFERENCE.sub(lambda match: chr(int(match[1], 16)), element.text or "")
    if element.tag in ("mi", "mo", "mn") and (text.startswith("\\") or text == "&"):
        raise _NotRead  # a command that the reader does not know, or a column outside of a table
    return text


def _attributes(tag: str, given: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in given.items():
        value = _SPACES.get(value, value)
        if name == "columnalign" and tag == "mtd" and value in CLASSES["mtd"]:
            found["class"] = value
        elif name == "columnspacing" and tag == "mtable":
            found["class"] = "aligned"
        elif (
            name in ELEMENTS.get(tag, ())
            and name != "class"
            and (_WORDS.fullmatch(value) if name in _NAMED else _is_short(value))
        ):
            found[name] = value
    return found


_NAMED = {
    "display", "mathvariant", "stretchy", "form", "movablelimits", "largeop", "accent", "accentunder",
    "displaystyle", "scriptlevel",
}  # fmt: skip


def _is_short(value: str) -> bool:
    """Whether a length is one of a few em."""
    match = _LENGTH.fullmatch(value)
    if match is None or match[1] in ("", "-"):
        return False
    return abs(float(match[1])) * _EM[match[2]] <= _WIDEST


# ---------------------------------------------------------------- alphabets


def _named_class(variant: str) -> dict[str, str]:
    name = {"bold": "bold", "italic": "italic", "sans-serif": "sans", "monospace": "mono"}.get(variant)
    return {"class": name} if name else {}


# MathML Core has the other alphabets as characters: where A, a and 0 of each stand
_ALPHABETS: Mapping[str, tuple[int, int, int | None]] = {
    "bold": (0x1D400, 0x1D41A, 0x1D7CE), "italic": (0x1D434, 0x1D44E, None),
    "bold-italic": (0x1D468, 0x1D482, None), "script": (0x1D49C, 0x1D4B6, None),
    "bold-script": (0x1D4D0, 0x1D4EA, None), "fraktur": (0x1D504, 0x1D51E, None),
    "double-struck": (0x1D538, 0x1D552, 0x1D7D8), "bold-fraktur": (0x1D56C, 0x1D586, None),
    "sans-serif": (0x1D5A0, 0x1D5BA, 0x1D7E2), "monospace": (0x1D670, 0x1D68A, 0x1D7F6),
}  # fmt: skip
_OLDER = {  # letters that had a place before the alphabets did
    "italic": {"h": "ℎ"},
    "script": dict(zip("BEFHILMRego", "ℬℰℱℋℐℒℳℛℯℊℴ", strict=True)),
    "fraktur": dict(zip("CHIRZ", "ℭℌℑℜℨ", strict=True)),
    "double-struck": dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ", strict=True)),
}


def _in_variant(variant: str, letter: str) -> str:
    """A letter or digit in another alphabet; itself where that has none."""
    if variant not in _ALPHABETS or not letter.isascii():
        return letter
    if (older := _OLDER.get(variant, {}).get(letter)) is not None:
        return older
    upper, lower, digit = _ALPHABETS[variant]
    if letter.isupper():
        return chr(upper + ord(letter) - ord("A"))
    if letter.islower():
        return chr(lower + ord(letter) - ord("a"))
    return chr(digit + int(letter)) if letter.isdigit() and digit is not None else letter


# ---------------------------------------------------------------- of a whole text


@dataclass
class Budget:
    """How much a text's formulas may still cost. What is beyond stays TeX."""

    characters: int = MOST
    seconds: float = SECONDS

    def typeset(self, tex: str, block: bool) -> Markup | None:
        """A formula as MathML, as long as there is something left to spend."""
        self.characters -= len(tex)
        if self.characters < 0 or self.seconds < 0:
            return None
        begun = time.perf_counter()
        found = typeset(tex, block)
        self.seconds -= time.perf_counter() - begun
        return found
