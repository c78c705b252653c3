"""What is said of a reward model, against numbers worked out by hand and other people's libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import brier_score_loss, roc_auc_score

from keel.evaluation.measures import accuracy
from keel.evaluation.reward_models import (
    Compared,
    auroc,
    calibration,
    disagreement,
    judge,
    offset,
    pearson,
    ranks,
    with_length,
    with_position,
)


def compared(chosen: Any, rejected: Any, p: Any = None, **more: Any) -> Compared:
    """Pairs of one model on its raw scale, unless `chosen` has a row a member."""
    sides = [np.atleast_2d(np.array(side, dtype=np.float64)) for side in (chosen, rejected)]
    members, n = sides[0].shape
    given: dict[str, Any] = {
        "means": np.zeros(members),
        "stds": np.ones(members),
        "p_chosen": [None] * n if p is None else list(p),
        "votes": [3] * n,
        "prompts": [str(i) for i in range(n)],
        "lengths": np.array([np.arange(n), np.arange(n)[::-1]]),
    }
    return Compared(sides[0], sides[1], **{**given, **more})


def logit(p: Any) -> Any:
    return np.log(np.asarray(p) / (1 - np.asarray(p)))


def turned(one: Compared, rows: Any) -> Compared:
    """The same pairs with the sides of `rows` exchanged."""
    chosen, rejected, lengths = one.chosen.copy(), one.rejected.copy(), one.lengths.copy()
    chosen[:, rows], rejected[:, rows] = one.rejected[:, rows], one.chosen[:, rows]
    lengths[:, rows] = one.lengths[::-1][:, rows]
    swap = set(rows)
    shares = [1 - (1.0 if p is None else p) if i in swap else p for i, p in enumerate(one.p_chosen)]
    first = [None if f is None else not f if i in swap else f for i, f in enumerate(one.chosen_first)]
    return Compared(
        chosen, rejected, one.means, one.stds, shares, one.votes, one.prompts, lengths, one.subsets, first
    )


def drawn(seed: int = 0, n: int = 300, members: int = 3) -> Compared:
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, (2, n))
    votes = rng.integers(1, 6, n)
    p = rng.binomial(votes, 1 / (1 + np.exp(truth[1] - truth[0]))) / votes
    scores = truth[:, None] + rng.normal(0, 0.7, (2, members, n))
    return compared(
        *scores,
        p,
        votes=votes.tolist(),
        means=rng.normal(0, 1, members),
        stds=1 + rng.random(members),
        prompts=[str(i // 2) for i in range(n)],
        lengths=50 + 10 * truth + rng.normal(0, 5, (2, n)),
        subsets=[("easy", "hard", None)[i % 3] for i in range(n)],
        chosen_first=[(True, False, None)[i % 3] for i in range(n)],
    )


def test_accuracy_by_margin_and_by_subset() -> None:
    one = compared(
        [1, 1, -1, 1, 1, -1, 1, 2], [0] * 8, [1.0, 0.75, 0.75, 0.0, 0.5, 1.0, None, 1.0],
        votes=[3, 4, 4, 3, 2, 1, 0, 2], subsets=["b", "b", "a", "a", "c", None, None, "b"],
    )  # fmt: skip
    found = judge(one)
    assert found["accuracy"]["mean"] == pytest.approx(4 / 7)  # the undecided pair does not count
    assert (found["by_margin"]["unanimous"]["mean"], found["by_margin"]["unanimous"]["n"]) == (2 / 3, 3)
    assert (found["by_margin"]["split"]["mean"], found["by_margin"]["split"]["n"]) == (0.5, 2)
    assert {name: (m["mean"], m["n"]) for name, m in found["by_subset"].items()} == {"a": (0, 2), "b": (1, 3)}
    assert found["accuracy"] == accuracy(one.chosen[0].tolist(), one.rejected[0].tolist(), one.p_chosen)


def test_what_does_not_apply_is_absent() -> None:
    found = judge(compared([1.0, 0.0], [0.0, 1.0], votes=[0, 1]))
    assert {"accuracy", "calibration", "length", "offset"} == set(found)
    assert "accuracy" not in judge(compared([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]))


def test_which_side_is_called_chosen_changes_nothing() -> None:
    one = drawn()
    first, second = judge(one), judge(turned(one, list(range(0, 300, 2))))

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b or a == pytest.approx(b, abs=1e-9)

    assert equal(first, second)


def test_calibration_by_hand() -> None:
    # the model is sure of its side with 0.6, 0.6, 0.9, 0.9; of the votes 1, ½, 1, ¼ agree with it
    one = compared(logit([0.6, 0.4, 0.9, 0.1]), [0] * 4, [1.0, 0.5, 1.0, 0.75])
    found = calibration(one, bins=4)
    assert [(b["low"], b["high"]) for b in found["bins"]] == [(0.5, 0.625), (0.875, 1.0)]
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([0.6, 0.9])
    assert [b["share"]["mean"] for b in found["bins"]] == [0.75, 0.625]
    assert found["ece"] == pytest.approx((0.15 + 0.275) / 2)
    assert found["brier"]["mean"] == pytest.approx((0.16 + 0.01 + 0.01 + 0.65**2) / 4)


def test_brier_is_that_of_sklearn_and_a_model_that_says_the_truth_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.98, 20000)
    said = (rng.random(20000) < p).astype(float)
    found = calibration(compared(logit(p), np.zeros(20000), said))
    assert found["ece"] < 0.015
    assert found["brier"]["mean"] == pytest.approx(brier_score_loss(said, p))
    sure = calibration(compared(3 * logit(p), np.zeros(20000), said))
    assert sure["ece"] > 0.1
    assert len(found["bins"]) == 10
    assert all(b["share"]["low"] <= b["confidence"] <= b["share"]["high"] for b in found["bins"][2:7:2])


def test_calibration_is_of_the_raw_scores_which_bradley_terry_gave_a_meaning() -> None:
    one = compared(logit([0.8, 0.8]), [0.0, 0.0], means=np.array([5.0]), stds=np.array([4.0]))
    assert calibration(one)["bins"][0]["confidence"] == pytest.approx(0.8)


def test_correlations_are_those_of_scipy() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 6, 50).astype(float)  # with ties
    y = x + rng.normal(0, 2, 50)
    assert pearson(x, y) == pytest.approx(pearsonr(x, y)[0])
    assert pearson(ranks(x), ranks(y)) == pytest.approx(spearmanr(x, y)[0])
    assert pearson(x, np.ones(50)) is None


def test_correlation_with_length_tells_bias_from_desert() -> None:
    rng = np.random.default_rng(2)
    truth, lengths = rng.normal(0, 1, (2, 400)), rng.normal(100, 20, (2, 400))
    votes = (truth[0] > truth[1]).astype(float)
    for weight in (0.0, 0.05):
        scores = truth + weight * lengths
        found = with_length(compared(*scores, votes, lengths=lengths))
        assert found["replies"]["pearson"] == pytest.approx(
            pearsonr(scores.reshape(-1), lengths.reshape(-1))[0]
        )
        assert abs(found["votes"]["spearman"]) < 0.1
        assert (found["pairs"]["spearman"] > 0.5) == (weight > 0)
    differences = scores[0] - scores[1], lengths[0] - lengths[1]
    both = [np.concatenate([d, -d]) for d in differences]
    assert found["pairs"]["spearman"] == pytest.approx(spearmanr(*both)[0])


def test_preference_for_what_stood_first() -> None:
    one = compared(
        [1, 1, -1, 1, 1], [0] * 5, [1.0, 0.75, 0.0, 1.0, 1.0], chosen_first=[True, True, False, False, None]
    )
    found = with_position(one)
    assert (found["reward"]["first"]["mean"], found["reward"]["first"]["n"]) == (0.75, 4)  # 1, 1, 1, 0
    assert found["votes"]["first"]["mean"] == pytest.approx((1 + 0.75 + 1 + 0) / 4)
    preferred = [1, 1, 1, 0, 0, 0, 0, 1]
    assert found["reward"]["pearson"] == pytest.approx(pearsonr(preferred, [1] * 4 + [0] * 4)[0])
    assert found["reward"]["spearman"] == pytest.approx(found["reward"]["pearson"])


def test_auroc_is_that_of_sklearn() -> None:
    rng = np.random.default_rng(3)
    signal, positive = rng.integers(0, 5, 80).astype(float), rng.random(80) < 0.4
    assert auroc(signal, positive) == pytest.approx(roc_auc_score(positive, signal))
    assert auroc(signal, np.ones(80, dtype=bool)) is None


def test_disagreement_points_at_errors_where_members_disagree_there() -> None:
    """Two members on scales of their own; they differ on pairs 2 and 3, and the ensemble is wrong on 2."""
    chosen = [[2.0, 2.0, 1.0, 3.0, 0.0], [20.0, 20.0, -40.0, 10.0, 0.0]]
    one = compared(chosen, np.zeros((2, 5)), [1.0, 1.0, 1.0, 1.0, 1.0], stds=np.array([1.0, 10.0]))
    found = disagreement(one)  # std: 0, 0, 2.5, 1; the last pair is a tie and does not count
    assert found["auroc"] == 1.0
    assert found["std_wrong"]["mean"] == 2.5
    assert found["std_right"]["mean"] == pytest.approx(1 / 3)
    flat = disagreement(
        compared(chosen, np.zeros((2, 5)), [1.0, 1.0, 0.0, 0.5, 1.0], stds=np.array([1.0, 10.0]))
    )
    assert flat["auroc"] is None
    assert "std_wrong" not in flat
    assert "disagreement" not in judge(compared([1.0], [0.0]))


def test_offset_finds_the_variances_it_was_made_of() -> None:
    rng = np.random.default_rng(4)
    for between in (0.0, 4.0):
        prompts = rng.integers(0, 600, 1500)
        offsets = rng.normal(0, np.sqrt(between), 600)[prompts]
        chosen, rejected = (offsets + rng.normal(0, 1.5, 1500) for _ in range(2))
        found = offset(chosen, rejected, [str(p) for p in prompts])
        assert found["within"] == pytest.approx(2.25, rel=0.1)
        assert found["between"] == pytest.approx(between, rel=0.2, abs=0.1)
        assert found["share"] == pytest.approx(between / (between + 2.25), abs=0.05)


def test_offset_by_hand_and_of_one_prompt() -> None:
    found = offset(np.array([3.0, 8.0]), np.array([1.0, 6.0]), ["p", "q"])  # means 2 and 7, spreads of ±1
    assert found == {
        "within": 2.0,
        "between": pytest.approx((25 - 2) / 2),
        "share": pytest.approx(11.5 / 13.5),
    }
    assert offset(np.array([3.0, 8.0]), np.array([1.0, 6.0]), ["p", "p"])["share"] is None


def test_a_constant_for_each_prompt_moves_the_offset_and_nothing_within_pairs() -> None:
    one = drawn()
    constant = 5 * np.random.default_rng(5).normal(0, 1, 150)[np.array([int(p) for p in one.prompts])]
    moved = Compared(
        one.chosen + constant,
        one.rejected + constant,
        one.means,
        one.stds,
        one.p_chosen,
        one.votes,
        one.prompts,
        one.lengths,
        one.subsets,
        one.chosen_first,
    )
    before, after = judge(one), judge(moved)
    assert after["offset"]["share"] > 0.5 > before["offset"]["share"]
    assert after["offset"]["within"] == pytest.approx(before["offset"]["within"], rel=1e-6)
    assert after["calibration"]["ece"] == pytest.approx(before["calibration"]["ece"])
    assert after["disagreement"]["auroc"] == pytest.approx(before["disagreement"]["auroc"])
    assert after["accuracy"] == before["accuracy"]
