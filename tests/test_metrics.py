"""Metrics against exact numbers, published ones and brute force."""

from __future__ import annotations

import csv
import gzip
import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from fakes import grow_path

from dts.evaluation.data import read_m4_csv
from dts.evaluation.measures import metrics
from dts.results import Rollout
from dts.tree import ROOT, Tree

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "m4_subset.csv.gz").is_file(), reason="needs ../shared/data")

DEV_TABLE = {  # of the data's own README: sMAPE, MASE, OWA
    ("Hourly", "Naive"): (44.679, 11.618, 3.4188),
    ("Hourly", "sNaive"): (14.414, 1.192, 0.6016),
    ("Hourly", "SES"): (19.273, 2.535, 0.9890),
    ("Hourly", "Naive2"): (19.600, 2.549, 1.0000),
    ("Weekly", "Naive"): (9.599, 2.681, 1.0000),
    ("Weekly", "sNaive"): (9.599, 2.681, 1.0000),
    ("Weekly", "SES"): (9.482, 2.595, 0.9780),
    ("Weekly", "Naive2"): (9.599, 2.681, 1.0000),
}


@pytest.fixture(scope="module")
def m4():
    series = {one.id: one for one in read_m4_csv(SHARED / "m4_subset.csv.gz")}
    forecasts = defaultdict(dict)
    with gzip.open(SHARED / "m4_reference_forecasts.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            forecasts[row["id"]][row["method"]] = np.array(row["forecast"].split(), float)
    return series, forecasts


def _means(m4, frequency, method):
    series, forecasts = m4
    chosen = [one for one in series.values() if one.frequency == frequency]
    smape = np.mean([metrics.smape(one.future, forecasts[one.id][method]) for one in chosen])
    mase = np.mean([metrics.mase(one.future, forecasts[one.id][method], one.history, one.season) for one in chosen])
    return smape, mase


@needs_shared
@pytest.mark.parametrize(("frequency", "method"), DEV_TABLE)
def test_reference_forecasts_give_the_dev_table(m4, frequency, method):
    smape, mase = _means(m4, frequency, method)
    owa = metrics.owa(smape, mase, *_means(m4, frequency, "Naive2"))
    assert (round(smape, 3), round(mase, 3), round(owa, 4)) == DEV_TABLE[frequency, method]


@needs_shared
def test_own_baselines_equal_the_organisers(m4):
    series, forecasts = m4
    for one in series.values():
        if one.frequency not in ("Hourly", "Weekly", "Monthly", "Quarterly", "Yearly"):
            continue  # for Daily D160 the organisers' own naive forecast is not the last training value of the file
        official = forecasts[one.id]
        np.testing.assert_allclose(metrics.naive2(one.history, one.horizon, one.season), official["Naive2"], rtol=1e-8)
        np.testing.assert_allclose(metrics.naive(one.history, one.horizon), official["Naive"], rtol=1e-8)
        own = metrics.seasonal_naive(one.history, one.horizon, one.season)
        np.testing.assert_allclose(own, official["sNaive"], rtol=1e-8)


def test_naive2_recovers_a_pure_season():
    season = np.array([0.5, 1.0, 1.5, 1.0])
    np.testing.assert_allclose(metrics.naive2(np.tile(10 * season, 8), 6, 4), 10 * np.resize(season, 6))
    assert not metrics.is_seasonal(np.tile(season, 2), 4)  # two seasons are too few
    np.testing.assert_array_equal(metrics.naive2(np.arange(1.0, 9.0), 3, 1), [8, 8, 8])


def test_a_missing_step_scores_the_worst_error():
    actual, history = np.array([10.0, 20.0]), np.array([1.0, 3.0, 2.0])
    assert metrics.smape(actual, np.array([10.0, np.nan])) == 100.0  # 0 and 200
    assert metrics.smape(np.zeros(1), np.array([np.nan])) == 200.0
    assert metrics.smape(np.zeros(1), np.zeros(1)) == 0.0
    assert metrics.mase(actual, np.array([10.0, np.nan]), history, 1) == (0 + 20) / 2 / 1.5


def test_scale_zero_is_never_a_division():
    flat = np.ones(5)
    assert metrics.mase(np.ones(2), np.ones(2), flat, 1) == 0.0
    assert metrics.mase(np.ones(2), np.zeros(2), flat, 1) == math.inf
    assert metrics.owa(0, 0, 0, 0) == 1.0


def test_classification_counts_unparsed_as_wrong():
    values = metrics.classification(["a", "a", "b", "b"], ["a", None, "b", "a"])
    assert values["accuracy"] == 0.5
    assert values["parse_failures"] == 0.25
    # a: precision 1/2, recall 1/2; b: precision 1, recall 1/2.
    assert values["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Chance: a 2/4 * 2/4 + b 2/4 * 1/4 = 3/8, so kappa is (1/2 - 3/8) / (5/8).
    assert values["kappa"] == pytest.approx(0.2)
    names, counts = metrics.confusion(["a", "a", "b", "b"], ["a", None, "b", "a"], ["a", "b"])
    assert names == ["a", "b", metrics.UNPARSED]
    assert counts.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("predictions", [["a"], [None], ["b"]])
def test_classification_of_one_example_is_finite(predictions):
    assert all(map(math.isfinite, metrics.classification(["a"], predictions).values()))


def test_text_metrics_at_known_points():
    text = "the cat sat on the mat today"
    assert metrics.bleu([text], [text]) == pytest.approx(100)
    assert metrics.rouge_l([text], [text]) == 1.0
    assert metrics.rouge_l(["the cat"], ["the cat sat on"]) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert metrics.self_bleu([text, text, text]) == pytest.approx(100)
    assert metrics.self_bleu(["a b c d", "e f g h"]) < 1
    assert metrics.distinct_n(["a a a", "a a b"], 2) == 2 / 4
    assert metrics.distinct_n(["word"], 2) == 0.0
    assert metrics.perplexity([math.log(0.25)] * 3) == pytest.approx(4)


def test_pass_at_k_equals_enumeration():
    for n, correct, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 5, 2), (4, 4, 4)]:
        draws = list(itertools.combinations(range(n), k))
        share = sum(any(one < correct for one in draw) for draw in draws) / len(draws)
        assert metrics.pass_at_k(n, correct, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="k <= n"):
        metrics.pass_at_k(3, 1, 4)


