"""Where DTS* leaves the tree: the Gaussian process over texts, against its definition, and searches that use it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

import dts
from dts.errors import UsageError
from dts.evaluation.studies.instances import PROMPT, instance
from dts.search import MaxEnt
from dts.search.maxent.branching import FEWEST_TEXTS, MOST_TEXTS, NUGGET, Brancher, Errors, SharedPrefixes
from dts.tree import ROOT, Tree

LONGEST = 8


def grown(texts: list[list[int]], rewards: list[float]) -> tuple[Tree, list[int]]:
    """A tree that holds these token sequences, all of whose inner nodes were forwarded."""
    tree, leaves = Tree(), []
    for text, reward in zip(texts, rewards, strict=True):
        node = ROOT
        for token in text:
            tree.slot[node] = 0
            child = tree.child_with(node, token)
            node = child if child > 0 else tree.add(node, token, math.log(0.4), math.log(0.3))
        tree.terminal[node], tree.reward[node] = 1, reward
        leaves.append(node)
    return tree, leaves


TEXTS = [[1] * 8, [1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 3, 3, 3, 3, 3, 3], [4] * 8, [4, 4, 4, 4, 4, 4, 5], [6] * 8]
REWARDS = [0.9, 0.7, 0.4, 0.1, 0.2, 0.5]


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_the_process_gives_the_posterior_of_its_kernel():
    tree, leaves = grown(TEXTS, REWARDS)
    texts = SharedPrefixes(LONGEST)
    for leaf in leaves:
        texts.add(tree.path(leaf), tree.reward[leaf])
    exponent, mean, variance, _ = texts._fit()
    found, scaled = texts.prefixes(), (np.array(REWARDS) - 0.1) / 0.8
    assert texts.scaled(REWARDS) == pytest.approx(scaled)
    kernel = np.array([[(shared(a, b) / LONGEST) ** exponent for b in TEXTS] for a in TEXTS])
    np.fill_diagonal(kernel, 1 + NUGGET)
    assert found.nodes.tolist()[0] == ROOT and len(set(found.nodes.tolist())) == len(found.nodes)
    inner = [node for node in range(1, len(tree)) if tree.n_children[node]]
    assert sorted(found.nodes.tolist()[1:]) == inner
    for node, depth, value, spread, fresh in zip(
        found.nodes, found.depths, found.means, found.variances, found.fresh, strict=True
    ):
        if node == ROOT:
            assert (value, fresh) == (pytest.approx(mean), pytest.approx(variance))
            continue
        prefix = list(tree.tokens(int(node)))
        cross = np.array([(shared(prefix, text) / LONGEST) ** exponent for text in TEXTS])
        solved = np.linalg.solve(kernel, cross)
        assert value == pytest.approx(mean + solved @ (scaled - mean))
        own = (depth / LONGEST) ** exponent
        assert spread == pytest.approx(variance * (own - solved @ cross), abs=1e-12)
        assert fresh == pytest.approx(variance * (1 - own))


def slow_prefixes(process: SharedPrefixes) -> dict[int, tuple[float, float, float]]:
    """Mean, variance and fresh variance by node: the process conditioned on all texts, prefix by prefix."""
    exponent, mean, variance, inverse = process._fit()
    weights = inverse @ (process.scaled(process.rewards) - mean)
    found = {}
    for nodes, shared in zip(process._nodes, process._shared, strict=True):
        for depth in range(1, shared.max()):
            both = (np.minimum(depth, shared) / LONGEST) ** exponent
            own = (depth / LONGEST) ** exponent
            spread = variance * max(own - both @ inverse @ both, 0.0)
            found[int(nodes[depth - 1])] = (mean + both @ weights, spread, variance * (1 - own))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_what_is_computed_by_segments_is_what_each_prefix_gives(seed):
    rng = np.random.default_rng(seed)
    drawn = [tuple(rng.integers(0, 3, rng.integers(1, LONGEST + 1)).tolist()) for _ in range(90)]
    texts = [t for t in dict.fromkeys(drawn) if not any(o != t and o[: len(t)] == t for o in drawn)]  # only leaves
    tree, leaves = grown(list(map(list, texts)), rng.normal(size=len(texts)).tolist())
    process = SharedPrefixes(LONGEST)
    for leaf in leaves:
        process.add(tree.path(leaf), tree.reward[leaf])
    found, expected = process.prefixes(), slow_prefixes(process)
    assert sorted(found.nodes.tolist()) == sorted([ROOT, *expected]) and len(expected) > 60
    for row in zip(found.nodes.tolist(), found.means, found.variances, found.fresh, strict=True):
        if row[0] != ROOT:
            assert row[1:] == pytest.approx(expected[row[0]], abs=1e-9, rel=1e-9)


@pytest.mark.parametrize(("alike_until", "exponents"), [(2, (0.25, 0.5)), (7, (2.0, 4.0))])
def test_the_exponent_follows_from_where_texts_that_share_more_become_alike(alike_until, exponents):
    """Rewards that the first tokens decide, and rewards that the last ones decide."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 2, 8).tolist() for _ in range(60)]
    texts = list(map(list, dict.fromkeys(map(tuple, drawn))))
    rewards = {prefix: float(rng.normal()) for prefix in {tuple(t[:alike_until]) for t in texts}}
    tree, leaves = grown(texts, [rewards[tuple(t[:alike_until])] for t in texts])
    process = SharedPrefixes(LONGEST)
    for leaf in leaves:
        process.add(tree.path(leaf), tree.reward[leaf])
    assert process._fit()[0] in exponents


