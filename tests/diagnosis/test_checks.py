"""Each check on series made by hand: silent on a healthy run and on single outliers, loud on the illness it
is for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from keel.diagnosis.findings import Conditions, Finding, conditions
from keel.diagnosis.watch import CHECKS, replay

UPDATES = 60
TARGETED = Conditions(kl_target=6.0)
Series = Mapping[str, Callable[[int], float]]


def healthy(update: int, noise: random.Random) -> dict[str, float]:
    """As in real runs: the reward rises, the KL swings to 1.6 times its target of 6, entropy halves, the
    critic is poor."""
    rise = 1 - math.exp(-update / 15)
    kl = 6 * rise * (1 + 0.6 * math.sin(update / 8)) * noise.uniform(0.8, 1.2)
    row = {
        "objective/kl": kl + noise.gauss(0, 0.4),
        "objective/kl_exact": kl,
        "objective/scores": -0.3 + 1.4 * rise + noise.gauss(0, 0.15),
        "objective/scores_std": 1.05 - 0.2 * rise + noise.gauss(0, 0.12),
        "policy/entropy_avg": 0.46 - 0.25 * rise + noise.gauss(0, 0.01),
        "policy/clipfrac_avg": 0.05 * (1 - rise) + noise.uniform(0, 0.02),
        "val/explained_variance": -0.5 * (1 - rise) - 0.05 + noise.gauss(0, 0.1),
        "rollout/response_length": 31 + 7 * rise + noise.gauss(0, 1.5),
        "rollout/truncated": max(0.0, noise.gauss(0.01, 0.015)),
        "rollout/repetition": 0.06 + noise.gauss(0, 0.01),
        "rollout/length_correlation": 0.3 + noise.gauss(0, 0.15),
        "rollout/sampler_drift": 2e-7,
        "rollout/staleness_kl": max(0.0, noise.gauss(0.02, 0.01)),
        "rollout/importance_capped": max(0.0, noise.gauss(0.01, 0.01)),
        "frac_reward_zero_std": min(1.0, max(0.0, 0.5 + 0.2 * rise + noise.gauss(0, 0.1))),
    }
    if update % 5 == 0:
        row |= {"eval/judge": 0.46 + 0.2 * rise + noise.gauss(0, 0.03), "eval/judge_error": 0.03}
        row["eval/objective/scores"] = row["objective/scores"]
    return row


def found(
    series: Series | None = None,
    settings: Conditions = TARGETED,
    seed: int = 0,
    updates: int = UPDATES,
) -> list[Finding]:
    noise, rows = random.Random(seed), []
    for update in range(1, updates + 1):
        row = healthy(update, noise) | {name: value(update) for name, value in (series or {}).items()}
        rows.append({"step": update, **{k: v for k, v in row.items() if v is not None}})
    return replay(rows, settings)[1]


def worst(findings: list[Finding], check: str) -> str | None:
    return ([f.severity for f in findings if f.check == check] or [None])[-1]


def after(update: int, well: float, ill: float) -> Callable[[int], float]:
    return lambda now: ill if now >= update else well


@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_raise_nothing_to_act_on(seed):
    for settings in (Conditions(kl_target=6.0), Conditions(), Conditions(constrained=False)):
        findings = found(settings=settings, seed=seed)
        assert not [f for f in findings if f.severity != "note" and f.check != "kl_too_high"]
        assert not [f for f in findings if f.severity == "act"]


ILL: list[tuple[str, str, Series, Conditions]] = [
    ("not_finite", "act", {"loss/policy_avg": after(30, 0.1, math.nan)}, Conditions()),
    ("not_finite", "act", {"grad_norm": after(30, 0.1, math.inf)}, Conditions()),
    ("not_finite", "act", {"objective/kl": after(30, 0.1, -1e308)}, Conditions()),
    ("kl_too_high", "warn", {"objective/kl_exact": after(30, 4, 13)}, Conditions(kl_target=6.0)),
    ("kl_too_high", "act", {"objective/kl_exact": after(30, 4, 17)}, Conditions(kl_target=6.0)),
    ("kl_too_high", "act", {"objective/kl_exact": after(30, 0.5, 11)}, Conditions(kl_target=1.0)),
    ("kl_too_high", "warn", {"objective/kl_exact": after(30, 4, 12)}, Conditions()),
    ("kl_too_high", "act", {"objective/kl_exact": after(30, 4, 30)}, Conditions()),
    ("kl_too_high", "warn", {"objective/kl_exact": after(30, 4, 30)}, Conditions(constrained=False)),
    (
        "kl_too_high",
        "act",
        {"objective/kl_exact": after(30, 4, 30)},
        Conditions(constrained=False, learned=True),
    ),
    ("kl_negative", "warn", {"objective/kl": lambda u: -0.5 + 0.2 * (-1) ** u}, Conditions()),
    ("kl_negative", "act", {"objective/kl": lambda u: -3 + (-1) ** u}, Conditions()),
    ("entropy_collapse", "warn", {"policy/entropy_avg": after(30, 0.5, 0.02)}, Conditions()),
    (
        "entropy_collapse",
        "act",
        {"policy/entropy_avg": after(30, 0.5, 0.02), "objective/scores": after(30, 0.5, 0.3)},
        Conditions(),
    ),
    ("teacher_farther", "warn", {"loss/policy_avg": after(30, 0.4, 0.5)}, Conditions(imitates=True)),
    ("teacher_farther", "act", {"loss/policy_avg": after(30, 0.4, 0.9)}, Conditions(imitates=True)),
    ("clip_fraction", "warn", {"policy/clipfrac_avg": after(30, 0.1, 0.35)}, Conditions()),
    ("clip_fraction", "act", {"policy/clipfrac_avg": after(30, 0.1, 0.6)}, Conditions()),
    ("clip_fraction", "note", {"policy/clipfrac_avg": after(30, 0.1, 0.6)}, Conditions(sequence_ratios=True)),
    ("rate_held_back", "warn", {"policy/lr_factor": after(30, 1, 0.2)}, Conditions()),
    ("critic_unexplaining", "note", {"val/explained_variance": after(30, 0.3, -0.2)}, Conditions()),
    ("critic_unexplaining", "warn", {"val/explained_variance": after(30, 0.3, -0.7)}, Conditions()),
    ("critic_unexplaining", "act", {"val/explained_variance": after(30, 0.3, -5)}, Conditions()),
    ("sampler_disagrees", "warn", {"rollout/sampler_drift": lambda u: 0.06}, Conditions()),
    ("sampler_disagrees", "act", {"rollout/sampler_drift": lambda u: 0.3}, Conditions()),
    ("sampler_disagrees", "act", {"rollout/sampler_drift": lambda u: 0.02}, Conditions(same_numbers=True)),
    ("sampler_disagrees", "warn", {"rollout/sampler_drift": lambda u: 2e-3}, Conditions(same_numbers=True)),
    ("sampler_disagrees", "act", {"rollout/sampler_drift": lambda u: 0.11}, Conditions(near_numbers=True)),
    ("sampler_disagrees", "warn", {"rollout/sampler_drift": lambda u: 0.03}, Conditions(near_numbers=True)),
    ("stale_samples", "warn", {"rollout/staleness_kl": after(30, 0.02, 0.15)}, Conditions()),
    ("stale_samples", "act", {"rollout/staleness_kl": after(30, 0.02, 0.6)}, Conditions()),
    ("stale_samples", "warn", {"rollout/importance_capped": after(30, 0.01, 0.15)}, Conditions()),
    ("stale_samples", "act", {"rollout/importance_capped": after(30, 0.01, 0.4)}, Conditions()),
    (
        "reward_implausible",
        "warn",
        {"objective/scores": after(30, 0, 6), "objective/scores_std": lambda u: 1},
        Conditions(),
    ),
    (
        "reward_implausible",
        "act",
        {"objective/scores": after(30, 0, 9), "objective/scores_std": lambda u: 1},
        Conditions(),
    ),
    ("reward_implausible", "act", {"objective/scores": after(30, 0, 0.6)}, Conditions(reward_bound=0.5)),
    (
        "reward_falls",
        "act",
        {"objective/scores": after(30, 0.5, -0.8), "objective/scores_std": lambda u: 1},
        Conditions(),
    ),
    (
        "reward_falls",
        "act",
        {"objective/scores": after(2, 0.1, -2), "objective/scores_std": after(2, 1, 0.1)},
        Conditions(),
    ),
    ("reward_without_spread", "warn", {"objective/scores_std": after(30, 1, 0.05)}, Conditions()),
    ("reward_without_spread", "warn", {"objective/scores_std": after(30, 50, 3)}, Conditions()),
    ("reward_without_spread", "note", {"objective/scores_std": lambda u: 0.05}, Conditions()),
    (
        "nothing_rewarded",
        "act",
        {"rewards/form/std": lambda u: 0.0, "rewards/form/mean": lambda u: 0.0},
        Conditions(),
    ),
    ("length_drift", "note", {"rollout/response_length": after(30, 30, 65)}, Conditions()),
    ("length_drift", "warn", {"rollout/response_length": after(30, 30, 100)}, Conditions()),
    ("length_drift", "warn", {"rollout/response_length": after(30, 30, 8)}, Conditions()),
    ("truncated_rising", "warn", {"rollout/truncated": after(30, 0.02, 0.4)}, Conditions()),
    ("truncated_rising", "act", {"rollout/truncated": after(30, 0.02, 0.97)}, Conditions()),
    ("repetition", "warn", {"rollout/repetition": after(30, 0.05, 0.3)}, Conditions()),
    ("repetition", "act", {"rollout/repetition": after(30, 0.05, 0.7)}, Conditions()),
    (
        "curriculum_spent",
        "note",
        {
            "curriculum/seen": lambda u: 1.0,
            "curriculum/solved": after(30, 0.3, 0.6),
            "curriculum/hopeless": lambda u: 0.35,
        },
        Conditions(),
    ),
    (
        "curriculum_spent",
        "warn",
        {
            "curriculum/seen": lambda u: 0.8,
            "curriculum/solved": lambda u: 0.0,
            "curriculum/hopeless": after(30, 0.3, 0.78),
        },
        Conditions(),
    ),
    ("judge_silent", "note", {"rewards/logged/judge/unanswered": after(30, 0.0, 0.1)}, Conditions()),
    ("judge_silent", "warn", {"rewards/logged/judge/unanswered": after(30, 0.02, 1.0)}, Conditions()),
    ("groups_all_equal", "warn", {"frac_reward_zero_std": after(30, 0.3, 0.9)}, Conditions()),
    ("reward_is_length", "warn", {"rollout/length_correlation": after(30, 0.2, 0.85)}, Conditions()),
    ("reward_is_length", "warn", {"rollout/length_correlation": after(30, 0.2, -0.85)}, Conditions()),
    ("reward_is_length", "note", {"rollout/length_correlation": lambda u: 0.85}, Conditions()),
]


@pytest.mark.parametrize(("check", "severity", "series", "settings"), ILL)
def test_an_ill_run_is_found_with_evidence_cause_and_remedy(check, severity, series, settings):
    findings = found(series, settings)
    assert worst(findings, check) == severity
    finding = next(f for f in findings if f.check == check)
    assert finding.cause
    assert finding.remedy
    assert any(letter.isdigit() for letter in finding.evidence) or check == "not_finite"


@pytest.mark.parametrize("setting", ["rollout.ahead", "rollout.partial"])
def test_stale_samples_have_a_remedy_for_each_setting_that_makes_them(setting):
    findings = found({"rollout/staleness_kl": after(30, 0.02, 0.15)}, Conditions())
    assert setting in next(f for f in findings if f.check == "stale_samples").remedy


# those that fall ill on the way, by something that single batches may show as well
FALLING_ILL = [
    one
    for one in ILL
    if one[0] not in ("not_finite", "kl_negative") and any(v(1) != v(UPDATES) for v in one[2].values())
]


@pytest.mark.parametrize(("check", "severity", "series", "settings"), FALLING_ILL)
def test_two_odd_batches_in_ten_are_noise(check, severity, series, settings):
    def odd(value: Callable[[int], float]) -> Callable[[int], float]:
        return lambda update: value(UPDATES) if update % 10 in (1, 2) else value(1)

    assert worst(found({name: odd(value) for name, value in series.items()}, settings), check) is None


def test_nothing_rewarded_is_first_a_warning_and_ends_with_the_first_reward():
    none = {"rewards/form/std": lambda u: 0.0, "rewards/form/mean": lambda u: 0.0}
    findings = [(f.severity, f.step) for f in found(none) if f.check == "nothing_rewarded"]
    assert findings == [("warn", 10), ("act", 30)]
    late = {name: lambda u: 0.1 if u == 9 else 0.0 for name in none}
    assert worst(found(late), "nothing_rewarded") is None
    one_response_an_update = {"rewards/form/std": lambda u: 0.0, "rewards/form/mean": lambda u: float(u % 2)}
    assert worst(found(one_response_an_update), "nothing_rewarded") is None
    two_rewards = {**none, "rewards/other/std": lambda u: 0.3, "rewards/other/mean": lambda u: 0.5}
    assert worst(found(two_rewards), "nothing_rewarded") is None


def test_a_single_update_that_leaves_everything_behind_is_enough():
    kl = lambda far: {"objective/kl_exact": lambda update: far if update == 2 else 4}  # noqa: E731
    assert worst(found(kl(151), TARGETED), "kl_too_high") == "act"  # 10 × 2.5 × 6
    assert worst(found(kl(149), TARGETED), "kl_too_high") is None


def test_a_student_as_certain_as_its_teacher_is_well_and_no_reward_is_optimised_there():
    """The same series alarms where nobody is imitated."""
    imitates = Conditions(imitates=True)
    certain = {"policy/entropy_avg": after(30, 0.5, 0.02), "policy/teacher_entropy": lambda u: 0.03}
    assert worst(found(certain, imitates), "entropy_collapse") is None
    surer = {**certain, "policy/teacher_entropy": lambda u: 0.2}
    assert worst(found(surer, imitates), "entropy_collapse") == "warn"
    falls = {"objective/scores": after(30, 1.0, -3.0), "objective/scores_std": lambda u: 1.0}
    assert worst(found(falls), "reward_falls") == "act"
    assert worst(found(falls, imitates), "reward_falls") is None
    assert worst(found({"loss/policy_avg": after(30, 0.4, 0.9)}), "teacher_farther") is None
    cut = found({"rollout/truncated": after(30, 0.02, 0.97)}, imitates)
    assert "shaping" not in next(f.remedy for f in cut if f.check == "truncated_rising")


def test_every_check_has_a_series_that_raises_it():
    assert {one[0] for one in ILL} | {"judge_falls"} == set(CHECKS)


def test_the_remedy_of_stale_samples_is_in_the_words_of_either_way_to_have_them():
    found_ones = found({"rollout/staleness_kl": after(30, 0.02, 0.6)})
    remedy = next(f.remedy for f in found_ones if f.check == "stale_samples")
    assert "rollout.ahead: 0" in remedy
    assert "rollout.partial" in remedy


# ---------------------------------------------------------------- what they are relative to


def test_the_first_alarm_comes_after_most_of_a_window_and_once():
    findings = found({"objective/kl_exact": after(30, 4, 30)})
    assert [(f.severity, f.step) for f in findings if f.check == "kl_too_high"] == [("act", 37)]
    worse = found({"objective/kl_exact": lambda u: 4 if u < 20 else 13 if u < 40 else 30})
    assert [(f.severity, f.step) for f in worse if f.check == "kl_too_high"] == [("warn", 27), ("act", 47)]


def test_a_policy_that_runs_away_is_not_waited_for():
    findings = found({"objective/kl_exact": after(30, 4, 100)})
    assert [f.step for f in findings if f.severity == "act"] == [32]


def test_updates_that_train_the_critic_alone_are_left_out():
    hot = {
        "policy/clipfrac_avg": lambda u: 0.9 if u <= 12 else 0.05,
        "val/explained_variance": lambda u: -9 if u <= 30 else 0.5,
    }
    assert worst(found(hot, Conditions(warmup=12)), "clip_fraction") is None
    assert worst(found(hot, Conditions(warmup=12)), "critic_unexplaining") is None
    assert worst(found(hot, Conditions()), "clip_fraction") == "act"
    assert worst(found(hot, Conditions()), "critic_unexplaining") == "act"


def test_long_responses_may_be_further_from_the_reference_where_no_target_is_set():
    far = {"objective/kl_exact": after(30, 4, 40), "rollout/response_length": lambda u: 900}
    assert worst(found(far, Conditions()), "kl_too_high") is None
    assert worst(found(far, Conditions(kl_target=6.0)), "kl_too_high") == "act"


def test_a_solved_task_of_right_and_wrong_is_no_hacking():
    """From 2 % to 99 % right: the batch's deviation is small at both ends, and large on the way."""
    share = lambda u: 0.02 + 0.97 / (1 + math.exp(-(u - 30) / 4))  # noqa: E731
    solved = {
        "objective/scores": share,
        "objective/scores_std": lambda u: math.sqrt(share(u) * (1 - share(u))),
    }
    findings = found({**solved, "policy/entropy_avg": after(40, 0.5, 0.01)}, Conditions(constrained=False))
    assert worst(findings, "reward_implausible") is None
    assert not [f for f in findings if f.severity == "act"]


