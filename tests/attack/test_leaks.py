"""What a long run holds: memory, open files and threads are the same after many updates as after few."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

import keel
from keel.config import parse
from keel.pipeline.pipeline import Pipeline
from keel.rewards.isolated import IsolatedFunction
from keel.rewards.rules import regex

pytestmark = pytest.mark.attack

UPDATES = 200
CALLS = 2000
# of a whole evaluate stage: 2000 take twenty minutes of a processor, more than the suite may
EVALUATIONS = int(os.environ.get("KEEL_EVALUATIONS", "300"))
SETTLED = 0.3  # of the run: caches are full, allocators have taken what they keep
MAY_GROW = 0.01


def held() -> dict[str, float]:
    process = psutil.Process()
    gc.collect()
    return {
        "memory": float(process.memory_info().rss),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count() + process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


def assert_flat(seen: list[dict[str, float]]) -> None:
    """The mean of the last tenth against that of a tenth after things have settled; of what is counted, the
    most: a thread more or less comes and goes."""
    tenth = max(len(seen) // 10, 1)
    first, last = seen[int(SETTLED * len(seen)) :][:tenth], seen[-tenth:]
    for name in seen[0]:
        before, after = (
            sum(one[name] for one in part) / tenth if name == "memory" else max(one[name] for one in part)
            for part in (first, last)
        )
        assert after <= before * (1 + MAY_GROW), f"{name}: {before:,.0f} → {after:,.0f}"


def test_200_updates_of_ppo_hold_what_20_did(every_kind: dict[str, Any], tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    def look(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        seen.append(held())

    stage = {**every_kind["ppo"], "updates": UPDATES, "save_every": 20, "lr": 1e-6, "eval_every": 20}
    settings = {"name": "r", "threads": 1, "device": "cpu", "dtype": "float32", "stages": {"ppo": stage}}
    pipeline = Pipeline(parse(settings), tmp_path / "r", lambda line: None)
    pipeline.progress = look
    pipeline._report = lambda: None
    pipeline.run()
    assert len(seen) == UPDATES
    assert_flat(seen)


def evaluation(every_kind: dict[str, Any], model: Path) -> dict[str, Any]:
    """A whole evaluate stage: two models, sampled and judged by a reward model and a rule."""
    judge = every_kind["judge"]
    data = {**judge["data"], "rows": 2}
    rewards = [{"kind": "learned", "model": judge["reward"]}, {"kind": "regex", "pattern": "red"}]
    return {**judge, "models": [str(model), every_kind["sft"]["model"]], "reward": rewards, "data": data}


def test_evaluations_hold_what_a_third_of_them_did(
    every_kind: dict[str, Any], roomy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keel.run` of an evaluate stage, again and again in one process, as a notebook would. No page."""
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    stages, seen = {"judge": evaluation(every_kind, roomy_model)}, list[dict[str, float]]()
    config = {"name": "r", "threads": 1, "device": "cpu", "dtype": "float32", "stages": stages}
    for number in range(EVALUATIONS):
        run = keel.run({**config, "seed": number}, runs=tmp_path, progress=False)
        assert set(run.stages["judge"].result["models"]) == set(stages["judge"]["models"])
        shutil.rmtree(run.path)
        if number % 3 == 2:
            seen.append(held())
    assert_flat(seen)


def test_2000_calls_of_an_isolated_function_hold_what_600_did(tmp_path: Path) -> None:
    """The process of a function of one's own is asked again and again."""
    (tmp_path / "mine.py").write_text("def f(completions, **_): return [1.0] * len(completions)\n")
    function, rule = IsolatedFunction(f"{tmp_path}/mine.py:f", "r", "mine"), regex("red")
    seen: list[dict[str, float]] = []
    try:
        for number in range(CALLS):
            arguments = {"prompts": ["the cat?"] * 4, "completions": [f" it is red {number}."] * 4}
            assert function.ask(arguments, 4)["values"] == [1.0] * 4
            assert rule(arguments["prompts"], arguments["completions"]) == [1.0] * 4
            if number % 10 == 9:
                seen.append(held())
    finally:
        function.process.close()
    assert_flat(seen)
