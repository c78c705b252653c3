"""Best-of-n: the best are chosen, kept as they were sampled, and learned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from keel.errors import DataError, UsageError
from keel.stages import best_of_n

SHORT = "python:" + str(Path(__file__).parent / "rewards_for_tests.py") + ":short_tokens"


@pytest.fixture
def run_best(run: Any, data: Any, tiny_model: Path, tmp_path: Path) -> Any:
    def go(name: str = "run", **more: Any) -> Path:
        settings = {
            "kind": "best_of_n",
            "model": str(tiny_model),
            "reward": SHORT,
            "data": str(data.prompts),
            "lr": 3e-3,
            "batch_size": 4,
            "samples_per_prompt": 6,
            "sampling": {"max_new_tokens": 5},
            "epochs": 20,
            "holdout": 0.2,
            **more,
        }
        run({"stages": {"best": settings}}, tmp_path / name)
        return tmp_path / name / "stages" / "best"

    return go


def chosen(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "best.jsonl").read_text().splitlines()]


def test_the_best_of_n_are_chosen_and_learned(
    run_best: Any, run: Any, data: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, cuttable = best_of_n.prepare.opened, list[Any]()
    monkeypatch.setattr(
        best_of_n.prepare, "opened", lambda *given: cuttable.append(opened(*given)) or cuttable[-1]
    )
    stage = run_best()
    assert len(cuttable) == 1  # the one that learns: by fsdp the first rank alone opens it
    rows, result = chosen(stage), json.loads((stage / "result.json").read_text())
    assert len(rows) == 12
    assert result["reward_best"]["mean"] > result["reward_mean"]["mean"] + 0.2
    assert result["kl_bound"] == pytest.approx(math.log(6) - 5 / 6)
    for row in rows:  # the reward is of these very ids, which are what is trained on
        assert row["reward"] == pytest.approx(sum(token < 150 for token in row["ids"]) / len(row["ids"]))
        assert row["reward"] >= row["mean"]
    judge = {
        "kind": "evaluate",
        "models": [str(tiny_model), str(stage / "model")],
        "reward": SHORT,
        "data": str(data.prompts),
        "sampling": {"max_new_tokens": 5},
        "best_of": [6],
    }
    run({"stages": {"judge": judge}}, stage / "judged")
    models = json.loads((stage / "judged" / "stages" / "judge" / "result.json").read_text())["models"]
    before, after, best = (measures["proxy"]["mean"] for measures in models.values())
    assert before < after
    assert before < best


def test_only_good_enough_ones_are_kept(run_best: Any) -> None:
    stage = run_best(min_reward=0.9)
    share = sum(row["reward"] >= 0.9 for row in chosen(stage)) / 12
    assert json.loads((stage / "result.json").read_text())["kept"] == share < 1
    with pytest.raises(DataError, match="no response reaches min_reward"):
        run_best("none", min_reward=1.5)


def test_a_response_that_was_cut_off_is_chosen_only_where_none_ended(run_best: Any) -> None:
    stage = run_best(samples_per_prompt=40, max_steps=1, sampling={"max_new_tokens": 12})
    assert any(row["stop_reason"] == "eos" for row in chosen(stage))
    reasons = {row["stop_reason"] for row in chosen(stage) if row["reward"] == 0}
    assert len(chosen(stage)) == 12
    assert reasons <= {"eos", "length"}


def test_two_runs_are_the_same_bytes(run_best: Any, differences: Any, tmp_path: Path) -> None:
    run_best("one", max_steps=3)
    run_best("two", max_steps=3)
    assert differences(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"sampling": {"temperature": 0}}, "same response n times"),
        ({"samples_per_prompt": 1}, "samples_per_prompt"),
        ({"eval_data": "x.jsonl", "holdout": 0}, "`eval_data` has no effect"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: Any, reason: str, run_best: Any) -> None:
    with pytest.raises(UsageError, match=reason):
        run_best(**more)


def test_any_character_survives_between_sampling_and_training(
    run_best: Any, data: Any, tmp_path: Path
) -> None:
    """U+2028 ends a line for some readers of text, and not for JSON."""
    odd = tmp_path / "odd.jsonl"
    odd.write_text(
        json.dumps({"prompt": "the\u2028 cat\u0085?"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    stage = run_best(data=[str(odd), str(data.prompts)], max_steps=1)
    rows = [
        json.loads(line) for line in (stage / "best.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    assert any("\u2028" in row["prompt"] for row in rows)
