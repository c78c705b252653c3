"""Final answers: found in a reply, parsed, compared.

One parser for references and replies: text → what it can mean (`Reading`s). Two answers are equal if they
share a reading. A text has several where people write one thing two ways: 50% is 50 and 1/2, "1,2" is 1.2 in
Europe and two numbers elsewhere. Numbers are exact (Fractions; with π and square roots as symbols), lists and
sets hold readings, and anything else is text without case and spacing. What differs so is left to math-verify
where it is installed (pip install math-verify), in a process of its own with a time limit.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from itertools import product

from keel.errors import RewardError, UsageError
from keel.rewards.exact import constant
from keel.rewards.isolated import Process
from keel.rewards.plain_answer import EMPTY, plain

Reading = tuple[str, object]  # what sort of value, and the value

LONGEST = 300  # characters; a longer text is no final answer
_MOST = 64  # readings of a list
_MARKER = re.compile(r"####|\\f?box(?:ed)?\s*\{|\\boxed\s+(?=[^\s{])|<answer>")
_SAID = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct)\s+)?"
    r"(?:answer|result|solution|ans)(?:\s+is\s*:?|\s*[:=])\s*",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"(\\?[A-Za-z]{1,7}(?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-z]))\s*(?=[^=\s])")
_ITEMS = re.compile(r"\s*(?:;|,|\bor\b|\band\b)\s*", re.IGNORECASE)
_OPEN, _CLOSE = "([{", ")]}"
_NO_UNIT = {  # words behind a number that make another thing of it
    *("or", "and", "to", "of", "is", "not", "plus", "minus", "times", "over", "per"),
    *("i", "e", "x", "y", "z", "n", "k", "pi", "sqrt", "infty", "emptyset"),
}
_POWER = r"(?:\^?\{?-?\d\}?)?"
_UNIT = re.compile(r"(?:[\d)}]|\\pi)(?:\s+(?=[A-Za-z°µ])|\s*(?=°))")  # where one may begin
_UNIT_WORD = re.compile(rf"[A-Za-z°µ]+\.?{_POWER}(?:[/*·][A-Za-z]+{_POWER})*|[/*·]")
_ATTACHED = re.compile(
    r"(?<=\d)\s*(°[CF]?|(?:mm|cm|dm|km|m|mg|kg|g|ml|l|ms|s|min|h|hr|hrs|kb|mb|gb|hz|kw|w|v|j|kj|n|mph|kph|ft|in"
    r"|lb|lbs|oz|mi|deg|rad|usd|eur)(?:\^?\{?[23]\}?)?(?:/(?:s|h|min|m|kg|l)(?:\^?\{?[23]\}?)?)?)$",
    re.IGNORECASE,
)
_SCALE = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_SAME_UNIT = {
    "degree": "°", "deg": "°", "°": "°", "metre": "m", "meter": "m", "kilometer": "km", "kilometre": "km",
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "gram": "g",
    "kilogram": "kg",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "liter": "l", "litre": "l",
    "inche": "in",
    "inch": "in", "feet": "ft", "foot": "ft", "mile": "mi", "pound": "lb", "ounce": "oz", "mph": "mi/h",
}  # fmt: skip
_MONEY = {"dollar", "usd", "euro", "eur", "gbp", "cent", "buck", "rupee", "yen", "yuan"}  # as often left out
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # of prose, not a LaTeX command
_SIDE_BY_SIDE = re.compile(r"\d\s+\d")
# written out to be worked out: 2+3 is no final answer, and what may be one is read by keel's own parser
_ARITHMETIC = re.compile(r"(?:\\(?:times|cdot|div|pi|pm|sqrt(?!\s*\[))(?![a-z])|[^A-Za-z\\])*")


def reference_of(text: str) -> str:
    """The final answer that a reference holds: behind its last marker, else all of it."""
    behind = text.rpartition("####")
    if behind[1]:
        return behind[2]
    held = marked(text)
    return text if held is None else held


def problem(reference: str) -> str:
    """What is wrong with a reference, as "is blank"; "" for one that an answer can be compared with."""
    if not reference.strip():
        return "is blank"
    text = reference_of(reference)
    if re.fullmatch(r"\s*-?\d{1,30}\s*", text):  # most are
        return ""
    shown = repr(text if len(text) <= 40 else text[:39] + "…")
    cleaned = plain(text)
    if not cleaned:
        return f"holds no answer: {shown}"
    if cleaned.casefold() in ("nan", "none", "null"):
        return f"is {shown}: the row has no answer"
    if len(text) > LONGEST:
        return f"is a text of {len(text)} characters in which no final answer is marked (####, \\boxed)"
    if ("\\" in text or "{" in text) and not _balanced(text):
        return f"cannot be parsed: the braces of {shown} do not match"
    if re.search(r"/\s*\{?0+\}?\s*$", cleaned) and re.fullmatch(r"[\d\s/{}().\\-]+", cleaned):
        return f"cannot be parsed: {shown} divides by zero"
    return ""


def same_answer(reference: str, answer: str) -> bool:
    """Whether two final answers are equal.

    As exact numbers where both are one (signs, separators of thousands and decimals, $ € £, fractions, mixed
    numbers, \\frac, powers, π and roots; a percentage equals both its number and its hundredth; a unit on one
    side only is left out), as sets, tuples and intervals of such, else as text without case and spacing.
    What differs that way is left to math-verify if it is installed, which knows algebra. It is not asked
    about two numbers, nor about numbers side by side, which it would multiply ("1 0" is 0), nor about words
    ("Paris" and "pairs" have the same letters).
    """
    if max(len(reference), len(answer)) > 4 * LONGEST:
        return " ".join(reference.split()) == " ".join(answer.split())
    one, other = plain(reference), plain(answer)
    if not one or not other:
        return False
    ours, theirs = _Answer(one), _Answer(other)
    if ours.variable and theirs.variable and ours.variable != theirs.variable:
        return False
    if ours.unit and theirs.unit and ours.unit != theirs.unit:
        return False
    if ours.readings & theirs.readings:
        return True
    if not ours.is_text and not theirs.is_text:
        return False  # two values that differ
    if max(len(one), len(other)) > LONGEST or any(
        pattern.search(text) for pattern in (_WORD, _SIDE_BY_SIDE) for text in (one, other)
    ):
        return False
    if ours.is_text != theirs.is_text and _ARITHMETIC.fullmatch(one if ours.is_text else other):
        return False
    return _math_verify(one, other)


def marked(text: str) -> str | None:
    """What the last marker of a final answer holds: the rest of the line after `####`, \\boxed{} or
    <answer></answer>. Of two that are nested the inner one starts last. A `####` with more text below its
    line is a heading of Markdown, and counts where there is no other marker."""
    heading: str | None = None
    closing: dict[int, int] | None = None
    last = text.rfind("</answer>")
    for marker in reversed(list(_MARKER.finditer(text))):
        start = marker.end()
        if marker[0] == "####":
            stop = text.find("\n", start)
            line, below = (text[start:stop], text[stop:]) if stop >= 0 else (text[start:], "")
            line = line.lstrip(" \t").partition("</answer>")[0]
            if last >= start or not below or below.isspace():
                return line
            heading = heading or line
        elif marker[0] == "<answer>":
            if last >= start:  # one that is never closed holds nothing
                return text[start : text.index("</answer>", start)]
        elif marker[0].endswith("{"):
            closing = _closings(text) if closing is None else closing
            if start - 1 in closing:
                return text[start : closing[start - 1]]
        else:  # \\boxed 5
            return text[start : start + 4 * LONGEST].split()[0].rstrip("$.")
    return heading


def math_verify_is_here() -> bool:
    """Whether math-verify is installed."""
    try:
        return importlib.util.find_spec("math_verify") is not None
    except ValueError:
        return False


# ---------------------------------------------------------------- one answer


class _Answer:
    """What a plain text can mean."""

    def __init__(self, text: str) -> None:
        text = _SAID.sub("", text, count=1) if _SAID.match(text) else text
        variable = _VARIABLE.match(text)
        self.variable = variable[1].lower() if variable else ""
        text = text[variable.end() :] if variable else text
        text = re.sub(_VARIABLE.pattern.replace("(", "(?:", 1), "", text) if variable else text
        text = _ungrouped(text.strip())
        self.unit = ""
        self.readings = _values(text)
        if not self.readings and (split := _without_unit(text)):
            number, self.unit = split
            self.readings = _values(number)
        self.is_text = not self.readings
        if self.is_text:
            self.unit = ""
            self.readings = {("text", _squeezed(text))}


def _values(text: str) -> set[Reading]:
    """Numbers, lists, sets, tuples and intervals that a text can mean; none for other text."""
    text = text.strip()
    if text == EMPTY or text in ("{}", "{ }"):
        return {("list", ())}
    found: set[Reading] = {("number", value) for value in constant(text)}
    return found | _collections(text)


def _collections(text: str) -> set[Reading]:
    if "\\cup" in text:
        parts = [_collections(part.strip()) for part in text.split("\\cup")]
        return {("union", tuple(sorted(map(repr, choice)))) for choice in _choices(parts)}
    if "\\pm" in text:
        both: list[set[Reading]] = [
            {("number", value) for value in constant(text.replace("\\pm", sign, 1))} for sign in "+-"
        ]
        return {("list", tuple(sorted(map(repr, choice)))) for choice in _choices(both)}
    opening, closing, inner = "", "", text
    if text[:1] in _OPEN and text[-1:] in _CLOSE and _encloses(text):
        opening, closing, inner = text[0], text[-1], text[1:-1]
    items = _split(inner, thousands=not opening)
    if len(items) < 2:
        single = opening == "{" and items and _element(items[0])
        return {("list", (repr(item),)) for item in single} if single else set()
    choices = _choices([_element(item) for item in items])
    if opening in ("", "{"):
        unordered: set[Reading] = {("list", tuple(sorted(map(repr, choice)))) for choice in choices}
        return unordered if opening else unordered | {("(ordered)", tuple(map(repr, c))) for c in choices}
    ordered: set[Reading] = {(f"{opening}ordered{closing}", tuple(map(repr, c))) for c in choices}
    return ordered


def _element(text: str) -> set[Reading]:
    """What an item of a list can mean: a value, or text."""
    text = _ungrouped(text.strip())
    text = text[match.end() :] if (match := _VARIABLE.match(text)) else text
    if not text:
        return set()
    return _values(text) or ({("text", _squeezed(text))} if len(text) <= 40 else set())


def _choices(parts: list[set[Reading]]) -> list[tuple[Reading, ...]]:
    """All ways to take one reading of each part; none where there are too many."""
    count = 1
    for part in parts:
        count *= len(part)
    return list(product(*parts)) if 0 < count <= _MOST else []


def _split(text: str, *, thousands: bool = False) -> list[str]:
    """Items between commas, semicolons, "or" and "and" that stand within no brackets. thousands: the comma of
    1,200 is none of these."""
    depth, start, items = 0, 0, list[str]()
    cuts = {match.start(): match.end() for match in _ITEMS.finditer(text)}
    if thousands:
        cuts = {at: end for at, end in cuts.items() if not _THOUSANDS.match(text, max(0, at - 1))}
    for index, character in enumerate(text):
        if index < start:
            continue
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and index in cuts:
            items.append(text[start:index])
            start = cuts[index]
    return [item for item in [*items, text[start:]] if item.strip()]


def _encloses(text: str) -> bool:
    """Whether a text's first bracket is closed by its last one."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return index == len(text) - 1
    return False


