"""The curriculum by success rate: what it draws, what it remembers, and that a run keeps it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.config.tasks import CurriculumConfig
from keel.errors import DataError, UsageError
from keel.rl.curriculum import Curriculum

LEVELS = [{"level": name} for name in ("easy", "some", "hard") for _ in range(100)]


def made(rows: int | list[dict[str, Any]] = 100, seed: int = 0, **settings: Any) -> Curriculum:
    columns = [{}] * rows if isinstance(rows, int) else rows
    return Curriculum(CurriculumConfig(**settings), columns, seed)


def told(curriculum: Curriculum, passes: dict[str, float], replies: int = 40) -> None:
    """Let every level have this share of passes."""
    for start, share in zip((0, 100, 200), passes.values(), strict=True):
        values = [float(i < share * replies) for i in range(replies)]
        curriculum.see([start], replies, values)


def test_drawn_are_levels_that_are_passed_sometimes():
    curriculum = made(LEVELS, by="level", explore=0.0)
    told(curriculum, {"easy": 1.0, "some": 0.5, "hard": 0.0})
    drawn = Counter(row // 100 for update in range(1, 51) for row in curriculum.draw(update, 10))
    # weights (40.5 / 41)(0.5 / 41) of easy and hard, ½ · ½ of some: 0.0120, 0.25, 0.0120, less what a draw
    # without repetition moves
    assert drawn[1] / 500 == pytest.approx(0.912, abs=0.04)
    assert drawn[0] > 0
    assert drawn[2] > 0


def test_a_share_comes_in_turn_whatever_the_rates():
    curriculum = made(LEVELS, by="level", explore=0.3)
    told(curriculum, {"easy": 1.0, "some": 0.5, "hard": 0.0})
    drawn = [row for update in range(1, 201) for row in curriculum.draw(update, 5)]
    seen = Counter(row // 100 for row in drawn)
    assert seen[0] / 1000 == pytest.approx(0.1 + 0.7 * 0.044, abs=0.03)
    assert len({row for row in drawn if row < 100}) > 90  # in turn: hardly one comes twice before all have


def test_a_prompt_of_which_nothing_is_known_comes_before_those_that_are_clear():
    curriculum = made(20, explore=0.0)
    curriculum.see(list(range(10)), 8, [1.0] * 80)
    first = Counter(row for update in range(1, 101) for row in curriculum.draw(update, 5))
    known = sum(count for row, count in first.items() if row < 10)
    assert known / 500 < 0.3
    assert sorted(curriculum.draw(1, 20)) == list(range(20))  # all, where all are needed


def test_no_prompt_twice_in_an_update_and_the_same_draw_again():
    curriculum = made(50, explore=0.25)
    curriculum.see([3, 4], 4, [1.0, 0, 1, 0, 1, 1, 1, 1])
    drawn = curriculum.draw(3, 40)
    assert len(set(drawn)) == 40
    assert curriculum.draw(3, 40) == drawn
    assert curriculum.draw(4, 40) != drawn
    other = made(50, explore=0.25)
    other.restore({name: tensor.clone() for name, tensor in curriculum.state().items()})
    assert other.draw(3, 40) == drawn


def test_rates_are_counts_that_fade():
    curriculum = made(2, memory=8)
    metrics = curriculum.see([0], 4, [1.0, 1.0, 0.0, None])
    assert curriculum.passed.tolist() == [2.0, 0.0]
    assert curriculum.seen.tolist() == [3.0, 0.0]
    assert curriculum.rates.tolist() == pytest.approx([2.5 / 4, 0.5])
    assert metrics["curriculum/pass_rate"] == pytest.approx(2 / 3)
    assert metrics["curriculum/seen"] == 0.5
    curriculum.see([0], 4, [0.0] * 4)  # half of what was is left
    assert curriculum.passed.tolist() == [1.0, 0.0]
    assert curriculum.seen.tolist() == [5.5, 0.0]
    curriculum.see([0, 0], 4, [1.0] * 8)  # a whole memory: nothing of what was
    assert curriculum.rates.tolist() == pytest.approx([8.5 / 9, 0.5])


def test_a_threshold_says_what_passes():
    curriculum = made(1, threshold=0.75)
    curriculum.see([0], 4, [0.7, 0.75, 0.8, -1.0])
    assert curriculum.passed.tolist() == [2.0]


def test_metrics_say_what_there_is_to_learn():
    curriculum = made(LEVELS, by="level")
    told(curriculum, {"easy": 1.0, "some": 0.5, "hard": 0.0})
    metrics = curriculum.see([100], 2, [1.0, 0.0])
    assert metrics["curriculum/solved"] == pytest.approx(1 / 3)
    assert metrics["curriculum/hopeless"] == pytest.approx(1 / 3)
    assert metrics["curriculum/rate/some"] == 0.5
    assert metrics["curriculum/expected_pass_rate"] == pytest.approx(0.5)


def test_a_row_without_a_value_is_an_error():
    with pytest.raises(DataError, match="no value in the column 'level'"):
        made([{"level": 1}, {}], by="level")


# ---------------------------------------------------------------- in a run


@pytest.fixture
def stage(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Rows of which half can be passed: a length below which every reply stays, and one that none reaches."""
    lines = [{"prompt": f"the {animal}?", "level": level} for animal in ("cat", "dog") for level in "ab" * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "kind": "grpo", "model": str(tiny_model), "data": str(tmp_path / "rows.jsonl"), "batch_size": 8,
        "reward": [{"kind": "keywords", "words": ["red"]}, {"kind": "length", "high": 4, "weight": 0.1}],
        "samples_per_prompt": 4, "updates": 3, "lr": 1e-3, "sampling": {"max_new_tokens": 5},
        "curriculum": {"by": "level", "threshold": 0.5, "reward": "keywords", "memory": 8}, "save_every": 1,
    }  # fmt: skip


