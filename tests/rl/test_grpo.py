"""GRPO and its kin: each setting does what its paper says, and all of them learn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.algorithms import advantages as advantage
from keel.algorithms.masked import masked_sum
from keel.config import GRPOConfig, parse
from keel.config.presets import PRESETS
from keel.errors import UsageError
from keel.rewards.mixture import Rated
from keel.rewards.shaping import RunningScale
from keel.rl import loop, rollout
from keel.rl.grpo import GRPO
from keel.rl.rollout import LoopState
from keel.rl.setup import make_optimizers, open_stage
from keel.rollout import GenerationRequest, KeelEngine
from keel.types import Completion

START = LoopState(0.0, RunningScale())
RED = {"kind": "keywords", "words": ["red"]}


@pytest.fixture
def settings(data: Any, tiny_model: Path) -> dict[str, Any]:
    return {
        "kind": "grpo", "model": str(tiny_model), "reward": [RED], "data": str(data.prompts), "batch_size": 8,
        "samples_per_prompt": 4, "updates": 2, "lr": 1e-3, "sampling": {"max_new_tokens": 5},
    }  # fmt: skip


@pytest.fixture
def open_grpo(settings: Any, stage_run: Any) -> Any:
    def go(**more: Any) -> tuple[list[rollout.PromptExample], rollout.Setup]:
        config = GRPOConfig.model_validate(settings | more)
        tasks, _, setup = open_stage(config, stage_run, sharing="none")
        return tasks, setup

    return go


@pytest.fixture
def run_grpo(run: Any, settings: Any, tmp_path: Path) -> Any:
    def go(name: str = "run", **more: Any) -> tuple[Path, list[dict[str, float]]]:
        run({"stages": {"grpo": settings | more}}, tmp_path / name)
        stage = tmp_path / name / "stages" / "grpo"
        return stage, [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]

    return go


def with_samples(monkeypatch: pytest.MonkeyPatch, ids: list[list[int]], scores: list[float]) -> None:
    """Let the engine return these responses and the rewards be these numbers, whatever model and rewards."""
    endings = iter(ids), iter(scores)

    def generate(_: Any, request: GenerationRequest, count: Any = None) -> list[Completion]:
        drawn = [tuple(next(endings[0])) for _ in request.prompts]
        return [
            Completion(tuple(p), y, "eos" if y[-1] == 1 else "length", (-1.0,) * len(y))
            for p, y in zip(request.prompts, drawn, strict=True)
        ]

    def rate(setup: Any, tasks: Any, completions: Any, update: int, dealt: Any) -> Rated:
        values = [next(endings[1]) for _ in completions]
        return Rated(torch.tensor(values), torch.tensor(values), torch.zeros(len(values)), {"red": values})

    monkeypatch.setattr(KeelEngine, "generate", generate)
    monkeypatch.setattr(rollout, "rate", rate)


# ---------------------------------------------------------------- learning


# with groups and without; the others by `make test-slow`
ALWAYS = ("grpo", "reinforce++")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in PRESETS]
)
def test_every_preset_learns_what_is_rewarded(preset: str, run_grpo: Any) -> None:
    """The untrained model writes anything; a token is rewarded. Every variant makes it likelier."""
    stage, rows = run_grpo(
        preset=preset,
        reward="python:"
        + str(Path(__file__).parents[1] / "stages" / "rewards_for_tests.py")
        + ":short_tokens",
        updates=15,
        lr=2e-2,
        batch_size=32,
        **({} if preset == "reinforce++" else {"samples_per_prompt": 8}),
    )
    first, last = (sum(row["objective/scores"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.15
    assert [row["val/ratio_first"] for row in rows] == [1.0] * 15
    assert (stage / "model" / "config.json").exists()


def test_two_runs_are_the_same_bytes(run_grpo: Any, differences: Any, tmp_path: Path) -> None:
    more = {
        "resample": 2,
        "kl": {"coef": 0.1, "estimator": "k2", "where": "loss"},
        "epochs": 2,
        "mini_batch": 4,
    }
    run_grpo("one", **more)
    run_grpo("two", **more)
    assert differences(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.parametrize(
    ("policy_loss", "reduce"),
    [
        ("clipped", "token"),
        ("cispo", "sequence"),
        ("clipped", 5.0),
        pytest.param("clipped", "sequence", marks=pytest.mark.slow),
        pytest.param("cispo", "token", marks=pytest.mark.slow),
        pytest.param("cispo", 5.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("read_apart")
def test_the_micro_batch_does_not_change_the_gradient(
    reduce: Any, policy_loss: str, open_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[torch.Tensor]] = []
    for size in ({}, {"micro_batch": 1}, {"micro_batch": 3}, {"micro_tokens": 24}):
        tasks, setup = open_grpo(
            reduce=reduce, policy_loss=policy_loss, epochs=2, entropy_coef=0.1, importance_cap=2.0,
            kl={"coef": 0.3, "estimator": "k2", "where": "loss"}, **size,
        )  # fmt: skip
        for model in (setup.roles.policy, setup.roles.reference):
            model.double()
        ids = [[7, 8, 1], [9, 1], [5, 6, 7, 8, 9], [5, 1], [6, 1], [7, 7, 7, 1], [8, 1], [9, 9, 1]]
        with_samples(monkeypatch, ids, [1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 1.0, 0.0])
        collected = loop.collect(GRPO(setup, tasks), tasks[:2], START, 1)

        def keep(optimizer: Any, *_: Any) -> dict[str, float]:
            grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            if len(found) < 4:
                found.append(grads)
            optimizer.zero_grad()
            return {"grad_norm": 0.0, "lr": 0.0}

        monkeypatch.setattr(loop.optim, "step", keep)
        optimizers = make_optimizers(setup.config, setup.roles)
        before = len(found)
        loop.learn(GRPO(setup, tasks), optimizers, collected.episodes, 1, LoopState(0.3, RunningScale()))
        del found[before + 1 :]
    assert len(found) == 4
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- what the settings mean


def test_a_preset_is_plain_settings_and_the_config_shows_them(settings: Any) -> None:
    dapo = GRPOConfig.model_validate({**settings, "preset": "dapo", "sampling": {"max_new_tokens": 50}})
    assert (dapo.clip_low, dapo.clip_high, dapo.reduce, dapo.resample, dapo.kl.coef) == (
        0.2,
        0.28,
        "token",
        10,
        0.0,
    )
    overlong = dapo.reward[-1].model_dump()
    assert (overlong["kind"], overlong["max_length"], overlong["buffer"]) == ("overlong", 50, 10)
    again = GRPOConfig.model_validate(dapo.model_dump(mode="json"))
    assert again == dapo  # the resolved config can be read again
    own = GRPOConfig.model_validate({**settings, "preset": "dapo", "clip_high": 0.5, "kl": {"coef": 0.1}})
    assert (own.clip_high, own.kl.coef, own.kl.where, own.kl.estimator) == (0.5, 0.1, "loss", "k3")
    assert (own.shaping.clip, own.shaping.missing_stop_penalty) == (None, 0.0)  # the paper has neither
    assert GRPOConfig.model_validate({**settings, "preset": "dr_grpo"}).reduce == 5.0
    rloo = GRPOConfig.model_validate({**settings, "preset": "rloo"})
    assert (rloo.baseline, rloo.scale, rloo.kl.where, rloo.kl.estimator) == (
        "leave_one_out",
        "none",
        "reward",
        "k1",
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.04, "k3", "loss")),
        ({"coef": 0.1}, (0.1, "k3", "loss")),
        ({"coef": 0.1, "where": "reward"}, (0.1, "k1", "reward")),
        ({"coef": 0.0}, (0.0, "k1", "reward")),  # nothing is constrained
    ],
)
@pytest.mark.parametrize("preset", [None, "grpo"])
def test_another_coefficient_is_not_another_method(
    preset: Any, given: Any, expected: Any, settings: Any
) -> None:
    config = GRPOConfig.model_validate({**settings, "preset": preset, **({"kl": given} if given else {})})
    assert (config.kl.coef, config.kl.estimator, config.kl.where) == expected
    assert GRPOConfig.model_validate(config.model_dump(mode="json")) == config


def test_methods_about_ratios_take_several_steps_a_batch(settings: Any) -> None:
    """In a single step all ratios are 1, and GSPO and CISPO would be GRPO."""
    found = {
        name: GRPOConfig.model_validate({**settings, "batch_size": 32, "preset": name}).mini_batch
        for name in PRESETS
    }
    assert found == {**dict.fromkeys(PRESETS), "dapo": 2, "gspo": 8, "cispo": 2}


def test_rules_are_not_clipped(open_grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's reward means what it says at any size; only learned rewards are bounded, on their own
    scale."""
    tasks, setup = open_grpo()
    scores = [-80.0, -3.0, -40.0, -6.0, 7.0, 9.0, 26.0, 12.0]
    with_samples(monkeypatch, [[k, 1] for k in range(5, 13)], scores)
    collected = loop.collect(GRPO(setup, tasks), tasks[:2], START, 1)
    assert collected.experience.rewards.tolist() == scores


