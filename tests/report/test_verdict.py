"""Verdicts on results made by hand."""

from __future__ import annotations

import math

import pytest

from keel.report.verdict import kl_target, verdict

CONFIG = {"stages": {"ppo": {"kind": "ppo", "kl": {"coef": 0.05, "target": 6.0}}, "dpo": {"kind": "dpo"}}}


def m(mean, low, high, n=200):
    return {"mean": mean, "low": low, "high": high, "n": n}


def result(**ppo):
    sft = {"gold": m(0.46, 0.43, 0.49), "proxy": m(0.0, -0.1, 0.1), "kl": m(0.0, 0.0, 0.0)}
    return {"reference": "sft", "models": {"sft": sft, "ppo": {"kl": m(5.2, 4.9, 5.5), **ppo}}}


def only(found):
    assert len(found) == 1
    return found[0]


def test_better_names_reward_interval_kl_and_target():
    one = only(verdict(result(gold=m(0.78, 0.75, 0.81), gold_lift=m(0.32, 0.28, 0.36)), CONFIG))
    assert one.level == "better"
    assert one.text == (
        "Better: gold reward rose from 0.46 to 0.78 (+0.32, 95 % interval 0.28 to 0.36) at KL 5.2 nats "
        "(target 6.0)."
    )
    assert (one.model, one.reference, one.by, one.prompts, one.notes) == ("ppo", "sft", "gold", 200, ())


def test_worse():
    one = only(verdict(result(gold=m(0.31, 0.28, 0.34), gold_lift=m(-0.15, -0.19, -0.11)), CONFIG))
    assert one.level == "worse"
    assert one.text.startswith(
        "Worse: gold reward fell from 0.46 to 0.31 (-0.15, 95 % interval -0.19 to -0.11)"
    )


@pytest.mark.parametrize(("low", "high"), [(-0.03, 0.07), (0.0, 0.04), (-0.04, 0.0), (0.0, 0.0)])
def test_an_interval_that_includes_zero_is_no_clear_change(low, high):
    one = only(verdict(result(gold=m(0.48, 0.45, 0.51), gold_lift=m(0.02, low, high)), CONFIG))
    assert one.level == "unclear"
    assert one.text.startswith("No clear change: gold reward went from 0.46 to 0.48")
    assert "which includes 0" in one.text


def test_an_unknown_interval_is_no_clear_change():
    for missing in (None, math.nan):
        one = only(verdict(result(gold=m(0.9, 0.8, 1.0), gold_lift=m(0.44, missing, missing)), CONFIG))
        assert one.level == "unclear"
        assert "interval unknown" in one.text


def test_gold_decides_even_when_the_proxy_says_the_opposite():
    measured = {"gold": m(0.3, 0.2, 0.4), "gold_lift": m(-0.16, -0.2, -0.1)}
    one = only(verdict(result(**measured, proxy=m(3.0, 2.9, 3.1), proxy_lift=m(3.0, 2.8, 3.2)), CONFIG))
    assert (one.level, one.by) == ("worse", "gold")
    assert any("over-optimised" in note for note in one.notes)


def test_a_proxy_that_rises_without_gold_is_said():
    measured = {"gold": m(0.46, 0.4, 0.5), "gold_lift": m(0.0, -0.1, 0.1)}
    one = only(verdict(result(**measured, proxy=m(3.0, 2.9, 3.1), proxy_lift=m(3.0, 2.8, 3.2)), CONFIG))
    assert any("did not clearly follow" in note for note in one.notes)


def test_kl_above_one_and_a_half_targets_is_said():
    lift = {"gold": m(0.78, 0.75, 0.81), "gold_lift": m(0.32, 0.28, 0.36)}
    within = only(verdict(result(**lift, kl=m(9.0, 8.8, 9.2)), CONFIG))
    above = only(verdict(result(**lift, kl=m(9.1, 8.8, 9.4)), CONFIG))
    assert not within.notes
    assert len(above.notes) == 1
    assert "KL is 1.5 times its target" in above.notes[0]
    assert not only(verdict(result(**lift, kl=m(99.0, 98, 100)), {})).notes  # no target, nothing to exceed


