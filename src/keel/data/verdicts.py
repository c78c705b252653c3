"""Judged rows as what a generative reward model learns: a judge's question, and the verdict.

A comparison becomes two questions which reply is better, with the better one in front and behind; a rated
reply becomes one, how good it is. They are asked in the words of a judge (`keel.data.questions`), so that the
model that learns to answer them is one. As demonstrations they end in the verdict; as prompts their column
`better` or `score` holds it, for `reward: {kind: verdict}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keel.data import records
from keel.data.files import RawRow
from keel.data.questions import SCORE, Criterion, Rubric, pairwise, pointwise
from keel.data.values import Invalid, number_value, parse_json, shown
from keel.errors import DataError
from keel.types import DemonstrationRecord, PreferenceRecord

COLUMN = "better"  # of the verdict on a pair: A, B or tie; that of a score is `SCORE`
RATINGS = "ratings"  # column with a number for each of several scales, as votes of people have it
_PLACES = 2  # of a mean in the answer that is shown


def is_pointwise(settings: Mapping[str, Any]) -> bool:
    """Whether a source's rows are rated replies, not comparisons."""
    return settings["mode"] == "pointwise"


def rubric_of(settings: Mapping[str, Any]) -> Rubric:
    """From the settings of a source: `rubric`, a text or criteria, `scale` and `reasons`."""
    given = settings["rubric"]
    criteria = () if isinstance(given, str) else tuple(Criterion(**one) for one in given)
    text = given if isinstance(given, str) else ""
    return Rubric(text, criteria, *settings["scale"], reasons=settings["reasons"])


def columns_of(settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The columns that questions about rated replies read, or add."""
    if settings is None or not is_pointwise(settings):
        return ()
    return (SCORE, RATINGS, *(one.name for one in rubric_of(settings).scored()))


def questions_of(settings: Mapping[str, Any] | None, rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """The two questions of each comparison, or the one of each rated reply; rows as they are where `settings`
    is None. A row that is not judged so is bad."""
    if settings is None:
        yield from rows
        return
    rubric, made_of = rubric_of(settings), _how_good if is_pointwise(settings) else _both_orders
    for origin, row in rows:
        if isinstance(row, DataError):
            yield origin, row
            continue
        try:
            questions = list(made_of(row, origin, rubric))
        except DataError as error:
            yield origin, error
            continue
        for number, made in enumerate(questions, 1):
            yield (origin if number == 1 else f"{origin} ({number})"), made


def _both_orders(row: Mapping[str, Any], origin: str, rubric: Rubric) -> Iterator[dict[str, Any]]:
    """The better reply by the votes, where there are some, is the one called chosen else; half the votes each
    are a tie."""
    if "completion" in row and "chosen" not in row and (SCORE in row or RATINGS in row):
        raise DataError(f"{origin}: it is a rated reply: set `mode: pointwise` in `verdicts`")
    record = records.parse(row, "preference", origin)
    assert isinstance(record, PreferenceRecord)
    share = 1.0 if record.p_chosen is None else record.p_chosen
    for front in (True, False):
        sides = (record.chosen, record.rejected) if front else (record.rejected, record.chosen)
        better = "tie" if share == 0.5 else "A" if (share > 0.5) == front else "B"
        asked = pairwise(rubric, record.prompt, *sides).text
        yield _question(record, rubric, asked, {COLUMN: better}, {COLUMN: better})


def _how_good(row: Mapping[str, Any], origin: str, rubric: Rubric) -> Iterator[dict[str, Any]]:
    """Of several criteria the answer holds each one's score, and the column their weighted mean."""
    if "chosen" in row and "rejected" in row:
        raise DataError(
            f"{origin}: it is a comparison, and `verdicts` with `mode: pointwise` reads rated replies: a "
            "prompt, a completion and a score (`columns` gives them these names, with `format: keel`)"
        )
    record = records.parse({k: v for k, v in row.items() if k != "label"}, "demonstration", origin)
    assert isinstance(record, DemonstrationRecord)
    try:
        given = _scores_of(row, rubric)
    except Invalid as error:
        raise DataError(f"{origin}: {error}") from None
    criteria = rubric.scored()
    mean = sum(c.weight * given[c.name] for c in criteria) / sum(c.weight for c in criteria)
    asked = pointwise(rubric, record.prompt, record.completion).text
    answer = {"scores": {name: _short(number) for name, number in given.items()}}
    yield _question(record, rubric, asked, answer, {SCORE: _short(mean, 12)})


def _scores_of(row: Mapping[str, Any], rubric: Rubric) -> dict[str, float]:
    """The number of each criterion: under its name in `ratings`, else in a column of that name. Where there
    is one score, the only one of `ratings` is it, too. Invalid where one is missing or off the scale."""
    ratings = row.get(RATINGS)
    if isinstance(ratings, str):  # as tables keep them
        ratings = parse_json(RATINGS, ratings)
    if not isinstance(ratings, Mapping | None):
        raise Invalid(f'"{RATINGS}" is {shown(ratings)}, not a number for each of some names')
    ratings = dict(ratings or {})
    found: dict[str, float] = {}
    for name in (one.name for one in rubric.scored()):
        value = ratings.get(name, row.get(name))
        if value is None and not rubric.criteria and ratings:
            if len(ratings) > 1:
                raise Invalid(
                    f'it has no "{name}", and "{RATINGS}" holds several ({", ".join(map(str, ratings))}): '
                    "name those that count as criteria in `verdicts.rubric`"
                )
            (value,) = ratings.values()
        if value is None:
            raise Invalid(f'it has no "{name}", neither as a column nor in "{RATINGS}"')
        number = _number(name, value)
        if not rubric.low <= number <= rubric.high:
            raise Invalid(
                f'"{name}" is {number:g}, not from {rubric.low} to {rubric.high} (`verdicts.scale`)'
            )
        found[name] = number
    return found


def _number(name: str, value: object) -> float:
    """A finite number, or the text of one, as CSV has it. Invalid where it is none."""
    try:
        return number_value(name, float(value) if isinstance(value, str) else value)
    except ValueError:  # of Invalid, too
        raise Invalid(f'"{name}" is {shown(value)}, not a finite number') from None


def _short(number: float, places: int = _PLACES) -> float | int:
    """Whole numbers without a point."""
    number = round(number, places)
    return int(number) if number == int(number) else number


def _question(
    record: PreferenceRecord | DemonstrationRecord,
    rubric: Rubric,
    asked: str,
    answer: Mapping[str, Any],
    right: Mapping[str, Any],
) -> dict[str, Any]:
    """A row with the question as its prompt, and the right answer in a column. Rows of one prompt are one
    `group`, so that no prompt is both trained on and held out."""
    prompt = json.dumps(record.prompt, sort_keys=True, ensure_ascii=False)
    group = record.columns.get("group") or hashlib.sha256(prompt.encode()).hexdigest()[:16]
    said: dict[str, Any] = {}
    if not rubric.reasons:  # nobody has written any
        said = {"completion": [{"role": "assistant", "content": json.dumps(answer)}]}
    return {
        **record.columns, "group": group, **right, "prompt": [{"role": "user", "content": asked}], **said,
    }  # fmt: skip
