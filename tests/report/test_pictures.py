"""Figures: what is drawn from which numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from keel.pipeline.stage_kinds import OWN_KINDS
from keel.report import pictures
from keel.report.reading import StageRun


def stage(kind, metrics, **settings):
    return StageRun("one", kind, "done", Path("nowhere"), {"kind": kind, **settings}, (), {}, {}, metrics)


def by_title(found):
    return {picture.title: picture for picture in found}


def test_training_and_held_out_loss_share_a_picture():
    metrics = {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)], "eval_loss": [(3, 1.5)]}
    (loss,) = pictures.curves(stage("sft", metrics))
    training, held_out = loss.figure["data"]
    assert (training["x"], training["y"]) == ([1, 2, 3], [3.0, 2.0, 1.0])
    assert (held_out["x"], held_out["y"]) == ([3], [1.5])


def test_the_kl_picture_draws_the_target():
    kl = {"objective/kl": [(1, 0.0), (2, 1.0)]}
    drawn = by_title(pictures.curves(stage("ppo", kl, kl={"target": 6.0})))["KL from the reference"]
    (line,) = drawn.figure["layout"]["shapes"]
    assert (line["y0"], line["y1"]) == (6.0, 6.0)
    low, high = drawn.figure["layout"]["yaxis"]["range"]
    assert low < 0 < 6 < high  # the line is in sight
    assert [key.label for key in drawn.keys] == ["target 6"]
    without = by_title(pictures.curves(stage("ppo", kl)))["KL from the reference"]
    assert "shapes" not in without.figure["layout"]


def test_a_coefficient_that_never_changes_has_no_axis_far_below_it():
    fixed = {"objective/kl_coef": [(1, 0.1), (2, 0.1), (3, None)]}
    drawn = by_title(pictures.curves(stage("ppo", fixed, kl={"coef": 0.1})))["KL coefficient"]
    low, high = drawn.figure["layout"]["yaxis"]["range"]
    assert (low, high) == pytest.approx((0.0, 0.2))


def test_a_value_that_is_not_finite_leaves_a_gap_and_valid_json():
    (loss,) = pictures.curves(stage("sft", {"loss": [(1, 3.0), (2, None), (3, 1.0)]}))
    assert loss.figure["data"][0]["y"] == [3.0, None, 1.0]
    json.dumps(loss.figure, allow_nan=False)


@pytest.mark.parametrize(
    ("kind", "metrics", "settings", "titles"),
    [
        (
            "dpo",
            ["loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "epoch"],
            {},
            ["Margin", "Accuracy", "Loss", "Log-probability of the chosen"],
        ),
        ("dpo", ["loss", "kl"], {"loss": "kto"}, ["Loss", "KL from the reference"]),
        (
            "dpo",
            ["nll_loss", "log_odds_ratio"],
            {"loss": "orpo"},
            ["Loss of the chosen", "Log odds"],
        ),
        (
            "grpo",
            [
                "objective/scores",
                "objective/scores_sampled",
                "rollout/groups_replaced",
                "frac_reward_zero_std",
            ],
            {"resample": 0},
            ["Score", "Groups of equal rewards"],
        ),
        (
            "grpo",
            ["objective/scores", "objective/scores_sampled", "rollout/groups_replaced"],
            {"resample": 3},
            ["Score", "Groups replaced", "Score as first sampled"],
        ),
        ("best_of_n", ["loss", "mean_token_accuracy", "epoch"], {}, ["Loss", "Token accuracy"]),
        ("classifier", ["accuracy", "loss"], {}, ["Loss", "Accuracy"]),
    ],
)
def test_each_kind_of_stage_shows_what_matters_of_it(kind, metrics, settings, titles):
    logged = {name: [(1, 0.5), (2, 0.7)] for name in metrics}
    assert [picture.title for picture in pictures.curves(stage(kind, logged, **settings))] == titles


def test_every_metric_that_is_drawn_is_one_that_is_logged():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    curves = [curve for kind in OWN_KINDS.values() for curve in kind.curves]
    drawn = {name for curve in curves for name in (curve.metric, curve.held_out) if name}
    assert [name for name in sorted(drawn) if f"| `{name}` |" not in page] == []
    assert all(bool(kind.curves) == kind.has_steps for kind in OWN_KINDS.values())


def test_the_chosen_responses_are_drawn_against_the_mean_of_all(tmp_path):
    rows = [{"mean": 0.1, "reward": 0.9}, {"mean": 0.4, "reward": 0.4}]
    (tmp_path / "best.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = replace(stage("best_of_n", {"loss": [(1, 1.0)]}, min_reward=0.5), directory=tmp_path)
    drawn, loss = pictures.curves(best)
    (dots,) = drawn.figure["data"]
    assert (dots["x"], dots["y"]) == ([0.1, 0.4], [0.9, 0.4])
    diagonal, least = drawn.figure["layout"]["shapes"]
    assert [diagonal[end] for end in ("x0", "y0", "x1", "y1")] == [0.1, 0.1, 0.4, 0.4]
    assert (least["y0"], least["y1"]) == (0.5, 0.5)
    assert [key.label for key in drawn.keys] == ["a prompt", "the mean itself", "kept from 0.50"]
    assert loss.title == "Loss"


def test_a_stage_of_unknown_kind_shows_what_it_logged():
    assert [p.title for p in pictures.curves(stage("new", {"a": [(1, 1.0)], "b": [(1, 2.0)]}))] == ["a", "b"]


def test_running_mean_is_centred_and_skips_what_is_missing():
    points = [(1, 1.0), (2, 4.0), (3, None), (4, 10.0)]
    assert pictures.running_mean(points, 3) == [(1, 2.5), (2, 2.5), (3, 7.0), (4, 10.0)]
    assert pictures.running_mean([], 3) == []
    assert len(pictures.running_mean([(i, 1.0) for i in range(100_000)], 5)) <= pictures.MOST_POINTS + 1


def test_thinning_keeps_spikes_and_order():
    points = [(i, 0.0) for i in range(10_000)]
    points[5001] = (5001, 99.0)
    points[7003] = (7003, -99.0)
    kept = pictures.thin(points, 600)
    assert len(kept) <= 600
    assert (5001, 99.0) in kept
    assert (7003, -99.0) in kept
    assert kept == sorted(kept)
    assert pictures.thin(points[:10], 600) == points[:10]


def test_points_carry_their_intervals_and_the_reference_sits_at_kl_zero():
    def m(mean, low, high):
        return {"mean": mean, "low": low, "high": high, "n": 9}

    models = {
        "sft": {"gold": m(0.4, 0.3, 0.5), "proxy": m(0.0, -1.0, 1.0)},
        "ppo": {"gold": m(0.8, 0.7, 0.85), "proxy": m(2.0, 1.0, 3.0), "kl": m(5.0, 4.0, 6.0)},
    }
    config = {"stages": {"ppo": {"kl": {"target": 6.0}}}}
    proxy, kl = pictures.judgement("judge", {"reference": "sft", "models": models}, config)
    ppo = proxy.figure["data"][1]
    assert (ppo["x"], ppo["y"]) == ([2.0], [0.8])
    assert [round(ppo["error_y"][side][0], 6) for side in ("arrayminus", "array")] == [0.1, 0.05]
    assert [trace["x"] for trace in kl.figure["data"]] == [[0.0], [5.0]]
    assert kl.figure["layout"]["shapes"][0]["x0"] == 6.0


def test_without_gold_the_proxy_is_drawn_against_kl():
    models = {"a": {"proxy": {"mean": 0.0}}, "b": {"proxy": {"mean": 1.0}, "kl": {"mean": 2.0}}}
    (kl,) = pictures.judgement("judge", {"reference": "a", "models": models}, {})
    assert kl.title == "Proxy reward against KL"


def test_labels_cannot_become_markup():
    assert pictures.plain("<b>%{x}") == "&lt;b&gt;% {x}"


def test_trajectory_pairs_score_and_kl_of_the_same_update():
    metrics = {
        "objective/kl": [(1, 0.0), (2, 1.0), (3, None), (4, 3.0)],
        "objective/scores": [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0), (5, 50.0)],
    }
    drawn = pictures.trajectories([stage("ppo", metrics)], {})
    assert drawn is not None
    assert (drawn.figure["data"][0]["x"], drawn.figure["data"][0]["y"]) == (
        [0.0, 1.0, 3.0],
        [10.0, 20.0, 40.0],
    )
    assert pictures.trajectories([stage("ppo", {})], {}) is None
