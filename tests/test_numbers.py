"""The formulas of the core, each against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

import dts
from dts.models.table import TableModel, TableSession
from dts.results import Completion, LogZ, Result, Rollout, Usage
from dts.rewards import Context, Finished, TerminalReward
from dts.search import MCTS, METHODS, Beam, BestOfN, Greedy, ParticleFilter, Search, SelfConsistency
from dts.search.maxent import MaxEnt, draw_index
from dts.search.particles import _effective_share, _inverse_temperature, systematic
from dts.search.partition import Draw, Partition, _hall_interval
from dts.search.sampling import Ancestral
from dts.search.walkers import EXPAND, Walker
from dts.settings import Budget, Decoding
from dts.softvalue import SoftValues, logsumexp
from dts.text import TextState, advance, flush
from dts.timeout import with_timeout
from dts.tree import NONE, ROOT, Tree

LOG = math.log


class Uniforms:
    """A random stream of known numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def leaf(tree: Tree, parent: int, token: int, log_p: float, rest: float, reward: float) -> int:
    node = tree.add(parent, token, log_p, rest)
    tree.terminal[node], tree.reward[node] = 1, reward
    return node


# -- tree --------------------------------------------------------------------------------------------------------------


def test_a_tree_by_hand():
    tree = Tree()
    assert (len(tree), list(tree.children(ROOT)), tree.leaves()) == (1, [], [])
    assert tree.statistics() == {"nodes": 1, "leaves": 0, "depth": 0, "branching": 0.0}
    a, b = tree.add(ROOT, 7, LOG(0.5), LOG(0.5)), tree.add(ROOT, 8, LOG(0.25), LOG(0.25))
    c = leaf(tree, a, 9, LOG(0.1), LOG(0.9), 2.0)
    d = tree.add(b, 7, LOG(0.5), -math.inf)
    tree.terminal[d] = 1  # complete, not scored
    assert list(tree.children(ROOT)) == [a, b] and list(tree.depth) == [0, 1, 1, 2, 2]
    assert tree.child_with(ROOT, 8) == b and tree.child_with(ROOT, 9) == NONE
    assert tree.path(c) == [a, c] and tree.tokens(c) == (7, 9) and tree.path(ROOT) == []
    assert tree.log_prob(c) == pytest.approx(LOG(0.05)) and tree.log_prob(ROOT) == 0.0
    assert list(tree.log_unexplored)[:3] == [LOG(0.25), LOG(0.9), -math.inf]
    assert (tree.leaves(), tree.n_children[ROOT]) == ([c], 2)
    assert tree.statistics() == {"nodes": 5, "leaves": 1, "depth": 2, "branching": pytest.approx(4 / 3)}
    exported = tree.to_dict()
    assert exported["reward"] == [None, None, None, 2.0, None] and exported["parent"] == [-1, 0, 0, 1, 2]
    assert exported["log_unexplored"][2] is None and exported["terminal"] == [0, 0, 0, 1, 1]
    assert exported["token"] == [-1, 7, 8, 9, 7] and exported["log_p"][1] == LOG(0.5)


def test_what_a_new_node_knows():
    tree = Tree()
    node = tree.add(ROOT, 3, LOG(0.5), LOG(0.5))
    for n in (ROOT, node):
        assert (tree.slot[n], tree.terminal[n], tree.promise[n]) == (NONE, 0, 0.0) and math.isnan(tree.reward[n])
        assert (tree.earned[n], tree.upper[n]) == (-math.inf, math.inf)
    assert (tree.first_child[node], tree.last_child[node], tree.next_sibling[node]) == (NONE, NONE, NONE)
    assert (tree.n_children[node], tree.log_unexplored[node]) == (0, 0.0)


# -- soft values -------------------------------------------------------------------------------------------------------


def test_logsumexp():
    assert logsumexp([]) == logsumexp([-math.inf]) == -math.inf
    assert logsumexp([LOG(2), LOG(3), -math.inf]) == pytest.approx(LOG(5))
    assert logsumexp([1000.0, 1000.0]) == pytest.approx(1000 + LOG(2))


def two_leaves(scale: float, **options: float) -> tuple[Tree, SoftValues, list[int]]:
    """p 0.5 and 0.3 with rewards 1 and 0; 0.2 is not explored."""
    tree = Tree()
    leaves = [leaf(tree, ROOT, 1, LOG(0.5), LOG(0.5), 1.0), leaf(tree, ROOT, 2, LOG(0.3), LOG(0.2), 0.0)]
    values = SoftValues(tree, scale, **options)
    for node in leaves:
        values.finish(node)
    return tree, values, leaves