@pytest.mark.parametrize(
    "wrong", [{"kl": 0.1}, {"sampling": 5}, {"sampling": {"max_new_tokens": "many"}}, {"shaping": 3}]
)
def test_settings_of_the_wrong_type_are_a_clear_error(wrong: Any, settings: Any) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        parse({"name": "x", "stages": {"s": {**settings, "preset": "dapo", **wrong}}})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"level": "sequence"}, "`level` has no effect with one gradient step"),
        ({"samples_per_prompt": 1}, "needs `samples_per_prompt` of 2 or more"),
        ({"baseline": "none"}, "`scale: group` needs a group"),
        ({"baseline": "leave_one_out"}, "`scale` has no effect with `baseline: leave_one_out`"),
        ({"baseline": "none", "scale": "batch", "resample": 1}, "`resample` has no effect"),
        ({"shaping": {"center": "prompt"}}, "`shaping.center` has no place here"),
        ({"policy_loss": "cispo", "level": "sequence", "epochs": 2}, "which takes no `level`"),
        ({"reduce": -1.0}, "positive, finite length"),
        ({"kl": {"coef": 0.0, "where": "loss", "estimator": "k2"}}, "no effect with `kl.coef` 0"),
        ({"epochs": 1, "dual_clip": 3.0}, "`dual_clip` has no effect with one gradient step"),
        ({"reward": [RED, RED]}, "two rewards are called 'keywords'"),
        ({"preset": "dpo"}, "preset"),
        ({"max_steps": 3}, "GRPO counts `updates`"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: Any, reason: str, settings: Any) -> None:
    with pytest.raises(UsageError, match=reason):
        parse({"name": "x", "stages": {"s": settings | more}})


