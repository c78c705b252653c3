"""Every interval holds what it promises: it covers the truth in 92–98 of 100 draws, and it is what its
docstring says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from keel.evaluation.measures import Measure, accuracy, across_runs, mean_interval, points_share, wilson
from keel.evaluation.policies import JudgedCompletion, measures

Draw = Callable[[np.random.Generator], Measure]
DRAWS = 1000


def covered(truth: float, draw: Draw, seed: int = 0) -> float:
    """The share of DRAWS intervals that hold `truth`."""
    rng = np.random.default_rng(seed)
    return sum(one["low"] <= truth <= one["high"] for one in (draw(rng) for _ in range(DRAWS))) / DRAWS


def points(rng: np.random.Generator, n: int, win: float, draw: float) -> list[float]:
    return rng.choice([1.0, 0.5, 0.0], n, p=[win, draw, 1 - win - draw]).tolist()


def lift(rng: np.random.Generator) -> Measure:
    """A paired difference whose two sides share their prompt, as `measures` makes it: the truth is 0.3."""
    prompts = rng.normal(0, 3, 60)

    def judged(rewards: Any) -> list[JudgedCompletion]:
        return [JudgedCompletion("a", 0.0, 1, "eos", gold={"total": float(reward)}) for reward in rewards]

    before, after = prompts + rng.normal(0, 1, 60), prompts + 0.3 + rng.normal(0, 1, 60)
    return measures(judged(after), judged(before))["gold_lift"]


def won(rng: np.random.Generator) -> Measure:
    """A win rate with many draws, as `measures` makes it: the truth is 0.4 + 0.4/2."""
    steps = points(rng, 80, 0.4, 0.4)
    before = [JudgedCompletion("a", 0.0, 1, "eos", proxy=0.5) for _ in steps]
    return measures([JudgedCompletion("a", 0.0, 1, "eos", proxy=step) for step in steps], before)["win_rate"]


def ranked(rng: np.random.Generator) -> Measure:
    """Accuracy on pairs of which some are undecided and some scored alike: 0.6 + 0.2/2 of those that
    count."""
    hits = points(rng, 150, 0.6, 0.2)
    shares = rng.choice([0.0, 0.3, 0.5, 0.8, 1.0], 150).tolist()
    chosen = [(2 * hit - 1) * (1 if p > 0.5 else -1) for hit, p in zip(hits, shares)]
    return accuracy(chosen, [0.0] * 150, shares)


INTERVALS: dict[str, tuple[float, Draw]] = {
    "mean, normal": (2.0, lambda rng: mean_interval(rng.normal(2, 3, 40).tolist())),
    "mean, skewed": (1.0, lambda rng: mean_interval(rng.exponential(1, 200).tolist())),
    "mean, two values": (0.3, lambda rng: mean_interval((rng.random(250) < 0.3).astype(float).tolist())),
    "across runs, 2": (0.5, lambda rng: across_runs(rng.normal(0.5, 0.1, 2).tolist())),
    "across runs, 3": (0.5, lambda rng: across_runs(rng.normal(0.5, 0.1, 3).tolist())),
    "across runs, 10": (0.5, lambda rng: across_runs(rng.normal(0.5, 0.1, 10).tolist())),
    "wilson, even": (0.5, lambda rng: wilson(rng.binomial(100, 0.5), 100)),
    "wilson, few": (0.4, lambda rng: wilson(rng.binomial(15, 0.4), 15)),
    "wilson, rare": (0.05, lambda rng: wilson(rng.binomial(120, 0.05), 120)),
    "wilson, frequent": (0.93, lambda rng: wilson(rng.binomial(256, 0.93), 256)),
    "points, no draws": (0.7, lambda rng: points_share(points(rng, 90, 0.7, 0.0))),
    "points, some draws": (0.6, lambda rng: points_share(points(rng, 90, 0.5, 0.2))),
    "points, mostly draws": (0.55, lambda rng: points_share(points(rng, 200, 0.25, 0.6))),
    "accuracy": (0.7, ranked),
    "paired difference": (0.3, lift),
    "win rate": (0.6, won),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_a_95_percent_interval_covers_in_95_of_100_draws(name: str) -> None:
    assert 0.92 <= covered(*INTERVALS[name]) <= 0.98


def test_every_interval_function_is_among_them() -> None:
    from keel.evaluation import measures as module

    made = {
        name
        for name, f in vars(module).items()
        if getattr(f, "__annotations__", {}).get("return") == "Measure"
    }
    assert made == {"mean_interval", "across_runs", "wilson", "points_share", "accuracy"}


def test_wilson_is_that_of_scipy() -> None:
    for successes, n in ((0, 10), (3, 10), (255, 256), (7, 7)):
        other = binomtest(successes, n).proportion_ci(0.95, "wilson")
        found = wilson(successes, n)
        assert (found["low"], found["high"]) == pytest.approx((other.low, other.high), abs=1e-9)


def test_points_without_draws_are_wilsons_and_draws_make_the_interval_narrower() -> None:
    assert points_share([1.0, 0.0, 1.0]) == wilson(2, 3)
    drawn, decided = points_share([0.5] * 40 + [1.0, 0.0] * 10), points_share([1.0, 0.0] * 30)
    assert (drawn["mean"], drawn["n"]) == (0.5, 60)
    assert drawn["high"] - drawn["low"] < 0.8 * (decided["high"] - decided["low"])
    alone = points_share([0.5] * 12)  # draws alone do not make it certain
    assert alone["low"] < 0.45
    assert alone["high"] > 0.55


def test_points_outside_of_0_to_1_and_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        points_share([0.5, 1.5])
    with pytest.raises(ValueError, match="no trials"):
        points_share([])