def test_without_gold_the_proxy_judges_and_the_reader_is_warned():
    found = result(proxy=m(1.8, 1.7, 1.9), proxy_lift=m(1.8, 1.6, 2.0))
    del found["models"]["sft"]["gold"]
    one = only(verdict(found, CONFIG))
    assert (one.level, one.by) == ("better", "proxy")
    assert one.text.startswith("Better: proxy reward rose from 0.00 to 1.80")
    assert any("no gold reward was measured" in note and "optimised" in note for note in one.notes)


def test_without_a_paired_lift_the_interval_is_that_of_independent_means():
    # half-widths 0.03 and 0.04 add to 0.05 in quadrature: 0.06 ± 0.05 excludes 0, 0.04 ± 0.05 does not
    for new, level in ((0.52, "better"), (0.50, "unclear")):
        found = result(gold=m(new, new - 0.04, new + 0.04))
        one = only(verdict(found, CONFIG))
        assert one.level == level
        assert any("independent" in note for note in one.notes)
    assert "(+0.04, 95 % interval -0.01 to 0.09" in one.text


def test_an_interval_that_excludes_zero_is_not_rounded_to_it():
    one = only(verdict(result(gold=m(0.464, 0.46, 0.47), gold_lift=m(0.004, 0.002, 0.006)), CONFIG))
    assert one.level == "better"
    assert "95 % interval 0.002 to 0.006" in one.text


def test_one_verdict_a_model_and_none_for_the_reference():
    found = result(gold=m(0.78, 0.75, 0.81), gold_lift=m(0.32, 0.28, 0.36))
    found["models"]["dpo"] = {
        "gold": m(0.2, 0.1, 0.3),
        "gold_lift": m(-0.26, -0.3, -0.2),
        "kl": m(20, 19, 21),
    }
    ppo, dpo = verdict(found, CONFIG)
    assert [(v.model, v.level) for v in (ppo, dpo)] == [("ppo", "better"), ("dpo", "worse")]
    assert "target" not in dpo.text


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "run an evaluate stage"),
        ({"reference": "sft", "models": {"sft": {"gold": m(0.5, 0.4, 0.6)}}}, "only sft was evaluated"),
        ({"reference": "sft", "models": {"sft": {}, "ppo": {"kl": m(1, 1, 1)}}}, "neither gold nor proxy"),
    ],
)
def test_not_judged_says_why(found, words):
    one = only(verdict(found, CONFIG))
    assert one.level == "unjudged"
    assert one.text.startswith("Not judged yet: ")
    assert words in one.text


def test_replies_that_never_end_are_said():
    lift = {"gold": m(0.78, 0.75, 0.81), "gold_lift": m(0.32, 0.28, 0.36)}
    assert only(verdict(result(**lift, truncated=m(0.12, 0.1, 0.14)), CONFIG)).notes == (
        "12 % of replies were cut off by the length limit.",
    )
    assert not only(verdict(result(**lift, truncated=m(0.04, 0.0, 0.08)), CONFIG)).notes


def test_the_target_is_that_of_the_stage_of_the_models_name():
    assert kl_target(CONFIG, "ppo") == 6.0
    assert kl_target(CONFIG, "dpo") is None
    assert kl_target(CONFIG, "some/hub-model") is None
    assert kl_target({"stages": {"ppo": {"kl": {"target": None}}}}, "ppo") is None


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["answer"], ""),
        (["answer", "format"], "Judged by rules alone (answer, format)"),
        (["code", "gym"], "Judged by rules alone (code, gym)"),
        (["learned"], "Judged by the proxy alone"),
        (["answer", "learned"], "Judged by the proxy alone"),
        ([], "Judged by the proxy alone"),
    ],
)
def test_what_a_verdict_by_the_proxy_is_worth_follows_from_the_rewards(kinds, said):
    found = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    lift = {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 100}
    result = {
        "reference": "sft",
        "models": {"sft": {"proxy": found}, "ppo": {"proxy": found, "proxy_lift": lift}},
    }
    judge = {"kind": "evaluate", "models": ["sft", "ppo"], "reward": [{"kind": kind} for kind in kinds]}
    (one,) = verdict(result, {"stages": {"judge": judge}})
    assert [note for note in one.notes if note.startswith("Judged by")][:1] == (
        [] if not said else [one.notes[0]]
    )
    assert one.notes[0].startswith(said) if said else not one.notes
