"""Draws by weights and ancestral draws, against numbers worked out by hand."""

from __future__ import annotations

import math

from toys import LOG, Uniforms

from dts.foresight import Foresight, Gain
from dts.logspace import draw
from dts.search.choice import Choice
from dts.search.maxent.lookahead import LookAhead
from dts.search.maxent.target import Onward
from dts.search.paths import Path
from dts.search.sampling import Ancestral
from dts.tree import ROOT, Tree


def test_a_draw_by_weights():
    weights = [LOG(1.0), LOG(2.0), -math.inf, LOG(1.0)]
    assert [draw("abcd", weights, u) for u in (0.0, 0.24, 0.26, 0.74, 0.76, 0.999)] == list("aabbdd")
    assert draw("abcd", weights, 1.0) == "b"  # rounding left a sliver: the largest
    assert draw("ab", [-1000.0, -1001.0], 0.5) == "a"


class Grown:
    """As much of a search as these draws look at."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def drafted(self, node):
        """No engine."""


def test_ancestral_draws_walk_the_children_by_their_own_p():
    tree = Tree()
    a, b = tree.add(ROOT, 1, LOG(0.5), LOG(0.5)), tree.add(ROOT, 2, LOG(0.25), LOG(0.25))
    policy = Ancestral(Grown(tree))
    chosen = [policy.select(Path(Uniforms(u))) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.99)]
    assert chosen == [a, a, b, b, Choice.EXPAND, Choice.EXPAND]
    assert policy.select(Path(Uniforms(0.5))) == b  # a has what is below 0.5
    assert policy.select(Path(Uniforms(), node=a)) == Choice.EXPAND  # no children: no number is needed
    c = tree.add(ROOT, 3, LOG(0.25 - 1e-9), -math.inf)
    assert policy.select(Path(Uniforms(1 - 1e-12))) == c  # every token is a child, rounding left a sliver


def test_draws_beyond_the_tree_leave_its_children_and_weigh_the_others_by_what_they_gain():
    tree = Tree()
    tree.add(ROOT, 1, LOG(0.5), LOG(0.5))
    b, c = tree.add(ROOT, 2, LOG(0.2), LOG(0.3)), tree.add(ROOT, 3, LOG(0.1), LOG(0.2))
    foresight = Foresight(tree, 2.0)
    policy = Onward(Grown(tree), b, foresight, LookAhead(Grown(tree), None, 0))
    chosen = [policy.select(Path(Uniforms(u))) for u in (0.0, 0.39, 0.41, 0.59, 0.61, 0.99)]
    assert chosen == [b, b, c, c, Choice.EXPAND, Choice.EXPAND]  # 0.2, 0.1 and 0.2 of 0.5
    foresight.learn(ROOT, {3: Gain(LOG(0.1), LOG(2.0) / 2), 4: Gain(LOG(0.05), LOG(3.0) / 2)})  # factors 2 and 3
    chosen = [policy.select(Path(Uniforms(u))) for u in (0.28, 0.29, 0.57, 0.58, 0.99)]
    assert chosen == [b, c, c, Choice.EXPAND, Choice.EXPAND]  # 0.2, 0.2 and 0.15 + 3 * 0.05 of 0.7
