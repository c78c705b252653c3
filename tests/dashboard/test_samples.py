"""Replies that were kept: found by step or model, read a page at a time, laid side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from made_runs import append, sample_row, trl_run
from pyarrow import parquet

from keel.dashboard.samples import PAGE, LineSamples, ParquetSamples, groups, page, shown


def text(reply: dict[str, Any]) -> str:
    return reply["completion"][0]["text"]


def kept(tmp_path: Path, steps: range, a_step: int = 4) -> LineSamples:
    append(tmp_path / "samples.jsonl", (sample_row(step, n) for step in steps for n in range(a_step)))
    found = LineSamples(tmp_path / "samples.jsonl")
    found.refresh()
    return found


def test_the_first_step_is_read_after_ten_thousand(tmp_path, monkeypatch):
    found = kept(tmp_path, range(1, 10_001), 1)
    assert len(groups(found)) == 10_000
    read, was = [], LineSamples.read
    monkeypatch.setattr(LineSamples, "read", lambda self, spots: read.append(len(spots)) or was(self, spots))
    first = page(found, found, "step 1", "step 10000", 0)
    assert text(first["rows"][0]["a"]) == " Reply 0 of step 1."
    assert text(first["rows"][0]["b"]) == " Reply 0 of step 10000."
    assert read == [1, 1]  # two rows of ten thousand


def test_replies_to_one_prompt_stand_side_by_side(tmp_path):
    rows = [
        {"model": model, "index": index, "prompt": f"p{index}", "completion": f"{model} {index}", "kl": 1.0}
        for model, order in (("sft", (0, 1, 2)), ("ppo", (2, 0)))
        for index in order
    ]
    append(tmp_path / "samples.jsonl", rows)
    found = LineSamples(tmp_path / "samples.jsonl")
    found.refresh()
    assert [(group.name, group.count) for group in groups(found)] == [("sft", 3), ("ppo", 2)]
    pairs = page(found, found, "sft", "ppo", 0)
    beside = [(text(row["a"]), row["b"] and text(row["b"])) for row in pairs["rows"]]
    assert beside == [("sft 0", "ppo 0"), ("sft 1", None), ("sft 2", "ppo 2")]
    assert pairs["same_prompts"]


def test_without_a_common_prompt_the_same_place_counts(tmp_path):
    append(tmp_path / "samples.jsonl", [{"step": s, "prompt": f"{s}", "completion": f"c{s}"} for s in (1, 2)])
    found = LineSamples(tmp_path / "samples.jsonl")
    found.refresh()
    pairs = page(found, found, "step 1", "step 2", 0)
    assert not pairs["same_prompts"]
    assert text(pairs["rows"][0]["b"]) == "c2"


def test_pages(tmp_path):
    found = kept(tmp_path, range(1, 2), 2 * PAGE + 3)
    sizes = [len(page(found, None, "step 1", None, first)["rows"]) for first in (0, PAGE, 2 * PAGE, 3 * PAGE)]
    assert sizes == [PAGE, PAGE, 3, 0]
    assert page(found, None, "step 1", None, 0)["total"] == 2 * PAGE + 3


def test_new_replies_are_found_and_void_ones_forgotten(tmp_path):
    found = kept(tmp_path, range(1, 3))
    append(tmp_path / "samples.jsonl", [sample_row(3, 0)])
    found.refresh()
    assert groups(found)[-1].name == "step 3"
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample_row(1, 0)) + "\nbroken\n")
    found.refresh()
    assert len(found.spots) == 1


def test_what_is_shown_is_bounded_and_plain():
    row = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, "odd"],
        "completion": [{"role": "x", "reasoning_content": "hm", "content": None, "tool_calls": [{"a": 1}]}],
        "rewards": {"r": 1.5, "skipped": None, "odd": "x"}, "gold": {"total": 0.5}, "length": True,
        "kl": 1e999, "extra": {"n": 2}, "stop_reason": ["x"] * 500,
    }  # fmt: skip
    found = shown(row)
    assert found["prompt"] == [{"role": "user", "text": "hi"}]
    assert found["completion"][0]["text"] == 'hm\n\n[{"a": 1}]'
    assert found["values"] == {"r": 1.5, "skipped": None, "gold/total": 0.5, "extra/n": 2}
    assert len(found["stop_reason"]) == 40
    assert len(shown({"completion": "x" * 10**6})["completion"][0]["text"]) < 21_000


def test_parquet_of_trl(tmp_path):
    run = trl_run(tmp_path / "trl", 20)
    (run / "completions" / "completions_00021.parquet").write_bytes(b"half written")
    found = ParquetSamples(run / "completions")
    found.refresh()
    assert [group.name for group in groups(found)] == ["step 1", "step 20"]
    row = page(found, found, "step 20", "step 1", 0)["rows"][1]
    assert text(row["a"]) == "b20"
    assert text(row["b"]) == "b1"
    assert row["a"]["values"] == {"accuracy_reward": 1.0, "advantage": 1.0}


def test_a_small_file_of_much_text_is_not_expanded(tmp_path):
    """60,000 rows of one prompt of 100 kB: 6 GB, in a file of a few hundred kilobytes."""
    rows, prompt = 60_000, "long " * 20_000
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([prompt]))
    table = pa.table({
        "step": [1] * rows, "prompt": prompts, "completion": [f"c{row}" for row in range(rows)],
        "reward": [float(row) for row in range(rows)],
    })  # fmt: skip
    path = tmp_path / "completions" / "completions_00001.parquet"
    path.parent.mkdir()
    parquet.write_table(table, path, row_group_size=20_000)
    assert path.stat().st_size < 2**21
    before = pa.default_memory_pool().max_memory()
    found = ParquetSamples(path.parent)
    found.refresh()
    assert len(found.spots) == rows
    last = page(found, None, "step 1", None, rows - 3)["rows"]
    assert [text(row["a"]) for row in last] == [f"c{row}" for row in range(rows - 3, rows)]
    assert last[0]["a"]["values"] == {"reward": rows - 3.0}
    assert last[0]["a"]["prompt"][0]["text"].startswith("long long")
    assert pa.default_memory_pool().max_memory() - before < 2**27


def test_conversations_and_missing_values_of_parquet(tmp_path):
    path = tmp_path / "completions_00002.parquet"
    turns = [{"role": "user", "content": "hi"}]
    rows = [
        {"step": 2, "prompt": turns, "completion": "a"}, {"step": 2, "prompt": None, "completion": None},
        {"step": 2, "prompt": turns, "completion": "c"},
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), path)
    found = ParquetSamples(tmp_path)
    found.refresh()
    assert found.spots[0].key == found.spots[2].key != found.spots[1].key
    shown_rows = page(found, None, "step 2", None, 0)["rows"]
    assert shown_rows[0]["a"]["prompt"] == [{"role": "user", "text": "hi"}]
    assert [text(row["a"]) for row in shown_rows] == ["a", "", "c"]


def test_prompts_that_are_nested_as_deeply_as_can_be_read(tmp_path):
    path = tmp_path / "samples.jsonl"
    for depth in range(900, 1000):  # somewhere here what is read can no longer be written
        append(path, [])
        with path.open("a") as handle:
            handle.write(f'{{"step": 1, "prompt": {"[" * depth}{"]" * depth}, "completion": "a"}}\n')
    found = LineSamples(path)
    found.refresh()
    assert [group.name for group in groups(found)] == ["step 1"]
    json.dumps(page(found, found, "step 1", "step 1", 0), allow_nan=False)


def test_the_last_of_very_many_steps_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr("keel.dashboard.samples.MOST_GROUPS", 5)
    assert [group.name for group in groups(kept(tmp_path, range(1, 8), 1))] == [
        f"step {n}" for n in range(3, 8)
    ]
