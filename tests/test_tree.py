"""The tree, against a small one made by hand."""

from __future__ import annotations

import math

import pytest
from toys import LOG, leaf

from dts.tree import NONE, ROOT, Tree


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
