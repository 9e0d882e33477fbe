"""Soft values, foresight and sums in log space, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import LOG, finish, leaf

from dts.foresight import NO_TILT, Gain
from dts.logspace import logsumexp
from dts.softvalue import SoftValues
from dts.tree import ROOT, Tree


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
        finish(values, node)
    return tree, values, leaves


def test_a_backup_by_hand():
    """The rest is worth the mean of exp(2 r) over the children, (e^2 + 1) / 2."""
    _, values, leaves = two_leaves(2.0)
    rest = (math.exp(2) + 1) / 2
    z = 0.5 * math.exp(2) + 0.3 + 0.2 * rest
    assert values.value() == pytest.approx(LOG(z) / 2) and values.rest(ROOT) == pytest.approx(LOG(rest) / 2)
    assert values.mean[ROOT] == pytest.approx(0.5 + 0.2 * 0.5)
    assert values.log_open[ROOT] == pytest.approx(LOG(0.2 * rest))  # the leaves are finished
    assert list(values.visits.finished) == [2, 1, 1] and list(values.visits.entered) == [0, 1, 1]
    children, log_probs, log_rest = values.transitions(ROOT)
    assert children == leaves
    assert np.exp([*log_probs, log_rest]) == pytest.approx(np.array([0.5 * math.exp(2), 0.3, 0.2 * rest]) / z)
    assert values.log_prob((2,), (LOG(0.3),)) == pytest.approx(LOG(0.3 / z))
    # A sequence that leaves the tree: the unexplored mass as p divides it.
    assert values.log_prob((4, 5), (LOG(0.1), LOG(0.7))) == pytest.approx(LOG(rest * 0.1 * 0.7 / z))
    finish(values, leaves[0])  # again: nothing changes
    assert list(values.visits.finished) == [2, 1, 1] and values.value() == pytest.approx(LOG(z) / 2)


def test_at_zero_a_value_is_a_mean():
    _, values, _ = two_leaves(0.0)
    assert (values.value(), values.rest(ROOT)) == (pytest.approx(0.6), pytest.approx(0.5))
    assert values.log_value[ROOT] == pytest.approx(0.0)


def test_what_is_finished_below_counts_with_one_observation_from_above():
    """Root - a - leaf (reward 1), and b not finished: worth what the root hands down."""
    tree, scale = Tree(), 2.0
    a, b = tree.add(ROOT, 1, LOG(0.5), LOG(0.5)), tree.add(ROOT, 2, LOG(0.25), LOG(0.25))
    values = SoftValues(tree, scale)
    finish(values, leaf(tree, a, 3, LOG(0.4), LOG(0.6), 1.0))
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
    values = values.settled(
        prior_strength=2.0, sweeps=1
    )  # leaves first: a takes two observations of what the root holds now
    rest = (math.exp(2) + 2 * f_a) / 3
    assert math.exp(values.log_value[a]) == pytest.approx(0.4 * math.exp(2) + 0.6 * rest)


def test_a_closed_branch_is_open_no_more_whatever_is_finished_later():
    tree, values, _ = two_leaves(2.0)
    node = tree.add(ROOT, 3, LOG(0.1), LOG(0.1))
    values.close(node)
    rest = (math.exp(2) + 1) / 2
    assert math.exp(values.log_open[ROOT]) == pytest.approx(0.1 * rest) and values.log_open[node] == -math.inf
    finish(values, leaf(tree, node, 3, LOG(0.5), LOG(0.5), 0.5))
    assert values.log_open[node] == -math.inf and values.visits.finished[node] == 1
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
        finish(values, leaf(tree, node, 5, LOG(0.5), LOG(0.5), reward))
    values = values.settled(sweeps=50)
    assert values.value(low) <= 0.25 and values.value(high) >= 0.75
    assert values.rest(low) <= 0.25 and values.rest(high) >= 0.75


def test_a_glance_ahead_by_hand():
    """Token 1 (p 0.2) gains 1/2, token 2 (p 0.3) gains 1; lambda 2."""
    tree = Tree()
    tree.earned[ROOT], tree.upper[ROOT] = 0.0, 1.0
    values = SoftValues(tree, 2.0)
    assert values.foresight.tilt(ROOT) == NO_TILT
    values.foresee(ROOT, {1: Gain(LOG(0.2), 0.5), 2: Gain(LOG(0.3), 1.0)})
    mean = 0.2 * math.exp(1) + 0.3 * math.exp(2) + 0.5
    tilt = values.foresight.tilt(ROOT)
    assert tilt.by_token == {1: 1.0, 2: 2.0} and math.exp(tilt.log_mean) == pytest.approx(mean)
    assert math.exp(values.log_rest[ROOT]) == pytest.approx(mean)
    assert values.log_beyond[ROOT] == 0.0  # nothing is known beyond the gain that was foreseen
    child = tree.add(ROOT, 2, LOG(0.3), LOG(0.7))  # no longer unexplored: 0.7 are left
    tilt = values.foresight.tilt(ROOT)
    assert tilt.by_token == {1: 1.0} and math.exp(tilt.log_mean) == pytest.approx((0.2 * math.exp(1) + 0.5) / 0.7)
    tree.promise[child] = 1.0
    tree.earned[child], tree.upper[child] = 1.0, 1.0
    values.grow()
    assert values.value(child) == 1.0
    tree.add(ROOT, 1, LOG(0.2), -math.inf)
    assert values.foresight.tilt(ROOT) == NO_TILT


def test_what_was_foreseen_is_not_expected_twice():
    tree = Tree()
    values = SoftValues(tree, 1.0)
    node = tree.add(ROOT, 1, LOG(0.5), LOG(0.5))
    values.grow()
    values.log_beyond[ROOT] = 3.0
    values.foresee(node, {2: Gain(LOG(0.25), 1.0)})
    foreseen = LOG(0.25 * math.e + 0.75)
    assert values.log_beyond[node] == pytest.approx(3.0 - foreseen)
    assert values.log_rest[node] == pytest.approx(3.0)
    values.foresee(node, {2: Gain(LOG(0.25), 40.0)})  # more than was expected: never below nothing
    assert values.log_beyond[node] == 0.0
