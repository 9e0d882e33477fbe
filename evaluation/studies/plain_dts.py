"""Diffusion Tree Sampling as in its paper, moved to tokens unchanged: the row that shows what our estimator adds.

Children are draws from p with repetition, a node's value is the log-mean over its draws (arXiv 2506.20701, eq. 8), a
path descends by the Boltzmann weights of those values and adds a draw while a node has fewer than C n^alpha of them.
Neither p(a|s) nor unexplored mass is used, and finished sequences are visited again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dts.search.maxent import draw_index
from dts.search.sampling import Ancestral, check_size
from dts.search.walkers import EXPAND, Plain, Walker, rollouts
from dts.settings import Budget
from dts.softvalue import logsumexp
from dts.tree import NONE

if TYPE_CHECKING:
    from dts.search.loop import Search


@dataclass(frozen=True, slots=True)
class PlainDTS:
    """rollouts: paths to walk; reward_scale: lambda; widening: C and alpha."""

    rollouts: int
    reward_scale: float = 4.0
    widening: tuple[float, float] = (2.0, 0.5)
    name: str = "plain-dts"

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)

    def batch_size(self) -> int:
        return 1

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def plan(self, search: Search) -> Iterator[Sequence[int]]:
        return rollouts(search, _Policy(search, self))


class _Policy(Plain):
    def __init__(self, search: Search, settings: PlainDTS) -> None:
        self._search, self._settings = search, settings
        self._ancestral = Ancestral(search.tree)
        self._draws: dict[int, int] = {}  # times that a node was drawn as a child
        self._entered: dict[int, int] = {}
        self._value: dict[int, float] = {}  # lambda V of nodes below which something is finished

    def select(self, walker: Walker) -> int:
        tree, node = self._search.tree, walker.node
        entered = self._entered[node] = self._entered.get(node, 0) + 1
        children = [child for child in tree.children(node) if child in self._value]
        drawn = sum(self._draws[child] for child in children)
        factor, exponent = self._settings.widening
        if not children or drawn < factor * entered**exponent:
            choice = self._ancestral.select(walker)  # p, over children and the rest alike
            if choice != EXPAND:
                self._draws[choice] += 1
            return choice
        weights = [math.log(self._draws[child]) + self._value[child] for child in children]
        return draw_index(children, weights, walker.rng.random())

    def expand(self, search: Search, walkers: Sequence[Walker]) -> list[int]:
        children = super().expand(search, walkers)
        self._draws |= dict.fromkeys(children, 1)
        return children

    def finish(self, walker: Walker) -> None:
        tree, node = self._search.tree, walker.node
        self._value[node] = self._settings.reward_scale * tree.reward[node]
        node = tree.parent[node]
        while node != NONE:
            children = [child for child in tree.children(node) if child in self._value]
            counts = [self._draws[child] for child in children]
            terms = [math.log(n) + self._value[child] for n, child in zip(counts, children, strict=True)]
            self._value[node] = logsumexp(terms) - math.log(sum(counts))
            node = tree.parent[node]
        self._search.log_weights = {node: self._value[0]}  # its estimate of log Z
