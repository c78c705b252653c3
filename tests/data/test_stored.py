"""Rows in files: the same records, tokens and weights as in memory, by any number of workers."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keel.config import parse
from keel.data import load as loading
from keel.data.load import load
from keel.data.stored import cache as caches
from keel.data.stored import records as stored
from keel.data.stored import tokens as token_rows
from keel.data.stored.cache import Cache, digest_of, keep_digests
from keel.data.stored.records import PickedRows, RecordSink, Rows, StoredRows, numbers_of, picked
from keel.data.stored.tokens import Preparation, Tokens, each, tokenised
from keel.data.stored.worker import Shown, do
from keel.errors import DataError, KeelError, UsageError
from keel.pipeline.pipeline import PREPARED, Pipeline
from keel.stages.lazy_rows import encode, entries_of
from keel.stages.prepare import TooLong
from keel.types import (
    DataSource,
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedRecord,
    Vote,
)

TURNS = ({"role": "user", "content": "the cat?", "name": "a"}, {"role": "assistant", "content": "red"})
RECORDS: list[Record] = [
    TextRecord("one\ntwo \u2028 three", {"n": 1, "x": 0.1}, "a:1"),
    TextRecord(TURNS, {}, "a:2"),  # type: ignore[arg-type]
    PromptRecord(
        "the owl?", {"when": datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "d": datetime.date(2026, 1, 2)}
    ),
    PromptRecord(TURNS[:1], {"t": (1, [2, {"keel": "x"}]), "b": b"\x00\xff", "m": Decimal("1.50")}),  # type: ignore[arg-type]
    DemonstrationRecord("a", "b", {"lone": "\ud800", "nested": {"keel": None, "k": [None, True]}}),
    PreferenceRecord("a", "b", "c", 0.75, 1.5, (Vote("x", "chosen"), Vote("", "tie")), {}, "b:7"),
    PreferenceRecord(TURNS[:1], TURNS[1:], TURNS[1:]),  # type: ignore[arg-type]
    UnpairedRecord("a", "b", False, {"inf": float("inf")}),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are kept in files from the third on, in tasks of a few."""
    monkeypatch.setattr(stored, "IN_MEMORY", 2)
    monkeypatch.setattr(loading, "IN_MEMORY", 2)
    monkeypatch.setattr(loading, "_LARGE", 0)


def kept(rows: list[Record], tmp_path: Path) -> StoredRows:
    with RecordSink(Cache(tmp_path / "cache"), lambda: "rows-x") as sink:
        for row in rows:
            sink.add(row)
        made = sink.done({})
    assert isinstance(made, StoredRows)
    return made


def pairs_file(path: Path, rows: int, bad: int | None = None) -> Path:
    with path.open("w", encoding="utf-8") as handle:
        for i in range(rows):
            row = {
                "prompt": f"the cat number {i}?",
                "chosen": " red",
                "rejected": f" so {'it is ' * (i % 7)}blue",
            }
            handle.write(json.dumps({**row, "chosen": "" if i == bad else row["chosen"]}) + "\n")
    return path


# ---------------------------------------------------------------- records


def test_every_record_comes_back_as_it_was(few: None, tmp_path: Path) -> None:
    rows = kept(RECORDS, tmp_path)
    assert list(rows) == RECORDS
    assert [rows[i] for i in range(-len(RECORDS), len(RECORDS))] == [*RECORDS, *RECORDS]
    assert rows[2:5] == RECORDS[2:5]
    assert isinstance(rows[3].columns["t"], tuple)
    assert rows.facts["forms"] == ["conversational", "standard"]
    with pytest.raises(IndexError):
        rows[len(RECORDS)]


def test_numbers_of_all_rows_are_those_of_the_records(few: None, tmp_path: Path) -> None:
    rows = kept(RECORDS, tmp_path)
    for name in ("p_chosen", "margin", "label", "votes"):
        np.testing.assert_array_equal(numbers_of(rows, name), numbers_of(RECORDS, name))
    order = [5, 0, 7, 5]
    some = picked(rows, order)
    assert isinstance(some, PickedRows)
    assert list(some) == [RECORDS[i] for i in order]
    np.testing.assert_array_equal(numbers_of(some, "votes"), [2, 0, 0, 2])
    assert list(picked(some, [2, 1])) == [RECORDS[7], RECORDS[0]]


