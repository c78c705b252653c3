"""What the mappings of data sets share: how one is described, and how two judged replies become a pair."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from keel.data.values import as_finite, is_list, json_value, shown
from keel.types import RecordType

Row = Mapping[str, Any]
Turns = list[dict[str, Any]]
TIE = "tie"  # what a pair without a better side is counted as


@dataclass(frozen=True, slots=True)
class Tied:
    """A pair whose sides are equally good: a row with `p_chosen` one half, left out unless `ties: keep`."""

    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something of a row that becomes no row of keel's, and why: "rounds beyond the first" """

    reason: str


Made = dict[str, Any] | Tied | LeftOut


@dataclass(frozen=True, slots=True)
class Format:
    """How the rows of one data set become keel's rows."""

    name: str  # in a config
    title: str  # what messages call it
    kind: RecordType  # of the rows that it makes
    columns: tuple[str, ...]  # a row that has them all may be of this data set; (): only where it is named
    # The rows of keel's that one row makes, or several with one `key`. ValueError for another shape.
    rows: Callable[[Sequence[Row]], Iterable[Made]]
    shape: Callable[[Row], bool] = lambda row: True  # whether a row with these columns is of this data set
    key: Callable[[Row], Any] | None = None  # neighbouring rows with one key belong together


def one(rows: Callable[[Row], Iterable[Made]]) -> Callable[[Sequence[Row]], Iterable[Made]]:
    """A mapping of single rows as `Format.rows` takes it."""
    return lambda group: rows(group[0])


def value_of(row: Row, name: str) -> Any:
    """A column's value. ValueError where it is missing."""
    if name not in row:
        raise ValueError(f'"{name}" is missing; it has {", ".join(map(str, row)) or "no columns"}')
    return row[name]


def text_of(row: Row, name: str) -> str:
    """A column that must be text. ValueError for anything else; whether it is empty is seen later."""
    value = value_of(row, name)
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {shown(value)}, not text')
    return value


def number_of(row: Row, name: str) -> float:
    """A column that must be a finite number; CSV cells write it as text."""
    value = value_of(row, name)
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+(\.\d*)?\s*", value):
        return float(value)
    number = as_finite(value)
    if number is None:
        raise ValueError(f'"{name}" is {shown(value)}, not a finite number')
    return number


def choice_of(row: Row, name: str, choices: Sequence[Any]) -> Any:
    """A column that must be one of `choices`. CSV cells write numbers as text."""
    value = value_of(row, name)
    for choice in choices:
        if isinstance(value, bool) == isinstance(choice, bool) and value == choice:
            return choice
        if isinstance(value, str) and isinstance(choice, int) and value.strip() == str(choice):
            return choice
    raise ValueError(f'"{name}" is {shown(value)}, not one of {", ".join(map(str, choices))}')


def list_of(row: Row, name: str) -> list[Any]:
    """A column that must be a list; as text, JSON of one."""
    value = value_of(row, name)
    if isinstance(value, str):
        with suppress(ValueError):
            value = json_value(value)
    if not is_list(value):
        raise ValueError(f'"{name}" is {shown(value)}, not a list')
    return list(value)


def has_mapping(row: Row, name: str, *keys: str) -> bool:
    """Whether a column is a list whose first entry is an object with these keys."""
    value = row.get(name)
    first = value[0] if isinstance(value, Sequence) and is_list(value) and len(value) else None
    return isinstance(first, Mapping) and all(key in first for key in keys)


def asked(*parts: str | None) -> Turns:
    """A user's turn: the parts that say something, an empty line between them."""
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part and part.strip())}]


def answered(text: str) -> Turns:
    """The assistant's turn."""
    return [{"role": "assistant", "content": text}]


def dialogue(text: str, user: str, assistant: str) -> Turns:
    """Turns of a dialogue that is written as one text, with a mark before each of them. What stands before
    the first mark is the user's. An empty last turn of the assistant's is where the reply belongs."""
    pieces = re.split(f"({re.escape(user)}|{re.escape(assistant)})", text)
    turns: Turns = asked(pieces[0].strip()) if pieces[0].strip() else []
    for mark, content in zip(pieces[1::2], pieces[2::2]):
        turns.append({"role": "user" if mark == user else "assistant", "content": content.strip()})
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def pair(
    prompt: str | Turns,
    first: str | Turns,
    second: str | Turns,
    better: float,
    *,
    votes: Sequence[Mapping[str, Any]] = (),
    columns: Mapping[str, Any] | None = None,
) -> Made:
    """Two replies as a pair. better: above 0 where the first one is preferred, below 0 where the second one
    is, 0 for a tie.

    votes: {"annotator", "choice": "first" | "second" | "tie"} of each person.
    """
    if first == second:
        return LeftOut("equal pair")
    sides = (first, second) if better >= 0 else (second, first)
    names = {"first": "chosen", "second": "rejected", TIE: TIE}
    if better < 0:
        names |= {"first": "rejected", "second": "chosen"}
    row = {**(columns or {}), "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    if votes:
        row["votes"] = [{**vote, "choice": names[vote["choice"]]} for vote in votes]
    if better:
        return row
    return Tied(row if votes else {**row, "p_chosen": 0.5})


def rest(row: Row, *used: str) -> dict[str, Any]:
    """The columns that a mapping does not use; those that keel gives a meaning are not taken over."""
    own = (
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "votes",
        "p_chosen",
        "margin",
        "messages",
        "text",
    )
    return {name: value for name, value in row.items() if name not in used and name not in own}
