"""A rank is killed at random moments of a run of all kinds of stage, by the clock: while ranks start, read,
sample, score, step, evaluate, write a checkpoint or a model. Each time the same command goes on, and what it
leaves in the end are the bytes of a run that nobody disturbed.

`KEEL_KILLS` says how many, `KEEL_KILLS_SEED` repeats the moments of a run that failed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ranks
KILLS = int(os.environ.get("KEEL_KILLS", "3"))
SEED = int(os.environ.get("KEEL_KILLS_SEED", str(random.SystemRandom().randrange(2**32))))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LONGEST = 900.0  # seconds of a run that nobody disturbs
Differences = Callable[[Path, Path], list[str]]


@dataclass(frozen=True)
class Ended:
    """A run, or what was left of it."""

    code: int
    said: str
    killed: int | None  # the rank
    seconds: float


def start(config: Path, runs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "keel", "run", str(config), "--runs", str(runs), "--nproc", "2"]
    return subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank → process, of those that live."""
    found: dict[int, int] = {}
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:
        return found
    for child in children:
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(one[5:]): int(child) for one in variables if one.startswith(b"RANK=")}
    return found


def run(
    config: Path, runs: Path, kill_after: float | None = None, draws: random.Random | None = None
) -> Ended:
    """The command, to its end. kill_after: seconds after which one of its ranks is killed; later, where there
    are none yet."""
    began = time.monotonic()
    process, killed = start(config, runs), None
    try:
        if kill_after is not None and draws is not None:
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                while process.poll() is None and not (living := ranks_of(process.pid)):
                    time.sleep(0.02)
                if process.poll() is None:
                    killed = draws.choice(sorted(living))
                    os.kill(living[killed], signal.SIGKILL)
        _, said = process.communicate(timeout=LONGEST)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    return Ended(process.returncode, said, killed, time.monotonic() - began)


@pytest.fixture
def stages(
    data: Any, tiny_model: Path, tiny_reward: Path, all_kinds: dict[str, Any],
    on_policy_kinds: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Every kind of stage that samples, scores, trains, evaluates or writes, with a checkpoint after each
    step; a policy that goes back to healthy weights, and roles on one base."""
    more = {"max_steps": 3, "save_every": 1, "eval_every": 2}
    supervised = {
        name: {**all_kinds[name], **more}
        for name in ("base", "tuned", "adapted", "reward", "encoder", "dpo", "kto")
    }
    supervised["base"].pop("patience")
    sampled = {"normalize": 8, "sampling": {"max_new_tokens": 6}}
    supervised["scores"] = {**all_kinds["reward-lora"], **more, **sampled}
    common = {"data": str(data.prompts), "sampling": {"max_new_tokens": 6}, "reward": str(tiny_reward)}
    trained = {"updates": 2, "save_every": 1, "eval_every": 1}
    names = ("ppo", "ppo-adapters", "grpo", "distill", "online-dpo")
    on_policy = {name: {**on_policy_kinds[name], **trained} for name in names}
    on_policy["ppo-adapters"]["reward"] = "scores"
    on_policy["grpo"] |= {"control": {"on_finding": "rollback"}, "lora": {"r": 2}}
    return {
        **supervised,
        "best": {
            "kind": "best_of_n", "model": str(tiny_model), "samples_per_prompt": 3, "batch_size": 5, **common,
            **more, "lr": 1e-3,
        },
        **on_policy,
        "judge": {
            "kind": "evaluate", "models": ["best", "grpo"], "best_of": [2], "batch_size": 8, **common,
        },
    }  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_at_any_moment_costs_no_byte(
    stages: dict[str, Any], strategy: str, tmp_path: Path, config_file: Callable[..., Path],
    differences: Differences, capsys: Any,
) -> None:  # fmt: skip
    settings = {"strategy": strategy, "timeout": 30}
    config = config_file(tmp_path / "config.yaml", stages, distributed=settings)
    draws = random.Random(f"{SEED}, {strategy}")
    whole = run(config, tmp_path / "whole")
    assert whole.code == 0, whole.said[-3000:]
    again = run(config, tmp_path / "whole")  # which starts, finds all done, and ends
    assert again.code == 0
    # a kill later than this on average, and all of them together do not reach the end
    work = max(whole.seconds - again.seconds, 0.0)
    moments, place, made = list[str](), tmp_path / "killed-1", 1
    left = KILLS
    while left:
        after = draws.uniform(0.0, again.seconds + 2 * work / KILLS)
        ended = run(config, place, after, draws)
        if ended.code == 0:  # it was done before
            assert differences(tmp_path / "whole" / "tiny", place / "tiny") == [], moments
            made += 1
            place = tmp_path / f"killed-{made}"
            continue
        left -= 1
        last = next((line for line in reversed(ended.said.splitlines()) if ": " in line), "")
        moments.append(f"seed {SEED}: rank {ended.killed} after {after:.2f} s ({last})")
        assert ended.killed is not None, ended.said[-3000:]
        assert ended.code == 1, (moments, ended.said[-3000:])
        assert f"rank {ended.killed} of 2" in ended.said, (moments, ended.said[-3000:])
        assert "SIGKILL" in ended.said, (moments, ended.said[-3000:])
        assert "Traceback" not in ended.said, (moments, ended.said[-3000:])
    ended = run(config, place)
    assert ended.code == 0, (moments, ended.said[-3000:])
    assert differences(tmp_path / "whole" / "tiny", place / "tiny") == [], moments
    with capsys.disabled():
        print("", *moments, sep="\n")