def test_a_backup_by_hand():
    """The rest is worth the mean of exp(2 r) over the children, (e^2 + 1) / 2."""
    _, values, leaves = two_leaves(2.0)
    rest = (math.exp(2) + 1) / 2
    z = 0.5 * math.exp(2) + 0.3 + 0.2 * rest
    assert values.value() == pytest.approx(LOG(z) / 2) and values.rest(ROOT) == pytest.approx(LOG(rest) / 2)
    assert values.mean[ROOT] == pytest.approx(0.5 + 0.2 * 0.5)
    assert values.log_open[ROOT] == pytest.approx(LOG(0.2 * rest))  # the leaves are finished
    assert list(values.visits) == [2, 1, 1] and list(values.entered) == [0, 1, 1]
    children, log_probs, log_rest = values.transitions(ROOT)
    assert children == leaves
    assert np.exp([*log_probs, log_rest]) == pytest.approx(np.array([0.5 * math.exp(2), 0.3, 0.2 * rest]) / z)
    assert values.log_prob((2,), (LOG(0.3),)) == pytest.approx(LOG(0.3 / z))
    # A sequence that leaves the tree: the unexplored mass as p divides it.
    assert values.log_prob((4, 5), (LOG(0.1), LOG(0.7))) == pytest.approx(LOG(rest * 0.1 * 0.7 / z))
    values.finish(leaves[0])  # again: nothing changes
    assert list(values.visits) == [2, 1, 1] and values.value() == pytest.approx(LOG(z) / 2)


def test_at_zero_a_value_is_a_mean():
    _, values, _ = two_leaves(0.0)
    assert (values.value(), values.rest(ROOT)) == (pytest.approx(0.6), pytest.approx(0.5))
    assert values.log_value[ROOT] == pytest.approx(0.0)


def test_what_is_finished_below_counts_with_one_observation_from_above():
    """Root - a - leaf (reward 1), and b not finished: worth what the root hands down."""
    tree, scale = Tree(), 2.0
    a, b = tree.add(ROOT, 1, LOG(0.5), LOG(0.5)), tree.add(ROOT, 2, LOG(0.25), LOG(0.25))
    values = SoftValues(tree, scale)
    values.finish(leaf(tree, a, 3, LOG(0.4), LOG(0.6), 1.0))
    above = 0.0  # log R of the root before anything is known
    rest = (math.exp(2) + math.exp(above)) / 2
    f_a = 0.4 * math.exp(2) + 0.6 * rest
    assert math.exp(values.log_value[a]) == pytest.approx(f_a)
    # The root's R is the mean over what was seen: a alone. b, and what is not a child, is worth the same.
    assert math.exp(values.log_rest[ROOT]) == pytest.approx(f_a) == pytest.approx(math.exp(values.log_value[b]))
    assert math.exp(values.log_value[ROOT]) == pytest.approx(f_a)
    assert math.exp(values.log_open[ROOT]) == pytest.approx(0.5 * 0.6 * rest + 0.25 * f_a + 0.25 * f_a)
    mean_a = 0.4 * 1.0 + 0.6 * 0.5
    assert values.mean[a] == pytest.approx(mean_a) and values.mean[b] == pytest.approx(mean_a)
    assert values.mean[ROOT] == pytest.approx(mean_a)
    values.settle(prior_strength=2.0, sweeps=1)  # leaves first: a takes two observations of what the root holds now
    rest = (math.exp(2) + 2 * f_a) / 3
    assert math.exp(values.log_value[a]) == pytest.approx(0.4 * math.exp(2) + 0.6 * rest)


def test_a_closed_branch_is_open_no_more_whatever_is_finished_later():
    tree, values, _ = two_leaves(2.0)
    node = tree.add(ROOT, 3, LOG(0.1), LOG(0.1))
    values.close(node)
    rest = (math.exp(2) + 1) / 2
    assert math.exp(values.log_open[ROOT]) == pytest.approx(0.1 * rest) and values.closed[node]
    values.finish(leaf(tree, node, 3, LOG(0.5), LOG(0.5), 0.5))
    assert values.log_open[node] == -math.inf and values.visits[node] == 1
    assert math.exp(values.log_value[ROOT]) == pytest.approx(
        0.5 * math.exp(2) + 0.3 + 0.1 * math.exp(values.log_value[node]) + 0.1 * math.exp(values.log_rest[ROOT])
    )


def test_bounds_of_the_reward_limit_every_estimate():
    tree = Tree()
    tree.earned[ROOT], tree.upper[ROOT] = 0.0, 1.0
    low, high = tree.add(ROOT, 1, LOG(0.5), LOG(0.5)), tree.add(ROOT, 2, LOG(0.5), -math.inf)
    tree.upper[low], tree.earned[high] = 0.25, 0.75
    tree.earned[low], tree.upper[high] = 0.0, 1.0
    values = SoftValues(tree, 4.0)
    assert (values.value(low), values.value(high)) == (0.0, 0.75)
    for node, reward in ((low, 0.25), (high, 1.0)):
        values.finish(leaf(tree, node, 5, LOG(0.5), LOG(0.5), reward))
    values.settle(sweeps=50)
    assert values.value(low) <= 0.25 and values.value(high) >= 0.75
    assert values.rest(low) <= 0.25 and values.rest(high) >= 0.75


