"""A run killed at any moment, and started again by the same command, ends with the bytes of one that was
not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

Differences = Callable[[Path, Path], list[str]]
KILLED = Path(__file__).with_name("killed.py")
MIDDLE = 40  # of the changes to the disk that a stage of two steps makes
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_config(folder: Path, stages: Mapping[str, Any], dtype: str = "float32") -> Path:
    """dtype: that of runs in this process, where `auto` is float32 too."""
    path, run = folder / "config.yaml", {"name": "tiny", "threads": 1, "device": "cpu", "dtype": dtype}
    path.write_text(yaml.safe_dump({**run, "stages": dict(stages)}, sort_keys=False))
    return path


def killed_and_resumed(folder: Path, stages: Mapping[str, Any], *plan: str, dtype: str = "float32") -> int:
    command = [sys.executable, str(KILLED), str(write_config(folder, stages, dtype)), str(folder), *plan]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def assert_all_alike(folder: Path, differences: Differences) -> None:
    runs = [path for path in folder.iterdir() if path.name.startswith("killed")]
    assert runs
    for path in runs:
        assert differences(folder / "undisturbed", path) == [], path.name


@pytest.fixture(scope="module")
def short(data: Any, tiny_model: Path, tiny_reward: Path) -> dict[str, Any]:
    """Stages of two steps each that write everything they can. The second step is too large and makes things
    worse."""
    common = {
        "model": str(tiny_model),
        "save_every": 1,
        "batch_size": 2,
        "lr": 0.3,
        "schedule": "constant",
        "eval_every": 1,
        "patience": 2,
    }
    ppo = {
        "kind": "ppo",
        "reward": str(tiny_reward),
        "data": {"source": str(data.prompts), "rows": 4},
        "updates": 2,
        "epochs": 1,
        "sampling": {"max_new_tokens": 3},
        "kl": {"coef": 1.0, "target": 0.5, "horizon": 10},
        "shaping": {"normalize": "running"},
        "eval_data": {"source": str(data.prompts), "rows": 2},
        **common,
    }
    sft = {"kind": "sft", "data": {"source": str(data.demonstrations), "rows": 8}, "max_steps": 2, **common}
    return {
        "sft": sft,
        "ppo": {**ppo, "sharing": "separate"},
        "ppo-trunk": {**ppo, "sharing": "trunk"},
        "ppo-adapters": {**ppo, "sharing": "adapters", "lora": {"r": 4, "alpha": 64}},
    }


@pytest.fixture(scope="module")
def watched(short: Mapping[str, Any]) -> dict[str, Any]:
    """Stages in which a check fires after each third update: twice a rollback, then a stop, whose checkpoint
    may be the last thing written."""
    ppo = {
        **{k: v for k, v in short["ppo"].items() if k not in ("patience", "eval_data")},
        "updates": 10,
        "save_every": 2,
        "lr": 0.01,
        "judge": {"kind": "length", "high": 2, "slack": 2},
    }
    control = {"on_finding": "rollback", "attempts": 2, "reward_bound": -1e6}
    return {
        "rolled": {**ppo, "control": control},
        "adjusted": {**ppo, "control": {**control, "on_finding": "adjust"}},
    }


EVERYWHERE = pytest.param("everywhere", marks=pytest.mark.slow)  # before every change, every stage


@pytest.fixture(scope="module", params=["in the middle", EVERYWHERE])
def killed(request: Any, short: Mapping[str, Any], watched: Mapping[str, Any], tmp_path_factory: Any) -> Path:
    """Stages alone, each run undisturbed, and killed and gone on with, in a folder of its name."""
    stages, stride, first = {**short, **watched}, 1, 1
    if request.param == "in the middle":
        rolled = {**stages["rolled"], "updates": 7}
        rolled["control"] = {**rolled["control"], "attempts": 1}
        stages = {"ppo-adapters": stages["ppo-adapters"], "rolled": rolled}
        stride, first = 251, MIDDLE
    folder = tmp_path_factory.mktemp("killed")
    kills = killed_and_resumed(folder, stages, "each", str(stride), str(first))
    assert kills >= (len(stages) if stride > 1 else 90)
    return folder


def test_trap_21_stages_killed_before_any_change_to_the_disk_end_the_same(
    killed: Path, short: Mapping[str, Any], differences: Differences
) -> None:
    """[trl 1.16 GRPO; trl 2657: no resume for PPO]"""
    for stage in there(killed, short):  # the best weights are not the last: they have to survive, too
        lines = (killed / stage / "undisturbed" / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        first, second = map(json.loads, lines)
        if stage == "sft":
            assert second["eval_loss"] > first["eval_loss"]
        else:
            values = [
                row["eval/objective/scores"] - row["eval/objective/kl"] for row in (first, second)
            ]  # β is near 1
            assert values[1] < values[0] - 0.2
        assert_all_alike(killed / stage, differences)


def test_findings_adjustments_rollbacks_and_stops_survive_any_kill(
    killed: Path, watched: Mapping[str, Any], differences: Differences
) -> None:
    events = killed / "rolled" / "undisturbed" / "stages" / "rolled" / "events.jsonl"
    found = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    attempts = 2 if (killed / "adjusted").exists() else 1
    assert found == ["finding", "rollback"] * attempts + ["finding", "stop"]
    for stage in there(killed, watched):
        assert_all_alike(killed / stage, differences)


def there(folder: Path, stages: Mapping[str, Any]) -> list[str]:
    """Those of the stages that were run."""
    found = [name for name in stages if (folder / name).exists()]
    assert found
    return found


@pytest.mark.slow  # the same by signals: tests/attack/test_kills.py
def test_a_run_over_all_stages_killed_again_and_again_ends_the_same(
    whole: Mapping[str, Any], tmp_path: Path, differences: Differences
) -> None:
    """In the precision that this processor is fast in."""
    assert killed_and_resumed(tmp_path, whole["stages"], "chain", "5", "3", dtype="auto") > 3
    assert_all_alike(tmp_path, differences)


def test_a_stage_that_is_done_is_not_run_again_and_keeps_no_checkpoints(
    short: Mapping[str, Any], run: Any, tmp_path: Path
) -> None:
    """Also where a kill came between the mark of being done and the removal of the checkpoints."""
    stages = {"sft": short["sft"]}
    run({"stages": stages}, tmp_path)
    stage = tmp_path / "stages" / "sft"
    before = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
    assert not (stage / "checkpoints").exists()
    (stage / "checkpoints" / "step-000002").mkdir(parents=True)
    run({"stages": stages}, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()} == before
    assert not (stage / "checkpoints").exists()


@pytest.mark.slow  # as tests/pipeline/test_pipeline.py, over stages of other settings
def test_a_stage_runs_afresh_when_its_settings_or_its_inputs_change(
    whole: Mapping[str, Any], run: Any, tmp_path: Path
) -> None:
    def marks() -> dict[str, int]:
        return {
            path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").glob("*/stage.json")
        }

    names = ("base", "sft", "reward")
    stages = {name: whole["stages"][name] for name in names}
    run({"stages": stages}, tmp_path)
    first = marks()
    run({"stages": {**stages, "sft": {**stages["sft"], "lr": 2e-3}}}, tmp_path)
    assert [name for name in names if marks()[name] != first[name]] == ["sft", "reward"]
    second = marks()
    run({"stages": stages, "seed": 1}, tmp_path)
    assert [name for name in names if marks()[name] != second[name]] == list(names)


# ---------------------------------------------------------------- the command itself, by the clock


def keel_run(config: Path, runs: Path, kill_after: float | None = None) -> bool:
    """Whether `keel run` came to its end; killed `kill_after` seconds after it began to work in its
    directory."""
    lock = runs / "tiny" / ".lock"
    before = lock.stat().st_mtime_ns if lock.exists() else 0
    command = [sys.executable, "-m", "keel", "run", str(config), "--runs", str(runs)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if kill_after is not None:
        while process.poll() is None and (not lock.exists() or lock.stat().st_mtime_ns == before):
            time.sleep(0.01)  # imports and reading: nothing is written
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(kill_after)
        process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors[-3000:]
    return process.returncode == 0


def kill_at_random(config: Path, folder: Path, kills: int, seconds: float, differences: Differences) -> None:
    """Kill `keel run` within `seconds` of work until `kills` have left a run half done, in as many runs as
    that takes; all end alike."""
    draw, half, number = random.Random(kills), 0, 0
    while half < kills:
        number += 1
        assert number <= 5 * kills, "kills hardly ever fall within the work"
        runs = folder / f"killed-{number}"
        while not keel_run(config, runs, draw.uniform(0, seconds) if half < kills else None):
            half += not (runs / "tiny" / "stages" / "judge" / "stage.json").exists()
        assert differences(folder / "undisturbed", runs / "tiny") == []
        shutil.rmtree(runs)


@pytest.mark.slow  # the kills before chosen changes above find the same, in less time
def test_keel_run_killed_at_random_moments_ends_the_same(
    whole: Mapping[str, Any], run: Any, tmp_path: Path, differences: Differences
) -> None:
    run({**whole, "dtype": "float32"}, tmp_path / "undisturbed")
    kill_at_random(write_config(tmp_path, whole["stages"]), tmp_path, 1, 1.0, differences)


@pytest.mark.slow
def test_keel_run_killed_at_20_random_moments_ends_the_same(
    whole: Mapping[str, Any], run: Any, tmp_path: Path, differences: Differences
) -> None:
    began = time.perf_counter()
    run({**whole, "dtype": "float32"}, tmp_path / "undisturbed")
    seconds = time.perf_counter() - began  # on this machine: kills must fall within the work, not after it
    kill_at_random(write_config(tmp_path, whole["stages"]), tmp_path, 20, 0.6 * seconds, differences)


@pytest.mark.slow
def test_a_run_over_all_stages_killed_before_every_change_to_the_disk_ends_the_same(
    whole: Mapping[str, Any], tmp_path: Path, differences: Differences
) -> None:
    assert killed_and_resumed(tmp_path, whole["stages"], "every", "5") > 40
    assert_all_alike(tmp_path, differences)
