"""Diffusion Tree Sampling as in its paper, moved to tokens unchanged: the row that shows what our estimator adds.

Children are draws from p with repetition, a node's value is the log-mean over its draws (arXiv 2506.20701, eq. 8), a
path descends by the Boltzmann weights of those values and adds a draw while a node has fewer than C n^alpha of them.
Neither p(a|s) nor unexplored mass is used, and finished sequences are visited again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dts.logspace import draw, logsumexp
from dts.results import Estimate, LogZ
from dts.search import GeneratorRun, Run, Search
from dts.search.choice import Choice
from dts.search.paths import Path, Plain, rollouts
from dts.search.readings import Readings
from dts.search.sampling import Ancestral, check_size
from dts.settings import Budget
from dts.softvalue import log_factor
from dts.tree import NONE, ROOT


@dataclass(frozen=True, slots=True)
class PlainDTS:
    """rollouts: paths to walk; reward_scale: lambda; widening: C and alpha."""

    rollouts: int
    reward_scale: float = 4.0
    widening: tuple[float, float] = (2.0, 0.5)

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)

    @property
    def name(self) -> str:
        return "plain-dts"

    def batch_size(self) -> int:
        return 1

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def start(self, search: Search) -> Run:
        policy = _Policy(search, self)
        return GeneratorRun(search, rollouts(search, policy), estimate=policy.estimate)


class _Policy(Plain):
    def __init__(self, search: Search, settings: PlainDTS) -> None:
        super().__init__(search)
        self._settings, self._ancestral = settings, Ancestral(search)
        self._draws: dict[int, int] = {}  # times that a node was drawn as a child
        self._entered: dict[int, int] = {}
        self._value: dict[int, float] = {}  # lambda V of nodes below which something is finished

    def select(self, path: Path) -> int | Choice:
        node = path.node
        entered = self._entered[node] = self._entered.get(node, 0) + 1
        children = self._known_children(node)
        drawn = sum(self._draws[child] for child in children)
        factor, exponent = self._settings.widening
        if not children or drawn < factor * entered**exponent:
            choice = self._ancestral.select(path)  # p, over children and the rest alike
            if not isinstance(choice, Choice):
                self._draws[choice] += 1
            return choice
        weights = [math.log(self._draws[child]) + self._value[child] for child in children]
        return draw(children, weights, path.rng.random())

    def _known_children(self, node: int) -> list[int]:
        return [child for child in self.search.tree.children(node) if child in self._value]

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        children = yield from super().expand(paths)
        self._draws |= dict.fromkeys(children, 1)
        return children

    def learn(self, path: Path) -> None:
        tree, node = self.search.tree, path.node
        self._value[node] = log_factor(self._settings.reward_scale, tree.reward[node])
        node = tree.parent[node]
        while node != NONE:
            children = self._known_children(node)
            counts = [self._draws[child] for child in children]
            terms = [math.log(n) + self._value[child] for n, child in zip(counts, children, strict=True)]
            self._value[node] = logsumexp(terms) - math.log(sum(counts))
            node = tree.parent[node]

    def estimate(self) -> Estimate | None:
        """Z alone: the values of draws with repetition say nothing of the sequences themselves."""
        return Estimate(LogZ(self._value[ROOT])) if ROOT in self._value else None
