"""Every reward is asked about the rows that it will judge, before anything is trained.

A rule that compares is given each row's reference; a function is asked about each distinct row with an empty
reply, which a policy may write too. A row on which a reward must fail is found here, and its source's
`on_bad` decides: an error that names file and row, or the row is left out and counted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from keel.data.chat import completion_text
from keel.data.load import Dataset
from keel.data.questions import VERDICTS, on_scale
from keel.data.stored.records import FilledRows, Rows, filled, picked
from keel.errors import DataError, RewardError, UsageError
from keel.rewards import answers, code_tests, functions
from keel.rewards.functions import RESERVED
from keel.stages import build_rewards
from keel.types import Record
from keel.worlds import gym

AT_ONCE = 64  # rows in a call
BUDGET = 20.0  # seconds that the functions of one reward are asked for
# kind → its setting that names a column
_COMPARES = {"answer": "column", "verdict": "column", "similarity": "to", "code": "tests"}
_JUDGE_READS = ("against", "reference")  # settings of a judge that name columns, which a row may lack
_CODE = ("python", "plugin")
Shown = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row on which a reward fails."""

    index: int  # of the record in its data set
    reason: str  # what fails, with the row's place


@contextmanager
def functions_of(terms: Sequence[Any], stage: str) -> Iterator[dict[str, Any]]:
    """The functions among the terms, imported, by the name that each is logged under; their processes end
    with the block. UsageError for one that cannot be imported."""
    found: dict[str, Any] = {}
    try:
        for term in terms:
            if term.kind in _CODE:
                found[term.log_name] = build_rewards.function_of(term, f"{stage}: reward")
                names = functions.signature_of(found[term.log_name]).names
                if functions.ENVIRONMENTS in names:  # there are none before an episode
                    asked = found.pop(term.log_name)
                    if isinstance(asked, functions.IsolatedFunction):
                        asked.process.close()
        yield found
    finally:
        for function in found.values():
            if isinstance(function, functions.IsolatedFunction):
                function.process.close()


def check_columns(stage: str, terms: Sequence[Any], records: Sequence[Record]) -> None:
    """DataError for a rule or a judge that compares with a column that no row has."""
    for term in terms:
        settings = list(_JUDGE_READS) if term.kind == "judge" else [_COMPARES.get(term.kind)]
        if term.kind == "code":  # columns that a row may lack, unless a config names one of its own
            settings += [name for name in ("setup", "entry_point") if term.changes(name)]
        if term.kind == "gym" and not any(gym.COLUMN in record.columns for record in records):
            raise DataError(f"{stage}: reward {term.log_name!r} is for rows of gym:NAME, and there are none")
        if term.kind == "gym" and (task := gym.pays_nonsense(r.columns.get(gym.COLUMN) for r in records)):
            raise DataError(
                f"{stage}: reward {term.log_name!r}: the task {task} gives its full score to "
                f"{gym.NONSENSE!r}, too, so that nothing can be learned from it: leave it out"
            )
        for setting in (one for one in settings if one):
            wanted = getattr(term, setting)
            if wanted and not any(wanted in record.columns for record in records):
                raise DataError(
                    f"{stage}: reward {term.log_name!r}: the data have no column {wanted!r} (`{setting}`)"
                )


def faults(
    stage: str,
    terms: Sequence[Any],
    records: Sequence[Record],
    say: Callable[[str], None],
    code: Mapping[str, Any],
    progress: Shown = lambda what, done, of: None,
) -> Iterator[RowFault]:
    """The rows on which a reward of the stage fails, each once.

    code: the functions that may be run, by name. progress: told how far each pass is. UsageError for a
    function that insists on a column that no row has; RewardError for one that fails on every row.
    """
    bad: set[int] = set()
    without: dict[str, int] = {}
    for index, record in enumerate(records):
        if index % AT_ONCE == 0:
            progress(f"{stage}: rewards' references", index, len(records))
        reason = _reference_fault(terms, record, without)
        if reason:
            bad.add(index)
            yield RowFault(index, f"{record.origin}: {reason}")
    for name, count in without.items():
        say(f"{stage}: reward {name!r} does not apply to {count:,} rows, which have no reference for it")
    for term in terms:
        if term.log_name in code:
            good = [i for i, record in enumerate(records) if i not in bad and _is_for(term, record)]
            told = partial(progress, f"{stage}: asking {term.log_name}")
            for fault in _asked(stage, term, code[term.log_name], records, good, say, told):
                bad.add(fault.index)
                yield fault


def without(dataset: Dataset, found: Sequence[RowFault], names: Sequence[str]) -> Dataset:
    """The data set without these rows; None in the rows that lack one of these columns, so that a reward sees
    the column in any batch."""
    bad = {fault.index for fault in found}
    kept: Sequence[Record]
    if isinstance(dataset.records, Rows):
        good = [index for index in range(len(dataset.records)) if index not in bad]
        kept = FilledRows(picked(dataset.records, good) if bad else dataset.records, names)
    else:
        kept = tuple(filled(record, names) for i, record in enumerate(dataset.records) if i not in bad)
    reasons = (*dataset.skipped_reasons, *(fault.reason for fault in found))
    return replace(dataset, records=kept, skipped=dataset.skipped + len(bad), skipped_reasons=reasons[:5])