def test_a_large_source_is_read_once_and_gives_what_it_gives_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs_file(tmp_path / "pairs.jsonl", 3000, bad=7)
    source = [DataSource(str(path), on_bad="skip")]
    plain = load(source, ("preference",), 0)
    assert isinstance(plain.records, tuple)
    monkeypatch.setattr(stored, "IN_MEMORY", 100)
    monkeypatch.setattr(loading, "_LARGE", 0)
    preparation = Preparation(Cache(tmp_path / "cache"))
    large = load(source, ("preference",), 0, preparation)
    assert isinstance(large.records, StoredRows)
    assert tuple(large.records) == plain.records
    assert (large.skipped, large.skipped_reasons, large.sources) == (1, plain.skipped_reasons, plain.sources)
    monkeypatch.setattr(loading.records, "parse", None)  # what is read again does not need it
    again = load(source, ("preference",), 0, Preparation(Cache(tmp_path / "cache")))
    assert (tuple(again.records), again.skipped_reasons) == (plain.records, plain.skipped_reasons)


def test_a_changed_file_is_read_again_and_what_was_made_of_it_removed(few: None, tmp_path: Path) -> None:
    path, cache = pairs_file(tmp_path / "pairs.jsonl", 30), Cache(tmp_path / "cache")
    first = load([DataSource(str(path))], ("preference",), 0, Preparation(cache))
    pairs_file(path, 40)
    cache = Cache(tmp_path / "cache")
    second = load([DataSource(str(path))], ("preference",), 0, Preparation(cache))
    assert (len(first.records), len(second.records)) == (30, 40)
    assert len(list((tmp_path / "cache").glob("rows-*"))) == 2
    cache.sweep()
    assert [p.name for p in (tmp_path / "cache").glob("rows-*")] == list(cache.used)


