"""Texts that are read as they are trained on."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keel.config import parse
from keel.config.supervised import PretrainConfig
from keel.data import chat, stream
from keel.data.stream import Cursor, TextStream, TokenStream, estimated_tokens, held_out, shards_of, text_key
from keel.errors import DataError, UsageError
from keel.pipeline.pipeline import Pipeline
from keel.types import DataSource, TextRecord

TEXTS = [f"the {animal} number {i} is red." for i, animal in enumerate(["cat", "dog", "owl"] * 20)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """60 texts in four files, one of each form, a README beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "README.txt").write_text("about these files")
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:15]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[15:30]))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[30:45]}), folder / "c.parquet")
    with gzip.open(folder / "d.jsonl.gz", "wt") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[45:])
    return folder


def texts_of(folder: Path, buffer: int = 7, **more: Any) -> TextStream:
    return TextStream(shards_of([DataSource(str(folder))]), 0, buffer, **more)


def one_pass(texts: TextStream, epoch: int = 0) -> Iterator[str]:
    at = (epoch, 0, 0)
    while at[0] == epoch:
        window, at = texts.window(*at)
        yield from (str(record.text) for record in window)


def test_a_pass_has_every_text_once_in_an_order_of_its_own(shards: Path) -> None:
    first, second = (list(one_pass(texts_of(shards), epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second
    assert first != TEXTS
    assert list(one_pass(texts_of(shards))) == first
    assert list(one_pass(TextStream(shards_of([DataSource(str(shards))]), 1, 7))) != first


@pytest.mark.parametrize("length", [5, 16, 40])
def test_rows_hold_the_stream_of_all_texts_and_predict_each_token_once(
    length: int, shards: Path, tokenizer: Any
) -> None:
    tokens = TokenStream(texts_of(shards), tokenizer, length)
    rows = [tokens.row() for _ in range(60)]
    assert all(len(row) == length for row in rows)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))
    joined = rows[0] + [token for row in rows[1:] for token in row[1:]]
    texts = [text for epoch in range(9) for text in one_pass(texts_of(shards), epoch)]
    expected = [token for text in texts for token in chat.document_ids(tokenizer, TextRecord(text))]
    assert joined == expected[: len(joined)]


@pytest.mark.parametrize("length", [5, 16])
def test_a_stream_goes_on_from_any_row_with_the_same_tokens(
    length: int, shards: Path, tokenizer: Any
) -> None:
    whole = TokenStream(texts_of(shards), tokenizer, length)
    cursors, rows = [], []
    for _ in range(300 // length * 8):
        cursors.append(Cursor(**json.loads(json.dumps(stream.as_values(whole.cursor())))))
        rows.append(whole.row())
    assert cursors[-1].epoch > 0  # over the end of a pass
    for start in range(0, len(rows) - 3, 3):
        resumed = TokenStream(texts_of(shards), tokenizer, length)
        resumed.seek(cursors[start])
        assert [resumed.row() for _ in range(3)] == rows[start : start + 3]


def test_no_text_that_is_held_out_is_trained_on(shards: Path) -> None:
    apart = held_out(texts_of(shards), 0.3)
    assert 8 < len(apart) < 28
    rest = texts_of(shards, left_out=frozenset(map(text_key, apart)))
    assert sorted([*one_pass(rest), *(str(record.text) for record in apart)]) == sorted(TEXTS)
    assert held_out(texts_of(shards), 0.0) == []


def test_a_bad_row_is_named_or_skipped_and_counted(shards: Path) -> None:
    with (shards / "b.jsonl").open("a") as handle:
        handle.write('{"text": ""}\n')
    with pytest.raises(DataError, match=r'b.jsonl:16: "text" is empty'):
        list(one_pass(texts_of(shards)))
    skipping = TextStream(shards_of([DataSource(str(shards), on_bad="skip")]), 0, 7)
    assert sorted(one_pass(skipping)) == sorted(TEXTS)
    assert len(skipping.bad) == 1
    assert len(list(one_pass(skipping, 1))) == 60
    assert len(skipping.bad) == 1  # the same row, read again


def test_the_estimate_is_near_the_tokens_that_there_are(shards: Path, tokenizer: Any) -> None:
    shards_found = shards_of([DataSource(str(shards))])
    exact = sum(len(chat.document_ids(tokenizer, TextRecord(text))) for text in TEXTS)
    assert estimated_tokens(shards_found, tokenizer) == pytest.approx(exact, rel=0.1)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nthe cat\n")
    with pytest.raises(UsageError, match=r"`stream` reads files and folders of .jsonl .txt .parquet"):
        shards_of([DataSource(str(tmp_path / "a.csv"))])
    with pytest.raises(UsageError, match="`stream` reads files"):
        shards_of([DataSource("world:helpdesk/text")])
    base = {"kind": "pretrain", "model": {"init": {"model_type": "llama"}}}
    with pytest.raises(ValueError, match="`rows` of a source has no effect with `stream`"):
        PretrainConfig.model_validate({**base, "data": {"source": "x.txt", "rows": 3}, "stream": True})
    with pytest.raises(ValueError, match="`shuffle_buffer` has no effect with `stream: false`"):
        PretrainConfig.model_validate({**base, "data": "x.txt", "stream": False, "shuffle_buffer": 3})


def test_small_corpora_are_no_stream(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"kind": "pretrain", "model": {"init": {"model_type": "llama"}}, "data": str(shards)}
    assert not PretrainConfig.model_validate(base).streams
    monkeypatch.setattr("keel.config.supervised.STREAM_FROM", 1000)
    assert PretrainConfig.model_validate(base).streams
    assert not PretrainConfig.model_validate({**base, "stream": False}).streams


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("no_report")
def test_a_run_that_is_cut_off_in_a_stream_ends_with_the_bytes_of_one_that_is_not(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stage = {
        "kind": "pretrain", "model": str(tiny_model), "data": str(shards), "stream": True,
        "shuffle_buffer": 9,
        "max_steps": 8, "batch_size": 2, "max_length": 24, "save_every": 2, "holdout": 0.2,
    }  # fmt: skip
    config = parse({"name": "stream", "threads": 1, "stages": {"base": stage}})

    def run(directory: Path, until: int | None = None) -> list[bytes]:
        def progress(stage: str, step: int, steps: int, metrics: Any) -> None:
            if step == until:
                raise Killed

        Pipeline(config, directory, lambda line: None, progress).run()
        stage_directory = directory / "stages" / "base"
        files = [stage_directory / "model" / "model.safetensors", stage_directory / "metrics.jsonl"]
        return [file.read_bytes() for file in files]

    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", until=5)
    assert run(tmp_path / "cut") == expected
