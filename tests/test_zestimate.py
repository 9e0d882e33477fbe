"""The estimate of Z, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import LOG, leaf

from dts.results import LogZ
from dts.search.maxent.zestimate import Partition, Trace, _hall_interval
from dts.search.paths import Path
from dts.tree import ROOT, Tree


def test_the_weight_of_a_path():
    trace = Trace(0, -math.inf, log_q=[LOG(0.75), LOG(0.25)])
    assert trace.log_weight == pytest.approx(0.0)
    trace.chose(LOG(0.5), [LOG(0.2), LOG(0.6)])
    assert math.exp(trace.log_weight) == pytest.approx(0.5 / (0.75 * 0.2 + 0.25 * 0.6))
    trace.chose(LOG(0.1), [LOG(0.5), LOG(0.1)])
    assert math.exp(trace.log_weight) == pytest.approx(0.05 / (0.75 * 0.1 + 0.25 * 0.06))


def start(partition: Partition) -> tuple[Path, Trace]:
    path = Path(np.random.default_rng(0))
    return path, partition.start(path)


def partition_of_two() -> tuple[Partition, Tree, list[tuple[Path, Trace]], list[int]]:
    """Two paths at the node after token 1 (p 0.5); below it leaves with p 0.4 and 0.6. lambda 2, rewards 0.5 and 1."""
    tree = Tree()
    node = tree.add(ROOT, 1, LOG(0.5), LOG(0.5))
    leaves = [leaf(tree, node, 2, LOG(0.4), LOG(0.6), 0.5), leaf(tree, node, 3, LOG(0.6), -math.inf, 1.0)]
    partition = Partition(tree, 2.0, (1.0, 0.0), None)
    started = [start(partition) for _ in range(2)]
    for path, trace in started:
        path.node = node
        trace.chose(LOG(0.5), [LOG(0.8), -math.inf])
    return partition, tree, started, leaves


def test_a_path_is_credited_with_what_another_finished_below_it():
    partition, _, ((first, one_trace), (second, two_trace)), leaves = partition_of_two()
    assert partition.log_z(exhausted=False) == LogZ(-math.inf, math.inf, (-math.inf, math.inf))
    first.node = leaves[0]
    one_trace.chose(LOG(0.4), [LOG(0.5), -math.inf])
    partition.close(one_trace, leaves[0])
    one = 0.2 / 0.4 * math.exp(1)
    found = partition.log_z(exhausted=False)
    assert math.exp(found.value) == pytest.approx(one) and found.error == math.inf
    assert found.interval == (-math.inf, math.inf)
    credit = 0.5 / 0.8 * 0.4 * math.exp(1)
    second.node = leaves[1]
    two_trace.chose(LOG(0.6), [LOG(1.0), -math.inf])
    partition.close(two_trace, leaves[1])
    two = credit + 0.3 / 0.8 * math.exp(2)
    found = partition.log_z(exhausted=False)
    assert math.exp(found.value) == pytest.approx((one + two) / 2) and found.error == math.inf
    known = partition.log_z(exhausted=True)
    truth = LOG(0.5 * 0.4 * math.exp(1) + 0.5 * 0.6 * math.exp(2))
    assert known.value == pytest.approx(truth) and known.error == 0.0 and known.interval == (known.value,) * 2


def test_a_path_that_gives_up_keeps_its_credits():
    partition, _, ((first, one_trace), (_, two_trace)), leaves = partition_of_two()
    first.node = leaves[0]
    one_trace.chose(LOG(0.4), [LOG(0.4), -math.inf])
    partition.close(one_trace, leaves[0])
    partition.give_up(two_trace)
    one, credit = 0.5 / 0.8 * math.exp(1), 0.5 / 0.8 * 0.4 * math.exp(1)
    assert math.exp(partition.log_z(exhausted=False).value) == pytest.approx((one + credit) / 2)
    third, three_trace = start(partition)  # starts when the first leaf is known
    third.node = leaves[1]
    three_trace.chose(LOG(0.3), [LOG(0.3), -math.inf])
    partition.close(three_trace, leaves[1])
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
    started = [start(partition) for _ in range(4)]
    for _, trace in started:
        trace.chose(LOG(0.5), [0.0])
    started[1][0].node = node
    partition.close(started[1][1], node)
    assert partition.log_z(exhausted=False).error == math.inf  # the first is under way
    for _, trace in (started[0], started[2], started[3]):
        partition.give_up(trace)
    # Each of the others stood above the leaf, at the root, with weight 1/2: credited with 1/2 x 1/2. Only two count.
    found = partition.log_z(exhausted=False)
    assert math.exp(found.value) == pytest.approx((0.25 + 0.5) / 2)


def test_equal_draws_leave_no_doubt():
    tree = Tree()
    node = leaf(tree, ROOT, 1, LOG(0.5), LOG(0.5), 3.0)
    partition = Partition(tree, 0.0, (1.0,), None)
    for _ in range(2):
        _, trace = start(partition)
        trace.known = -math.inf
        trace.chose(LOG(0.5), [LOG(0.5)])
        partition.close(trace, node)
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
