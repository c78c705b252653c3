"""A judge that nothing is trained on: what it is asked, when, and what the config refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel.config import parse
from keel.diagnosis.logs import lines
from keel.errors import DataError, EngineError, UsageError
from keel.rewards.mixture import Batch, Mixture, WeightedReward, precomputed
from keel.rl import heldout_judge, loop, rollout


def stage(data: Any, tiny_model: Path, tiny_reward: Path, **settings: Any) -> dict[str, Any]:
    ppo = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": str(tiny_reward),
        "data": str(data.prompts),
        "batch_size": 4,
        "updates": 4,
        "epochs": 1,
        "sampling": {"max_new_tokens": 4},
    }
    return {"stages": {"ppo": ppo | settings}}


@pytest.mark.parametrize("held_out", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_judge_is_asked_at_every_evaluation_and_trains_nothing(
    held_out, data, tiny_model, tiny_reward, run, tmp_path
):
    judge = {"kind": "length", "high": 2, "slack": 4}
    held = {"eval_data": {"source": str(data.prompts), "rows": 4}} if held_out else {}
    run(stage(data, tiny_model, tiny_reward, judge=judge, eval_every=2, **held), tmp_path / "judged")
    run(stage(data, tiny_model, tiny_reward), tmp_path / "alone")
    judged = lines(tmp_path / "judged" / "stages" / "ppo" / "metrics.jsonl")
    alone = lines(tmp_path / "alone" / "stages" / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in judged if "eval/judge" in row] == [0, 2, 4]
    assert all(
        0 <= row["eval/judge"] <= 1 and row["eval/judge_error"] >= 0 for row in judged if "eval/judge" in row
    )
    assert [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in judged[1:]] == alone


def test_a_worlds_gold_reward_judges_and_must_know_the_prompts(data, tiny_model, tiny_reward, run, tmp_path):
    known = {"source": "world:arithmetic/prompts", "rows": 4}
    config = stage(
        data, tiny_model, tiny_reward, judge="world:arithmetic", eval_every=4, eval_data=known, max_length=48
    )
    config["stages"]["ppo"] |= {"too_long": "truncate", "data": known}
    run(config, tmp_path / "known")
    assert "eval/judge" in lines(tmp_path / "known" / "stages" / "ppo" / "metrics.jsonl")[-1]
    with pytest.raises(DataError, match="cannot judge"):
        run(
            stage(data, tiny_model, tiny_reward, judge={"gold": "world:arithmetic"}, eval_every=2),
            tmp_path / "unknown",
        )


BASE = {"kind": "ppo", "model": "gpt2", "reward": "rm", "data": "p.jsonl"}


def ppo(**settings: Any) -> Any:
    return parse({"name": "x", "stages": {"ppo": {**BASE, **settings}}}).stages["ppo"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"judge": "other"}, "`judge` has no effect without `eval_every`"),
        ({"judge": "rm", "eval_every": 1}, "is what is trained on"),
        (
            {"judge": {"gold": "world:helpdesk", "reward": "other"}, "eval_every": 1},
            "either `gold` or `reward`",
        ),
        ({"judge": {}, "eval_every": 1}, "either `gold` or `reward`"),
        ({"eval_every": 1}, "give both or neither"),
        ({"judge": "other", "eval_every": 1, "patience": 2}, "`patience` has no effect"),
        ({"control": {"attempts": 2}}, "`control.attempts` has no effect"),
        ({"control": {"on_finding": "off", "reward_bound": 1.0}}, "`control.reward_bound` has no effect"),
        ({"control": "panic"}, "on_finding"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        ppo(**settings)


def test_short_forms():
    assert ppo(control=False).control.on_finding == "off"  # YAML's reading of a plain `off`
    assert ppo(control={"on_finding": False}).control.on_finding == "off"
    assert ppo(control="rollback").control.on_finding == "rollback"
    assert ppo().control.on_finding == "warn"
    assert ppo(judge="world:helpdesk", eval_every=1).judge.gold == "world:helpdesk"
    assert ppo(judge="other", eval_every=1).judge.reward[0].model == "other"
    assert ppo(judge=["other", {"kind": "length", "high": 9}], eval_every=1).judge.reward[1].kind == "length"
    assert ("reward", "other") in ppo(judge="other", eval_every=1).references()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rollout": {"ahead": 1}, "importance_cap": 2.0},
        {"rollout": {"partial": 2}, "importance_cap": 2.0},
    ],
)
def test_a_judge_that_fails_costs_no_update_and_is_asked_again(
    more: dict[str, Any], data: Any, tiny_model: Path, tiny_reward: Path, run: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, differences: Any,
) -> None:  # fmt: skip
    """What the update learned is kept, although no checkpoint was due; the end is that of a run in which
    nothing failed."""
    judge = {"kind": "length", "high": 2, "slack": 4}
    held = {"eval_data": {"source": str(data.prompts), "rows": 4}, "eval_every": 2, "patience": 2}
    config = stage(data, tiny_model, tiny_reward, judge=judge, save_every=10, **held, **more)
    run(config, tmp_path / "whole")
    evaluate, calls = rollout.evaluate, list[int]()

    def failing(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # after update 2; the first is what the stage starts from
            raise EngineError("the judge's server is gone")
        return evaluate(*given)

    monkeypatch.setattr(rollout, "evaluate", failing)
    with pytest.raises(EngineError, match="server is gone"):
        run(config, tmp_path / "cut")
    assert len(lines(tmp_path / "cut" / "stages" / "ppo" / "metrics.jsonl")) == 2  # steps 0 and 1
    learned, updates = loop.learn, list[int]()
    monkeypatch.setattr(loop, "learn", lambda *given: updates.append(given[3]) or learned(*given))
    run(config, tmp_path / "cut")
    assert updates == [3, 4]
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_an_evaluation_is_of_the_responses_that_the_judge_spoke_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 1, 2 and 3 have mean 2 and error 1/√3. The mean of others, which counts for the fourth in
    training, would make it 0.41."""
    heard, mute = precomputed([1.0, 2.0, None, 3.0]), precomputed([None] * 4)
    silent, spoken = [None, None, "late", None], torch.tensor([True, True, False, True])

    def columns_of(values: Any, reasons: list[str | None]) -> dict[str, torch.Tensor]:
        batch = Batch(["p"] * 4, ["c"] * 4, [[7]] * 4, ["eos"] * 4, [[3]] * 4, {})
        batch.logged.log_extra("judge/no_verdict", reasons)
        monkeypatch.setattr(heldout_judge.build_rewards, "columns_of", lambda tasks: {})
        monkeypatch.setattr(heldout_judge.build_rewards, "batch_of", lambda *given: batch)
        terms = [WeightedReward("judge", 1.0, values, neutral=True)]
        terms.append(WeightedReward("other", 1.0, precomputed([0.0] * 4)))
        judge = heldout_judge.Judge(None, Mixture(terms))
        ones = {name: torch.ones(4) for name in ("normalised", "kl", "length")}
        scores = heldout_judge.scores(judge, [], [], None)  # pyright: ignore[reportArgumentType]
        return {**ones, "scores": torch.tensor([1.0, 2, 9, 3]), "spoke": spoken, "judge": scores}

    config = SimpleNamespace(imitates=False, kl=SimpleNamespace(coef=0.0), batch_size=4)
    setup: Any = SimpleNamespace(judge=True, rewards=True, config=config)
    monkeypatch.setattr(rollout, "_held_out", lambda setup, prompts: columns_of(heard, silent))
    found = rollout.evaluate(setup, [])
    assert (found["eval/judge"], found["eval/judge_error"]) == (2.0, pytest.approx(1 / 3**0.5))
    final = rollout.final_measures(setup, [])
    assert [(final[name]["mean"], final[name]["n"]) for name in ("judge", "scores", "kl")] == [
        (2, 3),
        (2, 3),
        (1, 4),
    ]
    monkeypatch.setattr(rollout, "_held_out", lambda setup, prompts: columns_of(mute, ["late"] * 4))
    assert "eval/judge" not in rollout.evaluate(setup, [])
    assert "judge" not in rollout.final_measures(setup, [])
