"""What a history lets one expect, spectra, and the weighted median, against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dts.evaluation.measures.forecasting import Spectrum, expect, weighted_median, weighted_vote

WAVE = 100 + 20 * np.sin(np.arange(240) * np.pi / 12)  # ten seasons of 24


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 5)), min_size=1, max_size=12))
def test_weighted_median_equals_the_median_of_repeated_values(pairs):
    values, weights = np.array([[value] for value, _ in pairs], float), [weight for _, weight in pairs]
    repeated = [value for value, weight in pairs for _ in range(weight)]
    (found,) = weighted_median(values, weights)
    if repeated:
        assert found == np.median(repeated)
        assert weighted_median(values, np.array(weights) / 7)[0] == found  # only ratios of weights matter
    else:
        assert math.isnan(found)


def test_weighted_median_of_missing_steps():
    values = np.array([[1, np.nan, np.nan], [5, 6, np.nan], [9, 8, np.nan]])
    np.testing.assert_array_equal(weighted_median(values, [1, 1, 3]), [9, 8, np.nan])
    np.testing.assert_array_equal(weighted_median(values, [1, 1, 0]), [3, 6, np.nan])
    for bad in ([1, 1], [1, -1, 1], [1, np.inf, 1]):
        with pytest.raises(ValueError, match="weights"):
            weighted_median(values, bad)


def test_weighted_vote():
    assert weighted_vote(["a", "b", "b", None], [0.5, 0.3, 0.3, 9.0]) == "b"
    assert weighted_vote(["a", "b"], [1.0, 1.0]) == "a"
    assert weighted_vote([None, "a"], [1.0, 0.0]) is None


def test_a_pure_season_is_expected_to_go_on():
    ahead = 100 + 20 * np.sin(np.arange(240, 288) * np.pi / 12)
    found = expect(WAVE, 24, 48)
    np.testing.assert_allclose(found.centre, ahead, atol=0.2)
    assert (found.band > 0).all() and found.band.max() < 0.5


def test_expectations_weigh_rules_by_their_past():
    walk = np.cumsum(np.random.default_rng(1).normal(size=300)) + 50
    found = expect(walk, 1, 6)
    assert np.abs(found.centre - walk[-1]).max() < 3  # a random walk stays near its last value
    assert found.band[-1] > 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=60),
    st.sampled_from([1, 4, 12, 24]),
    st.integers(1, 12),
)
def test_expectations_exist_for_any_history(values, season, steps):
    found = expect(np.array(values), season, steps)
    assert found.centre.shape == found.band.shape == (steps,)
    assert np.isfinite(found.centre).all() and (found.band > 0).all()
    overlap = Spectrum(np.array(values), season, steps).overlap(np.array([values[-1]] * steps))
    assert 0 <= overlap <= 1 + 1e-9


def test_expectations_read_nothing_but_the_history():
    before = expect(WAVE[:200], 24, 10)
    changed = np.concatenate([WAVE[:200], np.full(40, 1e6)])
    np.testing.assert_array_equal(expect(changed[:200], 24, 10).centre, before.centre)


def test_spectra_tell_shape_and_scale():
    spectrum = Spectrum(WAVE[:192], 24, 48)
    ahead = WAVE[192:]
    mean = ahead.mean()
    same = spectrum.overlap(ahead)
    assert same == pytest.approx(1.0, abs=1e-6)
    flat, double = spectrum.overlap(np.full(48, mean)), spectrum.overlap(mean + 2 * (ahead - mean))
    faster = spectrum.overlap(mean + 20 * np.sin(np.arange(48) * np.pi / 3))
    assert flat < 0.85 and double < 0.95 and faster < 0.9
    assert Spectrum(np.full(50, 3.0), 12, 6).overlap(np.full(6, 3.0)) == 1.0
