"""What `control` does to a stage that finds something: changed, put back, or stopped; and nothing at all when
it is off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keel.diagnosis.findings import conditions
from keel.diagnosis.logs import lines
from keel.diagnosis.watch import replay
from keel.errors import KeelError, NotFiniteError
from keel.models import optim
from keel.rl import loop, rollout
from keel.rl.ppo import PPO
from keel.rl.setup import make_optimizers


@pytest.fixture
def stages(data: Any, tiny_model: Path, tiny_reward: Path) -> Any:
    """A ppo stage of a few updates with some settings changed."""

    def go(**settings: Any) -> dict[str, Any]:
        ppo = {
            "kind": "ppo",
            "model": str(tiny_model),
            "reward": str(tiny_reward),
            "data": str(data.prompts),
            "batch_size": 4,
            "updates": 7,
            "epochs": 1,
            "lr": 1e-2,
            "schedule": "constant",
            "warmup": 0,
            "sampling": {"max_new_tokens": 4},
            "kl": {"coef": 0.1},
            "save_every": 2,
            "old_logp": "trainer",  # by which the KL of untouched weights is exactly 0
        }
        return {"stages": {"ppo": ppo | settings}}

    return go


def metrics(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "stages" / "ppo" / "metrics.jsonl")


def events(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "stages" / "ppo" / "events.jsonl")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "stages" / "ppo" / "model" / "model.safetensors")


BOUND = {"reward_bound": -1e6}  # above which every reward is, so that the check fires after each third update


def test_off_and_warn_give_the_same_numbers_and_weights(stages, run, tmp_path):
    run(stages(control="off", updates=4), tmp_path / "off")
    run(stages(control={"on_finding": "warn", **BOUND}, updates=4), tmp_path / "warn")
    assert metrics(tmp_path / "off") == metrics(tmp_path / "warn")
    one, other = weights(tmp_path / "off"), weights(tmp_path / "warn")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert events(tmp_path / "off") == []
    assert [(e["event"], e["check"], e["step"]) for e in events(tmp_path / "warn")] == [
        ("finding", "reward_implausible", 3)
    ]


def test_adjust_changes_what_the_finding_asks_and_nothing_else(stages, run, tmp_path):
    run(stages(control={"on_finding": "adjust", "attempts": 1, **BOUND}), tmp_path)
    rows = metrics(tmp_path)
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.1] * 3 + [0.15] * 4)
    assert [row["lr"] for row in rows] == pytest.approx([1e-2] * 7)  # this finding is about β alone
    assert [(e["event"], e["step"]) for e in events(tmp_path)] == [
        ("finding", 3),
        ("adjust", 3),
        ("finding", 6),
    ]


def test_rollback_goes_back_with_both_changes_and_stops_after_its_attempts(stages, run, tmp_path):
    run(stages(control={"on_finding": "rollback", "attempts": 1, **BOUND}), tmp_path)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.1] * 3 + [0.15] * 3)
    assert [row["lr"] for row in rows] == pytest.approx([1e-2] * 3 + [5e-3] * 3)
    kl = [row["objective/kl_exact"] for row in rows]
    assert kl[2] > 0
    assert kl[0] == kl[3] == 0.0  # the weights are those of the start again
    said = [(e["event"], e["step"]) for e in events(tmp_path)]
    assert said == [("finding", 3), ("rollback", 3), ("finding", 6), ("stop", 6)]
    assert events(tmp_path)[1] | {"kl_coef": 0} == {
        "step": 3,
        "event": "rollback",
        "checks": ["reward_implausible"],
        "kl_coef": 0,
        "lr_factor": 0.5,
        "to": 0,
    }


ALL_ALIKE = {
    "kind": "length",
    "low": 100,
    "high": 101,
}  # never reached: 0 at every evaluation, so the first is best


def judged_at(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """What the judge says, evaluation by evaluation, the first before any update."""
    said, evaluate = iter(values), rollout.evaluate
    monkeypatch.setattr(rollout, "evaluate", lambda *a: {**evaluate(*a), "eval/judge": next(said)})


def test_stop_keeps_the_weights_that_the_judge_liked_best(stages, run, tmp_path, tiny_model, monkeypatch):
    judged_at(monkeypatch, 0.5, 0.7, 0.6, 0.9)
    run(stages(control={"on_finding": "stop", **BOUND}, judge=ALL_ALIKE, eval_every=1), tmp_path / "stopped")
    run(stages(control="off", updates=1), tmp_path / "one")
    assert events(tmp_path / "stopped")[-1] == {
        "step": 3,
        "event": "stop",
        "checks": ["reward_implausible"],
        "kl_coef": 0.1,
        "lr_factor": 1.0,
        "to": 1,
    }
    one, stopped = weights(tmp_path / "one"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], stopped[name]) for name in one)


@pytest.mark.parametrize(
    ("control", "kept"),
    [
        ("rollback", 0),
        pytest.param("stop", 0, marks=pytest.mark.slow),  # as rollback
        pytest.param("warn", None, marks=pytest.mark.slow),  # test_off_and_warn_give_the_same_numbers_…
    ],
)
def test_where_control_goes_back_a_stage_ends_no_worse_than_it_began(
    stages, run, tmp_path, tiny_model, control, kept
):
    """Nothing is found, and no later state is liked better than what the stage started from."""
    run(stages(control=control, judge=ALL_ALIKE, eval_every=1, updates=2), tmp_path)
    start, end = load_file(tiny_model / "model.safetensors"), weights(tmp_path)
    assert all(torch.equal(start[name], end[name]) for name in end) is (kept == 0)
    assert [(e["event"], e["to"]) for e in events(tmp_path)] == ([("keep", kept)] if kept == 0 else [])
    (
        tmp_path / "stages" / "ppo" / "stage.json"
    ).unlink()  # killed at the very end: the event is not written twice
    run(stages(control=control, judge=ALL_ALIKE, eval_every=1, updates=2), tmp_path)
    assert len(events(tmp_path)) == (kept == 0)


def test_a_stage_that_ends_before_its_last_update_says_at_which_one(stages, run, data, tmp_path):
    """The evaluated reward never rises, so patience ends it; the judge liked the start best."""
    held = {"eval_every": 1, "eval_data": str(data.prompts), "patience": 1}
    run(stages(control="rollback", judge=ALL_ALIKE, lr=1.0, reward=ALL_ALIKE, **held), tmp_path)
    last = metrics(tmp_path)[-1]["step"]
    assert 0 < last < 7
    assert [(e["event"], e["step"], e["to"]) for e in events(tmp_path)] == [("keep", last, 0)]


def test_stop_without_any_evaluation_keeps_the_last_healthy_weights(stages, run, tmp_path, tiny_model):
    run(stages(control={"on_finding": "stop", **BOUND}), tmp_path)
    start, stopped = load_file(tiny_model / "model.safetensors"), weights(tmp_path)
    assert all(torch.equal(start[name], stopped[name]) for name in stopped)


def test_what_a_stage_found_while_it_ran_is_what_its_metrics_show_afterwards(stages, run, tmp_path):
    pipeline = run(stages(control={"on_finding": "rollback", "attempts": 1, **BOUND}), tmp_path)
    settings = conditions(pipeline.config.stages["ppo"].model_dump(mode="json"))
    acted = [e["step"] for e in events(tmp_path) if e["event"] != "finding"]
    _, found = replay(metrics(tmp_path), settings, acted)
    assert [f.row() for f in found] == [e for e in events(tmp_path) if e["event"] == "finding"]


# ---------------------------------------------------------------- numbers that are none


def spoiled(open_ppo: Any, monkeypatch: pytest.MonkeyPatch, control: str, how: str) -> tuple[Any, Any]:
    """A loop whose third update is not finite; its setup, and what it returned or raised."""
    prompts, setup = open_ppo(updates=5, control=control, epochs=1, lr=1e-2, save_every=1, old_logp="trainer")
    optimizers, learn = make_optimizers(setup.config, setup.roles), loop.learn

    def learn_badly(algorithm: Any, optimizers: Any, episodes: Any, update: int, state: Any) -> Any:
        if update == 3 and how == "gradient":
            next(setup.roles.policy.parameters()).grad = torch.full_like(
                next(setup.roles.policy.parameters()), math.nan
            )
            raise NotFiniteError(
                "stage, update 3: the gradient is not finite (norm nan); lower the learning rate"
            )
        learned = learn(algorithm, optimizers, episodes, update, state)
        if update == 3:
            learned.metrics["loss/policy_avg"] = math.nan
        return learned

    monkeypatch.setattr(loop, "learn", learn_badly)
    try:
        return setup, loop.OnPolicyLoop(PPO(setup), prompts, [], optimizers).train()
    except KeelError as error:
        return setup, error


@pytest.mark.parametrize("how", ["gradient", "metric"])
def test_an_update_that_is_not_finite_is_rolled_back(how, open_ppo, monkeypatch):
    setup, result = spoiled(open_ppo, monkeypatch, "rollback", how)
    assert "kl_coef" in result
    assert result["kl_coef"] == pytest.approx(0.075)
    rows = lines(setup.run.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2].keys() == {"step", "episode"}
    assert rows[3]["objective/kl_exact"] == 0.0
    said = lines(setup.run.directory / "events.jsonl")
    assert [(e["step"], e["event"]) for e in said] == [(3, "finding"), (3, "rollback")]
    assert said[0]["check"] == "not_finite"
    assert str(setup.run.directory) not in json.dumps(said)  # which would differ between two runs


@pytest.mark.parametrize("control", ["off", "warn", "adjust"])
def test_without_a_way_back_it_is_an_error_as_ever(control, open_ppo, monkeypatch):
    setup, error = spoiled(open_ppo, monkeypatch, control, "metric")
    assert isinstance(error, NotFiniteError)
    assert "loss/policy_avg is nan at step 3" in str(error)
    said = [e["check"] for e in lines(setup.run.directory / "events.jsonl")]
    assert said == ([] if control == "off" else ["not_finite"])


def test_a_gradient_that_is_not_finite_is_rolled_back_in_the_whole_stage(
    stages: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `ppo.run`, with its clocks and counts: the failed update is logged and the run goes on."""
    step, calls = optim.step, []

    def spoiled(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise NotFiniteError("stage, update 3: the gradient is not finite")
        return step(*given, **named)

    monkeypatch.setattr(optim, "step", spoiled)
    run(stages(control="rollback", sharing="trunk"), tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert metrics(tmp_path)[2].keys() == {"step", "episode"}
    assert len(lines(tmp_path / "stages" / "ppo" / "times.jsonl")) == 7
