# pyright: strict
"""`keel.load_data`: rows of any source, validated."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, get_args

from keel.errors import UsageError
from keel.types import DataSource, RecordType

if TYPE_CHECKING:
    from keel.data.load import Dataset

# a row is read as the first of these that its columns make up: its own type before a narrower one
NATURAL: tuple[RecordType, ...] = ("preference", "unpaired", "demonstration", "text", "prompt")


def load_data(
    source: str | PathLike[str],
    *,
    kind: RecordType | None = None,
    rows: int | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
    strict: bool = False,
    format: str | None = None,
    pairs: Mapping[str, Any] | None = None,
    ties: Literal["skip", "keep"] = "skip",
    seed: int = 0,
    **options: Any,
) -> Dataset:
    """The records of a source, as a stage would read them.

    source: a path (.jsonl, .json, .parquet, .csv, .txt, also .gz), a hub id, world:NAME/SPLIT, or
    label:PROJECT for what people said in a project of `keel label`. kind: "text", "prompt", "demonstration",
    "preference" or "unpaired"; None: what the columns make up. rows: at most so many. split: of a hub data
    set. columns: keel's name of a column → the source's. system: a system message before every prompt.
    on_bad: "skip" leaves unusable rows out and counts them. strict: refuse columns and keys that are not
    read. format, pairs, ties: of a well-known data set, or of any with a label (docs/data.md). seed: of a
    world. options: a world's own settings, `name` and `revision` of a hub data set, or of label:PROJECT `db`,
    the address of its database.

    `.records` of the result are frozen records, `.kind` is their type, `.skipped` counts what was left out.
    Raises UsageError for a source that is not there, DataError with file, line and reason for an unusable
    row.

    >>> pairs = load_data("world:helpdesk/comparisons", rows=2)
    >>> pairs.kind, len(pairs.records), pairs.skipped
    ('preference', 2, 0)
    """
    from keel.data.load import load

    if kind is not None and kind not in get_args(RecordType):
        raise UsageError(f"kind {kind!r} is none of {', '.join(get_args(RecordType))}")
    wanted = DataSource(
        fspath(source),
        rows,
        split=split,
        columns=dict(columns or {}),
        system=system,
        on_bad=on_bad,
        strict=strict,
        format=format,
        pairs=pairs,
        ties=ties,
        options=options,
    )
    return load([wanted], NATURAL if kind is None else (kind,), seed)