def test_a_glance_ahead_by_hand():
    """Token 1 (p 0.2) gains 1/2, token 2 (p 0.3) gains 1; lambda 2."""
    tree = Tree()
    tree.earned[ROOT], tree.upper[ROOT] = 0.0, 1.0
    values = SoftValues(tree, 2.0)
    assert values.tilt(ROOT) == ({}, 0.0)
    values.look_ahead(ROOT, {1: (LOG(0.2), 0.5), 2: (LOG(0.3), 1.0)})
    mean = 0.2 * math.exp(1) + 0.3 * math.exp(2) + 0.5
    tilt, log_mean = values.tilt(ROOT)
    assert tilt == {1: 1.0, 2: 2.0} and math.exp(log_mean) == pytest.approx(mean)
    assert math.exp(values.log_rest[ROOT]) == pytest.approx(mean)
    assert values.log_beyond[ROOT] == 0.0  # nothing is known beyond the gain that was foreseen
    child = tree.add(ROOT, 2, LOG(0.3), LOG(0.7))  # no longer unexplored: 0.7 are left
    tilt, log_mean = values.tilt(ROOT)
    assert tilt == {1: 1.0} and math.exp(log_mean) == pytest.approx((0.2 * math.exp(1) + 0.5) / 0.7)
    tree.promise[child] = 1.0
    tree.earned[child], tree.upper[child] = 1.0, 1.0
    values.grow()
    assert values.value(child) == 1.0
    tree.add(ROOT, 1, LOG(0.2), -math.inf)
    assert values.tilt(ROOT) == ({}, 0.0)


def test_what_was_foreseen_is_not_expected_twice():
    tree = Tree()
    values = SoftValues(tree, 1.0)
    node = tree.add(ROOT, 1, LOG(0.5), LOG(0.5))
    values.grow()
    values.log_beyond[ROOT] = 3.0
    values.look_ahead(node, {2: (LOG(0.25), 1.0)})
    foreseen = LOG(0.25 * math.e + 0.75)
    assert values.log_beyond[node] == pytest.approx(3.0 - foreseen)
    assert values.log_rest[node] == pytest.approx(3.0)
    values.look_ahead(node, {2: (LOG(0.25), 40.0)})  # more than was expected: never below nothing
    assert values.log_beyond[node] == 0.0


# -- the estimate of Z -------------------------------------------------------------------------------------------------


def test_the_weight_of_a_path():
    draw = Draw(0, -math.inf, log_q=[LOG(0.75), LOG(0.25)])
    assert draw.log_weight == pytest.approx(0.0)
    draw.chose(LOG(0.5), [LOG(0.2), LOG(0.6)])
    assert math.exp(draw.log_weight) == pytest.approx(0.5 / (0.75 * 0.2 + 0.25 * 0.6))
    draw.chose(LOG(0.1), [LOG(0.5), LOG(0.1)])
    assert math.exp(draw.log_weight) == pytest.approx(0.05 / (0.75 * 0.1 + 0.25 * 0.06))


def partition_of_two() -> tuple[Partition, Tree, list[Walker], list[int]]:
    """Two paths at the node behind token 1 (p 0.5); below it leaves with p 0.4 and 0.6. lambda 2, rewards 0.5 and 1."""
    tree = Tree()
    node = tree.add(ROOT, 1, LOG(0.5), LOG(0.5))
    leaves = [leaf(tree, node, 2, LOG(0.4), LOG(0.6), 0.5), leaf(tree, node, 3, LOG(0.6), -math.inf, 1.0)]
    partition = Partition(tree, 2.0, (1.0, 0.0), None)
    walkers = [Walker(np.random.default_rng(0)) for _ in range(2)]
    for walker in walkers:
        partition.start(walker)
        walker.node = node
        walker.draw.chose(LOG(0.5), [LOG(0.8), -math.inf])
    return partition, tree, walkers, leaves


def test_a_path_is_credited_with_what_another_finished_below_it():
    partition, _, (first, second), leaves = partition_of_two()
    assert partition.log_z(exhausted=False) == LogZ(-math.inf, math.inf, (-math.inf, math.inf))
    first.node = leaves[0]
    first.draw.chose(LOG(0.4), [LOG(0.5), -math.inf])
    partition.finish(first.draw, leaves[0])
    one = 0.2 / 0.4 * math.exp(1)
    found = partition.log_z(exhausted=False)
    assert math.exp(found.value) == pytest.approx(one) and found.error == math.inf
    assert found.interval == (-math.inf, math.inf)
    credit = 0.5 / 0.8 * 0.4 * math.exp(1)
    second.node = leaves[1]
    second.draw.chose(LOG(0.6), [LOG(1.0), -math.inf])
    partition.finish(second.draw, leaves[1])
    two = credit + 0.3 / 0.8 * math.exp(2)
    found = partition.log_z(exhausted=False)
    assert math.exp(found.value) == pytest.approx((one + two) / 2) and found.error == math.inf
    known = partition.log_z(exhausted=True)
    truth = LOG(0.5 * 0.4 * math.exp(1) + 0.5 * 0.6 * math.exp(2))
    assert known.value == pytest.approx(truth) and known.error == 0.0 and known.interval == (known.value,) * 2


