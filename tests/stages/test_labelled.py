"""A classifier from one labelled file: its labels are found, and each becomes a source of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.config.classifier import ClassifierConfig
from keel.data import load
from keel.data.stored.cache import Cache
from keel.data.stored.tokens import Preparation
from keel.errors import DataError, UsageError

INIT = {"init": {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}}


def _stage(data: Any, **more: Any) -> ClassifierConfig:
    stage = {"kind": "classifier", "model": INIT, "data": data, **more}
    config = parse({"name": "tiny", "stages": {"s": stage}}).stages["s"]
    assert isinstance(config, ClassifierConfig)
    return config


def _texts(config: ClassifierConfig) -> dict[str, list[Any]]:
    return {
        label: [r.text for source in sources for r in load.load([source.plain()], ("text",), 0).records]  # pyright: ignore[reportAttributeAccessIssue]
        for label, sources in config.data.items()
    }


@pytest.fixture
def write(tmp_path: Path):
    def go(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return go


def _jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = 'review,sentiment,id\n"good, really",pos,1\nbad,neg,2\nfine,pos,3\n'


def test_csv_and_jsonl_give_the_same_texts_by_label(write):
    rows = [("good, really", "pos"), ("bad", "neg"), ("fine", "pos")]
    wanted = {"neg": ["bad"], "pos": ["good, really", "fine"]}
    lines = _jsonl(*({"review": text, "sentiment": label} for text, label in rows))
    for source in (write("a.csv", CSV), write("a.jsonl", lines)):
        config = _stage({"source": source, "label": "sentiment", "text": "review"})
        assert config.labels == ["neg", "pos"]
        assert _texts(config) == wanted


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("text,label\na,0\nb,1\nc,0\n", ["0", "1"]),
        ("text,label\na,True\nb,False\n", ["false", "true"]),
        ("text,kind\na,True\nb,False\n", ["False", "True"]),
        ("text,label\na,1.0\nb,2\n", ["1", "2"]),
        ("text,label\na, pos \nb,neg\n", ["neg", "pos"]),
    ],
)
def test_a_label_is_the_same_when_it_is_found_and_when_its_rows_are_read(text, labels, write):
    column = text.split("\n")[0].split(",")[1]
    config = _stage({"source": write("a.csv", text), "label": column})
    assert config.labels == labels
    assert sum(map(len, _texts(config).values())) == text.count("\n") - 1


def test_numbers_of_jsonl_are_labels(write):
    rows = ({"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 1.0})
    config = _stage({"source": write("a.jsonl", _jsonl(*rows)), "label": "label"})
    assert _texts(config) == {"0": ["a"], "1": ["b", "c"]}


def test_several_files_are_joined_label_by_label(write):
    one, other = (
        write("a.csv", "text,label\na,x\nb,y\n"),
        write("b.jsonl", _jsonl({"text": "c", "label": "x"})),
    )
    config = _stage([{"source": one, "label": "label"}, {"source": other, "label": "label"}])
    assert _texts(config) == {"x": ["a", "c"], "y": ["b"]}


def test_a_row_without_a_label_is_a_bad_row(write):
    source = write("a.csv", "text,label\na,x\nb,\nc,y\n")
    with pytest.raises(DataError, match=r"a\.csv:3: \"label\".* has no value; mend the row.*on_bad: skip"):
        _texts(_stage({"source": source, "label": "label"}))
    assert _texts(_stage({"source": source, "label": "label", "on_bad": "skip"})) == {"x": ["a"], "y": ["c"]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"label": "sentimnt"}, r'has no column "sentimnt"; it has review, sentiment, id'),
        ({"label": "sentiment", "where": {"id": "1"}}, "`where` and `label` both choose rows"),
        ({}, "or one file with the label in a column"),
        ({"label": "sentiment", "source": "nowhere.csv"}, r"no file nowhere\.csv"),
        (
            {"label": "sentiment", "source": "stanfordnlp/imdb"},
            "of a hub data set give the rows of each label",
        ),
        ({"label": "sentiment", "txt": "review"}, "txt"),
    ],
)
def test_what_cannot_be_is_said(data, reason, write):
    with pytest.raises(UsageError, match=reason):
        _stage({"source": write("a.csv", CSV), **data})


def test_a_column_that_is_none_of_labels_is_said(write):
    rows = "".join(f"t{i},{i}\n" for i in range(1002))
    source = write("a.csv", f"text,label\n{rows}")
    with pytest.raises(UsageError, match=r"more than 1,000 different values"):
        _stage({"source": source, "label": "label"})


def test_only_rows_with_a_value_are_read(write):
    source = {"source": write("a.csv", CSV), "columns": {"text": "review"}, "where": {"sentiment": "neg"}}
    config = _stage({"neg": source, "pos": {**source, "where": {"sentiment": "pos"}}})
    assert _texts(config) == {"neg": ["bad"], "pos": ["good, really", "fine"]}
    with pytest.raises(DataError, match=r"none of 3 rows has \"sentiment\" 'bad' \(`where`\)"):
        _texts(_stage({"neg": {**source, "where": {"sentiment": "bad"}}, "pos": source}))


def test_the_rows_of_one_label_are_not_taken_for_those_of_another(write, tmp_path, monkeypatch):
    """Rows of large files are kept by what they hold and by the settings that choose among them."""
    config = _stage({"source": write("a.csv", CSV), "label": "sentiment", "text": "review"})
    sources = [one.plain() for of_label in config.data.values() for one in of_label]  # pyright: ignore[reportAttributeAccessIssue]
    assert load.fingerprint(sources[:1]) != load.fingerprint(sources[1:])
    monkeypatch.setattr(load, "_LARGE", 0)
    for _ in range(2):
        preparation = Preparation(Cache(tmp_path / "kept"))
        read = [load.load([source], ("text",), 0, preparation).records for source in sources]
        assert [[record.text for record in rows] for rows in read] == [["bad"], ["good, really", "fine"]]


def test_a_file_without_more_is_shown_how_to_be_written(write):
    """With its own columns, so that the hint can be copied; else with what is to be filled in."""
    source = write("a.csv", "review,stars,id\ngood,5,1\nbad,1,2\n")
    for data in (source, {"source": source}):
        with pytest.raises(
            UsageError, match=rf"`{{source: {re.escape(source)}, label: stars, text: review}}`"
        ):
            _stage(data)
    source = write("b.csv", "a,b\nc,d\n")
    with pytest.raises(
        UsageError, match=r"\(this one has a, b\): \{source: FILE, label: COLUMN, text: COLUMN\}"
    ):
        _stage(source)
