"""One base for all roles: what it changes is memory, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.models.adapters import files_of
from keel.models.load import ModelSource
from keel.rewards import learned

LORA = {"r": 2, "alpha": 16}


@pytest.fixture(scope="module")
def rewarded(run: Any, data: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a reward stage of one member and one of two, trained as adapters."""
    folder = tmp_path_factory.mktemp("rewarded")
    stage = {
        "kind": "reward", "model": str(tiny_model), "data": str(data.pairs), "lora": LORA, "lr": 3e-2, "batch_size": 8,
        "max_steps": 4, "normalize": 0,
    }  # fmt: skip
    run({"stages": {"reward": stage, "rewards": {**stage, "members": 2}}}, folder)
    return folder / "stages"


@pytest.fixture
def stages(run: Any, data: Any, tiny_model: Path, rewarded: Path, tmp_path: Path) -> Any:
    """Run one on-policy stage; its directory and what was said."""

    def go(name: str, **settings: Any) -> tuple[Path, list[str]]:
        stage = {
            "kind": "ppo", "model": str(tiny_model), "reward": str(rewarded / "reward" / "model"), "data": str(data.prompts), "lora": LORA,
            "lr": 1e-2, "batch_size": 8, "updates": 3, "epochs": 2, "mini_batch": 4, "micro_batch": 3, "sampling": {"max_new_tokens": 5},
        }  # fmt: skip
        said: list[str] = []
        pipeline = run({"stages": {"one": stage | settings}}, tmp_path / name)
        return pipeline.stage_directory("one"), said

    return go


def metrics_of(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_base_gives_the_bytes_of_separate_models(
    kind: str, checkpointing: bool, stages: Any, tiny_reward: Path
) -> None:
    """With a reward model of its own weights: only where policy, reference and critic keep theirs differs."""
    settings = {"kind": kind, "reward": str(tiny_reward), "gradient_checkpointing": checkpointing}
    if kind == "grpo":
        settings |= {"samples_per_prompt": 2}
    one, _ = stages("separate", **settings)
    other, _ = stages("adapters", sharing="adapters", **settings)
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for folder in ("model", "model/adapter", *(["critic", "critic/adapter"] if kind == "ppo" else [])):
        (weights,) = (one / folder).glob("*.safetensors")
        assert weights.read_bytes() == (other / folder / weights.name).read_bytes()
