"""Every stage learns a tiny task in seconds, and does so twice identically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SECONDS_ONLY = {"times.jsonl", "stage.json"}  # what may differ between two runs of one config


def results(stage: Path) -> dict[str, bytes]:
    """Everything a stage leaves behind that must not depend on the clock."""
    files = [p for p in stage.rglob("*") if p.is_file() and p.name not in SECONDS_ONLY]
    return {str(p.relative_to(stage)): p.read_bytes() for p in files}


def metrics(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def result(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "result.json").read_text())


@pytest.fixture(scope="module")
def stages(data: Any) -> dict[str, dict[str, Any]]:
    """pretrain → sft → reward → ppo (both sharings), long enough to learn."""
    ppo = {
        "kind": "ppo",
        "model": "sft",
        "reward": "reward",
        "data": str(data.prompts),
        "lr": 2e-3,
        "batch_size": 48,
        "mini_batch": 24,
        "epochs": 2,
        "updates": 24,
        "sampling": {"max_new_tokens": 6},
        "kl": {"coef": 0.05},
    }
    init = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return {
        "base": {
            "kind": "pretrain",
            "data": str(data.text),
            "lr": 1e-2,
            "batch_size": 8,
            "max_length": 24,
            "epochs": 30,
            "holdout": 0.1,
            "model": {"vocab_size": 300, "init": {**init, "max_position_embeddings": 48}},
        },
        "sft": {
            "kind": "sft",
            "model": "base",
            "data": str(data.demonstrations),
            "lr": 5e-3,
            "batch_size": 12,
            "epochs": 12,
            "packing": True,
        },
        "reward": {
            "kind": "reward",
            "model": "sft",
            "data": str(data.pairs),
            "lr": 3e-3,
            "batch_size": 12,
            "epochs": 4,
            "normalize": 24,
            "sampling": {"max_new_tokens": 6},
            "holdout": 0.2,
        },
        "ppo": ppo,
        # at 0.1 the value loss pulls at the trunk: see docs/notes.md
        "ppo-trunk": {**ppo, "updates": 32, "sharing": "trunk", "value_coef": 0.01},
        "judge": {
            "kind": "evaluate",
            "models": ["base", "sft", "ppo", "ppo-trunk"],
            "reference": "sft",
            "reward": "reward",
            "data": str(data.prompts),
            "comparisons": str(data.pairs),
            "sampling": {"max_new_tokens": 6},
        },
    }


@pytest.fixture(scope="module")
def learned(run: Any, stages: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those stages, run."""
    folder = tmp_path_factory.mktemp("learned")
    run({"stages": stages}, folder)
    return folder / "stages"


@pytest.fixture(scope="module")
def twice(run: Any, stages: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of them, of a few steps a stage: a step that is not the same each time is not so early on."""
    short = {name: {**stage} for name, stage in stages.items()}
    for name in ("base", "sft", "reward"):
        short[name] |= {"max_steps": 3}
    for name in ("ppo", "ppo-trunk"):
        short[name] |= {"updates": 2, "batch_size": 12, "mini_batch": 6}
    folders = tmp_path_factory.mktemp("once"), tmp_path_factory.mktemp("again")
    for folder in folders:
        run({"stages": short}, folder)
    return folders[0] / "stages", folders[1] / "stages"


def test_pretraining_learns_the_texts(learned: Path) -> None:
    rows = metrics(learned / "base")
    assert rows[0]["loss"] > 5.5  # ln 300
    assert result(learned / "base")["eval_loss"]["mean"] < 1.5


def test_sft_learns_the_form_of_the_answers(learned: Path) -> None:
    """Four colours are equally likely, so ln 4 a reply is what is left at best."""
    assert metrics(learned / "sft")[-1]["loss"] < 0.8
    judge = result(learned / "judge")["models"]
    assert judge["sft"]["truncated"]["mean"] < 0.2 < 0.6 < judge["base"]["truncated"]["mean"]


def test_the_reward_model_learns_to_prefer_one_token(learned: Path) -> None:
    found = result(learned / "reward")
    assert found["accuracy"]["mean"] > 0.9
    assert metrics(learned / "reward")[-1]["accuracy"] > 0.9
    assert result(learned / "judge")["reward_model"]["accuracy"]["mean"] > 0.9


@pytest.mark.parametrize("stage", ["ppo", "ppo-trunk"])
def test_ppo_learns_to_say_that_token(learned: Path, stage: str) -> None:
    def share_of_red(model: str) -> float:
        lines = (learned / "judge" / "samples.jsonl").read_text().splitlines()
        texts = [row["completion"] for row in map(json.loads, lines) if row["model"] == model]
        return sum("red" in text for text in texts) / len(texts)

    assert share_of_red("sft") < 0.6
    assert share_of_red(stage) > 0.8
    judge = result(learned / "judge")["models"][stage]
    assert judge["proxy_lift"]["low"] > 0
    assert judge["kl"]["mean"] > 0.5
    rows = metrics(learned / stage)
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"]


@pytest.mark.slow  # a run that was cut off and an undisturbed one: tests/pipeline/test_pipeline.py
@pytest.mark.parametrize("stage", ["base", "sft", "reward", "ppo", "ppo-trunk", "judge"])
def test_two_runs_of_one_config_leave_the_same_bytes(twice: tuple[Path, Path], stage: str) -> None:
    one, other = (results(folder / stage) for folder in twice)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    wanted = (
        {"samples.jsonl", "result.json"}
        if stage == "judge"
        else {"model/model.safetensors", "metrics.jsonl", "result.json"}
    )
    assert wanted <= one.keys()
    assert not any("checkpoints" in name or "partial" in name for name in one)
