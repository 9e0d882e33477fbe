"""Rewards and lambdas of any finite size: nothing overflows, and what is worth most is what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import LOG

import dts
from dts.models.table import TableModel
from dts.search import METHODS, MaxEnt, ParticleFilter

TOKEN, VOCAB, HORIZON = 2, 6, 3


class Points(dts.Reward):
    """`worth` for each TOKEN, earned at once."""

    name, monotone = "points", True

    def __init__(self, worth):
        self.worth = worth

    def start(self, context):
        return 0, 0

    def extend(self, states, tokens):
        return [(n + 1, hits + (t == TOKEN)) for (n, hits), t in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [self.worth * hits for _, hits in states]

    def upper(self, states):
        return [self.worth * (hits + HORIZON - n) for n, hits in states]

    def finish(self, states, finished):
        return self.earned(states)


def uniform(vocab=VOCAB):
    return TableModel(lambda prefix: np.zeros(vocab), vocab)


def decode(method, reward, lm=None, **options):
    return dts.decode(lm or uniform(), (1,), method=method, reward=reward, max_new_tokens=HORIZON, seed=1, **options)


@pytest.mark.parametrize("search", ["sample", "best"])
@pytest.mark.parametrize(("worth", "scale"), [
    (22.5, 4.0), (100.0, 4.0), (186.5, 4.0), (1e4, 1.0), (1e9, 1e6), (1e-9, 1e12), (1e300, 1.0), (1.0, 1e300),
])  # fmt: skip
def test_a_token_of_any_worth_is_drawn_by_the_paths_that_follow_the_values(search, worth, scale):
    method = MaxEnt(6, reward_scale=scale, search=search, explore=0.0, sharpness=8.0)
    result = decode(method, Points(worth), batch_size=1)
    assert result.rollouts[0].reward == result.best.reward == HORIZON * worth
    assert all(math.isfinite(result.values.value(node)) for node in range(len(result.tree)))
    assert sum(result.shares.values()) == pytest.approx(1)
    if search == "sample":  # DTS* has proved that nothing is better, and stops before it learns the target
        assert result.sample(4) == [result.best] * 4  # anything else is e^-90 as likely, or less


@pytest.mark.parametrize("search", ["sample", "best"])
def test_a_token_that_costs_anything_is_avoided(search):
    for worth in (-30.0, -1e3, -1e9):
        result = decode(MaxEnt(4, search=search, explore=0.0), Losses(worth), batch_size=1)
        assert all(rollout.reward == 0.0 for rollout in result.rollouts[:1])


class Losses(Points):
    """A penalty for each TOKEN: what was earned counts every penalty that is still possible."""

    def earned(self, states):
        return [self.worth * (hits + HORIZON - n) for n, hits in states]

    def promise(self, states):
        return self.finish(states, [])

    def upper(self, states):
        return [self.worth * hits for _, hits in states]

    def finish(self, states, finished):
        return [self.worth * hits for _, hits in states]


def test_a_token_that_the_model_hardly_ever_writes_is_found_if_it_is_worth_it():
    """p is 1e-290; lambda times the gain outweighs it."""
    row = [0.0 if token != TOKEN else 290 * LOG(0.1) for token in range(VOCAB)]
    lm = TableModel(lambda prefix: np.array(row), VOCAB)
    result = decode(MaxEnt(2, explore=0.0, search="best"), Points(1000.0), lm, batch_size=1)
    assert result.rollouts[0].reward == 3000.0


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 1e9])
def test_z_is_exact_at_any_lambda_when_every_sequence_is_finished(scale):
    result = decode(MaxEnt(10_000, reward_scale=scale), Points(40.0), uniform(3))
    counts = np.array([math.comb(HORIZON, k) * 2 ** (HORIZON - k) for k in range(HORIZON + 1)])
    logs = np.log(counts / 27) + scale * 40.0 * np.arange(HORIZON + 1)
    assert len(result.rollouts) == 27
    assert result.log_z == pytest.approx(float(np.logaddexp.reduce(logs)), rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("worth", [1e9, -1e9, 1e150])
def test_every_method_takes_rewards_of_any_size(name, worth):
    result = decode(METHODS[name](12, 1e6), Points(worth) if worth > 0 else Losses(worth))
    rewards = [rollout.reward for rollout in result.rollouts]
    assert rewards and all(map(math.isfinite, rewards))
    if name not in ("self-consistency", "weighted-best-of-n", "confidence-vote"):
        assert result.best.reward == max(rewards)


@pytest.mark.parametrize("method", [MaxEnt(4, reward_scale=1e200), ParticleFilter(4, reward_scale=1e200)])
def test_a_product_that_no_float_holds_is_named(method):
    with pytest.raises(dts.UsageError, match=r"reward_scale=1e\+200 times a reward of .* is not a finite number"):
        decode(method, lambda text: 1e200)
