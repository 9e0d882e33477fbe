"""Weights and resampling of the particle filter, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from toys import LOG

import dts
from dts.models.table import TableModel
from dts.search import ParticleFilter
from dts.search.particles import _effective_share, _inverse_temperature, systematic


def test_systematic_resampling():
    scores = np.log([0.1, 0.6, 0.3, 1e-300])
    picked, log_copies = systematic(scores, 0.5)  # at 1/8, 3/8, 5/8, 7/8
    assert picked.tolist() == [1, 1, 1, 2]
    assert np.exp(log_copies) == pytest.approx([0.4, 2.4, 1.2, 0.0])
    assert systematic(scores, 0.0)[0].tolist() == [0, 1, 1, 2]
    assert systematic(np.array([0.0, -math.inf]), 1 - 1e-16)[0].tolist() == [0, 0]  # never one without weight
    assert systematic(scores + 1000, 0.5)[0].tolist() == [1, 1, 1, 2]


def log_weights(scale, reward, rows=None, **options):
    method = ParticleFilter(8, reward_scale=scale, **options)
    lm = TableModel(lambda prefix: np.zeros(3) if rows is None else np.array(rows, float), 3)
    result = dts.decode(lm, (1,), method=method, reward=reward, max_new_tokens=1, seed=3)
    return {result.tree.tokens(leaf)[0]: weight for leaf, weight in result.log_weights.items()}, result


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_particles_that_are_not_resampled_weigh_what_their_rewards_do(scale):
    weights, result = log_weights(scale, lambda text: float(text), ess_threshold=0.0)
    counts = Counter(int(rollout.text) for rollout in result.rollouts)
    assert len(counts) == 3 and sum(counts.values()) == 8
    for token, count in counts.items():
        assert weights[token] == pytest.approx(LOG(count / 8) + scale * token)


def test_effective_share_and_inverse_temperature():
    assert _effective_share(np.log([1.0, 1.0, 1.0, 1.0])) == pytest.approx(1.0)
    assert _effective_share(np.array([0.0, -math.inf])) == pytest.approx(0.5)
    assert _effective_share(np.log([3.0, 1.0]) - 800) == pytest.approx(16 / 10 / 2)
    assert _inverse_temperature(np.zeros(4), 0.0) == pytest.approx(1.0)
    certain = np.array([0.0, -math.inf])
    assert (_inverse_temperature(certain, 0.0), _inverse_temperature(certain, 0.25)) == (0.0, 0.25)
    entropy = -(0.75 * LOG(0.75) + 0.25 * LOG(0.25)) / LOG(2)
    assert _inverse_temperature(np.log([3.0, 1.0]), 0.5) == pytest.approx(entropy + (1 - entropy) / 2)