def _ungrouped(text: str) -> str:
    """A text without brackets and braces that only group it: {5}, (5), (A)."""
    while text[:1] in ("(", "{") and text[-1:] in (")", "}") and _encloses(text):
        inner = text[1:-1].strip()
        if not inner or len(_split(inner)) > 1:
            return text
        text = inner
    return text


def _without_unit(text: str) -> tuple[str, str] | None:
    """(number, unit) of a number with a unit behind it; None for anything else."""
    match = _ATTACHED.search(text)
    number, behind = (text[: match.start()], match[1]) if match else ("", "")
    if match is None and (match := _UNIT.search(text)):
        number, behind = text[: match.end()].rstrip(), text[match.end() :]
    words = behind.casefold().replace(".", "").split()
    if not number or not words or not all(_UNIT_WORD.fullmatch(word) for word in words):
        return None
    if words[0] in _SCALE:
        number, words = f"{number} \\times {_SCALE[words[0]]}", words[1:]
    named = all(len(word) > 1 for word in words) and len(words) > 1  # "km per hour", "cups of tea"
    other = _NO_UNIT - {"of", "per"} if named else _NO_UNIT
    if any(word in other or (len(word) == 1 and word not in "°mgslhjnvwcf/*·") for word in words):
        return None
    return number, _unit(words)


