"""Items and votes from files of many kinds, and into them. A table of all stands in docs/human-loop.md.

`read` takes a file (JSONL, JSON, CSV, parquet, each also .gz) or a folder of Potato's, and finds the shape by
the first row; `write` writes one. Between the two stands `Labels`: items of one task with their votes.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.data import files
from keel.data.formats import FORMATS, Conversion
from keel.data.formats import detect as known_data_set
from keel.errors import DataError, UsageError
from keel.feedback.formats import arena, argilla, label_studio, plain, potato, training
from keel.feedback.formats.base import Invalid, Labels, Row, as_task
from keel.types import DataSource
from keel.votes.answers import scales_of
from keel.votes.kinds import Added, NewItem, PastJudgement, Project, Task

if TYPE_CHECKING:
    from keel.votes.store import Store

__all__ = ["READS", "WRITES", "Labels", "as_task", "into_project", "of_project", "read", "write"]

READS = ("keel", "pairs", "training", "label_studio", "argilla", "potato", "arena")
WRITES = ("keel", "preference", "unpaired", "ranked", "demonstration", "ratings", "label_studio", "argilla")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_NESTED = ("votes", "item", "replies", "completions", "ranks", "ratings", "columns", "gold", "adjudicated")
Found = tuple[Task, NewItem, Sequence[PastJudgement]]


# ---------------------------------------------------------------- in


def read(path: Path, *, task: Task | None = None, format: str | None = None) -> Labels:
    """Items and votes of a file or folder. task: what the items are for, where not what their votes say.
    format: one of `READS`, or a name of `keel.data.formats`; None finds it.

    UsageError for a path where nothing is and an unknown format; DataError, with file and line, for a row
    that is none, two items of one key that differ, and rows of two tasks.
    """
    if format is not None and format not in READS and format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; known: {', '.join([*READS, *FORMATS])}")
    if format == "potato" or (format is None and potato.is_folder(path)):
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; Potato's projects are read from their folder")
        labels = potato.read(path)
    else:
        paths = files.locate(str(path))
        if paths is None:
            raise UsageError(f"no file {path}; keel reads {' '.join(files.SUFFIXES)}, each also .gz")
        rows = [row for place in paths for row in files.read(place, str(place))]
        labels = _of_rows(rows, str(path), format)
    if not labels.items:
        raise DataError(f"{path} holds nothing to judge" + "".join(f"; {note}" for note in labels.notes))
    return as_task(labels, task) if task is not None else labels


def _of_rows(rows: Sequence[files.RawRow], name: str, format: str | None) -> Labels:
    """Every row through the reader that the first one asks for."""
    first = next((row for _, row in rows if not isinstance(row, DataError)), None)
    if first is None:
        raise next((row for _, row in rows if isinstance(row, DataError)), DataError(f"{name} holds no rows"))
    chosen = format or _detect(_whole(first))
    source = rows
    if chosen in FORMATS and chosen not in READS:
        conversion = Conversion(DataSource(name, format=chosen, ties="keep"), ("preference", "demonstration"))
        source, chosen = list(conversion(rows)), "training"
    gathered = _Gathered()
    reader = _READERS[chosen]
    for origin, row in source:
        if isinstance(row, DataError):
            raise row
        try:
            reader(_whole(row), gathered)
        except Invalid as error:
            raise DataError(f"{origin}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{origin}: no row of the format {chosen} ({reason})") from None
        gathered.check(origin)
    return gathered.labels()


def _detect(row: Row) -> str:
    """The format of a first row. DataError where it is none."""
    if plain.is_own(row):
        return "keel"
    if label_studio.is_task(row):
        return "label_studio"
    if argilla.is_record(row):
        return "argilla"
    if arena.is_vote(row):
        return "arena"
    if training.ITEM in row and training.reads(row):
        return "training"
    known = known_data_set(row, ("preference",))
    if known is not None:
        return known.name
    if training.reads(row):
        return "training"
    return "pairs"


class _Gathered:
    """What the readers have found so far."""

    def __init__(self) -> None:
        self.items: dict[str, NewItem] = {}
        self.votes: list[PastJudgement] = []
        self.tasks: dict[str, None] = {}
        self.left_out: dict[str, int] = {}
        self.words: dict[str, Any] = {}
        self._clash = ""

    def add(self, task: Task, item: NewItem, votes: Iterable[PastJudgement]) -> None:
        before = self.items.setdefault(item.key, item)
        if before.prompt != item.prompt or list(before.replies) != list(item.replies):
            self._clash = f"item {item.key!r} stands above with another prompt or other replies"
        self.tasks[task] = None
        self.votes += votes

    def check(self, origin: str) -> None:
        if self._clash:
            raise DataError(f"{origin}: {self._clash}")
        if len(self.tasks) > 1:
            raise DataError(
                f"{origin}: this row is for a {list(self.tasks)[-1]} task, those above for a "
                f"{next(iter(self.tasks))} task; split the file"
            )

    def labels(self) -> Labels:
        task: Any = next(iter(self.tasks), "pairwise")
        notes = tuple(f"{count:,} {reason} left out" for reason, count in self.left_out.items())
        return Labels(task, list(self.items.values()), self.votes, notes, self.words)


def _read_own(row: Row, gathered: _Gathered) -> None:
    item, votes, word = plain.read_own(row)
    default: Any = "pairwise" if len(item.replies) == 2 else "rating" if len(item.replies) == 1 else "ranking"
    gathered.add(row.get("task") or default, item, votes)
    if word is not None:
        gathered.words[item.key] = word


def _read_arena(row: Row, gathered: _Gathered) -> None:
    found = arena.read(row)
    if found is None:
        gathered.left_out["votes on later rounds"] = gathered.left_out.get("votes on later rounds", 0) + 1
    else:
        gathered.add("pairwise", *found)


def _read_training(row: Row, gathered: _Gathered) -> None:
    kind = training.reads(row)
    if kind is None:
        raise Invalid(f"it has {', '.join(map(str, row))}, which no type of training row has")
    if training.ITEM in row and "adjudicated" in row[training.ITEM]:
        word = {k: v for k, v in row[training.ITEM]["adjudicated"].items() if v is not None}
        person, note = str(word.pop("person")), str(word.pop("note", ""))
        gathered.words[str(row[training.ITEM]["key"])] = (person, plain.answer_of_word(word), note)
    gathered.add(*training.read(row, kind))


def _read_pairs(row: Row, gathered: _Gathered) -> None:
    gathered.add(*plain.read(row), ())


_READERS: dict[str, Callable[[Row, _Gathered], None]] = {
    "keel": _read_own,
    "pairs": _read_pairs,
    "training": _read_training,
    "arena": _read_arena,
    "label_studio": lambda row, gathered: gathered.add(*label_studio.read(row)),
    "argilla": lambda row, gathered: gathered.add(*argilla.read(row)),
}


def _whole(row: Row) -> dict[str, Any]:
    """A row whose nested cells, which a CSV file has as JSON and a parquet file fills up with nulls, are what
    they were."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        nested = name in _NESTED or name in ("prompt", "chosen", "rejected", "completion")
        if nested and isinstance(value, str) and value[:1] in "[{":
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if value is not None:
            found[name] = _filled(value)
    return found


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _filled(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_filled(v) for v in value]
    return value