def test_a_path_that_gives_up_keeps_its_credits():
    partition, _, (first, second), leaves = partition_of_two()
    first.node = leaves[0]
    first.draw.chose(LOG(0.4), [LOG(0.4), -math.inf])
    partition.finish(first.draw, leaves[0])
    partition.give_up(second.draw)
    one, credit = 0.5 / 0.8 * math.exp(1), 0.5 / 0.8 * 0.4 * math.exp(1)
    assert math.exp(partition.log_z(exhausted=False).value) == pytest.approx((one + credit) / 2)
    third = Walker(np.random.default_rng(0))  # starts when the first leaf is known
    partition.start(third)
    third.node = leaves[1]
    third.draw.chose(LOG(0.3), [LOG(0.3), -math.inf])
    partition.finish(third.draw, leaves[1])
    three = 0.2 * math.exp(1) + math.exp(2)
    found = partition.log_z(exhausted=False)
    estimates = np.array([one, credit, three])
    assert math.exp(found.value) == pytest.approx(estimates.mean())
    assert found.error == pytest.approx(estimates.std() / math.sqrt(3) / estimates.mean())
    held = LOG(0.2 * math.exp(1) + 0.3 * math.exp(2))
    low, high = _hall_interval(estimates)
    assert found.interval == pytest.approx((max(LOG(low), held) if low > 0 else held, max(LOG(high), held)))


def test_only_paths_that_were_planned_and_those_before_the_first_under_way_count():
    tree = Tree()
    node = leaf(tree, ROOT, 1, LOG(0.5), LOG(0.5), 0.0)
    partition = Partition(tree, 1.0, (1.0,), 2)
    walkers = [Walker(np.random.default_rng(0)) for _ in range(4)]
    for walker in walkers:
        partition.start(walker)
        walker.draw.chose(LOG(0.5), [0.0])
    walkers[1].node = node
    partition.finish(walkers[1].draw, node)
    assert partition.log_z(exhausted=False).error == math.inf  # the first is under way
    for walker in (walkers[0], walkers[2], walkers[3]):
        partition.give_up(walker.draw)
    # Each of the others stood above the leaf, at the root, with weight 1/2: credited with 1/2 x 1/2. Only two count.
    found = partition.log_z(exhausted=False)
    assert math.exp(found.value) == pytest.approx((0.25 + 0.5) / 2)


def test_equal_draws_leave_no_doubt():
    tree = Tree()
    node = leaf(tree, ROOT, 1, LOG(0.5), LOG(0.5), 3.0)
    partition = Partition(tree, 0.0, (1.0,), None)
    for _ in range(2):
        walker = Walker(np.random.default_rng(0))
        partition.start(walker)
        walker.draw.known = -math.inf
        walker.draw.chose(LOG(0.5), [LOG(0.5)])
        partition.finish(walker.draw, node)
    found = partition.log_z(exhausted=False)
    assert (found.value, found.error, found.interval) == (pytest.approx(0), 0.0, (found.value, found.value))


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [1.0, 1.0, 4.0, 2.0], [5.0, 5.0, 1.0]])
def test_halls_interval_solves_his_equation(values):
    """W + s W^2 / 3 + s^2 W^3 / 27 + s / 6n = z / sqrt(n), with W = (mean - bound) / spread."""
    x, n = np.array(values), len(values)
    mean, spread = x.mean(), x.std()
    s = (((x - mean) / spread) ** 3).mean()
    for bound, z in zip(_hall_interval(x), (1.959964, -1.959964), strict=True):
        w = (mean - bound) / spread
        assert w + s * w**2 / 3 + s**2 * w**3 / 27 + s / (6 * n) == pytest.approx(z / math.sqrt(n))


# -- choices -----------------------------------------------------------------------------------------------------------


def test_a_draw_by_weights():
    weights = [LOG(1.0), LOG(2.0), -math.inf, LOG(1.0)]
    assert [draw_index("abcd", weights, u) for u in (0.0, 0.24, 0.26, 0.74, 0.76, 0.999)] == list("aabbdd")
    assert draw_index("abcd", weights, 1.0) == "b"  # rounding left a sliver: the largest
    assert draw_index("ab", [-1000.0, -1001.0], 0.5) == "a"


def test_ancestral_draws_walk_the_children_by_their_own_p():
    tree = Tree()
    a, b = tree.add(ROOT, 1, LOG(0.5), LOG(0.5)), tree.add(ROOT, 2, LOG(0.25), LOG(0.25))
    policy = Ancestral(tree)
    chosen = [policy.select(Walker(Uniforms(u))) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.99)]
    assert chosen == [a, a, b, b, EXPAND, EXPAND]
    assert policy.select(Walker(Uniforms(0.5))) == b  # a has what is below 0.5
    assert policy.select(Walker(Uniforms(), node=a)) == EXPAND  # no children: no number is needed
    c = tree.add(ROOT, 3, LOG(0.25 - 1e-9), -math.inf)
    assert policy.select(Walker(Uniforms(1 - 1e-12))) == c  # every token is a child, rounding left a sliver
    # Only children from b on, among the mass of 0.5 that was outside the children when there was only a.
    later = Ancestral(tree, explored=b, log_mass=tree.log_unexplored[:])
    later.log_mass[ROOT] = LOG(0.5)
    assert [later.select(Walker(Uniforms(u))) for u in (0.0, 0.49, 0.51, 0.99)] == [b, b, c, c]


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


