"""Numbers as people write them, read exactly: separators, fractions, powers of ten, π and square roots."""

from __future__ import annotations

import re
from fractions import Fraction
from math import isqrt

# (n, k) → q: a sum of q · √n · π^k, n without square factors
Exact = tuple[tuple[tuple[int, int], Fraction], ...]

LONGEST = 120  # characters of a number
LARGEST_POWER = 400
_PLAIN = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_ENGLISH = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_EUROPEAN = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?: \d{3})+,\d+")
_INDIAN = re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d*)?")
_SPACED = re.compile(r"\d{1,3}(?:[ '_]\d{3})+(?:\.\d*)?")
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}|\d+,\d{4,}|0,\d+")
_NUMERAL = r"(?:\d[\d.,'_]*(?: \d{3}(?!\d)[\d.,]*)*|\.\d+)"
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
_TOKEN = re.compile(
    rf"\s*(?:({_NUMERAL})(?:[eE]([-+]?\d{{1,3}})(?![\d.]))?|(\\pi|pi|\\sqrt|sqrt)(?![A-Za-z])"
    r"|(\\times|\\cdot|\\div|[-+*/^(){}\[\]]))"
)


def constant(text: str) -> set[Exact]:
    """The exact values a plain text may stand for: one for a number, two for a percentage and for one with a
    comma that may be decimal, none for other text. A sum counts only with π or a root in it: 10-12 is a
    range."""
    text = text.strip()
    if not text or len(text) > LONGEST:
        return set()
    percent = re.search(r"\s*(?:%|\bpercent|\bper cent)$", text, re.IGNORECASE)
    text = text[: percent.start()] if percent else text
    values = {_exact(value) for value in _sums(text)}
    return values | {_exact(_times(dict(value), Fraction(1, 100))) for value in values} if percent else values


def _sums(text: str) -> list[dict[tuple[int, int], Fraction]]:
    if mixed := _MIXED.fullmatch(text):
        sign, whole, over, under = mixed.groups()
        if int(under) == 0:
            return []
        value = int(whole) + Fraction(int(over), int(under))
        return [{(1, 0): -value if sign == "-" else value}]
    found: list[dict[tuple[int, int], Fraction]] = []
    for comma in (False, True) if "," in text else (False,):
        try:
            parser = _Parser(_tokens(text, comma))
            value = parser.whole()
        except (_NoNumber, ZeroDivisionError, OverflowError, RecursionError):
            continue
        if not parser.adds or any(key != (1, 0) for key in value):
            found.append(value)
    return found


class _NoNumber(Exception):
    """A text that is no constant."""


def numeral(text: str, decimal_comma: bool = False) -> Fraction:
    """A numeral with its separators. _NoNumber for one that is written wrongly, as 1,20,0."""
    if _ENGLISH.fullmatch(text) or _INDIAN.fullmatch(text):
        if not decimal_comma:
            return Fraction(text.replace(",", "").rstrip("."))
    elif _PLAIN.fullmatch(text):
        return Fraction(text)
    elif _SPACED.fullmatch(text):
        return Fraction(re.sub(r"[ '_]", "", text))
    elif _EUROPEAN.fullmatch(text) or (decimal_comma and _DECIMAL_COMMA.fullmatch(text)):
        return Fraction(re.sub(r"[. ]", "", text).replace(",", "."))
    raise _NoNumber


def _tokens(text: str, decimal_comma: bool) -> list[str | Fraction]:
    tokens: list[str | Fraction] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _NoNumber
        number, exponent, name, sign = match.groups()
        if number is not None:
            if tokens and isinstance(tokens[-1], Fraction):
                raise _NoNumber  # numbers side by side
            tokens.append(numeral(number, decimal_comma) * Fraction(10) ** int(exponent or 0))
        else:
            tokens.append((name or sign).lstrip("\\"))
        place = match.end()
    return tokens


