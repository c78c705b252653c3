"""`dtype: auto` in the loops, where bfloat16 is fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.accel import cpu_linear
from keel.models import precision


@pytest.mark.usefixtures("accel_on")
@pytest.mark.parametrize("kind", ["sft", "kto", "ppo"])
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
            "updates": 3,
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
    ("has", "fast"),
    [({}, False), ({"avx512_f": True}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, False)],
)
def test_which_processors_are_fast_in_bfloat16(has: dict[str, bool], fast: bool) -> None:
    assert precision.fast_cpu(has) is fast
