"""Intervals and tests against exact values and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dts.evaluation.measures import statistics


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_interval_of_a_mean_is_close_to_the_normal_one(method):
    values = np.random.default_rng(0).normal(3, 1, 400)
    found = statistics.bootstrap(statistics.mean, values, method=method)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_same_seed_same_interval():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert statistics.bootstrap(statistics.mean, values, seed=3) == statistics.bootstrap(
        statistics.mean, values, seed=3
    )


def test_columns_are_resampled_together():
    names = np.array(list("abcd"))
    found = statistics.bootstrap(lambda x, y: float(np.mean(x == y)), names, names)
    assert found == (1.0, 1.0, 1.0)  # a broken pairing would fall below 1


def test_clusters_widen_the_interval():
    # 4 subjects with 25 equal values each: the data hold 4 facts, not 100.
    values, subjects = np.repeat([0.0, 1.0, 0.0, 1.0], 25), np.repeat(list("abcd"), 25)
    loose = statistics.bootstrap(statistics.mean, values, clusters=subjects, method="percentile")
    tight = statistics.bootstrap(statistics.mean, values, method="percentile")
    assert loose.high - loose.low > 3 * (tight.high - tight.low)


def test_degenerate_data_give_an_answer():
    assert statistics.bootstrap(statistics.mean, [1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    alone = statistics.bootstrap(statistics.mean, [2.0])
    assert alone.value == 2.0
    assert math.isnan(alone.low)
    with pytest.raises(ValueError, match="one length"):
        statistics.bootstrap(statistics.mean, [])


def test_paired_difference_uses_the_pairs():
    base = np.random.default_rng(1).normal(0, 10, 60)
    found = statistics.paired_difference(base + 1, base)
    assert found.value == pytest.approx(1)
    assert found.low == pytest.approx(1)  # unpaired noise of size 10 cancels
    assert found.high == pytest.approx(1)


def test_sign_flip_equals_enumeration():
    first, second = [3.0, 2.0, 5.0, 1.0, 4.0], [1.0, 2.5, 2.0, 0.0, 1.5]
    differences = np.subtract(first, second)
    sums = [abs((differences * signs).sum()) for signs in itertools.product([1, -1], repeat=5)]
    exact = np.mean([value >= abs(differences.sum()) - 1e-12 for value in sums])
    assert statistics.sign_flip_test(first, second) == pytest.approx(exact)


def test_sign_flip_by_clusters_has_only_as_many_patterns():
    first, second = np.ones(40), np.zeros(40)
    assert statistics.sign_flip_test(first, second) < 0.001
    assert statistics.sign_flip_test(first, second, clusters=np.repeat([1, 2, 3], [10, 10, 20])) == 0.25
    assert statistics.sign_flip_test([1.0], [0.0]) == 1.0
    assert statistics.sign_flip_test([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_holm_is_the_textbook_example():
    adjusted = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert statistics.holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}


def test_wilcoxon_is_scipys_and_exact():
    import scipy.stats

    first, second = np.random.default_rng(2).normal(0.5, 1, (2, 12))
    assert statistics.wilcoxon(first, second) == scipy.stats.wilcoxon(first, second).pvalue
    # All of five differences positive: 2 of the 32 sign patterns are as extreme.
    assert statistics.wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5) == pytest.approx(2 / 32)
    assert statistics.wilcoxon([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_wilcoxon_by_clusters_tests_their_means():
    first = [1.0, 3.0, 3.0, 3.0, 5.0, 5.0]
    assert statistics.wilcoxon(first, [0.0] * 6, clusters="aabbcc") == pytest.approx(2 / 8)


def test_effect_sizes_are_the_textbook_ones():
    first, second = [3.0, 5.0, 4.0, 6.0], [2.0, 3.0, 4.0, 3.0]
    assert statistics.cohens_d(first, second) == pytest.approx(1.5 / math.sqrt((5 / 3 + 2 / 3) / 2))
    assert statistics.cohens_dz(first, second) == pytest.approx(1.5 / np.std([1, 2, 0, 3], ddof=1))
    # With equal variances and correlation r: d_z = d / sqrt(2 (1 - r)).
    a = np.random.default_rng(4).normal(0, 1, 5000)
    b = 0.8 * a + 0.6 * np.random.default_rng(5).normal(0, 1, 5000) + 0.3
    ratio = statistics.cohens_dz(b, a) / statistics.cohens_d(b, a)
    assert ratio == pytest.approx(1 / math.sqrt(0.4), rel=0.05)


def test_effect_sizes_without_spread_are_nan():
    assert math.isnan(statistics.cohens_d([1.0, 1.0], [0.0, 0.0]))
    assert math.isnan(statistics.cohens_dz([1.5, 2.5], [1.0, 2.0]))
    assert math.isnan(statistics.cohens_d([1.0], [0.0]))


def test_bca_interval_is_scipys():
    import scipy.stats

    values = np.random.default_rng(3).exponential(1, 40)
    found = statistics.bootstrap(statistics.mean, values, resamples=999, seed=7)
    expected = scipy.stats.bootstrap(
        (np.arange(40),), lambda rows: values[rows].mean(), n_resamples=999, vectorized=False, method="BCa",
        rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