def test_a_branch_point_is_drawn_by_expected_improvement_for_its_tokens():
    tree, leaves = grown(TEXTS, REWARDS)
    brancher = Brancher(tree, LONGEST, predicted=False)
    for leaf in leaves:
        brancher.learn(leaf, 0)
    found = brancher._texts.prefixes()
    spread = np.sqrt(found.variances + found.fresh)
    z = (found.means - 1.0) / spread  # in units of the rewards, 0.9 is the highest
    worth = spread * (norm.pdf(z) + z * norm.cdf(z)) * [math.exp(tree.log_unexplored[n]) for n in found.nodes.tolist()]
    worth = (worth / (LONGEST - found.depths)) ** 2
    bounds = np.cumsum(worth) / worth.sum()
    for uniform in np.linspace(0.001, 0.999, 97):
        expected = int(found.nodes[np.searchsorted(bounds, uniform)])
        assert brancher.choose(0.9, lambda node: True, float(uniform)) == expected
    best_path = set(tree.path(leaves[0]))
    assert sum(worth[i] for i, n in enumerate(found.nodes.tolist()) if n in best_path) > 0.5 * worth.sum()


def test_only_nodes_that_are_open_are_chosen_and_none_where_nothing_is_known():
    tree, leaves = grown(TEXTS, REWARDS)
    brancher = Brancher(tree, LONGEST, predicted=False)
    for count, leaf in enumerate(leaves):
        assert (brancher.choose(0.9, lambda node: True, 0.5) is None) == (count < FEWEST_TEXTS)
        brancher.learn(leaf, 0)
    assert all(brancher.choose(0.9, lambda node: node == 5, u) == 5 for u in (0.0, 0.5, 0.999))
    assert brancher.choose(0.9, lambda node: False, 0.5) is None
    equal, leaves = grown(TEXTS, [0.3] * 6)
    flat = Brancher(equal, LONGEST, predicted=False)
    for leaf in leaves:
        flat.learn(leaf, 0)
    assert flat.choose(0.3, lambda node: True, 0.5) is None


def test_a_precise_value_model_is_believed_and_a_wrong_one_is_not():
    tree, leaves = grown(TEXTS, REWARDS)
    for precise in (True, False):
        brancher = Brancher(tree, LONGEST, predicted=True)
        for node in range(1, len(tree)):
            below = [REWARDS[i] for i, leaf in enumerate(leaves) if node in tree.path(leaf)]
            tree.promise[node] = below[0] if precise else 1 - below[0]
        for leaf in leaves:
            brancher.learn(leaf, 0)
        found = brancher._texts.prefixes()
        means, variances = brancher._both_opinions(found)
        promises = brancher._texts.scaled([tree.promise[n] for n in found.nodes.tolist()[1:]])
        pull = (means[1:] - found.means[1:]) / (promises - found.means[1:])
        assert np.all(variances <= found.variances)
        assert np.mean(pull) > 0.5 if precise else np.mean(pull) < 0.2


