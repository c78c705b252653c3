"""Single values of a row, validated: text, numbers, labels, votes."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from keel.types import Vote

CHOICES = ("chosen", "rejected", "tie")
MOST_VOTES = 10_000  # on one pair: more are a slip, and would fill the memory
MOST_SHOWN = 10**40  # a whole number beyond it is not written out
_VOTE_TOLERANCE = 0.005  # a share rounded to two decimals still agrees with its votes


class Invalid(Exception):
    """What is wrong with a row; `records.parse` adds where the row is."""


def text_value(where: str, value: object) -> str:
    """The value, which must be text with something in it."""
    if not isinstance(value, str):
        quoted = " (write it in quotes)" if isinstance(value, Real) else ""
        raise Invalid(f"{where} is {shown(value)}, not text{quoted}")
    if not value.strip():
        raise Invalid(f"{where} is {'empty' if not value else 'only whitespace'}")
    check_unicode(where, value)
    return value


def check_unicode(where: str, value: str) -> None:
    """Invalid for a lone surrogate, which no tokenizer reads."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise Invalid(f"{where} holds a lone surrogate (\\u{code:04x}), which is not valid Unicode") from None


def json_value(text: str | bytes) -> Any:
    """What a text says as JSON. ValueError where it is none, also for thousands of brackets."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_json(name: str, value: str) -> Any:
    """What a text says as JSON."""
    try:
        return json_value(value)
    except ValueError as error:
        raise Invalid(f'"{name}" is text that is no JSON: {error}') from None


def as_finite(value: object) -> float | None:
    """The value as a float where it is a finite number, which true and false are not; None otherwise. A whole
    number beyond all floats counts as infinite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def number_value(name: str, value: object) -> float:
    """The value as a float; it must be finite."""
    number = as_finite(value)
    if number is None:
        raise Invalid(f'"{name}" is {shown(value)}, not a finite number')
    return number


def label_value(value: object) -> bool:
    """A thumb: true or false, 1 or 0."""
    if isinstance(value, (bool, Real)) and value in (0, 1):
        return bool(value)
    raise Invalid(f'"label" is {shown(value)}, not true or false (or 1 or 0)')


def parse_votes(value: Any) -> tuple[Vote, ...]:
    """Votes from [{"annotator", "choice"}, …], or from counts by choice (their annotators are unknown:
    "")."""
    if isinstance(value, Mapping):
        votes: list[Vote] = []
        for choice, count in value.items():
            if choice not in CHOICES:
                raise Invalid(f'"votes" counts {choice!r}; it may count {", ".join(CHOICES)}')
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise Invalid(f'"votes" has {shown(count)} for {choice!r}, not a count')
            if count > MOST_VOTES:
                raise Invalid(
                    f'"votes" counts {count:.3g} for {choice!r}, more than {MOST_VOTES:,}; give their share '
                    'as "p_chosen" instead'
                )
            votes.extend([Vote("", choice)] * count)
        return tuple(votes)
    if not is_list(value):
        raise Invalid(
            f'"votes" is {shown(value)}, not a list of {{"annotator", "choice"}} or counts by choice'
        )
    votes = []
    for number, vote in enumerate(value, 1):
        if not isinstance(vote, Mapping) or "annotator" not in vote or "choice" not in vote:
            raise Invalid(f'"votes" entry {number} is {shown(vote)}; it needs "annotator" and "choice"')
        annotator, choice = vote["annotator"], vote["choice"]
        if choice not in CHOICES:
            raise Invalid(f'"votes" entry {number} chose {choice!r}, not one of {", ".join(CHOICES)}')
        if isinstance(annotator, (bool, float)) or not isinstance(annotator, (str, int)):
            raise Invalid(f'"votes" entry {number} has {shown(annotator)} as annotator, not a name or number')
        votes.append(Vote(str(annotator), choice))
    return tuple(votes)


def share_of_votes(row: Mapping[str, Any], votes: Sequence[Vote]) -> float | None:
    """The share that preferred `chosen`, ties one half: as given, or from the votes. Both must agree."""
    points = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
    share = sum(points[vote.choice] for vote in votes) / len(votes) if votes else None
    if "p_chosen" not in row:
        return share
    given = number_value("p_chosen", row["p_chosen"])
    if not 0 <= given <= 1:
        raise Invalid(f'"p_chosen" is {given:g}, not between 0 and 1')
    if share is not None and abs(share - given) > _VOTE_TOLERANCE:
        raise Invalid(f'"p_chosen" is {given:g}, but the votes give {share:.3g}; leave one of them out')
    return given if share is None else share


def nearest(word: str, known: Sequence[str] | Mapping[str, Any], cutoff: float = 0.6) -> str | None:
    """The name among `known` that `word` was probably meant to be, if one is close: `cutoff` is in [0, 1]."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=cutoff)
    return next(iter(close), None)


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def shown(value: object) -> str:
    """A value as a message shows it, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > MOST_SHOWN:
        return "a number beyond all reason"
    if isinstance(value, Real):
        return "NaN" if math.isnan(value) else f"the number {value}"
    if isinstance(value, Mapping):
        return "an object"
    if is_list(value):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
