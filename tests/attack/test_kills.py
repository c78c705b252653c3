"""Kills: SIGKILL, SIGTERM and SIGINT, once and twice, at every kind of stage. The same command goes on, and
ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.attack

SIGNALS = (["SIGKILL"], ["SIGTERM"], ["SIGINT"], ["SIGINT", "SIGINT"], ["SIGTERM", "SIGTERM"])
KINDS = ("base", "sft", "reward", "classes", "dpo", "ppo", "grpo", "best", "pairs", "judge")
KILLS = 30  # of each kind
OF_A_RUN = 12  # at least
IN_A_ROW = 4  # before the command is let to its end and its bytes are compared
SAID = "keel: interrupted; the same command goes on from the last checkpoint"
SAID_EARLY = "keel: interrupted"  # while the command is imported
Differences = Callable[[Path, Path], list[str]]


@pytest.fixture(scope="session")
def undisturbed(
    forked: Any, every_kind: dict[str, Any], write_config: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the config and a whole run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_config(folder, every_kind)
    ended = forked("run", "config.yaml", cwd=folder, timeout=300)
    ended.assert_clean()
    assert ended.code == 0, ended.err
    return folder


def check_killed(ended: Any, signals: list[str]) -> bool:
    """Whether the command was killed; how it ended, and what it has said, is as it should be."""
    assert ended.left == [], ended
    if ended.code == 0:
        return False
    if signals == ["SIGKILL"]:
        assert ended.signal == signal.SIGKILL, ended
        return True
    ended.assert_clean()
    # after its work is done a signal ends the process without a word
    if ended.signal in (signal.SIGINT, signal.SIGTERM):
        return True
    assert ended.code == 130, ended
    assert ended.err.splitlines()[-1] in (SAID, SAID_EARLY), ended.err
    assert ended.err.count("interrupted") == 1, ended.err
    assert ended.out == ""
    return True


def assert_whole(folder: Path) -> None:
    """What stands under its own name is whole, at any moment."""
    for path in folder.rglob("*.json"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            json.loads(path.read_text())


@pytest.mark.parametrize("stage", KINDS)
def test_a_stage_of_any_kind_killed_anywhere_ends_with_the_same_bytes(
    stage: str, undisturbed: Path, forked: Any, tmp_path: Path, differences: Differences
) -> None:
    draw, kills, by_signal, number = random.Random(stage), 0, Counter[str](), 0
    command = ["run", "config.yaml", "--only", stage]
    seconds = changes = 0.0
    while kills < KILLS:
        folder, number = tmp_path / str(number), number + 1
        shutil.copytree(undisturbed, folder)
        shutil.rmtree(folder / "runs" / "r" / "stages" / stage)
        for _ in range(IN_A_ROW if changes else 0):
            signals = SIGNALS[kills % len(SIGNALS)]
            when: dict[str, Any] = {
                "before": draw.randint(1, int(changes)),
                "gap_events": draw.randint(1, 60),
            }
            if draw.random() < 0.4:
                when = {"after": draw.uniform(0.02, seconds), "gap": draw.choice((0.0, 0.005, 0.05, 0.3))}
            ended = forked(*command, cwd=folder, kill={"signals": signals, **when}, timeout=60)
            assert_whole(folder / "runs")
            if not check_killed(ended, signals):
                break
            kills += 1
            by_signal["+".join(signals)] += 1
        ended = forked(*command, cwd=folder, timeout=60)
        ended.assert_clean()
        assert ended.code == 0, ended.err
        assert differences(undisturbed / "runs" / "r", folder / "runs" / "r") == [], folder
        assert list((folder / ".tmp").iterdir()) == []
        changes, seconds = max(changes, ended.changes), max(seconds, ended.seconds)
        shutil.rmtree(folder)
    assert len(by_signal) == len(SIGNALS), by_signal


def test_a_run_of_all_kinds_killed_again_and_again_ends_with_the_same_bytes(
    undisturbed: Path, forked: Any, tmp_path: Path, differences: Differences
) -> None:
    """The whole command, also while it checks data and goes from stage to stage."""
    shutil.copytree(undisturbed, tmp_path / "done")
    idle = forked("run", "config.yaml", cwd=tmp_path / "done", timeout=120)  # what a start takes by itself
    draw, kills, number = random.Random(5), 0, 0
    while kills < OF_A_RUN:
        folder, number = tmp_path / str(number), number + 1
        folder.mkdir()
        shutil.copy(undisturbed / "config.yaml", folder)
        complete, here = False, 0
        while not complete:
            signals = draw.choice(SIGNALS)
            when: dict[str, Any] = {
                "before": draw.randint(1, idle.changes + 30),
                "gap_events": draw.randint(1, 60),
            }
            if draw.random() < 0.5:
                when = {"after": draw.uniform(0.1, idle.seconds + 1), "gap": draw.choice((0.0, 0.01, 0.2))}
            ended = forked("run", "config.yaml", cwd=folder, kill={"signals": signals, **when}, timeout=120)
            complete = not check_killed(ended, signals)
            here += not complete
            assert here < 150, "it never comes to its end"
        kills += here
        forked("run", "config.yaml", cwd=folder, timeout=120).assert_clean()
        assert differences(undisturbed / "runs" / "r", folder / "runs" / "r") == []
        assert list((folder / ".tmp").iterdir()) == []
