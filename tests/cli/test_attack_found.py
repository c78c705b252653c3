"""One small case of each kind of fault that attacks have found: see `tests/attack` for the rest."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keel.config import parse, read
from keel.data import load
from keel.errors import DataError, UsageError
from keel.rundir import checkpoint, kept, run_status, stage_files
from keel.types import DataSource

GOOD: dict[str, Any] = {"prompt": "a?", "completion": " b"}
PAIR: dict[str, Any] = {"prompt": "a?", "chosen": " b", "rejected": " c"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "completion": "b", "x": ' + "[" * 600 + "]" * 600 + "}", "more than 100"),
        ('{"prompt": "a", "completion": "b", "x": ' + '{"a":' * 600 + "1" + "}" * 601, "more than 100"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', 'key "prompt" appears twice'),
        (json.dumps({**GOOD, "label": False}), "an unpaired row may show what not to do"),
    ],
)  # fmt: skip
def test_a_row_is_refused_and_skipped_alone(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{said}"):
        load.load([DataSource(str(path))], ["demonstration"], 0)
    found = load.load([DataSource(str(path), on_bad="skip")], ["demonstration"], 0)
    assert (len(found.records), found.skipped) == (1, 1)


def test_a_trillion_votes_fill_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**PAIR, "votes": {"chosen": 10**12}}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*p_chosen"):
        load.load([DataSource(str(path))], ["preference"], 0)


def test_nested_votes_in_a_cell_are_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected,votes\na,b,c," + "[" * 3000 + "\n")
    with pytest.raises(DataError, match=r"rows.csv:2"):
        load.load([DataSource(str(path))], ["preference"], 0)


@pytest.mark.parametrize(
    "odd",
    [
        pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
        pyarrow.array([10**15, 1], pyarrow.duration("s")),
        pyarrow.array([b"\xff", b"x"]).view(pyarrow.string()),
    ],
    ids=["date", "duration", "text"],
)
def test_a_value_that_python_cannot_hold_costs_its_row_alone(odd: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = {"prompt": ["a?", "b?"], "completion": [" c", " d"], "odd": odd}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(DataError, match=r'rows.parquet:row 1: "odd" holds'):
        load.load([DataSource(str(path))], ["demonstration"], 0)
    found = load.load([DataSource(str(path), on_bad="skip")], ["demonstration"], 0)
    assert [record.prompt for record in found.records] == ["b?"]


ANSWERS = {"response_1": "b", "response_2": "c"}
# columns that become a label, a score, a margin or a strength → a row, and the columns that hold the number
READ = {
    "margin": ({**PAIR, "margin": 1.0}, ["preference"]),
    "p_chosen": ({**PAIR, "p_chosen": 1.0}, ["preference"]),
    "label": ({**GOOD, "label": 1.0}, ["unpaired"]),
    "ranks": ({"prompt": "a", "completions": ["b", "c"], "ranks": [1.0, 2.0]}, ["preference"]),
    "score_0": (
        {"question": "a", "answer_0": "b", "answer_1": "c", "score_0": 1.0, "score_1": 0.0}, ["preference"]
    ),
    "preference_strength": ({"prompt": "a", **ANSWERS, "preference_strength": 1.0}, ["preference"]),
}  # fmt: skip


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", READ)
def test_a_number_that_is_none_is_refused_where_it_says_what_is_better(
    column: str, odd: float, tmp_path: Path
) -> None:
    """In tables it can stand anywhere; where nobody reads it, it does no harm."""
    row, kinds = READ[column]
    bad = {**row, column: [odd, 1.0] if isinstance(row[column], list) else odd}
    path = tmp_path / "rows.parquet"

    def read(*rows: dict[str, Any], **more: Any) -> Any:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**one, "other": odd} for one in rows]), path)
        return load.load([DataSource(str(path), **more)], kinds, 0)

    assert len(read(row, row).records) == 2
    with pytest.raises(DataError, match=rf'rows.parquet:row 2: .*"{column}"'):
        read(row, bad)
    kept = read(row, bad, on_bad="skip")
    assert (len(kept.records), kept.skipped) == (1, 1)


def test_a_margin_beyond_all_floats_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**PAIR, "margin": 10**400}) + "\n")
    with pytest.raises(DataError, match=r'rows.jsonl:1: "margin" is a number beyond all reason') as refused:
        load.load([DataSource(str(path))], ["preference"], 0)
    assert len(str(refused.value)) < 300


def test_long_cells_of_two_open_files_are_read(tmp_path: Path) -> None:
    """Python's limit on cells is one for the whole process; sources of a mixture are open at once."""
    long = "x " * 2**17
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(f"prompt,completion\n{name}?,b\nc?,{long}\n")
    before = csv.field_size_limit()
    found = load.load([DataSource(str(tmp_path / name)) for name in ("a.csv", "b.csv")], ["demonstration"], 0)
    assert len(found.records) == 4
    assert csv.field_size_limit() == before


