"""A run of a few stages that the tests of this folder read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import keel


@pytest.fixture(scope="session")
def stages(whole: dict[str, Any]) -> dict[str, Any]:
    """Bare stages: pretraining to a judge, a few steps each, without held-out prompts."""
    names = ("base", "sft", "reward", "rewards", "ppo")
    judge = {**whole["stages"]["judge"], "models": ["sft", "ppo"]}
    ppo = {
        key: value for key, value in whole["stages"]["ppo"].items() if key not in ("eval_data", "eval_every")
    }
    ppo.pop("patience", None)
    learned = {**whole["stages"]["sft"], "lr": 1e-2, "max_steps": 40}  # enough for answers that end
    ppo["sampling"] = {"max_new_tokens": 12}
    return {**{name: whole["stages"][name] for name in names}, "sft": learned, "ppo": ppo, "judge": judge}


@pytest.fixture(scope="session")
def finished(stages: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> keel.Run:
    """The run, finished. Tests only read it."""
    return keel.run(
        stages, "threads=1", "device=cpu", runs=tmp_path_factory.mktemp("runs"), name="tiny", progress=False
    )


@pytest.fixture
def text_run(whole: dict[str, Any]) -> dict[str, Any]:
    """One stage of a few steps that saves every second one."""
    return {"base": whole["stages"]["base"]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"
