"""`dtype: auto` in the loops, where bfloat16 is fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keel.accel import cpu_linear, processor
from keel.models import precision
from keel.models.precision import fast_in_bfloat16  # itself: `precision`'s is another one in tests


@pytest.mark.usefixtures("accel_on")
@pytest.mark.parametrize(
    "kind", ["ppo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sft", "kto"))]
)
def test_weights_cast_once_in_a_step_are_those_of_the_step(
    kind: str,
    run: Any,
    data: Any,
    tiny_model: Path,
    tiny_reward: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scope that outlived a change of the weights would leave other numbers than casts that are made in
    every forward."""
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    common = {"model": str(tiny_model), "lr": 1e-2, "batch_size": 8, "micro_batch": 2}
    stage: dict[str, Any] = {
        "sft": {
            "kind": "sft",
            "data": str(data.demonstrations),
            "max_steps": 4,
            "eval_every": 2,
            "holdout": 0.2,
        },
        "kto": {"kind": "dpo", "loss": "kto", "data": str(data.pairs), "max_steps": 4, "holdout": 0},
        "ppo": {
            "kind": "ppo",
            "data": str(data.prompts),
            "reward": str(tiny_reward),
            "updates": 2,
            "epochs": 2,
            "mini_batch": 4,
            "sampling": {"max_new_tokens": 5},
        },
    }[kind]
    logs, made = [], list[str]()
    for once in (True, False):
        if not once:
            monkeypatch.setattr(
                cpu_linear._CastCache, "_once", lambda self, kind, make, *weights: made.append(kind) or make()
            )
        pipeline = run({"stages": {"stage": {**common, **stage}}}, tmp_path / str(once))
        folder = pipeline.stage_directory("stage")
        logs.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        logs[-1].append((folder / "model" / "model.safetensors").read_bytes())
    assert {"cast", "packed"} <= set(made)  # what was meant to be tested
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("has", "by", "kept"),
    [
        ({}, None, torch.float32),
        ({"avx512_f": True, "avx512_vnni": True}, None, torch.float32),
        ({"avx512_bf16": True}, "vectors", torch.float32),
        ({"amx_bf16": True, "avx512_bf16": True}, "tiles", torch.bfloat16),
    ],
)
def test_what_auto_is_on_a_processor(
    has: dict[str, bool], by: str | None, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products, and what keys and values are kept in, by what torch says that the processor can."""
    questions = (processor.has_half_tiles, processor.has_half_products, fast_in_bfloat16)
    monkeypatch.setattr(processor, "_of_cpu", lambda: has)
    for question in questions:
        question.cache_clear()
    try:
        cpu = torch.device("cpu")
        assert processor.multiplies_half(has) == by
        assert fast_in_bfloat16(cpu) is (by is not None)
        assert processor.cache_dtype(cpu) == kept
        assert not fast_in_bfloat16(torch.device("meta"))
        monkeypatch.setattr(precision, "fast_in_bfloat16", fast_in_bfloat16)  # as outside of tests
        model = precision.mark_precision(nn.Linear(2, 2), "auto")
        assert precision.compute_dtype(model, cpu) == (torch.float32 if by is None else torch.bfloat16)
        plain = precision.mark_precision(nn.Linear(2, 2), "float32")
        assert precision.compute_dtype(plain, cpu) == torch.float32
    finally:
        for question in questions:
            question.cache_clear()


def test_without_onednn_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what multiplies by the processor's own products of bfloat16."""
    monkeypatch.setattr(processor, "_of_cpu", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    processor.has_half_products.cache_clear()
    assert not processor.has_half_products()
    processor.has_half_products.cache_clear()
