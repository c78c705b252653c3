"""The two laws of over-optimisation, against hand-made curves; peaks and ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keel.evaluation.measures import mean_interval
from keel.evaluation.overoptimization import course, fit, spread


def test_points_on_the_law_of_best_of_n_give_its_coefficients():
    # d(0.5 − 0.1 d): 0.4 at 1, 0.6 at 2, 0.6 at 3
    found = fit("best_of_n", [1, 2, 3], [0.4, 0.6, 0.6])
    assert (found.alpha, found.beta, found.r2, found.n) == pytest.approx((0.5, 0.1, 1.0, 3))
    assert found.peak == pytest.approx(2.5)
    assert found.at(2.5) == pytest.approx(0.625)


def test_points_on_the_law_of_rl_give_its_coefficients():
    # d(0.3 − 0.2 log d): 0.3 at 1, e·0.1 at e, e²·(−0.1) at e²
    e = math.e
    found = fit("rl", [1, e, e * e], [0.3, 0.1 * e, -0.1 * e * e])
    assert (found.alpha, found.beta, found.r2) == pytest.approx((0.3, 0.2, 1.0))
    assert found.peak == pytest.approx(math.exp(0.5))  # d/dd = α − β − β log d


def test_the_peak_is_where_the_law_is_highest():
    for law in ("best_of_n", "rl"):
        found = fit(law, [0.5, 1, 2, 4], [0.2, 0.35, 0.5, 0.3])
        grid = np.linspace(0.01, 6, 6000)
        best = grid[np.argmax([found.at(d) for d in grid])]
        assert found.peak == pytest.approx(best, abs=2e-3)


def test_noisy_points_are_fitted_as_numpys_least_squares_do():
    random = np.random.default_rng(0)
    d = np.sqrt(random.uniform(0, 9, 40))
    y = d * (0.4 - 0.1 * d) + random.normal(0, 0.05, 40)
    for law, bend in (("best_of_n", d), ("rl", np.log(d))):
        expected, residual, *_ = np.linalg.lstsq(np.stack([d, -d * bend], 1), y, rcond=None)
        found = fit(law, d.tolist(), y.tolist())
        assert [found.alpha, found.beta] == pytest.approx(expected.tolist())
        assert found.r2 == pytest.approx(1 - residual[0] / ((y - y.mean()) ** 2).sum())


def test_the_start_is_on_every_curve_and_moves_no_coefficient():
    one, other = fit("rl", [1, 2, 3], [0.3, 0.4, 0.2]), fit("rl", [0, 1, 2, 3], [0, 0.3, 0.4, 0.2])
    assert (one.alpha, one.beta) == pytest.approx((other.alpha, other.beta))
    assert one.at(0) == 0


def test_a_curve_that_only_rises_has_no_peak():
    assert fit("best_of_n", [1, 2, 3], [0.1, 0.4, 0.9]).peak is None
    assert fit("rl", [1, 2, 3], [0.1, 0.4, 0.9]).peak is None
    assert fit("best_of_n", [1, 2], [0.0, 0.0]).r2 is None


@pytest.mark.parametrize(
    ("d", "gold"),
    [([1, 1, 0], [1, 1, 0]), ([1, -2], [0, 0]), ([1, 2], [0, math.nan]), ([1, 2], [0])],
)
def test_what_leaves_a_curve_open_is_refused(d, gold):
    with pytest.raises(ValueError, match="distance"):
        fit("best_of_n", d, gold)


def test_a_course_is_of_windows_not_of_single_values():
    found = course([0.0, 0.9, 0.0, 0.6, 0.6, 0.6, 0.1, 0.2, 0.3])
    assert (found.at, found.peak, found.end) == (4, pytest.approx(0.6), pytest.approx(0.2))
    assert found.fall == pytest.approx(0.4)
    assert course([0.1, 0.2]).fall == 0
    assert course([1.0, 2.0, 3.0, 4.0]).fall == 0
    with pytest.raises(ValueError, match="no values"):
        course([])


def test_the_spread_behind_an_interval():
    values = [0.0, 1.0, 5.0, 2.0]
    found = mean_interval(values)
    assert spread(found) == pytest.approx(np.std(values, ddof=1))