def test_length_that_the_user_rewards_is_not_pointed_at():
    assert (
        worst(
            found({"rollout/length_correlation": lambda u: 0.9}, Conditions(length_rewarded=True)),
            "reward_is_length",
        )
        is None
    )


# ---------------------------------------------------------------- the judge


def judged(
    judge: Callable[[int], float], proxy: Callable[[int], float], error: float | None = 0.02
) -> str | None:
    rows = [
        {"step": u, "eval/judge": judge(u), "eval/objective/scores": proxy(u)}
        | ({} if error is None else {"eval/judge_error": error})
        for u in range(0, 101, 5)
    ]
    return worst(replay(rows, Conditions())[1], "judge_falls")


def over(update: float) -> float:
    return 0.5 + 0.3 * math.sin(min(update, 90) / 90 * math.pi)  # rises to update 45, then falls


def test_a_judge_that_falls_while_the_proxy_rises_is_found():
    assert judged(over, lambda u: u / 100) == "act"
    assert judged(over, lambda u: u / 100, error=None) == "warn"


def test_a_judge_that_falls_with_the_proxy_or_rises_or_is_unsure_is_not():
    assert judged(over, lambda u: -abs(u - 45)) is None
    assert judged(lambda u: u / 100, lambda u: u / 100) is None
    assert judged(over, lambda u: u / 100, error=0.2) is None


