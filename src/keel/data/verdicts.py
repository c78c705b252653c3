"""Comparisons as what a generative reward model learns: "which of the two is better", and the verdict.

A pair becomes two questions, with the better reply in front and behind, in the words in which a judge of
pairs is asked (`keel.data.questions`), so that the model that learns to answer them is one. As demonstrations
they end in the verdict; as prompts their column `better` holds it, for `reward: {kind: verdict}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keel.data import records
from keel.data.files import RawRow
from keel.data.questions import Criterion, Rubric, pairwise
from keel.errors import DataError
from keel.types import PreferenceRecord

COLUMN = "better"  # of the verdict: A, B or tie


def rubric_of(settings: Mapping[str, Any]) -> Rubric:
    """From the settings of a source: `rubric`, a text or criteria, and `reasons`."""
    given = settings["rubric"]
    criteria = () if isinstance(given, str) else tuple(Criterion(**one) for one in given)
    return Rubric(given if isinstance(given, str) else "", criteria, reasons=settings["reasons"])


def questions_of(settings: Mapping[str, Any] | None, rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """The two questions of each comparison; rows as they are where `settings` is None. A row that is no
    comparison is bad."""
    if settings is None:
        yield from rows
        return
    rubric = rubric_of(settings)
    for origin, row in rows:
        if isinstance(row, DataError):
            yield origin, row
            continue
        try:
            record = records.parse(row, "preference", origin)
        except DataError as error:
            yield origin, error
            continue
        assert isinstance(record, PreferenceRecord)
        for number, made in enumerate(_both_orders(record, rubric), 1):
            yield (origin if number == 1 else f"{origin} ({number})"), made


def _both_orders(record: PreferenceRecord, rubric: Rubric) -> Iterator[dict[str, Any]]:
    """The better reply by the votes, where there are some, is the one called chosen else; half the votes each
    are a tie. Rows of one prompt are one `group`, so that no prompt is both trained on and held out."""
    share = 1.0 if record.p_chosen is None else record.p_chosen
    prompt = json.dumps(record.prompt, sort_keys=True, ensure_ascii=False)
    group = record.columns.get("group") or hashlib.sha256(prompt.encode()).hexdigest()[:16]
    for front in (True, False):
        sides = (record.chosen, record.rejected) if front else (record.rejected, record.chosen)
        better = "tie" if share == 0.5 else "A" if (share > 0.5) == front else "B"
        said: dict[str, Any] = {}
        if not rubric.reasons:  # nobody has written any
            said = {"completion": [{"role": "assistant", "content": json.dumps({COLUMN: better})}]}
        asked = pairwise(rubric, record.prompt, *sides).text
        columns = {**record.columns, "group": group, COLUMN: better}
        yield {**columns, "prompt": [{"role": "user", "content": asked}], **said}