def test_a_bad_row_of_a_large_file_is_named_and_leaves_nothing(few: None, tmp_path: Path) -> None:
    path = pairs_file(tmp_path / "pairs.jsonl", 5000, bad=4321)
    with pytest.raises(DataError, match=r"pairs.jsonl:4322: \"chosen\" is empty"):
        load([DataSource(str(path))], ("preference",), 0, Preparation(Cache(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_mixture_of_large_sources_is_drawn_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        DataSource(str(pairs_file(tmp_path / "a.jsonl", 50)), weight=1),
        DataSource(str(pairs_file(tmp_path / "b.jsonl", 900)), weight=3),
    ]
    plain = load(sources, ("preference",), 3)
    monkeypatch.setattr(stored, "IN_MEMORY", 100)
    monkeypatch.setattr(loading, "_LARGE", 0)
    large = load(sources, ("preference",), 3, Preparation(Cache(tmp_path / "cache")))
    assert isinstance(large.records, Rows)
    assert tuple(large.records) == plain.records


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(("workers", "count", "task"), [(1, 1100, 1024), (2, 300, 128)])
def test_tokens_are_those_of_the_rows_one_by_one_whoever_makes_them(
    workers: int,
    count: int,
    task: int,
    few: None,
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_rows, "TASK", task)  # alone a task with a whole block; two have three tasks
    path = pairs_file(tmp_path / "pairs.jsonl", count)
    preparation = Preparation(Cache(tmp_path / "cache"), workers)
    rows = load([DataSource(str(path))], ("preference",), 0, preparation).records
    assert isinstance(rows, StoredRows)
    made = tokenised(rows, tokenizer, preparation, "x")
    expected = [tokens for _, _, tokens in each(tokenizer, tuple(rows))]
    assert [made[i] for i in range(len(made))] == expected
    assert made.lengths().tolist() == [[len(part) for part in tokens] for tokens in expected]
    monkeypatch.setattr(token_rows, "work", None)  # a second time nothing is made
    assert tokenised(rows, tokenizer, preparation, "x")[count - 1] == expected[count - 1]


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_first_row_that_cannot_be_tokenised_is_the_error(
    workers: int, few: None, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_rows, "TASK", 16)
    said = [{"role": "user", "content": "the cat?"}]
    rows: list[Record] = [TextRecord((*said, {"role": "assistant", "content": "red"})) for _ in range(100)]  # type: ignore[arg-type]
    for at in (40, 90):
        rows[at] = TextRecord(tuple(said), origin=f"talks:{at + 1}")  # type: ignore[arg-type]
    preparation = Preparation(Cache(tmp_path / "cache"), workers)
    with pytest.raises(DataError, match='talks:41: "messages" has no assistant turn to learn from'):
        tokenised(kept(rows, tmp_path), tokenizer, preparation, "x")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["rows-x"]


def test_a_worker_that_is_killed_is_told_of(few: None, tmp_path: Path, tokenizer: Any) -> None:
    rows = kept(RECORDS[:3], tmp_path)
    rows.__class__ = type("Dying", (StoredRows,), {"__reduce__": lambda self: (os._exit, (9,))})
    preparation = Preparation(Cache(tmp_path / "cache"), 2)
    tasks = [token_rows.Task(0, 0, 1), token_rows.Task(1, 1, 2)]
    with pytest.raises(KeelError, match=r"ended without a word at row 0 to 1"):
        do(rows, tokenizer, tasks, tmp_path, preparation, "x")


def test_entries_of_records_that_become_none_one_or_several() -> None:
    record = np.array([0, 0, 2, 3, 3, 3])
    entries, numbers = entries_of(record, np.array([3, 1, 0]))
    assert entries.tolist() == [3, 4, 5, 0, 1]
    assert numbers.tolist() == [0, 0, 0, 2, 2]


def test_a_worker_needs_no_torch() -> None:
    code = "import sys, keel.data.stored.worker; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# ---------------------------------------------------------------- the cache


def test_two_that_make_the_same_folder_at_once_both_have_it(tmp_path: Path) -> None:
    one, other = Cache(tmp_path), Cache(tmp_path)
    with one.making("x") as first, other.making("x") as second:
        (first / "f").write_text("a")
        (second / "f").write_text("a")
    assert (tmp_path / "x" / "f").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    code = f"""
import os
import pickle
from pathlib import Path
from keel.data.stored.cache import Cache
making = Cache(Path({str(tmp_path)!r})).making("x")
making.__enter__()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with Cache(tmp_path).making("y") as living:
        Cache(tmp_path).sweep()
        assert list(tmp_path.iterdir()) == [living]


def test_a_digest_is_kept_for_a_file_that_has_not_changed_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "big", Cache(tmp_path / "cache")
    cache.place.mkdir()
    path.write_bytes(b"a" * (1 << 25))
    os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setattr(caches, "_SETTLED", 0)
    monkeypatch.setattr(caches, "_digests", {})
    first = digest_of(path, cache)
    keep_digests(cache)
    monkeypatch.setattr(caches, "_digests", {})
    monkeypatch.setattr(caches, "_sha256", lambda path: "00")
    assert digest_of(path, cache) == first
    path.write_bytes(b"b" * (1 << 25))
    os.utime(path, ns=(10**18, 10**18))  # the same size and time; the kernel's own time of change tells
    assert digest_of(path, cache) == b"\0"


def test_a_disk_that_is_full_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    with (
        pytest.raises(UsageError, match=r"rows cannot be written to .*cache"),
        Cache(tmp_path / "cache" / "in").making("x"),
    ):
        pass


# ---------------------------------------------------------------- training


@pytest.mark.usefixtures("no_report")
def test_stages_end_with_the_same_bytes_from_files_as_from_memory(
    data: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"model": str(tiny_model), "max_steps": 2, "batch_size": 4}
    pairs = str(data.pairs)
    config = {
        "name": "twins",
        "threads": 1,
        "workers": 2,
        "stages": {
            "sft": {"kind": "sft", "data": str(data.demonstrations), **common},
            "packed": {"kind": "sft", "data": str(data.chats), "packing": True, "max_length": 48, **common},
            "rm": {"kind": "reward", "data": pairs, "normalize": 0, **common},
            "dpo": {"kind": "dpo", "data": pairs, "votes": "soft", **common},
            "grpo": {
                "kind": "grpo",
                "model": str(tiny_model),
                "data": str(data.prompts),
                "updates": 1,
                "batch_size": 4,
                "samples_per_prompt": 2,
                "reward": {"kind": "length", "high": 2},
                "sampling": {"max_new_tokens": 4},
            },
        },
    }

    def made(directory: Path) -> dict[str, bytes]:
        Pipeline(parse(config), directory, lambda line: None).run()
        files = [*directory.glob("stages/*/model/*.safetensors"), *directory.glob("stages/*/*.jsonl")]
        return {
            str(file.relative_to(directory)): file.read_bytes()
            for file in files
            if file.name != "times.jsonl"
        }

    plain = made(tmp_path / "memory")
    assert not (tmp_path / "memory" / PREPARED).exists()
    monkeypatch.setattr(stored, "IN_MEMORY", 2)
    monkeypatch.setattr(loading, "_LARGE", 0)
    assert made(tmp_path / "files") == plain
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "files" / PREPARED).iterdir())
    assert kinds.count("rows") == 4
    assert kinds.count("tokens") == 3  # all stages on pairs read the same
    shutil.rmtree(tmp_path / "files" / "stages" / "rm")
    assert made(tmp_path / "files") == plain  # once more, from what was kept


@pytest.mark.parametrize("policy", ["skip", "truncate"])
def test_rows_that_are_too_long_are_left_out_or_cut_alike_and_skipped_ones_are_not_read(
    policy: str, few: None, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs_file(tmp_path / "pairs.jsonl", 70)
    stage_run: Any = SimpleNamespace(name="x", preparation=Preparation(Cache(tmp_path / "cache")))
    records = load([DataSource(str(path))], ("preference",), 0, stage_run.preparation).records
    assert isinstance(records, StoredRows)
    seen: list[int] = []

    def encoded(rows: Any) -> tuple[list[Tokens], TooLong]:
        too_long = TooLong(stage_run, policy, limit=20)

        def fits(record: Record, tokens: Tokens) -> bool:
            seen.append(len(tokens[0]) + max(map(len, tokens[1:])))
            return too_long.fits(record, seen[-1])

        return list(encode(rows, tokenizer, too_long, fits, lambda number, tokens: tokens)), too_long

    plain, counts = encoded(tuple(records))
    asked, seen = seen, []
    large, counts_of_files = encoded(records)
    assert large == plain
    assert (counts_of_files.left_out, counts_of_files.cut) == (counts.left_out, counts.cut)
    assert max(asked) > 20 > min(asked)  # some are, some are not
    assert any(size > 20 for size in seen) == (policy == "truncate")


# ---------------------------------------------------------------- progress


def test_a_pass_is_shown_on_a_terminal_once_it_has_taken_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    clock = iter([0.0, 1.0, 2.5, 3.0, 9.0])
    monkeypatch.setattr("keel.data.stored.worker.time.monotonic", lambda: next(clock))
    shown = Shown(lambda *what: seen.append(what))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for done in (1, 2, 3):
        shown("rm: tokenising", done, 4)
    assert seen == [("rm: tokenising", 3, 4, {})]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    shown("rm: tokenising", 4, 4)
    assert len(seen) == 1


def test_reading_and_tokenising_tell_how_far_they_are(
    few: None, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_rows, "TASK", 512)  # three tasks: two workers have them
    told: list[tuple[str, int, int]] = []
    preparation = Preparation(
        Cache(tmp_path / "cache"), 2, lambda what, done, of: told.append((what, done, of))
    )
    path = pairs_file(tmp_path / "pairs.jsonl", 1500)
    rows = load([DataSource(str(path))], ("preference",), 0, preparation).records
    assert isinstance(rows, StoredRows)
    assert told[-1] == ("reading pairs.jsonl (MB)", 0, 0)
    tokenised(rows, tokenizer, preparation, "rm: tokenising")
    assert ("rm: tokenising", 1500, 1500) in told


def test_columns_that_rewards_ask_for_are_there_in_every_row_of_a_file(few: None, tmp_path: Path) -> None:
    rows = [PromptRecord("a", {"answer": 1}), PromptRecord("b", {}), PromptRecord("c", {"more": 2})]
    whole = stored.FilledRows(kept(list(rows), tmp_path), ("answer",))
    expected = [{"answer": 1}, {"answer": None}, {"more": 2, "answer": None}]
    assert [record.columns for record in whole] == [whole[i].columns for i in range(3)] == expected
    assert whole.facts["columns"] == ["answer", "more"]
    assert pickle.loads(pickle.dumps(whole))[1].columns == {"answer": None}