def test_equal_groups_are_counted_and_sampled_again(open_grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups the second is all equal; its replacement is too at first, and the second try is not."""
    tasks, setup = open_grpo(resample=3)
    ids = [[k, 1] for k in range(5, 9)] + [[9, 9, 1]] * 4 + [[5, 1]] * 4 + [[k, 7, 7, 1] for k in range(5, 9)]
    scores = [1.0, 0.0, 0.0, 0.0] + [1.0] * 4 + [0.0] * 4 + [0.0, 1.0, 2.0, 3.0]
    with_samples(monkeypatch, ids, scores)
    collected = loop.collect(GRPO(setup, tasks), tasks[:2], START, 1)
    assert [list(c.ids) for c in collected.experience.completions] == ids[:4] + ids[12:]
    assert collected.experience.rated.raw.tolist() == scores[:4] + scores[12:]
    assert collected.experience.rated.by_name["red"] == scores[:4] + scores[12:]
    assert collected.metrics["frac_reward_zero_std"] == 0.0
    sampled = collected.metrics["objective/scores_sampled"]
    assert sampled == pytest.approx(5 / 8) != collected.metrics["objective/scores"]
    assert (collected.metrics["rollout/resample_rounds"], collected.metrics["rollout/groups_replaced"]) == (
        2,
        2,
    )
    assert collected.reward_scaler.count == 16  # the running scale has seen what was thrown away
    e = collected.episodes
    for row, c in enumerate(collected.experience.completions):  # prompts, tokens and masks moved together
        p = len(c.prompt_ids)
        assert e.ids[row, : p + len(c.ids)].tolist() == [*c.prompt_ids, *c.ids]
        assert e.mask[row].sum() == len(c.ids)
    assert len({c.prompt_ids for c in collected.experience.completions[4:]}) == 1


def test_trap_22_a_group_of_equal_rewards_has_no_gradient_and_says_so(
    open_grpo: Any, monkeypatch: pytest.MonkeyPatch, loss_of: Any
) -> None:
    """[trl 2703, 3452]"""
    tasks, setup = open_grpo(kl={"coef": 0.0})
    with_samples(monkeypatch, [[k, 1] for k in range(5, 13)], [1.0, 0.0, 0.0, 1.0] + [0.7] * 4)
    collected = loop.collect(GRPO(setup, tasks), tasks[:2], START, 1)
    assert collected.metrics["frac_reward_zero_std"] == 0.5
    assert collected.episodes.advantages[4:].tolist() == [[0.0, 0.0]] * 4
    loss = loss_of(GRPO(setup, tasks), collected.episodes, [4, 5, 6, 7], 4, 0.0, on_policy=True)
    assert loss.metrics["loss/policy_avg"] == 0.0


def test_the_kl_in_the_reward_is_part_of_what_the_group_compares(
    open_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, setup = open_grpo(preset="rloo", kl={"coef": 0.5})
    with torch.no_grad():
        setup.roles.policy.lm_head.weight.mul_(1.3)
    scores = [1.0, 0.0, 0.0, 1.0, 0.3, 0.2, 0.1, 0.0]
    with_samples(monkeypatch, [[k, 9, 1] for k in range(5, 13)], scores)
    collected = loop.collect(GRPO(setup, tasks), tasks[:2], dataclasses.replace(START, kl_coef=0.5), 1)
    s = collected.experience.scored
    kl = masked_sum(s.logp - s.ref_logp, s.mask, dim=1)
    assert kl.abs().max() > 0.1
    expected = advantage.leave_one_out(torch.tensor(scores) - 0.5 * kl, 4)
    torch.testing.assert_close(collected.episodes.advantages[:, 0], expected)


def test_reinforce_plus_plus_pays_the_kl_token_by_token_and_whitens_over_the_batch(
    open_grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, setup = open_grpo(preset="reinforce++", batch_size=4, samples_per_prompt=1, kl={"coef": 0.5})
    with torch.no_grad():
        setup.roles.policy.lm_head.weight.mul_(1.3)
    with_samples(monkeypatch, [[5, 9, 1], [6, 1], [7, 8, 9, 1], [8, 1]], [1.0, 0.0, 0.5, 2.0])
    collected = loop.collect(GRPO(setup, tasks), tasks[:4], dataclasses.replace(START, kl_coef=0.5), 1)
    s, mask = collected.experience.scored, collected.experience.scored.mask
    k1 = torch.where(mask, s.logp - s.ref_logp, 0.0)
    to_go = k1.flip(1).cumsum(1).flip(1)  # Σ over this token and those after it
    raw = torch.tensor([1.0, 0.0, 0.5, 2.0])[:, None] - 0.5 * to_go
    expected = (raw - raw[mask].mean()) / raw[mask].std(correction=0)
    torch.testing.assert_close(collected.episodes.advantages[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_truncated_responses_can_be_left_out_of_the_loss(
    open_grpo: Any, monkeypatch: pytest.MonkeyPatch, loss_of: Any
) -> None:
    ids = [
        [5, 1],
        [6, 7, 8, 9, 9],
        [7, 1],
        [8, 1],
        [5, 5, 5, 5, 5],
        [6, 6, 6, 6, 6],
        [7, 7, 7, 7, 7],
        [8] * 5,
    ]
    for masked in (False, True):
        tasks, setup = open_grpo(mask_truncated=masked)
        with_samples(monkeypatch, ids, [1.0, 0.0, 0.2, 0.4, 0.0, 1.0, 2.0, 3.0])
        collected = loop.collect(GRPO(setup, tasks), tasks[:2], START, 1)
        assert collected.metrics["rollout/truncated"] == 5 / 8
        counted = collected.episodes.mask.sum(dim=1).tolist()
        assert counted == ([2, 0, 2, 2, 0, 0, 0, 0] if masked else [2, 5, 2, 2, 5, 5, 5, 5])
    loss_of(GRPO(setup, tasks), collected.episodes, [4, 5], 0, 0.04, on_policy=True).loss.backward()
    # nothing counts: no gradient, and no NaN
    assert all(p.grad is None or not p.grad.any() for p in setup.roles.policy.parameters())


def test_a_sampler_that_disagrees_is_seen_and_weighed(
    open_grpo: Any, monkeypatch: pytest.MonkeyPatch, loss_of: Any
) -> None:
    """The samples above claim log-probabilities of −1, which they did not have."""
    tasks, setup = open_grpo(importance_cap=0.5)
    with_samples(monkeypatch, [[k, 1] for k in range(5, 13)], [1.0, 0.0] * 4)
    collected = loop.collect(GRPO(setup, tasks), tasks[:2], START, 1)
    s, weights = collected.experience.scored, collected.episodes.weights
    assert weights is not None
    torch.testing.assert_close(weights[s.mask], (s.logp + 1.0).exp().clamp(max=0.5)[s.mask])
    assert collected.metrics["rollout/sampler_drift"] == pytest.approx(
        (s.logp + 1.0).abs()[s.mask].mean().item()
    )
    rows = list(range(8))
    plain = dataclasses.replace(collected.episodes, weights=None)
    one, other = (
        loss_of(GRPO(setup, tasks), e, rows, 8, 0.0, on_policy=True).loss for e in (collected.episodes, plain)
    )
    assert one.item() != other.item()


def test_the_real_sampler_agrees_with_the_trainer(run_grpo: Any) -> None:
    _, rows = run_grpo(updates=3)
    assert all(row["rollout/sampler_drift"] < 1e-5 for row in rows)