def test_errors_count_each_text_once_and_begin_at_the_prior():
    errors = Errors(8)
    depths = np.array([1.0, 2.0, 3.0, 4.0])
    prior = np.full(4, 0.5)
    assert errors.variances(depths, prior).tolist() == [0.5] * 4
    errors.add(depths, np.array([1.0, 1.0, 2.0, 2.0]))
    assert errors.variances(np.array([1.0, 3.0, 7.0]), np.full(3, 0.5)) == pytest.approx(
        [(0.25 * 1 + 1.0) / 2.25, (0.25 * 4 + 1.0) / 2.25, 0.5]
    )


def test_more_texts_than_the_process_keeps_leave_the_best():
    process, rng = SharedPrefixes(3), np.random.default_rng(1)
    tree, leaves = grown(
        [[a, b, c] for a in range(6) for b in range(6) for c in range(6)], rng.uniform(size=216).tolist()
    )
    for leaf in leaves:
        process.add(tree.path(leaf), tree.reward[leaf])
    highest = sorted(tree.reward[leaf] for leaf in leaves)[-MOST_TEXTS + 1 :]  # the newest stays for one more
    assert len(process.rewards) == MOST_TEXTS and set(highest) <= set(process.rewards)
    assert len(process.prefixes().nodes) > 1


@pytest.mark.parametrize("branch", ["values", "improvement"])
def test_the_best_sequence_is_found_whatever_decides_where_to_branch(branch):
    case = instance(2, vocab_size=4, horizon=4)
    method = MaxEnt(10**4, search="best", branch=branch)
    result = dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=4, seed=0)
    assert result.best.reward == pytest.approx(case.rewards.max()) and not result.partial
    leaves = [rollout.leaf for rollout in result.rollouts]
    assert len(leaves) == len(set(leaves)) == len(case.sequences)


def test_over_long_texts_paths_branch_late_where_the_last_tokens_decide():
    """The reward is the share of a token in the text: what is earned early stays."""

    def share(text: str) -> float:
        return text.split().count("3") / 30

    case = instance(0, vocab_size=6, horizon=1, eos=None)
    depths = {}
    for branch in ("values", "improvement"):
        method = MaxEnt(60, search="best", branch=branch, values=None, greedy=False)
        result = dts.decode(case.lm, PROMPT, reward=share, method=method, max_new_tokens=30, seed=0, batch_size=2)
        starts = [rollout.start_depth / rollout.length for rollout in result.rollouts]
        depths[branch] = float(np.mean([start > 0.25 for start in starts])), result.best.reward
    assert depths["improvement"][0] >= 0.5 > depths["values"][0]
    assert depths["improvement"][1] > depths["values"][1]


def test_an_unknown_branch_is_refused():
    with pytest.raises(UsageError, match="branch='deep' is not known; give 'values', 'improvement' or None"):
        MaxEnt(8, search="best", branch="deep")


@pytest.mark.parametrize("scale", [1e-310, 1e-12, 1.0, 1e90, 1e160, 1.6e308])
@pytest.mark.parametrize("predicted", [False, True])
def test_branch_points_do_not_depend_on_the_unit_of_the_rewards(scale, predicted):
    tree, leaves = grown(TEXTS, [(reward - 0.5) * scale for reward in REWARDS])
    brancher = Brancher(tree, LONGEST, predicted=predicted and scale == 1.0)
    for leaf in leaves:
        brancher.learn(leaf, 0)
    plain, leaves = grown(TEXTS, [reward - 0.5 for reward in REWARDS])
    other = Brancher(plain, LONGEST, predicted=predicted and scale == 1.0)
    for leaf in leaves:
        other.learn(leaf, 0)
    for uniform in np.linspace(0.01, 0.99, 23):
        chosen = brancher.choose(0.4 * scale, lambda node: True, float(uniform))
        assert chosen == other.choose(0.4, lambda node: True, float(uniform))


@pytest.mark.parametrize("scale", [1e-310, 1e-9, 1e150, 1e160, 1e300])
def test_the_best_is_found_for_rewards_of_any_size(scale):
    case = instance(2, vocab_size=4, horizon=4)
    method = MaxEnt(10**4, search="best", reward_scale=0.0 if scale > 1e200 else 1.0)

    def reward(text: str) -> float:
        return case.reward(text) * scale

    result = dts.decode(case.lm, PROMPT, reward=reward, method=method, max_new_tokens=4, seed=0)
    assert result.best.reward == pytest.approx(case.rewards.max() * scale)