@pytest.mark.parametrize(("rollouts", "size"), [(1, 1), (3, 3), (5, 4), (16, 4), (40, 10), (64, 16), (1000, 16)])
def test_paths_decoded_together(rollouts, size):
    for method in (MaxEnt(rollouts), MCTS(rollouts)):
        assert (method.batch_size(), method.budget()) == (size, Budget(rollouts=rollouts))
    assert (MaxEnt(1).exploring(), MaxEnt(1, search="best").exploring(), MaxEnt(1, explore=0.0).exploring()) == (
        0.35, 0.1, 0.0,
    )  # fmt: skip


def test_the_defaults_are_those_that_the_figures_were_made_with():
    assert MaxEnt(9) == MaxEnt(9, 4.0, "sample", None, 0.7, 8.0, None, 16)
    assert Beam(8) == Beam(8, length_penalty=1.0, reward_weight=0.0, groups=1, segment=1, branch=4)
    assert MCTS(9) == MCTS(9, puct=True, bonus=1.25, value="mean")
    assert ParticleFilter(9) == ParticleFilter(9, reward_scale=4.0, ess_threshold=0.5, entropic=False, segment=None)
    assert SelfConsistency(9) == SelfConsistency(9, str.strip, weighted=False)
    assert Decoding() == Decoding(48, 0, 1.0, None, None, (), 0, None, None) and Budget() == Budget(None, None, None)


@pytest.mark.parametrize(("option", "good", "bad"), [
    ("reward_scale", (0.0, 1e6), (-1e-9, math.inf, math.nan)), ("search", ("sample", "best"), ("", None)),
    ("explore", (0.0, 1.0, None), (-0.01, 1.01)), ("widening", (0.01, 1.0), (0.0, 1.01)),
    ("sharpness", (0.01,), (0.0, math.inf)), ("bonus", (0.0, 9.0, None), (-0.1, math.inf)),
    ("lookahead", (0, 1), (-1, 1.5)), ("rollouts", (1,), (0, True, 2.0)),
])  # fmt: skip
def test_the_allowed_range_of_each_option_of_maxent(option, good, bad):
    for value in good:
        assert getattr(MaxEnt(**{"rollouts": 4, option: value}), option) == value
    for value in bad:
        with pytest.raises(dts.UsageError, match=f"{option}="):
            MaxEnt(**{"rollouts": 4, option: value})


# -- p and budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "good", "bad"), [
    ("max_new_tokens", (1,), (0,)), ("min_new_tokens", (0, 48), (-1, 49)), ("top_k", (1, None), (0,)),
    ("temperature", (0.01,), (0.0, math.inf)), ("top_p", (0.01, 1.0, None), (0.0, 1.01)),
    ("batch_size", (1, None), (0,)), ("stop", ((), ("a", "b")), ("a", ("",), (1,), ("a", ""))),
])  # fmt: skip
def test_the_allowed_range_of_each_decoding_option(option, good, bad):
    for value in good:
        assert getattr(Decoding(**{option: value}), option) == value
    for value in bad:
        with pytest.raises(dts.UsageError, match=f"{option}="):
            Decoding(**{option: value})


def test_the_allowed_range_of_each_budget():
    assert Budget(1, 1, 0.1) == Budget(rollouts=1, tokens=1, seconds=0.1)
    for bad in ({"rollouts": 0}, {"tokens": 0}, {"seconds": 0}):
        with pytest.raises(dts.UsageError, match=next(iter(bad))):
            Budget(**bad)


def test_p_by_hand():
    logits = torch.tensor([[0.0, LOG(2.0), LOG(4.0), LOG(8.0)]])

    def p(forbidden=((), ()), **options):
        found = Decoding(**options).probabilities(logits.clone(), forbidden)
        assert found.dtype == torch.float64
        return [Fraction(value).limit_denominator(1000) for value in found[0].tolist()]

    def over(total, *parts):
        return [Fraction(part, total) for part in parts]

    assert p() == over(15, 1, 2, 4, 8)
    assert p(temperature=0.5) == over(85, 1, 4, 16, 64)
    assert p(top_k=2) == over(12, 0, 0, 4, 8) and p(top_k=4) == p(top_k=9) == p(top_p=1.0) == over(15, 1, 2, 4, 8)
    assert p(top_p=0.5) == over(8, 0, 0, 0, 8) and p(top_p=0.6) == over(12, 0, 0, 4, 8)
    assert p(top_p=0.81) == over(14, 0, 2, 4, 8)
    # The first of two equal tokens holds just as much as is asked for.
    assert Decoding(top_p=0.5).probabilities(torch.zeros(1, 2)).sum(0).sort().values.tolist() == [0.0, 1.0]
    assert p(((0,), (3,))) == over(7, 1, 2, 4, 0) and p(((), (3,))) == p(((0,), ())) == over(15, 1, 2, 4, 8)
    assert p(((0,), (1, 3)), temperature=0.5) == over(17, 1, 0, 16, 0)
    kept = logits.double()
    Decoding().probabilities(kept, ((0,), (3,)))
    assert kept.isfinite().all()  # the caller's logits stay as they were


# -- what a search returns ---------------------------------------------------------------------------------------------


