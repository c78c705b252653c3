"""What ranks send is what a plan says: by the kernel's own count of a process's bytes."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.config import read
from keel.distributed import launch
from keel.pipeline.pipeline import Pipeline
from keel.plan import planner
from keel.plan.rank_memory import Asked

pytestmark = pytest.mark.ranks
WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def broad_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """An untrained Llama of 1.3 million weights, beside which what is said of a step is little."""
    folder = tmp_path_factory.mktemp("broad") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("strategy", "lora", "dtype"),
    [
        *itertools.product(("ddp", "fsdp"), (None, {"r": 8}), ("float32",)),
        ("fsdp", None, "auto"),
        ("fsdp", {"r": 8}, "auto"),
    ],
)
def test_a_rank_sends_what_the_plan_says(
    strategy: str, lora: Any, dtype: str, broad_model: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    """auto: on a processor that is fast in bfloat16 the matrices are half."""
    rows = "".join(json.dumps({"prompt": "the cat is", "completion": " red"}) + "\n" for _ in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    stage = {
        "kind": "sft", "model": {"path": str(broad_model), "dtype": dtype}, "holdout": 0,
        "data": str(tmp_path / "rows.jsonl"), "batch_size": 8, "micro_batch": 2, "epochs": 6,
        "save_every": 100, "lora": lora,
    }  # fmt: skip
    path = config_file(tmp_path / "config.yaml", {"sft": stage}, distributed={"strategy": strategy})
    planned = planner.plan(Pipeline(read(path), tmp_path / "planned"), Asked(2))
    sent = planned[0]["ranks"]["strategies"][strategy]["sent_by"]
    expected = sum(sent.values())
    counted = count(path, tmp_path, "half-bytes" if dtype == "auto" else "bytes")
    print(f"{strategy}, lora {lora}, {dtype}: {expected} planned, {counted} counted")
    assert 1 <= counted / expected < 1.01  # the rest: metrics, heartbeats


def count(path: Path, folder: Path, how: str, every: int = 1) -> float:
    """Bytes that the first of two ranks sends between two steps of an optimiser, `every` one of which
    counts."""
    out = folder / "sent.json"
    command = [sys.executable, str(WORKER), how, str(out), "run", str(path), "--runs", str(folder)]
    outcome = launch.run(command, 2, ENVIRONMENT)
    assert outcome.code == 0, outcome.line
    totals = json.loads(out.read_text())
    return statistics.median(b - a for a, b in itertools.pairwise(totals[every::every]))


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_an_update_of_ppo_sends_what_the_plan_says(
    dtype: str, broad_model: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    """The policy whole to sample from, three models to score, two that learn."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the cat is"}) + "\n")
    stage = {
        "kind": "ppo", "model": {"path": str(broad_model), "dtype": dtype}, "sharing": "separate",
        "data": str(tmp_path / "rows.jsonl"), "batch_size": 4, "mini_batch": 4, "micro_batch": 1, "epochs": 1,
        "updates": 5, "save_every": 100, "sampling": {"max_new_tokens": 4}, "old_logp": "trainer",
        "reward": {"kind": "length", "high": 4, "slack": 4},
    }  # fmt: skip
    path = config_file(tmp_path / "config.yaml", {"ppo": stage}, distributed={"strategy": "fsdp"})
    planned = planner.plan(Pipeline(read(path), tmp_path / "planned"), Asked(2))[0]["ranks"]
    expected = planned["strategies"]["fsdp"]["sent_by"]
    assert all(expected[what] for what in ("weights", "gradients", "sampling", "scoring"))
    counted = count(path, tmp_path, "half-bytes" if dtype == "auto" else "bytes", every=2)
    print(f"ppo, {dtype}: {expected} planned, {counted} counted")
    assert 1 <= counted / sum(expected.values()) < 1.02
