"""One labelled file as a classifier's texts by label: which labels it has is read from its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from keel.config.parts import DataConfig
from keel.config.settings import Settings
from keel.data import files
from keel.data.rewriting import label_of
from keel.errors import DataError, UsageError

MOST = 1000  # different labels; beyond it the column is hardly one of labels


class LabelledSource(DataConfig):
    """Rows of all labels, with the label in a column: one source with a place for each label's texts."""

    label: str = Field(description="Column that holds the label: a text, a whole number, true or false.")
    text: str = Field("text", description="Column that holds the text.")


WANTED = "give the texts by label, {LABEL: SOURCE, OTHER: SOURCE}, or one file with the label in a column"
_LABELS = re.compile(r"label|class|category|sentiment|genre|style|target|topic|intent|stars|polarity", re.I)
_TEXTS = ("text", "review", "sentence", "content", "body", "comment", "document", "tweet", "message", "post")


def what_is_wanted(value: object) -> str:
    """What to write in place of sources without labels; of one file, with the names of its columns."""
    source = value.get("source") if isinstance(value, Mapping) else value
    row = _first_row(source) if isinstance(source, str) else {}
    labels = [name for name in row if _LABELS.search(name) and label_of(row[name]) is not None]
    texts = [name for name in _TEXTS if name in row and name not in labels]
    if len(labels) != 1 or not texts:
        columns = f" (this one has {', '.join(row)})" if row else ""
        return f"{WANTED}{columns}: {{source: FILE, label: COLUMN, text: COLUMN}}"
    return f"{WANTED}: `{{source: {source}, label: {labels[0]}, text: {texts[0]}}}`"


def _first_row(source: str) -> Mapping[str, Any]:
    """The first good row of a file; empty where there is none, or no such file."""
    try:
        for path in files.locate(source) or ():
            for _, row in files.read(path, source):
                if not isinstance(row, DataError):
                    return row
    except (UsageError, DataError):
        pass
    return {}


class _Shape(Settings):
    """What is looked at before the whole is validated."""

    source: str
    label: str
    text: str = "text"
    columns: dict[str, str] = Field(default_factory=dict)


def is_labelled(value: object) -> bool:
    """Whether a source says which column holds the label."""
    return isinstance(value, Mapping) and "source" in value


def by_label(values: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Label → sources that take that label's rows alone. ValueError for what is no labelled source, and for
    files without labels."""
    found: dict[str, list[dict[str, Any]]] = {}
    for value in values:
        if "label" not in value:
            raise ValueError(what_is_wanted(value))
        rest = {key: given for key, given in value.items() if key not in _Shape.model_fields}
        shape = _Shape.model_validate({key: value[key] for key in _Shape.model_fields if key in value})
        if twice := next((key for key in ("where",) if rest.get(key)), None):
            raise ValueError(f"`{twice}` and `label` both choose rows: give one of them")
        columns = dict(shape.columns)
        if shape.text != "text":
            columns["text"] = shape.text
        for label in _labels(shape):
            one = {"source": shape.source, **rest, "where": {shape.label: label}}
            found.setdefault(label, []).append(one | ({"columns": columns} if columns else {}))
    return found


def _labels(shape: _Shape) -> list[str]:
    """The labels of a file, sorted. Rows without one are bad rows, which `on_bad` decides about later."""
    try:
        paths = files.locate(shape.source)
        if paths is None:
            raise ValueError(
                f"{shape.source}: labels are found in files; of a hub data set give the rows of each label: "
                f"{{LABEL: {{source: {shape.source}, where: {{{shape.label}: VALUE}}}}}}"
            )
        labels, seen = set[str](), 0
        for path in paths:
            for _, row in files.read(path, str(Path(shape.source)), shape.columns):
                if isinstance(row, DataError):
                    continue
                seen += 1
                if shape.label not in row and seen == 1:
                    raise ValueError(f'{shape.source} has no column "{shape.label}"; it has {", ".join(row)}')
                if (label := label_of(row.get(shape.label))) is not None:
                    labels.add(label)
                if len(labels) > MOST:
                    raise ValueError(
                        f'{shape.source}: "{shape.label}" has more than {MOST:,} different values; is it the '
                        "column of the label?"
                    )
    except (UsageError, DataError) as error:
        raise ValueError(str(error)) from None
    if not labels:
        raise ValueError(f'{shape.source}: no row has a label in "{shape.label}"')
    return sorted(labels)