def metrics_of(folder: Path) -> list[dict[str, float]]:
    text = (folder / "stages" / "grpo" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_keeps_its_rates_over_a_stop(run, stage, tmp_path, monkeypatch):
    from keel.rl.loop import OnPolicyLoop

    run({"stages": {"grpo": stage}}, tmp_path / "whole")
    whole = metrics_of(tmp_path / "whole")
    update = OnPolicyLoop.update

    def stopped(self: Any, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OnPolicyLoop, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            run({"stages": {"grpo": stage}}, tmp_path / "killed")
    run({"stages": {"grpo": stage}}, tmp_path / "killed")
    assert metrics_of(tmp_path / "killed") == whole
    weights = [
        (tmp_path / name / "stages" / "grpo" / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
    assert {"curriculum/rate/a", "curriculum/rate/b", "curriculum/pass_rate"} <= whole[-1].keys()


@pytest.mark.slow
def test_rates_follow_from_the_reward_that_is_named(run, stage, tmp_path):
    short = stage | {"curriculum": {"reward": "length", "threshold": 2.0}, "updates": 1}
    run({"stages": {"grpo": short}}, tmp_path / "none")
    assert metrics_of(tmp_path / "none")[0]["curriculum/pass_rate"] == 0.0  # a length's reward is 1 at most
    run({"stages": {"grpo": short | {"curriculum": {"threshold": -9.0}}}}, tmp_path / "all")
    assert metrics_of(tmp_path / "all")[0]["curriculum/pass_rate"] == 1.0


def test_a_column_that_is_not_there_is_found_before_anything_runs(run, stage, tmp_path):
    with pytest.raises(DataError, match=r"grpo: .*rows.jsonl:1: it has no value in the column 'lvel'"):
        run({"stages": {"grpo": stage | {"curriculum": {"by": "lvel"}}}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"curriculum": {"reward": "keyword"}}, "no reward is called: keywords, length"),
        ({"curriculum": {}, "resample": 1}, "give one of them"),
    ],
)
def test_settings_that_contradict_each_other(stage, more, said):
    with pytest.raises(UsageError, match=said):
        parse({"name": "x", "stages": {"grpo": stage | more}})


@pytest.mark.slow
def test_ppo_has_it_too(run, stage, tmp_path):
    ppo = {k: v for k, v in stage.items() if k != "samples_per_prompt"} | {"kind": "ppo", "updates": 2}
    run({"stages": {"grpo": ppo}}, tmp_path / "ppo")
    assert "curriculum/rate/a" in metrics_of(tmp_path / "ppo")[-1]