def _unit(words: Iterable[str]) -> str:
    """A unit in one spelling; "" for money, whose sign is as often left out."""
    parts: list[str] = []
    for word in words:
        if word in ("square", "sq"):
            parts.append("^2")
            continue
        if word in ("cubic", "cu"):
            parts.append("^3")
            continue
        word = re.sub(r"\^?\{?([23])\}?$", r"^\1", word)
        base, power = (word[:-2], word[-2:]) if word[-2:] in ("^2", "^3") else (word, "")
        base = _SAME_UNIT.get(base, base)
        base = base if len(base) < 3 else _SAME_UNIT.get(base.removesuffix("s"), base.removesuffix("s"))
        parts.append("/" if base == "per" else "" if base in _MONEY else base + power)
    powers = [part for part in parts if part in ("^2", "^3")]
    return "".join([part for part in parts if part not in ("^2", "^3")] + powers)


def _squeezed(text: str) -> str:
    """Text without case, without quotes and dots at its ends, and without spaces but those between words."""
    text = text.casefold().strip("\"'`“”‘’.!?,;: ")
    return re.sub(r"(?<=[^\w.])\s+|\s+(?=[^\w.])", "", text)


def _balanced(text: str) -> bool:
    depth = 0
    for mark in re.findall(r"\\[{}]|[{}]", text):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0:
            return False
    return depth == 0


def _closings(text: str) -> dict[int, int]:
    """Place of each opening brace → of the one that closes it."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in re.finditer(r"[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing


# ---------------------------------------------------------------- math-verify

_process: Process | None = None


def _math_verify(reference: str, answer: str) -> bool:
    """What math-verify says, in a process of its own: its time limits do not hold in C. False where it is not
    there, or takes too long."""
    global _process
    if not math_verify_is_here():
        return False
    if _process is None:
        _process = Process("math-verify", {"what": "math"}, timeout=30.0)
    try:
        return bool(_process.ask((reference, answer), "over a pair of answers")["same"])
    except (RewardError, UsageError):
        return False