def a_result(**parts) -> Result:
    return Result(**{"completions": [], "rollouts": [], "usage": Usage(), "tree": Tree(), "values": None,
                     "method": "nothing", **parts})  # fmt: skip


def test_a_result_of_weighted_samples():
    result = a_result(log_weights={4: LOG(0.3), 7: LOG(0.1)})
    assert result.log_z == pytest.approx(LOG(0.4))
    assert result.shares == pytest.approx({4: 0.75, 7: 0.25})
    assert result.effective_sample_size == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert a_result(log_z_estimate=LogZ(1.5, 0.1, (1.0, 2.0)), log_weights={1: 0.0}).log_z == 1.5


def test_a_result_says_what_it_does_not_know():
    result = a_result()
    for wanted, message in (("best", "no rollout finished"), ("log_z", "nothing estimates no Z"),
                            ("shares", "use MaxEnt"), ("effective_sample_size", "use MaxEnt")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            getattr(result, wanted)
    with pytest.raises(RuntimeError, match="use MaxEnt"):
        result.sample(1)
    assert not result.partial and "sampler" not in repr(result)
    assert result.usage.as_dict() == dict.fromkeys(Usage.__slots__, 0)


def test_a_result_draws_with_the_seed_it_is_given():
    asked = []
    result = a_result(_sampler=lambda k, seed: asked.append((k, seed)) or [])
    assert result.sample(3) == result.sample(2, seed=5) == [] and asked == [(3, 0), (2, 5)]


def test_records_do_not_change():
    for record in (Completion("", (), 0.0, 0.0, "eos"), LogZ(0.0, 0.0, (0.0, 0.0)), Context("", (), str),
                   Finished((), ""), Decoding(), Budget(), Rollout(0, 0.0, 0.0, 0, 0.0, 0, 0, 0, 0, "")):  # fmt: skip
        with pytest.raises(AttributeError):
            setattr(record, type(record).__slots__[0], None)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def table(rows):
    """Logits by the tokens behind the prompt; zeros elsewhere."""
    return TableModel(lambda prefix: np.array(rows.get(prefix[1:], np.zeros(3)), float), 3, eos=0, name="broken")


@pytest.mark.parametrize("bad", [[math.nan, 0, 0], [0, 0, math.nan], [0, math.inf, 0], [-math.inf] * 3])
def test_logits_that_are_no_distribution_are_named(bad):
    lm = table({(): [-99.0, -99.0, 0.0], (2,): bad})
    with pytest.raises(dts.ModelError, match=r"broken gave .* at node 1 of the tree, 1 tokens behind .* after '1 2 '"):
        dts.decode(lm, (1,), method=BestOfN(3), max_new_tokens=2)


def test_processors_see_the_ids_and_one_row_and_may_write_to_it():
    seen = []

    def forbid(ids, row):
        seen.append(ids.tolist())
        row[:, 0] = -math.inf
        return row

    result = dts.decode(table({}), "1", method=BestOfN(30), max_new_tokens=2, logits_processor=forbid)
    assert all(len(c.token_ids) == 2 and 0 not in c.token_ids for c in result.completions)
    assert result.best.logprob == pytest.approx(2 * LOG(0.5))
    assert sorted({tuple(ids) for (ids,) in seen}) == [(1,), (1, 1), (1, 2)] and len(seen) == 3


def test_prompts_that_are_empty_or_too_long():
    lm = TableModel(lambda prefix: np.zeros(3), 3, context_length=5)
    assert dts.decode(lm, (1, 2), method=BestOfN(1), max_new_tokens=3).completions
    with pytest.raises(dts.UsageError, match=r"2 tokens plus max_new_tokens=4 exceeds .* table .5 tokens"):
        dts.decode(lm, (1, 2), method=BestOfN(1), max_new_tokens=4)
    with pytest.raises(dts.UsageError, match="prompt is empty"):
        dts.decode(lm, (), method=BestOfN(1))


class Tight(TableModel):
    """No memory behind the prompt."""

    def open(self, *arguments, **options):
        raise self.table(())


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), dts.UnavailableError), (MemoryError(), dts.UnavailableError),
    (RuntimeError("not enough memory: you tried"), dts.UnavailableError), (RuntimeError("shape"), RuntimeError),
    (dts.RewardError("out of memory"), dts.RewardError), (ValueError("out of memory"), ValueError),
])  # fmt: skip
def test_only_lack_of_memory_is_called_so(error, expected):
    with pytest.raises(expected) as raised:
        dts.decode(Tight(lambda prefix: error, 3), (1, 2), method=BestOfN(7), max_new_tokens=1, batch_size=5)
    if expected is dts.UnavailableError:
        assert "out of memory with a prompt of 2 tokens and 5 paths" in str(raised.value)
        assert "lower batch_size" in str(raised.value) and "\n" not in str(raised.value)
    else:
        assert raised.value is error


