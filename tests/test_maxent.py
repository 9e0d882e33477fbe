"""What MaxEnt adds to the tree's values: an unbiased Z, a glance ahead, and pruning by bounds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from toys import finish

import dts
from dts.evaluation.studies.instances import PROMPT, instance, total_variation
from dts.search import MaxEnt
from dts.search.maxent.zestimate import Partition
from dts.softvalue import SoftValues
from dts.tree import Tree


class Earned:
    """Monotone: token a at position i earns table[i, a] >= 0. Sequences that end early earn nothing more."""

    name, monotone = "earned", True

    def __init__(self, table):
        self.table = table
        self.left = [float(table[i:].max(-1).sum()) for i in range(len(table) + 1)]  # the most that is still to come

    def start(self, context):
        return 0, 0.0, False

    def extend(self, states, tokens):
        return [
            (depth + 1, total + self.table[depth, token], token == 0)
            for (depth, total, _), token in zip(states, tokens, strict=True)
        ]

    def earned(self, states):
        return [total for _, total, _ in states]

    def upper(self, states):
        return [total if ended else total + self.left[depth] for depth, total, ended in states]

    def finish(self, states, finished):
        return self.earned(states)


def token_level(seed, *, sparse=False, **options):
    """An instance whose reward is `Earned`, at most 1; sparse: 3 unlikely entries only."""
    case = instance(seed, **options)
    rng = np.random.default_rng(seed)
    table = rng.uniform(size=(case.horizon, case.lm.vocab_size))
    table[:, 0] = 0.0  # EOS
    if sparse:
        keep = rng.choice(np.flatnonzero(table), 3, replace=False)
        table.flat[np.setdiff1d(np.arange(table.size), keep)] = 0.0
    table /= table.max(-1).sum()
    rewards = np.array([sum(table[i, a] for i, a in enumerate(s)) for s in case.sequences])
    return dataclasses.replace(case, rewards=rewards), Earned(table)


def search(case, reward, rollouts, scale=8.0, seed=0, batch_size=None, **options):
    method = MaxEnt(rollouts, reward_scale=scale, **options)
    return dts.decode(
        case.lm, PROMPT, reward=reward, method=method, max_new_tokens=case.horizon, seed=seed, batch_size=batch_size
    )


def relative_z(case, reward, scale, seeds, rollouts=16, **options):
    z = float(np.exp(case.log_p) @ np.exp(scale * case.rewards))
    return np.array([math.exp(search(case, reward, rollouts, scale, s, **options).log_z) / z for s in range(seeds)])


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("tokens", [0, 2])
def test_estimate_of_z_is_unbiased(batch_size, tokens):
    case, reward = token_level(0, sparse=True, vocab_size=4, horizon=3)  # 85 sequences
    found = relative_z(case, reward, 8.0, 200, batch_size=batch_size, lookahead=tokens)
    assert abs(found.mean() - 1) < 3 * found.std() / math.sqrt(200)
    assert found.std() > 0.05  # so that the line above says something


def test_forgetting_what_other_paths_finished_is_biased(monkeypatch):
    """The estimator needs the credits: without them, paths side by side lose what others finished below them."""
    monkeypatch.setattr(
        Partition, "give_up", lambda self, trace: self._settle(dataclasses.replace(trace, credits=[]), -math.inf)
    )
    settle = Partition._settle
    monkeypatch.setattr(
        Partition, "_settle", lambda self, trace, own: settle(self, dataclasses.replace(trace, credits=[]), own)
    )
    case, reward = token_level(0, sparse=True, vocab_size=4, horizon=3)
    found = relative_z(case, reward, 8.0, 200, batch_size=8)
    assert found.mean() - 1 < -3 * found.std() / math.sqrt(200)


def test_intervals_of_log_z_cover_the_truth():
    covered, scale = 0, 12.0
    for structured in (True, False):
        case = instance(3, structured=structured)
        truth = float(np.logaddexp.reduce(case.log_p + scale * case.rewards))
        estimates = [search(case, case.reward, 200, scale, seed).log_z_estimate for seed in range(50)]
        covered += sum(e.interval[0] <= truth <= e.interval[1] for e in estimates)
        widths = [e.interval[1] - e.interval[0] for e in estimates]
        assert np.median(widths) < 1.0  # nats; an interval can always cover by saying nothing
    assert covered >= 90  # of 100


def test_z_is_exact_when_every_sequence_is_finished():
    case, reward = token_level(1, vocab_size=3, horizon=3)
    result = search(case, reward, 10_000)
    assert result.log_z == pytest.approx(float(np.logaddexp.reduce(case.log_p + 8.0 * case.rewards)), abs=1e-9)
    assert result.log_z_estimate.error == 0.0
    pi = case.target(8.0)
    assert result.effective_sample_size == pytest.approx(1 / float(pi @ pi), rel=1e-9)


def test_draws_leave_the_tree_and_its_estimate_alone():
    case, reward = token_level(1, vocab_size=5, horizon=4)
    result = search(case, reward, 5, 1.0)
    before, tree, tokens = result.effective_sample_size, result.tree.to_dict(), result.usage.forwarded_tokens
    first = result.sample(20)
    assert any(draw.token_ids not in {done.token_ids for done in result.completions} for draw in first)
    assert result.tree.to_dict() == tree and result.effective_sample_size == before
    assert result.usage.forwarded_tokens > tokens
    assert result.sample(20) == first  # the seed alone decides


def test_shares_are_those_of_the_target_and_count_for_what_was_not_finished():
    """By hand: two children of the root, p 0.5 and 0.3, each with one finished leaf; 0.2 is not explored."""
    tree = Tree()
    first = tree.add(0, 1, math.log(0.5), math.log(0.5))
    second = tree.add(0, 2, math.log(0.3), math.log(0.2))
    leaves = [tree.add(first, 3, math.log(0.9), math.log(0.1)), tree.add(second, 3, math.log(0.01), math.log(0.99))]
    values = SoftValues(tree, 2.0)
    for leaf, reward in zip(leaves, (0.5, 1.0), strict=True):
        tree.terminal[leaf], tree.reward[leaf] = 1, reward
        finish(values, leaf)
    # A leaf that is the only one of its node has all of it, however unlikely it is there.
    factors = np.exp([values.log_value[first], values.log_value[second]])
    weights, shares = np.array([0.5 + 0.1, 0.3 + 0.1]) * factors, values.log_shares()
    assert [math.exp(shares[leaf]) for leaf in leaves] == pytest.approx(weights / weights.sum(), rel=1e-12)


def test_shares_weigh_a_small_tree_better_than_the_probabilities_of_its_leaves_do():
    """The mean of the reward under pi*, estimated from 40 of 3,905 sequences."""
    errors = {"shares": [], "own probability": []}
    for seed in range(8):
        case, reward = token_level(seed, vocab_size=5, horizon=5)
        result = search(case, reward, 40, 4.0)
        truth = float(case.target(4.0) @ case.rewards)
        assert sum(result.shares.values()) == pytest.approx(1)
        own = {leaf: math.exp(result.tree.log_prob(leaf) + 4.0 * result.tree.reward[leaf]) for leaf in result.shares}
        for name, weights in (("shares", result.shares), ("own probability", own)):
            mean = sum(w * result.tree.reward[leaf] for leaf, w in weights.items()) / sum(weights.values())
            errors[name].append(abs(mean - truth))
    assert np.mean(errors["shares"]) < np.mean(errors["own probability"])


def test_a_branch_can_be_closed_before_anything_is_finished():
    tree = Tree()
    child = tree.add(0, 1, math.log(0.25), math.log(0.75))
    values = SoftValues(tree, 4.0)
    values.close(child)
    assert values.log_open[0] == pytest.approx(math.log(0.75))  # what is left, at the value of nothing known


def test_values_agree_with_each_other_when_a_search_is_over():
    """A backup uses what the parents held at its time; at the end every value is the fixed point of its backup."""
    case, reward = token_level(2, vocab_size=6, horizon=4)
    values = search(case, reward, 60).values
    before = list(values.log_value)
    assert list(values.settled().log_value) == pytest.approx(before, abs=1e-4)


def test_a_token_level_reward_converges_to_the_target_with_a_glance_ahead():
    case, reward = token_level(2, vocab_size=5, horizon=4)  # 341 sequences
    distance = [
        total_variation(case.distribution(search(case, reward, n, lookahead=3).values), case.target(8.0))
        for n in (30, 110, 1000)
    ]
    assert distance[0] < 0.4 and distance[1] < 0.1 and distance[2] < 1e-9


def test_a_glance_ahead_pays_on_sparse_rewards():
    ahead, blind = [], []
    for seed in range(6):
        case, reward = token_level(seed, sparse=True, vocab_size=8, horizon=5)  # 19,608 sequences
        for found, tokens in ((ahead, 8), (blind, 0)):
            result = search(case, reward, 40, 16.0, seed, lookahead=tokens)
            found.append(total_variation(case.distribution(result.values), case.target(16.0)))
    assert np.mean(ahead) < 0.8 * np.mean(blind)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bounds_prove_the_best_sequence_early(batch_size):
    for seed in range(4):
        case, reward = token_level(seed, vocab_size=6, horizon=5)  # 3,906 sequences
        result = search(case, reward, 10**5, search="best", batch_size=batch_size)
        assert result.best.reward == pytest.approx(case.rewards.max(), abs=1e-12)
        assert len(result.rollouts) < 200  # of 100,000 allowed: it stopped because nothing left could be better
        assert result.usage.forwarded_tokens == result.usage.unique_tokens


@pytest.mark.parametrize("bonus", [None, 1.0])
def test_without_bounds_every_sequence_is_finished_once(bonus):
    case, _ = token_level(0, vocab_size=4, horizon=3)
    result = search(case, case.reward, 10**5, search="best", bonus=bonus)
    assert sorted(c.token_ids for c in result.completions) == sorted(case.sequences)


def test_pruned_paths_count_as_rollouts_spent():
    case, reward = token_level(6, vocab_size=8, horizon=5)
    result, to_the_end = (search(case, reward, n, search="best", batch_size=1) for n in (6, 10**5))
    # The budget ended the search, not a proof, and some of the 6 paths are no rollouts.
    assert len(result.rollouts) < len(to_the_end.rollouts) < 6