class _Parser:
    """Sums of products of powers: `2\\sqrt{3}`, `\\frac` already written as ((a)/(b)), `-\\pi/2`."""

    def __init__(self, tokens: list[str | Fraction]) -> None:
        self.tokens, self.place = tokens, 0
        self.adds = False  # whether it is a sum, whose terms may be the ends of a range

    def whole(self) -> dict[tuple[int, int], Fraction]:
        value = self._sum(top=True)
        if self.place != len(self.tokens):
            raise _NoNumber
        return value

    def _next(self) -> str | Fraction | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def _take(self) -> str | Fraction:
        token = self._next()
        if token is None:
            raise _NoNumber
        self.place += 1
        return token

    def _sum(self, top: bool = False) -> dict[tuple[int, int], Fraction]:
        sign = 1
        while self._next() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        total = _times(self._product(), Fraction(sign))
        while self._next() in ("+", "-"):
            self.adds = True
            factor = Fraction(-1 if self._take() == "-" else 1)
            total = _plus(total, _times(self._product(), factor))
        return total

    def _product(self) -> dict[tuple[int, int], Fraction]:
        value, explicit = self._power(), False
        while (token := self._next()) is not None and token not in ("+", "-", ")", "}", "]"):
            if token in ("/", "div"):
                self._take()
                value = _product(value, _inverse(self._power()))
                continue
            if token in ("*", "times", "cdot"):
                self._take()
                power = self._next() == Fraction(10) or self._scale()
                if not power and not (_symbolic(value) or self._next() in ("pi", "sqrt")):
                    raise _NoNumber  # 2 × 3 are dimensions
                explicit = True
                value = _product(value, self._power())
                continue
            if isinstance(token, Fraction):
                raise _NoNumber
            if token == "(" and not explicit and not _symbolic(value):
                raise _NoNumber  # 2 (3) is no product that an answer would be written as
            value = _product(value, self._power())
        return value

    def _scale(self) -> bool:
        """Whether a power of ten (or a dozen) comes, as `5 million` is written out."""
        token = self._next()
        return isinstance(token, Fraction) and token in (12, 10**2, 10**3, 10**6, 10**9, 10**12)

    def _power(self) -> dict[tuple[int, int], Fraction]:
        base = self._atom()
        if self._next() != "^":
            return base
        self._take()
        exponent = self._atom(signed=True)
        power = exponent.get((1, 0), Fraction(0)) if set(exponent) <= {(1, 0)} else None
        if power is None or abs(power) > LARGEST_POWER:
            raise _NoNumber
        if power == Fraction(1, 2):
            return _root(base)
        if power.denominator != 1 or (len(base) > 1 and abs(power) > 8):
            raise _NoNumber
        value: dict[tuple[int, int], Fraction] = {(1, 0): Fraction(1)}
        for _ in range(abs(int(power))):
            value = _product(value, base)
        return value if power >= 0 else _inverse(value)

    def _atom(self, signed: bool = False) -> dict[tuple[int, int], Fraction]:
        token = self._take()
        if isinstance(token, Fraction):
            return {(1, 0): token} if token else {}
        if signed and token in ("+", "-"):
            return _times(self._atom(), Fraction(-1 if token == "-" else 1))
        if token == "pi":
            return {(1, 1): Fraction(1)}
        if token == "sqrt":
            if self._next() == "[":
                raise _NoNumber
            return _root(self._atom())
        if token in ("(", "{"):
            value = self._sum()
            if self._take() != {"(": ")", "{": "}"}[token]:
                raise _NoNumber
            return value
        raise _NoNumber


def _symbolic(value: dict[tuple[int, int], Fraction]) -> bool:
    return any(key != (1, 0) for key in value)


def _plus(
    one: dict[tuple[int, int], Fraction], other: dict[tuple[int, int], Fraction]
) -> dict[tuple[int, int], Fraction]:
    total = dict(one)
    for key, value in other.items():
        total[key] = total.get(key, Fraction(0)) + value
    return {key: value for key, value in total.items() if value}


def _times(value: dict[tuple[int, int], Fraction], factor: Fraction) -> dict[tuple[int, int], Fraction]:
    return {key: part * factor for key, part in value.items() if part * factor}


def _product(
    one: dict[tuple[int, int], Fraction], other: dict[tuple[int, int], Fraction]
) -> dict[tuple[int, int], Fraction]:
    total: dict[tuple[int, int], Fraction] = {}
    for (n, k), a in one.items():
        for (m, j), b in other.items():
            square, root = _squares(n * m)
            total = _plus(total, {(root, k + j): a * b * square})
    return total


def _inverse(value: dict[tuple[int, int], Fraction]) -> dict[tuple[int, int], Fraction]:
    """1/x of a single term, or of a + b√n by its conjugate."""
    if not value:
        raise ZeroDivisionError
    if len(value) == 1:
        ((n, k), part), *_ = value.items()
        return {(n, -k): 1 / (part * n)}
    if len(value) == 2 and all(k == 0 for _, k in value):
        (first, a), (second, b) = value.items()
        conjugate = {first: a, second: -b}
        norm = _product(value, conjugate)
        if set(norm) == {(1, 0)}:
            return _times(conjugate, 1 / norm[1, 0])
    raise _NoNumber


def _root(value: dict[tuple[int, int], Fraction]) -> dict[tuple[int, int], Fraction]:
    """√x of a rational number that is not negative: √(p/q) = √(p·q)/q."""
    if not value:
        return {}
    if set(value) != {(1, 0)} or value[1, 0] < 0:
        raise _NoNumber
    number = value[1, 0]
    square, root = _squares(number.numerator * number.denominator)
    return {(root, 0): Fraction(square, number.denominator)}


def _squares(number: int) -> tuple[int, int]:
    """(a, n) with number = a²·n, n without square factors. _NoNumber above 10¹²."""
    if number > 10**12:
        whole = isqrt(number)
        if whole * whole == number:
            return whole, 1
        raise _NoNumber
    square, root, factor = 1, number, 2
    while factor * factor <= root and factor < 10**4:
        while root % (factor * factor) == 0:
            root //= factor * factor
            square *= factor
        factor += 1
    whole = isqrt(root)
    return (square * whole, 1) if whole * whole == root else (square, root)


def _exact(value: dict[tuple[int, int], Fraction]) -> Exact:
    return tuple(sorted(value.items()))