def test_no_uniform_number_draws_what_has_no_probability():
    """Not at 0, where the first tokens have none, and not at the end, where the last ones have none."""
    rows = [-math.inf, 0.0, LOG(3.0), -math.inf]
    lm = TableModel(lambda prefix: np.array(rows), 4)
    context, decoding = Context("", (1,), lm.decode), Decoding(max_new_tokens=2)

    def drawn(*uniforms):
        session = lm.open((1,), batch_size=4, max_new_tokens=2)
        search = Search(
            lm, session, context, TerminalReward(lambda c, f: [0.0] * len(f), "none"), decoding, Budget(), 4
        )
        nodes = search.draw([ROOT] * len(uniforms), uniforms)
        return [search.tree.token[node] for node in nodes], [math.exp(x) for x in search.tree.log_unexplored[:1]]

    assert drawn(0.0) == ([1], [pytest.approx(0.75)])
    assert drawn(0.24, 0.26, 1 - 1e-16) == ([1, 2, 2], [0.0])
    assert drawn(0.9, 0.8) == ([2, 2], [pytest.approx(0.25)])


def chain(*tokens):
    """A model that surely writes these tokens."""
    rows = {tokens[:i]: np.where(np.arange(4) == token, 0.0, -math.inf) for i, token in enumerate(tokens)}
    return TableModel(lambda prefix: rows[prefix[1:]], 4, eos=0)


def test_a_limit_that_is_just_reached_is_kept(monkeypatch):
    """The prompt and two more tokens are forwarded for three tokens."""
    for budget, ended in ((3, False), (2, True)):
        result = dts.decode(chain(1, 2, 3), (1,), method=Greedy(), max_new_tokens=3, budget=Budget(tokens=budget))
        assert (result.partial, len(result.rollouts)) == (ended, 0 if ended else 1)
        assert result.usage.forwarded_tokens == (2 if ended else 3)
    now = [0.0]
    monkeypatch.setattr("dts.search.loop.time.perf_counter", lambda: now[0])

    def at_each_token(ids, row):
        now[0] += 0.5
        return row

    for seconds, finished in ((1.0, 0), (1.1, 1), (0.5, 0)):
        now[0] = 7.0
        result = dts.decode(chain(1, 2, 3), (1,), method=Greedy(), max_new_tokens=3, budget=Budget(seconds=seconds),
                            logits_processor=at_each_token)  # fmt: skip
        assert len(result.rollouts) == finished, seconds
    assert now[0] == 7.5 and result.usage.seconds == 0.5


def test_the_earliest_stop_string_ends_the_text():
    def text(*stop):
        result = dts.decode(chain(1, 2, 3, 1, 2), (1,), method=Greedy(), max_new_tokens=5, stop=stop)
        return result.best.text, result.best.finished_by, result.rollouts[0].length

    assert text("3 ", "2 3 ") == text("2 3 ", "3 ") == ("1 ", "stop", 3)
    assert text("3 1 ") == ("1 2 ", "stop", 4) and text("1 2 ") == ("", "stop", 2)
    assert text("9") == ("1 2 3 1 2 ", "length", 5)
    ended = dts.decode(chain(1, 0), (1,), method=Greedy(), max_new_tokens=2).best
    assert (ended.text, ended.token_ids, ended.finished_by) == ("1 ", (1, 0), "eos")


def test_what_a_rollout_records():
    seen = []
    lm = TableModel(lambda prefix: np.array([0.0, 1.0, 2.0]), 3, eos=0)
    result = dts.decode(lm, (1, 2), method=BestOfN(12), reward=lambda text: len(text) % 5, max_new_tokens=4, seed=2,
                        batch_size=3, on_rollout=seen.append)  # fmt: skip
    best = -math.inf
    for index, rollout in enumerate(seen):
        best = max(best, rollout.reward)
        assert (rollout.index, rollout.best_so_far) == (index, best) and rollout.reward == len(rollout.text) % 5
        tokens = result.tree.tokens(rollout.leaf)
        assert rollout.length == len(tokens) and rollout.text == lm.decode(tokens)
    assert seen == result.rollouts and result.best.reward == best
    assert seen[-1].nodes == len(result.tree) and seen[-1].tokens == result.usage.forwarded_tokens
    assert result.usage.generated_tokens == len(result.tree) - 1


class Known(TerminalReward):
    """Always 1, and says so from the start."""

    def __init__(self) -> None:
        super().__init__(lambda context, finished: [1.0] * len(finished), "known")

    def earned(self, states):
        return [1.0] * len(states)

    upper = earned


@pytest.mark.parametrize("bonus", [None, 1.0])
def test_what_can_only_be_as_good_is_not_tried(bonus):
    """The second path finds that nothing is worth a token."""
    lm = TableModel(lambda prefix: np.zeros(4), 4)
    method = MaxEnt(9, search="best", bonus=bonus)
    result = dts.decode(lm, (1,), method=method, reward=Known(), max_new_tokens=3, batch_size=1)
    assert (len(result.rollouts), len(result.tree), result.partial) == (1, 4, False)