# ---------------------------------------------------------------- configs

SFT = {"kind": "sft", "model": "m", "data": "d.jsonl"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: &a {x: *a}", "an alias"),
        ("name: " + "[" * 1200, "nested too deep"),
        ("date: 2026-13-45", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
        *((f"seed: !!{tag}", "not what its tag") for tag in ("int ''", "float ''", "bool x", "timestamp x")),
        ("a: &a !!pairs [b: [x, x]]\n" + "".join(
            f"{chr(c)}: &{chr(c)} !!pairs [{', '.join([f'k: *{chr(c - 1)}'] * 9)}]\n" for c in range(98, 108)
        ), "more than 100,000 values"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(c)}: &{chr(c)} [{','.join([f'*{chr(c - 1)}'] * 9)}]\n" for c in range(98, 108)
        ), "more than 100,000 values"),
    ],
)  # fmt: skip
def test_a_trick_in_yaml_is_a_line_with_the_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"config.yaml") as refused:
        read(path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lr", float("inf"), "stages.s.lr: must be a finite number"),
        ("lr", "inf", "stages.s.lr: must be a finite number"),
        ("lr", 1e300, "`lr` is 1e+300: it must be a finite number, at most 1e+15"),
        ("lr", 10**400, "stages.s.lr"),
        ("batch_size", 2**64, "`batch_size` is too large: at most 2,147,483,647"),
        ("batch_size", 10**4000, "stages.s"),
        ("data", {"source": "d.jsonl", "options": {"a": [float("nan")]}}, "`options.a.0` is nan"),
        ("batch_size", True, "`batch_size`: true is no number"),
        ("model", "x" * 100_000, "stages.s.model: 100,000 characters"),
    ],
)
def test_a_value_that_no_setting_can_have_is_refused_with_its_key(key: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse({"name": "r", "stages": {"s": {**SFT, key: value}}})
    assert said in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_billion_rounds_are_refused_at_once() -> None:
    rounds = {"n": 10**9, "reward": "a", "policy": "b", "annotators": "world:helpdesk", "pairs": 3}
    stages = {"a": {**SFT, "kind": "reward"}, "b": {**SFT, "kind": "ppo", "reward": "a"}}
    with pytest.raises(UsageError, match=r"rounds.n: .*100"):
        parse({"name": "r", "rounds": rounds, "stages": stages})


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"kind": "lenght"}, "unknown kind 'lenght'; did you mean 'length'?"),
        ({"high": 3}, "`kind` is missing"),
    ],
)
def test_an_unknown_reward_is_not_taken_for_a_stage(term: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse({"name": "r", "stages": {"s": {**SFT, "kind": "grpo", "reward": [term]}}})
    assert f"stages.s.reward.0: {said}" in str(refused.value)


def test_names_that_no_folder_can_have_are_refused() -> None:
    with pytest.raises(UsageError, match=r"name: .*100 characters"):
        parse({"name": "n" * 300, "stages": {"s": SFT}})
    with pytest.raises(UsageError, match=r"at most 100 characters"):
        parse({"name": "r", "stages": {"s" * 300: SFT}})


# ---------------------------------------------------------------- run directories


@pytest.mark.parametrize("name", ["values.json", "tensors.pt"])
@pytest.mark.parametrize("how", ["empty", "half", "flipped", "list", "gone"])
def test_a_broken_checkpoint_is_said_and_not_gone_on_from(name: str, how: str, tmp_path: Path) -> None:
    import torch

    checkpoint.save(tmp_path, checkpoint.Checkpoint(3, {"a": torch.arange(1000)}, {"x": 1}, {"log": 2}))
    path = tmp_path / "step-000003" / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x7F
        path.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "list": b"[1]"}.get(how, content)
        )
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) is None
    assert "step-000003 is broken" in said[0]
    assert "going on without it" in said[0]


