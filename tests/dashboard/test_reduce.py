"""Few points that show what many would: no spike is lost, wherever it stands."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.dashboard.reduce import Points, as_json, band, extremes, means, within


def points(values: list[float] | np.ndarray) -> Points:
    return Points(np.arange(len(values)), np.asarray(values, float))


@pytest.mark.parametrize("at", [0, 1, 499_999, 654_321, 999_999])
@pytest.mark.parametrize("height", [50.0, -50.0])
def test_a_spike_of_one_point_in_a_million_stays(at, height):
    values = np.sin(np.arange(1_000_000) / 5000)
    values[at] = height
    few = extremes(points(values), 1200)
    assert len(few.steps) <= 1200
    assert few.values[few.steps == at].tolist() == [height]
    assert (np.diff(few.steps) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300), st.integers(5, 60))
def test_every_piece_keeps_its_extremes(values, most):
    few = extremes(points(values), most)
    whole = np.asarray(values)
    assert len(few.steps) <= max(most, 5)
    np.testing.assert_array_equal(few.values, whole[few.steps])
    assert {few.steps[0], few.steps[-1]} == {0, len(values) - 1}
    if np.isfinite(whole).any():
        assert np.nanmin(few.values) == np.nanmin(whole)
        assert np.nanmax(few.values) == np.nanmax(whole)
    if np.isnan(whole).any():
        assert np.isnan(few.values).any()  # a gap is seen


def test_a_spike_is_found_again_where_one_looks_closer():
    values = np.zeros(1_000_000)
    values[[500_000, 500_003]] = 3.0, -3.0
    near = within(points(values), 499_900, 500_100)
    assert near.steps[0] == 499_899
    assert near.steps[-1] == 500_101
    assert extremes(near, 1200) is near  # every single point


def test_what_is_left_out_comes_with_its_means():
    steps, values, middle, mean = as_json(points([1.0, 3.0] * 5000), 100)
    assert len(steps) == len(values) <= 100
    assert set(mean) == {2.0}
    assert len(middle) == 100
    assert as_json(points([1.0, float("nan")]), 100) == [[0, 1], [1.0, None]]


def test_means_know_of_gaps():
    found = means(points([1.0, float("nan"), float("nan"), float("nan")]), 2)
    np.testing.assert_array_equal(found.values, [1.0, np.nan])


def test_a_band_is_median_and_range():
    seeds = [points([0.0, 1.0, 2.0]), points([1.0, 2.0, 9.0]), points([2.0, 6.0])]
    found = band(seeds, 100)
    assert found.steps.tolist() == [0, 1, 2]
    assert found.middle.tolist() == [1.0, 2.0, 5.5]
    assert found.low.tolist() == [0.0, 1.0, 2.0]
    assert found.high.tolist() == [2.0, 6.0, 9.0]
    assert found.runs.tolist() == [3, 3, 2]


def test_a_band_keeps_the_spike_of_one_seed():
    quiet, loud = np.zeros(100_000), np.zeros(100_000)
    loud[77_777] = 5.0
    found = band([points(quiet), points(quiet), points(loud)], 400)
    assert len(found.steps) == 400
    assert found.high.max() == 5.0
    assert found.middle.max() == 0.0


def test_bands_of_nothing():
    assert len(band([], 100).steps) == 0
    assert len(band([points([float("nan")])], 100).steps) == 0


def test_what_is_beyond_any_number_is_a_gap():
    few = as_json(points([1e308] * 1000), 10)
    assert None in few[3]  # the mean of a piece
    json.dumps(few, allow_nan=False)