def test_monotonicity_counts_transitions_that_do_not_fall():
    assert metrics.monotonicity([1, 1, 0, 2]) == 2 / 3
    assert math.isnan(metrics.monotonicity([1]))
    assert metrics.best_so_far([1, 3, 2, 4]) == [1, 3, 3, 4]


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_chance_monotonicity_equals_all_permutations(n):
    shares = [metrics.monotonicity(order) for order in itertools.permutations(range(n))]
    chance = metrics.independent_monotonicity(n)
    assert chance.mean == pytest.approx(np.mean(shares))
    assert chance.deviation == pytest.approx(np.std(shares))


def test_shuffled_monotonicity_with_ties_equals_all_permutations():
    rewards = [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]
    shares = [metrics.monotonicity(order) for order in itertools.permutations(rewards)]
    chance = metrics.shuffled_monotonicity(rewards, draws=20000)
    assert chance.mean == pytest.approx(np.mean(shares))
    assert chance.deviation == pytest.approx(np.std(shares), rel=0.05)


def test_a_perplexity_beyond_all_floats_is_infinite():
    assert metrics.perplexity([-math.log(4.0)] * 3) == pytest.approx(4.0)
    assert metrics.perplexity([-800.0, -1000.0]) == math.inf


def test_tokens_that_several_rollouts_have_are_reused():
    tree = Tree()
    first = grow_path(tree, ROOT, 4, 1.0)
    beside = grow_path(tree, tree.path(first)[1], 4, 1.0)  # leaves after two tokens
    other = grow_path(tree, ROOT, 2, 1.0)
    rollouts = [
        Rollout(i, 1.0, 1.0, 0, 0.0, 0, tree.depth[leaf], start, leaf, "")
        for i, (leaf, start) in enumerate([(first, 0), (beside, 2), (other, 0), (beside, 4)])
    ]
    assert metrics.tokens_reused(tree, rollouts) == pytest.approx(1 - 8 / 14)
    assert metrics.branch_depth(rollouts) == pytest.approx(0.25)  # of 0, 0.5, 0 and 1
    assert metrics.tokens_reused(tree, rollouts[:1]) == metrics.branch_depth(rollouts[:1]) == 0
    assert metrics.tokens_reused(tree, []) is metrics.branch_depth([]) is None


def test_repetition_is_the_share_of_runs_that_stood_before():
    assert metrics.repetition("a b c d") == 0
    assert metrics.repetition("a b c A b c a b c") == pytest.approx(4 / 7)
    assert metrics.repetition("too short") == 0