def required_columns(terms: Sequence[Any], code: Mapping[str, Any]) -> list[str]:
    """Columns that rules compare with or functions insist on."""
    names = [column for term in terms if (column := _column_of(term))]
    of_judges = [getattr(term, one) for term in terms if term.kind == "judge" for one in _JUDGE_READS]
    names += [name for name in of_judges if name is not None]
    for function in code.values():
        names += functions.signature_of(function).required
    return [name for name in dict.fromkeys(names) if name not in RESERVED]


def _column_of(term: Any) -> str | None:
    """The column that a rule compares with; None for one that compares with none."""
    if term.kind == "gym":
        return gym.COLUMN
    return getattr(term, _COMPARES[term.kind]) if term.kind in _COMPARES else None


def _problem(term: Any, record: Record, value: Any) -> str:
    """Why a reference cannot be compared with; "" where it can."""
    if term.kind == "gym":
        return gym.problem(value)
    if term.kind == "code":
        return code_tests.problem(value, record.columns.get(term.entry_point), record.columns.get(term.setup))
    try:
        text = str(value) if isinstance(value, str | int | float) else completion_text(value)
    except (TypeError, KeyError, IndexError, AttributeError):
        return "is neither text, a number nor a conversation"
    if term.kind == "answer":
        return answers.problem(text)
    if not text.strip():
        return "is blank"
    return _no_verdict(term, text) if term.kind == "verdict" else ""


def _no_verdict(term: Any, text: str) -> str:
    """Why a text is no right answer of a question; "" where it is one."""
    if term.mode == "pairwise":
        return "" if text in VERDICTS else f"is {text[:40]!r}, no verdict (A, B, tie)"
    try:
        on_scale(text, build_rewards.rubric_of_scores(term))
    except ValueError as error:
        return str(error)
    return ""


def _is_for(term: Any, record: Record) -> bool:
    return term.source_filter is None or record.columns.get("source") == term.source_filter


def _reference_fault(terms: Sequence[Any], record: Record, without: dict[str, int]) -> str:
    """Why a rule cannot judge replies to this row; "" where all can. Rows without a reference, to which
    another reward applies, are counted in `without`."""
    meant = [term for term in terms if _is_for(term, record)]
    absent: list[Any] = []
    for term in meant:
        column = _column_of(term)
        if column is None:
            continue
        value = record.columns.get(column)
        if value is None:
            absent.append(term)
        elif problem := _problem(term, record, value):
            return f"reward {term.log_name!r}: its reference, column {column!r}, {problem}"
    if absent and len(absent) == len(meant):
        columns = ", ".join(repr(_column_of(term)) for term in absent)
        return f"no reward applies to it: it has no {columns}"
    for term in absent:
        without[term.log_name] = without.get(term.log_name, 0) + 1
    return ""


# ---------------------------------------------------------------- functions


def _asked(
    stage: str,
    term: Any,
    function: Any,
    records: Sequence[Record],
    rows: Sequence[int],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Iterator[RowFault]:
    """Ask a function about each distinct row, in calls of some rows."""
    names = list(dict.fromkeys(name for i in rows for name in records[i].columns if name not in RESERVED))
    try:
        signature = functions.signature_of(function)
        read = signature.accepted(term.log_name, dict.fromkeys((*names, *RESERVED)))
        if term.try_rows:
            columns = [name for name in names if name in read]
            distinct = _distinct(records, rows, columns)
            yield from _tried(stage, term, function, records, distinct, names, say, progress)
    except UsageError as error:
        raise UsageError(f"{stage}: {error}") from None


def _tried(
    stage: str,
    term: Any,
    function: Any,
    records: Sequence[Record],
    rows: Sequence[int],
    names: Sequence[str],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Iterator[RowFault]:
    def ask(chosen: Sequence[int]) -> str:
        """What goes wrong on these rows; "" for nothing."""
        columns: Mapping[str, Any] = {name: [records[i].columns.get(name) for i in chosen] for name in names}
        prompts = [getattr(records[i], "prompt", "") for i in chosen]
        try:
            functions.call(function, term.log_name, prompts, [""] * len(chosen), [[0]] * len(chosen), columns)
        except RewardError as error:
            if "was stopped" in str(error):
                raise RewardError(f"{stage}: {error}") from None
            return str(error)
        return ""

    until, good = time.monotonic() + BUDGET, 0
    found: list[RowFault] = []
    for start in range(0, len(rows), AT_ONCE):
        progress(start, len(rows))
        if time.monotonic() > until:
            said = f"was asked about {start:,} of {len(rows):,} distinct rows in {BUDGET:g} s"
            say(f"{stage}: reward {term.log_name!r} {said}; it meets the others in training")
            break
        chosen = rows[start : start + AT_ONCE]
        if not (together := ask(chosen)):
            good += len(chosen)
            continue
        reasons = {i: reason for i in chosen if (reason := ask([i]))}
        if not reasons or (not good and len(reasons) == len(chosen)):
            raise RewardError(f"{stage}: {together}; it was asked with an empty reply, as a policy may write")
        good += len(chosen) - len(reasons)
        found = [RowFault(i, f"{records[i].origin}: {reason}") for i, reason in reasons.items()]
        yield from found


def _distinct(records: Sequence[Record], rows: Sequence[int], columns: Sequence[str]) -> list[int]:
    """The first row of each set of values of these columns."""
    first: dict[bytes, int] = {}
    for index in rows:
        values = repr([records[index].columns.get(name) for name in columns])
        first.setdefault(hashlib.blake2b(values.encode("utf-8", "replace"), digest_size=16).digest(), index)
    return list(first.values())
