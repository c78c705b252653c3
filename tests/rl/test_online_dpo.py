"""Online DPO: pairs by reward, and a gradient that is DPO's, however the step is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keel.algorithms import preference
from keel.config import OnlineDPOConfig, parse
from keel.errors import UsageError
from keel.rewards.shaping import RunningScale
from keel.rl import loop, rollout
from keel.rl.online_dpo import OnlineDPO, paired, slopes
from keel.rl.rollout import LoopState
from keel.rl.setup import make_optimizers, open_stage

START = LoopState(0.1, RunningScale())
LETTERS = {"kind": "keywords", "words": ["a", "e", "i", "t", "s", "d"], "mode": "share"}


@pytest.fixture
def settings(data: Any, tiny_model: Path) -> dict[str, Any]:
    short = f"python:{Path(__file__).parents[1] / 'stages' / 'rewards_for_tests.py'}:short_tokens"
    return {
        "kind": "online_dpo", "model": str(tiny_model), "reward": short, "data": str(data.prompts),
        "batch_size": 12, "samples_per_prompt": 3, "updates": 2, "lr": 1e-3, "beta": 0.3,
        "sampling": {"max_new_tokens": 5},
    }  # fmt: skip


def test_best_and_worst_are_a_pair_and_equal_ones_are_none() -> None:
    rewards = torch.tensor([0.0, 2.0, 1.0, 5.0, 5.0, 5.0, 3.0, 1.0, 3.0])
    chosen, rejected = paired(rewards, 3)
    assert (chosen.tolist(), rejected.tolist()) == ([1, 6], [0, 7])
    assert [len(side) for side in paired(torch.ones(4), 2)] == [0, 0]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_slopes_are_those_of_the_pairs_loss(loss: str) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    logp, ref = (-torch.rand(4, 3, dtype=torch.float64) for _ in range(2))
    chosen, rejected = torch.tensor([0, 3]), torch.tensor([1, 2])
    weights, losses, measured = slopes(logp, ref, mask, chosen, rejected, loss, 0.3)
    logp.requires_grad_()
    sums = [torch.where(mask, x, 0.0).sum(dim=1) for x in (logp, ref)]
    whole = [x / mask.sum(dim=1) for x in sums] if loss == "ipo" else sums
    sides = (whole[0][chosen], whole[0][rejected], whole[1][chosen], whole[1][rejected])
    expected, _ = (preference.ipo if loss == "ipo" else preference.dpo)(*sides, beta=0.3)
    (slope,) = torch.autograd.grad(expected.mean(), logp)
    torch.testing.assert_close(weights, -slope)
    torch.testing.assert_close(losses, expected.detach())
    assert measured["rewards/margins"] == pytest.approx(
        measured["rewards/chosen"] - measured["rewards/rejected"]
    )


@pytest.mark.parametrize(("loss", "more"), [("sigmoid", {}), ("ipo", {"micro_batch": 1})])
@pytest.mark.usefixtures("read_apart")
def test_the_gradient_is_that_of_dpo_on_the_pairs(
    loss: str, more: dict[str, Any], settings: Any, stage_run: Any
) -> None:
    config = OnlineDPOConfig.model_validate({**settings, "loss": loss, **more})
    tasks, _, setup = open_stage(config, stage_run, sharing="none")
    with torch.no_grad():
        setup.roles.reference.lm_head.weight.mul_(1.2)  # so that pairs differ in their slopes
    for model in (setup.roles.policy, setup.roles.reference):
        model.double()
    algorithm = OnlineDPO(setup)
    collected = loop.collect(algorithm, tasks[:4], START, 1)
    found: list[dict[Any, Tensor]] = []

    def keep(optimizer: Any, *_: Any) -> dict[str, float]:
        found.append({p: p.grad.clone() for group in optimizer.param_groups for p in group["params"]})
        optimizer.zero_grad()
        return {"grad_norm": 0.0, "lr": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.optim, "step", keep)
        optimizers = make_optimizers(config, setup.roles)
        learned = loop.learn(algorithm, optimizers, collected.episodes, 1, START)
    chosen, rejected = paired(collected.experience.rewards, 3)
    assert 0 < len(chosen) <= 4

    def reply(model: Any, row: int) -> Tensor:
        done = collected.experience.completions[row]
        ids, start = torch.tensor([[*done.prompt_ids, *done.ids]]), len(done.prompt_ids)
        logp = model(input_ids=ids).logits[0, :, : setup.vocab].log_softmax(dim=-1)
        each = logp[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1)
        return each.mean() if loss == "ipo" else each.sum()

    sides = [
        torch.stack([reply(model, int(row)) for row in rows])
        for model in (setup.roles.policy, setup.roles.reference)
        for rows in (chosen, rejected)
    ]
    losses, _ = (preference.ipo if loss == "ipo" else preference.dpo)(*sides, beta=0.3)
    setup.roles.policy.zero_grad()
    losses.mean().backward()
    assert learned.metrics["loss/policy_avg"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert len(found[0]) == len(list(setup.roles.policy.parameters()))
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_two_runs_are_the_same_bytes(run: Any, settings: Any, differences: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run({"stages": {"odpo": settings}}, tmp_path / name)
    assert differences(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.slow
def test_it_learns_what_is_rewarded(run: Any, settings: Any, tmp_path: Path) -> None:
    stage = {**settings, "updates": 15, "batch_size": 32, "samples_per_prompt": 4, "lr": 2e-2}
    run({"stages": {"odpo": stage}}, tmp_path / "one")
    path = tmp_path / "one" / "stages" / "odpo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first, last = (sum(row["objective/scores"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert [row["val/ratio"] for row in rows] == pytest.approx([1.0] * 15)


@pytest.mark.slow
def test_a_judge_of_pairs_decides(run: Any, settings: Any, standing_judge: Any, tmp_path: Path) -> None:
    """The judge likes red: what it is shown are the two replies to a prompt."""
    judge = {"kind": "judge", "model": "scripted", "mode": "pairwise", "address": standing_judge.address}
    before = len(standing_judge.asked)
    stage = {**settings, "reward": judge, "samples_per_prompt": 2, "batch_size": 4, "updates": 1}
    run({"stages": {"odpo": stage}}, tmp_path)
    assert len(standing_judge.asked) == before + 4  # two prompts, both orders


def test_an_update_without_a_pair_teaches_nothing(settings: Any, stage_run: Any, monkeypatch: Any) -> None:
    config = OnlineDPOConfig.model_validate(settings)
    tasks, _, setup = open_stage(config, stage_run, sharing="none")
    rated = rollout.rate

    def equal(*args: Any) -> Any:
        found = rated(*args)
        found.total.zero_()
        return found

    monkeypatch.setattr(rollout, "rate", equal)
    monkeypatch.setattr(
        rollout, "shaped", lambda setup, rated, completions, scaler: torch.zeros(len(completions))
    )
    collected = loop.collect(OnlineDPO(setup), tasks[:4], START, 1)
    assert collected.metrics["frac_reward_zero_std"] == 1.0
    assert not collected.episodes.advantages.any()
    learned = loop.learn(OnlineDPO(setup), make_optimizers(config, setup.roles), collected.episodes, 1, START)
    assert learned.metrics["grad_norm"] == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 2}, "epochs: unknown key"),
        ({"kl": {"coef": 0.1}}, "kl: unknown key"),
        ({"importance_mode": "token_mask"}, "importance_mode: unknown key"),
        ({"samples_per_prompt": 1}, "samples_per_prompt"),
        ({"shaping": {"center": "prompt"}}, "`shaping.center` has no effect"),
        ({"batch_size": 5}, "not a multiple"),
    ],
)
def test_settings_without_effect_are_refused(wrong: dict[str, Any], message: str) -> None:
    stage = {"kind": "online_dpo", "model": "m", "reward": "r", "data": "d", **wrong}
    with pytest.raises(UsageError, match=message):
        parse({"name": "x", "stages": {"s": stage}})