@pytest.mark.parametrize("search", ["sample", "best"])
def test_draws_keep_to_the_batch(search, monkeypatch):
    lm = TableModel(lambda prefix: np.zeros(6), 6)
    result = dts.decode(lm, (1,), method=MaxEnt(3, search=search), max_new_tokens=4, batch_size=2, seed=1)
    calls, tokens = result.usage.model_calls, result.usage.forwarded_tokens
    widths, extend = [], TableSession.extend
    monkeypatch.setattr(
        TableSession, "extend", lambda self, *given: widths.append(len(given[0])) or extend(self, *given)
    )
    assert len(result.sample(9, seed=3)) == 9
    assert max(widths) == 2 and sum(widths) == result.usage.forwarded_tokens - tokens
    assert len(widths) == result.usage.model_calls - calls


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "greedy"])
def test_a_size_is_a_whole_number_of_at_least_one(name, size):
    with pytest.raises(dts.UsageError, match=f"={size!r} is not allowed; give a whole number >= 1"):
        METHODS[name](size, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_name_cannot_be_given(name):
    method = METHODS[name](8, 1.0)
    assert method.name == name
    assert [field.name for field in dataclasses.fields(method) if not field.init] == ["name"]


def test_the_smaller_limit_counts():
    lm = TableModel(lambda prefix: np.zeros(3), 3)

    def rollouts(n, budget):
        return len(dts.decode(lm, (1,), method=BestOfN(n), max_new_tokens=2, budget=budget).rollouts)

    assert [rollouts(4, Budget(rollouts=2)), rollouts(2, Budget(rollouts=4)), rollouts(3, Budget(seconds=1e6))] == [
        2,
        2,
        3,
    ]
    assert [rollouts(3, None), rollouts(3, Budget())] == [3, 3]


# -- text --------------------------------------------------------------------------------------------------------------


def as_bytes(ids):
    """Ids are bytes; above 255 lie tokens without text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def stream(ids):
    state, pieces = TextState(), []
    for token in ids:
        state, piece = advance(as_bytes, state, token)
        pieces.append(piece)
        assert len(state.ids) <= 17  # the window stays short: a piece of nine, eight that are not settled
    return pieces, flush(as_bytes, state)


def test_characters_come_when_they_are_whole():
    assert stream("né!".encode()) == (["n", "", "é", "!"], "")
    assert stream([*"é".encode()[:1]]) == ([""], "\ufffd")
    assert stream([104, 300, 105]) == (["h", "", "i"], "") and stream([300, 105]) == (["", "i"], "")
    assert stream([]) == ([], "")
    for wrong in ([255] * 20, [0xF0, 0x9F] * 9, [65, *[0x80] * 15, 66]):
        pieces, last = stream(wrong)
        assert "".join(pieces) + last == as_bytes(wrong)
    rng = np.random.default_rng(0)
    for _ in range(200):  # letters, parts of characters and tokens without text in any order
        ids = rng.choice([65, 300, *"é😀".encode(), 255], size=rng.integers(1, 25)).tolist()
        pieces, last = stream(ids)
        assert "".join(pieces) + last == as_bytes(ids)
    # Nine bytes that are no character: all but the last mark are settled. Four are kept, and so on.
    pieces, last = stream([255] * 20)
    assert [len(piece) for piece in pieces] == [0] * 8 + [8] + [0] * 4 + [5] + [0] * 4 + [5, 0] and len(last) == 2


# -- time --------------------------------------------------------------------------------------------------------------


class Asked:
    """Says what it was asked; monotone, with a promise."""

    name, monotone = "asked", True

    def start(self, context):
        return ("start", context)

    def extend(self, states, tokens):
        if tokens == [13]:
            raise KeyError("unlucky")
        return [(state, token) for state, token in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [1.0] * len(states)

    def upper(self, states):
        return [3.0] * len(states)

    def promise(self, states):
        return [2.0] * len(states)

    def finish(self, states, finished):
        return [float(len(done.text)) for done in finished]


def test_a_timed_reward_is_the_reward():
    timed = with_timeout(Asked(), 60)
    assert (timed.name, timed.monotone, timed.start("c")) == ("asked", True, ("start", "c"))
    assert timed.extend([0, 1], [5, 6]) == [(0, 5), (1, 6)] and timed.extend([], []) == []
    assert (timed.earned([0]), timed.upper([0, 0]), timed.promise([0])) == ([1.0], [3.0, 3.0], [2.0])
    assert timed.finish([0], [Finished((1,), "abc")]) == [3.0] and timed.finish([], []) == []
    with pytest.raises(KeyError, match="unlucky"):
        timed.extend([0], [13])


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, True, "1", None])
def test_a_timeout_is_a_number_of_seconds(seconds):
    with pytest.raises(dts.UsageError, match="reward timeout"):
        with_timeout(Asked(), seconds)


@pytest.mark.parametrize("name", METHODS)
def test_a_search_that_ran_out_of_time_says_so(name, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dts.search.loop.time.perf_counter", lambda: now[0])

    def at_each_call(ids, row):
        now[0] += 0.5
        return row

    def partial(seconds):
        now[0] = 0.0
        lm = TableModel(lambda prefix: np.zeros(4), 4)
        return dts.decode(lm, (1,), method=METHODS[name](4, 1.0), max_new_tokens=3, budget=Budget(seconds=seconds),
                          logits_processor=at_each_call).partial  # fmt: skip

    assert (partial(0.5), partial(1.0), partial(60)) == (True, True, False)