BROKEN = [
    *(b"", b"[1]", b"null", b"\xff", b"[" * 99_999, b'{"fingerprint": 3}'),
    *(b'{"weights": {"a": 1}}', b'{"seconds": "x"}'),
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_mark_of_being_done_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_bytes(content)
    assert stage_files.read_record(tmp_path) == {}


def test_a_broken_fingerprint_is_kept_under_a_name_of_its_own(tmp_path: Path) -> None:
    stage = tmp_path / "stages" / "sft"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text("{}")
    (stage / "fingerprint").write_bytes(b"\xff/../..")
    assert stage_files.read_mark(stage) == ""
    place = kept.keep(stage)
    assert place == tmp_path / "kept" / "sft-unknown"
    assert [one.path for one in kept.listed(tmp_path)] == [place]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"stages": 3}', b'{"stages": {"a": 3}}', b"\xff"])
def test_a_broken_manifest_has_no_stages(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert run_status.manifest(tmp_path) == {}
    assert run_status.results(tmp_path) == {}


def test_what_a_stage_wrote_for_itself_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "best.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(UsageError, match=r"best.jsonl is not what keel wrote there: .* remove it"):
        stage_files.read_own(tmp_path / "best.jsonl", lines=True)


# ---------------------------------------------------------------- models, templates, reports


def test_sizes_that_no_model_has_are_refused_before_they_fill_the_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    from keel.models.load import ModelSource, model_config

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 10_001}))
    with pytest.raises(UsageError, match=r"config.json: num_hidden_layers is 10,001, which no model has"):
        model_config(ModelSource(str(folder)))
    with pytest.raises(UsageError, match=r"model.init: hidden_size is"):
        model_config(ModelSource(init={"model_type": "llama", "hidden_size": 10**13}))
    (folder / "config.json").write_text("[" * 99_999)
    with pytest.raises(UsageError, match=r"config.json is no JSON"):
        model_config(ModelSource(str(folder)))


def test_a_template_that_took_too_long_is_not_waited_for_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from transformers import AutoTokenizer

    from keel.data.chat import rendering

    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    monkeypatch.setattr(rendering, "_slow", {})
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    turns = [{"role": "user", "content": "a"}]
    with pytest.raises(UsageError, match=r"takes more than 0.3 s"):
        rendering.apply(tokenizer, turns, True, {})
    monkeypatch.setattr(rendering, "SECONDS", 60)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"takes more than"):
        rendering.apply(tokenizer, turns, True, {})
    assert time.monotonic() - began < 5


def test_an_empty_chat_template_is_not_taken_for_none() -> None:
    with pytest.raises(UsageError, match=r"chat_template: .*at least 1 character"):
        parse({"name": "r", "stages": {"s": {**SFT, "model": {"path": "m", "chat_template": ""}}}})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", b"\xff\xfe\xff", "config.yaml cannot be read"),
        ("config.yaml", b"stages: [1]", "`stages` is no mapping"),
        ("manifest.json", b'{"stages": [1]}', "manifest.json: `stages` is no mapping"),
        ("stages/s/metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl:1 is not JSON"),
        ("stages/s/metrics.jsonl", b'{"step": "x", "loss": 1}\n', "metrics.jsonl:1"),
        ("stages/s/result.json", b'{"models": [1]}', "result.json"),
        ("stages/s/stage.json", b'{"weights": 3}', None),
        ("stages/s/fingerprint", b"\xff", None),
    ],
)
def test_a_report_says_what_a_broken_file_is_or_shows_the_rest(
    name: str, content: bytes, said: str | None, tmp_path: Path
) -> None:
    from keel.report import reading

    (tmp_path / "stages" / "s").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("name: r\nstages: {s: {kind: evaluate}}\n")
    (tmp_path / name).write_bytes(content)
    if said is None:
        assert reading.read(tmp_path).name == "r" or name == "config.yaml"
        return
    with pytest.raises(DataError, match=said):
        reading.read(tmp_path)