# ---------------------------------------------------------------- out


def write(labels: Labels, path: Path, format: str, *, sources: bool = True) -> int:
    """Write items and votes in a format of `WRITES`, as the file's suffix says; how many rows. The file
    appears whole or not at all. sources: False leaves out where replies come from.

    UsageError for an unknown format or suffix, a file that is there, and a task that makes no such rows.
    """
    if format not in WRITES:
        raise UsageError(f"there is no format {format!r}; known: {', '.join(WRITES)}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: the file's name must end in {', '.join(SUFFIXES)}")
    if suffix in (".csv", ".parquet") and format in ("label_studio", "argilla"):
        raise UsageError(f"{path}: {format} is written as .json or .jsonl")
    if path.exists():
        raise UsageError(f"{path} is there already; it was not overwritten")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}")
    rows = list(rows_of(labels, format, sources=sources))
    if not rows:
        raise UsageError(f"nothing to write: no item has votes that make a {format} row")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(_as_bytes(rows, suffix))
    partial.replace(path)
    return len(rows)


def rows_of(labels: Labels, format: str, *, sources: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a format of `WRITES`."""
    if not sources:
        labels = _without_sources(labels)
    if format == "keel":
        return plain.write_own(labels)
    if format == "label_studio":
        return label_studio.write(labels.items, labels.votes_of(), labels.task)
    if format == "argilla":
        return argilla.write(labels.items, labels.votes_of(), labels.task)
    return training.write(labels, format)


def _without_sources(labels: Labels) -> Labels:
    items = [
        replace(item, replies=[replace(reply, source=None) for reply in item.replies])
        for item in labels.items
    ]
    return replace(labels, items=items)


def _as_bytes(rows: Sequence[Mapping[str, Any]], suffix: str) -> bytes:
    if suffix == ".json":
        return (_json(rows, indent=1) + "\n").encode()
    if suffix == ".jsonl":
        return "".join(map(line_of, rows)).encode()
    if suffix == ".csv":
        return _csv(rows)
    import pyarrow
    import pyarrow.parquet

    sink, names = io.BytesIO(), list(dict.fromkeys(name for row in rows for name in row))
    filled = [{name: _no_empty(row.get(name)) for name in names} for row in rows]
    try:  # pyarrow takes the columns of the first row alone
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), sink)
    except (pyarrow.ArrowException, TypeError) as error:
        raise UsageError(f"these rows are no table ({error}); write them as .jsonl") from None
    return sink.getvalue()


def line_of(row: Any) -> str:
    """A row as a line of JSON that any file and any connection takes."""
    return _json(row) + "\n"


def _json(value: Any, indent: int | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character: JSON has a way to write it, UTF-8 has none
        return json.dumps(value, indent=indent)
    return text


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import csv

    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: value if isinstance(value, str) else _json(value)
                for name, value in row.items()
                if value is not None
            }
        )
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError:
        raise UsageError("a text holds half of a character, which CSV cannot; write it as .jsonl") from None


def _no_empty(value: Any) -> Any:
    """Without empty objects, for which parquet has no column."""
    if isinstance(value, Mapping):
        return {k: _no_empty(v) for k, v in value.items() if v != {}}
    if isinstance(value, list | tuple):
        return [_no_empty(v) for v in value]
    return value


# ---------------------------------------------------------------- the database


def of_project(store: Store, name: str) -> Labels:
    """All items of a project with their votes, gold items and reviewers' words included."""
    project = store.project(name)
    items = [
        NewItem(row.key, row.prompt, row.replies, row.columns, row.gold, row.priority)
        for row in store.items(name)
    ]
    votes = [
        PastJudgement(v.key, v.person, v.answer, v.at, v.seconds, v.shown, v.is_model)
        for v in store.votes(name)
    ]
    words = {word.key: (word.person, word.answer, word.note) for word in store.adjudications(name)}
    return Labels(project.task, items, votes, (), words, scales_of(project))


def into_project(
    store: Store, name: str, labels: Labels, by: int | None = None, *, make: Project | None = None
) -> Added:
    """Add items, and their votes, to a project: all or nothing. For one of another task they are as `as_task`
    makes them. make: the project, where there is none of this name. Reviewers' words stay out: only an admin
    adjudicates. UsageError for an answer that the project does not ask for."""
    there = next((project for project in store.projects() if project.name == name), make)
    project = there or store.project(name)
    if project.task != labels.task:
        labels = as_task(labels, project.task)
    added, _ = store.bring_in(name, labels.items, labels.votes, by, make=make)
    return added
