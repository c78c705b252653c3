"""A config of every kind of stage that several ranks work on, and how one is run on some of them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from keel.distributed import launch

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_config(path: Path, stages: Mapping[str, Any], **more: Any) -> Path:
    whole = {
        "name": "tiny",
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        **more,
        "stages": dict(stages),
    }
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def config_file() -> Callable[..., Path]:
    """`write_config`, for tests."""
    return write_config


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """An untrained Llama whose head is its embeddings; a number of rows that no 2 or 3 ranks share evenly."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + len(tokenizer) % 2 + 1, hidden_size=16, intermediate_size=36,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=48, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A BERT without dropout, whose masks each rank draws for its own rows."""
    folder = tmp_path_factory.mktemp("plain") / "bert"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def all_kinds(
    data: Any, tiny_model: Path, tied_model: Path, plain_bert: Path, tmp_path_factory: Any
) -> dict[str, Any]:
    """Two steps of each kind: rows of several lengths, fewer of them than ranks, ties, adapters."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"text": f"the {word} is {colour}" + ", so it is" * (number % 4), "label": colour}
        for number, (word, colour) in enumerate(
            (word, colour) for word in ("cat", "dog", "fox", "hen") for colour in ("red", "blue")
        )
    ]
    texts = folder / "labelled.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"batch_size": 5, "micro_batch": 2, "max_steps": 2, "lr": 1e-3, "schedule": "constant"}
    sft = {"kind": "sft", "model": str(tied_model), "data": str(data.demonstrations), **common}
    reward = {"kind": "reward", "model": str(tiny_model), "data": str(data.pairs), "normalize": 0, **common}
    dpo = {"kind": "dpo", "model": str(tied_model), "data": str(data.pairs), **common}
    return {
        "base": {
            "kind": "pretrain", "data": str(data.text), "max_length": 16, "eval_every": 1, "patience": 1,
            "model": {"path": str(tied_model)}, **common,
        },
        "tuned": sft,
        "packed": {**sft, "model": str(tiny_model), "packing": True, "max_length": 40, "loss_on": "all"},
        "one-row": {**sft, "batch_size": 1, "micro_batch": None},
        "adapted": {**sft, "model": str(tiny_model), "lora": {"r": 2}, "gradient_checkpointing": True},
        "reward": {**reward, "eval_every": 1, "center": 0.01},
        "reward-lora": {**reward, "lora": {"r": 2}},
        "ensemble": {**reward, "members": 2, "max_steps": 1},
        "classes": {
            "kind": "classifier", "model": str(tiny_model), "holdout": 0.25,
            "data": {"source": str(texts), "label": "label", "text": "text"}, **common,
        },
        "encoder": {
            "kind": "classifier", "model": str(plain_bert), "holdout": 0.25,
            "data": {"source": str(texts), "label": "label", "text": "text"}, **common,
        },
        "dpo": {**dpo, "eval_every": 1},
        "dpo-lora": {**dpo, "model": str(tiny_model), "lora": {"r": 2}},
        "kto": {**dpo, "loss": "kto", "batch_size": 6},
        "orpo": {**dpo, "loss": "orpo"},
    }  # fmt: skip


@pytest.fixture(scope="session")
def few_kinds(all_kinds: dict[str, Any]) -> dict[str, Any]:
    """One step each of what is most easily wrong: ties and uneven rows, a rank without rows."""
    return {name: {**all_kinds[name], "max_steps": 1} for name in ("tuned", "one-row")}


@pytest.fixture(scope="session")
def on_policy_kinds(data: Any, tiny_model: Path, tied_model: Path, tiny_reward: Path) -> dict[str, Any]:
    """Three updates of each on-policy kind."""
    common = {
        "model": str(tiny_model), "data": str(data.prompts), "batch_size": 6, "micro_batch": 2, "updates": 3,
        "epochs": 2, "mini_batch": 3, "lr": 1e-3, "sampling": {"max_new_tokens": 6}, "eval_every": 2,
        "eval_data": {"source": str(data.prompts), "rows": 4},
        "kl": {"coef": 0.1, "target": 0.5, "horizon": 40},
    }  # fmt: skip
    ppo = {"kind": "ppo", "reward": str(tiny_reward), **common}
    idle = ("epochs", "mini_batch", "kl")
    direct = {key: value for key, value in common.items() if key not in idle}
    return {
        "distill": {
            "kind": "distill", **direct, "teacher": str(tied_model), "epochs": 2, "mini_batch": 3,
            "demonstrations": {"data": str(data.demonstrations), "share": 0.4}, "divergence": "jsd",
        },
        "online-dpo": {
            "kind": "online_dpo", **direct, "samples_per_prompt": 3,
            "reward": [str(tiny_reward), {"kind": "length", "high": 4, "slack": 4}],
        },
        "ppo": {
            **ppo, "sharing": "separate", "critic_warmup": 1, "patience": 3, "curriculum": {"threshold": 0.0},
            "shaping": {"normalize": "running"}, "ptx": {"data": str(data.text), "batch_size": 2},
        },
        "ppo-adapters": {**ppo, "sharing": "adapters", "lora": {"r": 2}},
        "grpo": {
            "kind": "grpo", **common, "samples_per_prompt": 2, "resample": 1,
            "reward": [str(tiny_reward), {"kind": "length", "high": 4, "slack": 4}],
        },
        "grpo-ahead": {
            "kind": "grpo", **common, "samples_per_prompt": 2, "rollout": {"ahead": 1}, "importance_cap": 1.5,
            "reward": str(tiny_reward),
        },
        "grpo-partial": {
            "kind": "grpo", **common, "samples_per_prompt": 2, "rollout": {"partial": 2},
            "importance_cap": 1.5, "reward": str(tiny_reward),
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def one_base_kinds(
    all_kinds: dict[str, Any], on_policy_kinds: dict[str, Any], tiny_reward: Path, tiny_model: Path
) -> dict[str, Any]:
    """Policy, reference, critic, reward model and judge on one frozen base; and a reference and a reward
    model with weights of their own beside it."""
    scores = {**all_kinds["reward-lora"], "normalize": 8, "max_steps": 1, "sampling": {"max_new_tokens": 6}}
    common = {"old_logp": "trainer", "updates": 2}
    shared = {**on_policy_kinds["ppo-adapters"], **common, "reward": "scores", "judge": {"reward": "others"}}
    apart = {**shared, "reference": str(tiny_model), "reward": str(tiny_reward)}
    grpo = {**on_policy_kinds["grpo"], **common, "resample": 0, "sharing": "adapters", "lora": {"r": 2}}
    return {
        "scores": scores,
        "others": {**scores, "lr": 2e-3},
        "one-base": shared,
        "apart": {key: value for key, value in apart.items() if key != "judge"},
        "grpo-one-base": {**grpo, "reward": ["scores", {"kind": "length", "high": 4, "slack": 4}]},
    }


COUNTER = '''
class Counter:
    def reset(self, seed, **columns):
        self.total = seed % 5
        return f" From {self.total}."

    def add(self, amount: int) -> str:
        """
        Add.

        Args:
            amount: How much.
        """
        self.total += amount
        return str(self.total)

    def get_reward(self) -> float:
        return self.total / 10
'''


@pytest.fixture(scope="session")
def episode_kinds(tmp_path_factory: pytest.TempPathFactory, clerk: Path) -> dict[str, Any]:
    """Two updates of GRPO and PPO with an environment. A turn ends at the first "e", so that there are
    several; how many differs from episode to episode."""
    folder = tmp_path_factory.mktemp("counter")
    (folder / "counter.py").write_text(COUNTER, encoding="utf-8")
    common = {
        "model": str(clerk), "environment": f"{folder / 'counter.py'}:Counter", "max_turns": 4,
        "data": {"source": "world:shop/prompts", "rows": 5}, "updates": 2, "epochs": 1, "lr": 1e-3,
        "eval_data": {"source": "world:shop/test_prompts", "rows": 4}, "eval_every": 1, "batch_size": 10,
        "sampling": {"max_new_tokens": 90, "stop": ["e"]}, "kl": {"coef": 0.1},
    }  # fmt: skip
    paid = {"kind": "environment"}
    return {
        "grpo": {"kind": "grpo", **common, "samples_per_prompt": 2, "reward": paid},
        "ppo": {"kind": "ppo", **common, "sharing": "separate", "reward": {**paid, "at": "turn"}},
    }


@pytest.fixture(scope="session")
def in_float64(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of stages in float64 on n ranks, each made once: the folder, with one folder a strategy."""
    made: dict[tuple[Any, ...], Path] = {}

    def go(stages: Mapping[str, Any], ranks: int, *strategies: str, how: str = "float64") -> Path:
        key = (tuple(stages), ranks, strategies)
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        config = write_config(folder / "config.yaml", copy.deepcopy(dict(stages)))
        command = [sys.executable, str(WORKER), how, str(folder), str(config), *strategies]
        if ranks == 1:
            environment = {**os.environ, **ENVIRONMENT}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            outcome = launch.run(command, ranks, {**ENVIRONMENT, "KEEL_TRACEBACK": "1"})
            assert outcome.code == 0, outcome.line
        made[key] = folder
        return folder

    return go
