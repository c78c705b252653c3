"""What `keel bench reward` found: a table for the terminal, and a page with the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keel.report import page
from keel.report.wording import number, short

NAMES = {"rewardbench": "RewardBench", "rewardbench2": "RewardBench 2", "llmbar": "LLMBar", "pairs": "Pairs"}
SHOWN = 40  # errors on the page
LONGEST = 1500  # characters of a text on the page
_PARTS = (
    ("sections", "Sections"),
    ("subsets", "Subsets"),
    ("position", "In both orders"),
    ("length", "Length"),
)
_LENGTH = {
    "accuracy": ("Pairs won", "every right reply against every wrong one of its question"),
    "right longer": ("Right reply longer", "of the pairs whose right reply is the longer one"),
    "right shorter": ("Right reply shorter", "of those whose right reply is the shorter one"),
    "controlled": ("Length-controlled", "mean of the two: who always takes the longer reply has ½"),
    "longer right": ("What length would win", "share of the pairs whose right reply is longer"),
}


class Line(NamedTuple):
    """One measure."""

    label: str
    value: str
    interval: str
    n: str
    explanation: str


def lines(found: Mapping[str, Any]) -> list[tuple[str, list[Line]]]:
    """(heading, its measures), in reading order."""
    tables = [("", [_line("Score", found["score"], _about(found))])]
    for part, heading in _PARTS:
        measures: Mapping[str, Any] = found.get(part) or {}
        if part == "subsets" and list(measures) == ["all"]:
            continue
        if measures:
            tables.append((heading, [_named(part, name, measure) for name, measure in measures.items()]))
    return tables


def _named(part: str, name: str, measure: Mapping[str, Any]) -> Line:
    label, explanation = _LENGTH.get(name, (name, "")) if part == "length" else (name, "")
    return _line(label, measure, explanation)


def _line(label: str, measure: Mapping[str, Any], explanation: str = "") -> Line:
    low, high, mean = (measure.get(end) for end in ("low", "high", "mean"))
    interval = "" if low is None or high is None else f"{number(low, 3)} to {number(high, 3)}"

    return Line(label, number(mean, 3), interval, f"{int(measure['n']):,}", explanation)


def _about(found: Mapping[str, Any]) -> str:
    return {
        "rewardbench": "mean of the sections",
        "rewardbench2": "mean of the subsets",
        "llmbar": "mean of Natural and Adversarial, over both orders",
        "pairs": "share of the pairs won, equal scores one half",
    }[found["benchmark"]]


def notes(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers."""
    said: list[str] = []
    if found["missing_subsets"]:
        names = ", ".join(found["missing_subsets"])
        said.append(f"The score is not that of the whole benchmark: there are no questions of {names}.")
    if found["unanswered"]:
        said.append(f"{found['unanswered']:,} questions have no answer, and count as a guess.")
    if found["cut"]:
        said.append(f"Of {found['cut']:,} replies the model reads only the beginning.")
    if found.get("skipped"):
        said.append(f"Rows that cannot be used were left out: {found['skipped']:,}.")
    if found["score"]["low"] is None:
        said.append("There are too few questions for an interval.")
    return said


def as_text(found: Mapping[str, Any]) -> str:
    """The tables as lines."""
    head = f"{short(found['model'])} on {NAMES[found['benchmark']]}: {found['questions']:,} questions"
    rows = [(heading, line) for heading, table in lines(found) for line in table]
    width = max(len(line.label) for _, line in rows) + 2
    text, before = [head], ""
    for heading, line in rows:
        if heading != before:
            text.append(f"\n{heading}")
            before = heading
        interval = f"({line.interval})" if line.interval else ""
        text.append(f"  {line.label:<{width}}{line.value:>7}  {interval:<18} n {line.n}")
    return "\n".join([*text, *(f"\n{note}" for note in notes(found))])


def write(path: Path, found: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> None:
    """Write the page, by an atomic rename."""
    page.put(path, render(found, errors))


def render(found: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    shown = [
        {
            **row,
            **{name: _short(row[name]) for name in ("prompt", "right", "wrong")},
            "right_score": number(row["right_score"], 3),
            "wrong_score": number(row["wrong_score"], 3),
        }
        for row in errors[:SHOWN]
    ]
    score = lines(found)[0][1][0]
    return page.fill(
        "bench.html",
        [],
        title=f"{short(found['model'])} on {NAMES[found['benchmark']]}",
        score=score,
        about=_about(found),
        questions=f"{found['questions']:,}",
        tables=lines(found)[1:],
        notes=notes(found),
        errors=shown,
        more=max(0, len(errors) - len(shown)),
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
