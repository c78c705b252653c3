"""Seconds of a step by phase, from shapes, against what a run counts of its own models and rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from keel.cli.main import app
from keel.config import Training, parse
from keel.models.machine_speed import Speed
from keel.pipeline.pipeline import Pipeline
from keel.plan import model_shapes, rank_memory, stage_memory, step_seconds
from keel.plan.rank_memory import Asked
from keel.plan.stage_memory import Lengths, ModelRef, StageModels

FLOPS = Speed(1e9, {1: 1e15})  # a machine that waits for arithmetic alone
BYTES = Speed(1e18, {1: 1e9})  # and one that waits for its memory
LLAMA = "meta-llama/Llama-3.1-8B"
NOTHING = "def nothing(completions, **columns):\n    return [0.0 for _ in completions]\n"


def stage(kind: str, **settings: Any) -> Training:
    found = parse({"name": "x", "stages": {kind: {"kind": kind, **settings}}}).stages[kind]
    assert isinstance(found, Training)
    return found


@pytest.mark.parametrize(
    "kind", ["sft", "ppo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dpo", "grpo"))]
)
def test_arithmetic_is_what_a_run_counts(
    kind: str, run: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one length, responses that all reach their limit: nothing is left to the data."""
    for module in ("keel.stages.supervised_loop", "keel.rl.setup"):
        monkeypatch.setattr(f"{module}.speed", lambda device, dtype: FLOPS)
    rows = [{"prompt": f"{a} b", "chosen": "c d e f", "rejected": "f e d c"} for a in "abcdefgh"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "prompt", **({"completion": "chosen"} if kind == "sft" else {})}
    source: Any = str(data) if kind == "dpo" else {"source": str(data), "columns": columns}
    settings = {"model": {"path": str(tiny_model), "dtype": "float32"}, "data": source, "batch_size": 8,
                "micro_batch": 8, "lr": 1e-4, "save_every": 100}  # fmt: skip
    if kind in ("ppo", "grpo"):
        (tmp_path / "mine.py").write_text(NOTHING)  # its process imports this alone
        reward = {"kind": "python", "function": f"{tmp_path / 'mine.py'}:nothing"}
        settings |= {"reward": reward, "updates": 2, "sampling": {"max_new_tokens": 6}}
    else:
        settings |= {"max_steps": 2, "holdout": 0}
    config = {"name": "x", "device": "cpu", "threads": 1, "stages": {kind: {"kind": kind, **settings}}}
    monkeypatch.setenv("KEEL_TRUST", "1")
    pipeline = run(config, tmp_path / "run")
    lines = (pipeline.stage_directory(kind) / "times.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    counted = {p: row[p] * row[f"{p}/roofline"] for p in ("rollout", "forward", "train") if p in row}

    shape = model_shapes.of_config(AutoConfig.from_pretrained(tiny_model))
    assert shape is not None
    lengths = _longest(pipeline, kind)
    refs = StageModels(ModelRef(shape), None, {})
    planned = step_seconds.phases(stage(kind, **settings), refs, lengths, 1, FLOPS)
    for phase, seconds in counted.items():
        assert planned[phase] == pytest.approx(seconds, rel=0.15), (phase, planned, counted)


@pytest.mark.parametrize(
    "kind", ["sft", "reward", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pretrain", "dpo"))]
)
def test_attention_is_part_of_the_floor_where_rows_are_given(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of some 500 tokens of a narrow model: attention is as much as its weights."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    sizes = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr("keel.stages.supervised_loop.speed", lambda device, dtype: FLOPS)
    rows = [{"prompt": f"{a} b", "chosen": "c d " * 124, "rejected": "f e " * 124} for a in "abcd"]
    if kind == "pretrain":
        rows = [{"text": row["prompt"] + row["chosen"]} for row in rows]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "prompt", "completion": "chosen"}
    settings: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"}, "batch_size": 4, "micro_batch": 4, "lr": 1e-4,
        "data": {"source": str(data), "columns": columns} if kind == "sft" else str(data), "max_steps": 1,
        "holdout": 0, "max_length": 512,
    }  # fmt: skip
    config = {"name": "x", "device": "cpu", "threads": 1, "stages": {kind: {"kind": kind, **settings}}}
    pipeline = Pipeline(parse(config), tmp_path / "run", say=lambda line: None)
    pipeline.run()
    row = json.loads((pipeline.stage_directory(kind) / "times.jsonl").read_text().splitlines()[0])
    lengths = _longest(pipeline, kind)
    assert lengths.total > 400
    shape = model_shapes.of_config(AutoConfig.from_pretrained(model))
    assert shape is not None
    refs = StageModels(ModelRef(shape), None, {})
    found = step_seconds.works(stage(kind, **settings), refs, lengths)
    for phase in ("train", "reference") if kind == "dpo" else ("train",):
        planned, counted = found[phase].seconds(FLOPS), row[phase] * row[f"{phase}/roofline"]
        assert planned == pytest.approx(counted, rel=0.05), phase
        without = replace(found[phase], pairs=0).seconds(FLOPS)
        assert planned > 1.3 * without


def llama(**settings: Any) -> tuple[Training, StageModels, Lengths]:
    """GRPO of a model of 8 B parameters: 64 prompts with 8 samples of up to 1,024 tokens."""
    common: dict[str, Any] = {
        "model": {"path": LLAMA, "dtype": "bfloat16"} if "lora" in settings else LLAMA,
        "data": "d",
        "reward": "r",
        "batch_size": 512,
        "samples_per_prompt": 8,
    }
    found = stage("grpo", **common, sampling={"max_new_tokens": 1024}, micro_batch=1, **settings)
    return found, StageModels(ModelRef(model_shapes.KNOWN[LLAMA]), None, {}), Lengths(1024, 1024)


def test_sampling_reads_all_weights_for_each_token_of_the_slots_and_the_keys_before_it() -> None:
    settings, refs, lengths = llama()
    shape = refs.model.shape
    weights = 2 * (shape.parameters() - shape.vocab * shape.hidden)  # bytes: 16 bit, without the embedding
    passes = 512 / 64 * 1024
    read = step_seconds.phases(settings, refs, lengths, 1, BYTES)["rollout"] * 1e9
    keys = 2 * 2 * shape.layers * shape.keys * 512 * (2048 * 2049 - 1024 * 1025) / 2
    assert read == pytest.approx(passes * weights + keys, rel=0.02)


def test_a_server_reads_its_weights_once_for_the_rows_that_it_is_asked_for_at_a_time() -> None:
    passes = {
        n: step_seconds.works(*llama(rollout={"engine": "vllm", "concurrency": n}))["rollout"].passes
        for n in (64, 512)
    }
    assert passes == {64: 8 * 1024, 512: 1024}


def test_keels_slots_are_those_that_the_config_says() -> None:
    counted: dict[int, tuple[float, float]] = {}
    for slots in (64, 256):
        settings, refs, lengths = llama(rollout={"concurrency": slots})
        found = stage_memory.phases(settings, refs, lengths, "cuda") or []
        (rollout,) = (phase for phase in found if phase.name == "rollout")
        passes = step_seconds.works(settings, refs, lengths)["rollout"].passes
        counted[slots] = passes, rollout.parts["policy"]["kv_cache"]
    assert counted[256] == pytest.approx((counted[64][0] / 4, counted[64][1] * 4))
    assert llama()[0].rollout.rows_at_once == 64


def test_a_pair_has_two_sides_and_an_example_of_ktos_one() -> None:
    refs, lengths = StageModels(ModelRef(model_shapes.KNOWN[LLAMA]), None, {}), Lengths(100, 50)
    tokens = {
        loss: step_seconds.works(stage("dpo", model=LLAMA, data="d", loss=loss, batch_size=4), refs, lengths)
        for loss in ("sigmoid", "kto", "orpo")
    }
    assert tokens["sigmoid"]["train"].tokens == 4 * (100 + 2 * 50)
    assert tokens["kto"]["train"].tokens == 4 * (100 + 50)
    assert ["reference" in found for found in tokens.values()] == [True, True, False]


def test_more_ranks_take_less_time_and_send_more() -> None:
    settings, refs, lengths = llama()
    card = Speed(4e14, {1: 2e12})
    found = {
        n: rank_memory.on_ranks(settings, refs, lengths, Asked(n, 80, 5e10, card))["fsdp"].seconds
        for n in (2, 8)
    }
    assert found[8]["train"] == pytest.approx(found[2]["train"] / 4)
    assert found[8]["optimizer"] == pytest.approx(found[2]["optimizer"] / 4)
    assert list(found[8]) == ["rollout", "forward", "train", "optimizer", "sending"]
    assert not rank_memory.on_ranks(settings, refs, lengths, Asked(8))["fsdp"].seconds


def test_a_servers_cards_are_those_with_which_sampling_and_training_take_as_long() -> None:
    rollout, rest = {n: 70 / n for n in range(1, 8)}, {n: 30 / n for n in range(1, 8)}
    split = step_seconds.best_split(rollout, rest, 8)
    assert split is not None
    assert (split.engine, split.training) == (5, 3)
    assert split.ahead == pytest.approx(14)
    assert split.in_turn == pytest.approx(24)
    assert step_seconds.best_split({}, {}, 1) is None


def test_the_lines_say_seconds_and_the_split() -> None:
    settings, refs, lengths = llama(rollout={"engine": "vllm"}, lora={"r": 16}, gradient_checkpointing=True)
    asked = Asked(8, 80, 5e10, Speed(4e14, {1: 2e12}))
    found = rank_memory.on_ranks(settings, refs, lengths, asked)
    split = rank_memory.split_of(settings, refs, lengths, asked, found)
    assert split is not None
    assert split.engine + split.training == 8
    lines = rank_memory.as_lines(rank_memory.as_dict(found, asked, split))
    assert any("8 × 80 GB, ddp: at least" in line and "rollout" in line for line in lines)
    assert f"cards of its own: {split.engine}, and {split.training} that train" in lines[-1]
    without = Asked(8, 80, 5e10)
    assert rank_memory.split_of(settings, refs, lengths, without, found) is None


def test_a_speed_needs_both_numbers(tmp_path: Path) -> None:
    for options in (["--tflops", "400"], ["--reading", "2000"]):
        outcome = CliRunner().invoke(app, ["plan", "x.yaml", "--nproc", "2", *options])
        assert "go together" in str(outcome.exception)
        outcome = CliRunner().invoke(app, ["plan", "x.yaml", *options])
        assert "no effect without --nproc" in str(outcome.exception)
    speed = rank_memory.speed_of(400, 2000)
    assert speed is not None
    assert (speed.flops, speed.reading(1e9)) == (4e14, 2e12)


def _longest(pipeline: Pipeline, name: str) -> Lengths:
    from keel.plan import planner

    datasets = planner._datasets(pipeline, name)
    return planner._longest(pipeline, name, planner._tokenizer(pipeline, name), datasets)