def test_a_judge_that_is_below_what_training_started_from_is_found_at_the_second_evaluation():
    def at(gold: float, proxy: float = 1.0, last: int = 6) -> list[Any]:
        values = {0: (0.42, 0.0), 3: (gold, proxy), 6: (gold, proxy)}
        rows = [
            {"step": u, "eval/judge": v, "eval/judge_error": 0.03, "eval/objective/scores": p}
            for u, (v, p) in values.items()
            if u <= last
        ]
        return replay(rows, Conditions())[1]

    assert worst(at(0.1), "judge_falls") == "act"
    assert "from 0.42 at step 0 to 0.1" in at(0.1)[0].evidence
    assert worst(at(0.28), "judge_falls") == "warn"  # 0.14 is 3.8 errors
    assert at(0.36) == []
    assert at(0.1, proxy=-1.0) == []  # both fall: training fails, it is not fooled
    assert at(0.1, last=3) == []


def test_noise_alone_seldom_makes_a_falling_judge():
    for error in (0.02, None):
        said = []
        for seed in range(200):
            noise = random.Random(seed)
            said.append(judged(lambda u, noise=noise: 0.5 + noise.gauss(0, 0.02), lambda u: u / 100, error))
        assert said.count("act") <= (4 if error else 0)  # without logged errors it never asks to act
        assert said.count("warn") <= (30 if error else 60)


# ---------------------------------------------------------------- from settings


def test_conditions_come_from_a_stages_settings():
    settings: dict[str, Any] = {
        "kl": {"coef": 0.1, "target": 4.0},
        "critic_warmup": 3,
        "level": "sequence",
        "control": {"reward_bound": 2.0},
        "model": {"dtype": "float32"},
        "reward": [{"kind": "learned"}, {"kind": "overlong"}],
    }
    assert conditions(settings) == Conditions(
        kl_target=4.0,
        learned=True,
        warmup=3,
        reward_bound=2.0,
        length_rewarded=True,
        sequence_ratios=True,
        same_numbers=True,
    )
    assert conditions({"model": {"dtype": "auto"}}) == Conditions(near_numbers=True)
    server = {"rollout": {"engine": "vllm", "dtype": None}}
    assert conditions({"model": {"dtype": "auto"}, **server}) == Conditions()
    assert conditions({"model": {"dtype": "float32"}, **server}) == Conditions(near_numbers=True)
    assert conditions({"kl": {"coef": 0.0, "target": None}}) == Conditions(constrained=False)
    assert conditions({}) == Conditions()
