"""Distillation and online DPO, stopped in an update and started again, end with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel.rl.loop import OnPolicyLoop


@pytest.fixture
def kinds(data: Any, tiny_model: Path, roomy_model: Path) -> dict[str, dict[str, Any]]:
    common = {
        "model": str(tiny_model), "data": str(data.prompts), "batch_size": 6, "micro_batch": 4, "updates": 4,
        "lr": 1e-3, "save_every": 1, "sampling": {"max_new_tokens": 5}, "eval_every": 2, "patience": 2,
        "eval_data": {"source": str(data.prompts), "rows": 4},
    }  # fmt: skip
    demonstrations = {"data": str(data.demonstrations), "share": 0.4}
    return {
        "distill": {
            "kind": "distill", "teacher": str(roomy_model), "demonstrations": demonstrations, "epochs": 2,
            "mini_batch": 3, **common,
        },
        "online_dpo": {
            "kind": "online_dpo", "samples_per_prompt": 3, **common,
            "reward": {"kind": "length", "high": 1, "slack": 40, "unit": "characters"},
        },
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "online_dpo"])
def test_trap_21_a_stopped_stage_ends_with_the_same_bytes(
    kind: str, kinds: Any, run: Any, differences: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    stages = {"stages": {"one": kinds[kind]}}
    run(stages, tmp_path / "whole")
    update = OnPolicyLoop.update

    def stopped(self: OnPolicyLoop, number: int) -> None:
        if number == 3:
            raise RuntimeError("stopped")
        update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OnPolicyLoop, "update", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            run(stages, tmp_path / "again")
    assert not (tmp_path / "again" / "stages" / "one" / "result.json").exists()
    run(stages, tmp_path / "again")
    assert differences(tmp_path / "whole", tmp_path / "again") == []
