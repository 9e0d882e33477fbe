"""Maximum-entropy tree search: Diffusion Tree Sampling (DTS) and DTS*, on tokens (arXiv 2506.20701).

Both grow one tree and keep the soft values of `dts.softvalue`. DTS spends each rollout where the estimated target
pi* = p exp(lambda r) / Z has the most mass that is not finished yet, so no sequence is drawn twice and the tree's
distribution converges to pi*. DTS* looks for the best sequence: it descends by a sharper target and leaves out what
cannot beat the best reward found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dts.errors import UsageError
from dts.search.lookahead import look_ahead
from dts.search.partition import Partition
from dts.search.sampling import check_size
from dts.search.walkers import BLOCKED, EXPAND, PRUNED, Plain, Walker, rollouts
from dts.settings import Budget
from dts.softvalue import SoftValues, logsumexp
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.loop import Search


@dataclass(frozen=True, slots=True)
class MaxEnt:
    """Maximum-entropy tree search.

    rollouts: finished sequences to spend. reward_scale: lambda >= 0. search: "sample" (DTS) or "best" (`DTS*`).
    explore: share of rollouts that follow p instead of the values (but still finish nothing twice).
    widening: a node that n paths entered may have up to `n ** widening` children (progressive widening, Coulom 2007),
    and one more when all it has are finished, so that paths go deep where others went. 1 lets p alone decide. What is
    not a child keeps its mass and its value all the same, and exploring rollouts ignore the limit.
    sharpness: `DTS*` only, paths are led by the soft values at sharpness times lambda.
    bonus: `DTS*` only. None: children are drawn by those values. A number: the child of the largest value plus PUCT's
    confidence bonus of this weight, in units of the reward range seen so far.
    lookahead: for monotone rewards, how many of the likeliest next tokens of a node are tried on the reward (not on the
    model), so that those that gain are drawn more often; 0 turns it off.
    """

    rollouts: int
    reward_scale: float = 4.0
    search: str = "sample"
    explore: float | None = None
    widening: float = 0.7
    sharpness: float = 8.0
    bonus: float | None = None
    lookahead: int = 16
    name: str = field(default="maxent", init=False)

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)
        if not 0 <= self.reward_scale < math.inf:
            raise UsageError(f"reward_scale={self.reward_scale!r} is not allowed; give a number >= 0")
        if self.search not in ("sample", "best"):
            raise UsageError(f"search={self.search!r} is not known; give 'sample' (DTS) or 'best' (DTS*)")
        if self.explore is not None and not 0 <= self.explore <= 1:
            raise UsageError(f"explore={self.explore!r} is not allowed; give a share from 0 to 1")
        if not 0 < self.widening <= 1:
            raise UsageError(f"widening={self.widening!r} is not allowed; give an exponent above 0 and up to 1")
        if not 0 < self.sharpness < math.inf:
            raise UsageError(f"sharpness={self.sharpness!r} is not allowed; give a number > 0")
        if self.bonus is not None and not 0 <= self.bonus < math.inf:
            raise UsageError(f"bonus={self.bonus!r} is not allowed; give a number >= 0, or None")
        if not isinstance(self.lookahead, int) or self.lookahead < 0:
            raise UsageError(f"lookahead={self.lookahead!r} is not allowed; give a whole number of tokens >= 0")
        if self.search == "best":
            object.__setattr__(self, "name", "maxent-star")

    def batch_size(self) -> int:
        """A quarter of the rollouts, so that later paths learn from earlier ones, but at least 4: a step of few paths
        costs nearly what a step of one does."""
        return min(16, max(4, self.rollouts // 4), self.rollouts)

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def exploring(self) -> float:
        """`explore`, or what its default stands for."""
        if self.explore is not None:
            return self.explore
        return 0.35 if self.search == "sample" else 0.1

    def plan(self, search: Search) -> Iterator[Sequence[int]]:
        search.values = SoftValues(search.tree, self.reward_scale)
        if self.search == "best":
            guide = SoftValues(search.tree, self.sharpness * self.reward_scale)
            return rollouts(search, _Best(guide, search.values, self))
        explore = self.exploring()
        search.partition = Partition(search.tree, self.reward_scale, (1 - explore, explore), search.budget.rollouts)
        return rollouts(search, _Boltzmann(search.values, search.partition, self))


class _Boltzmann(Plain):
    """Follow the estimated target, restricted to what is not finished: p(a|s) exp F_open(sa), rest u(s) exp G(s).

    A share of the paths follows p instead, so that no sequence is left out for a wrong early estimate.
    """

    distinct = True

    def __init__(self, values: SoftValues, partition: Partition, settings: MaxEnt) -> None:
        self._values, self._partition, self._settings = values, partition, settings

    def arrived(self, search: Search, nodes: Sequence[int]) -> None:
        look_ahead(search, self._values, nodes, self._settings.lookahead)

    def select(self, walker: Walker) -> int:
        node, values = walker.node, self._values
        choices = _open_children(values, node)
        if node == ROOT:
            walker.explores = walker.rng.random() < self._settings.exploring()
            self._partition.start(walker)
        assert walker.draw is not None
        allowed = _may_widen(values, node, choices, self._settings.widening)
        choices, by_p, by_value = _weights(values, node, choices, True, allowed)
        if not choices:
            self._partition.give_up(walker.draw)
            return BLOCKED
        index = draw_index(range(len(choices)), by_p if walker.explores else by_value, walker.rng.random())
        walker.draw.chose(by_p[index], [w[index] - logsumexp(w) for w in (by_value, by_p)])
        return _enter(values, choices[index])

    def expand(self, search: Search, walkers: Sequence[Walker]) -> list[int]:
        tilts = [self._values.tilt(walker.node) for walker in walkers]
        children = _tilted_draw(search, walkers, [tilt for tilt, _ in tilts])
        for walker, child, (tilt, log_mean) in zip(walkers, children, tilts, strict=True):
            assert walker.draw is not None
            walker.draw.chose(0.0, [tilt.get(search.tree.token[child], 0.0) - log_mean, 0.0])
        return children

    def finish(self, walker: Walker) -> None:
        assert walker.draw is not None
        self._partition.finish(walker.draw, walker.node)
        self._values.finish(walker.node)


class _Best(Plain):
    """The same descent by sharper values, among what can still beat the best reward found; or by the largest value plus
    a confidence bonus. What cannot beat it is closed, as are finished subtrees."""

    distinct = True

    def __init__(self, guide: SoftValues, values: SoftValues, settings: MaxEnt) -> None:
        self._guide, self._values, self._settings = guide, values, settings
        self._low, self._high = math.inf, -math.inf  # rewards seen

    def arrived(self, search: Search, nodes: Sequence[int]) -> None:
        look_ahead(search, self._guide, nodes, self._settings.lookahead)

    def select(self, walker: Walker) -> int:
        node, guide, settings = walker.node, self._guide, self._settings
        children = _open_children(guide, node)
        if node == ROOT:
            walker.explores = walker.rng.random() < settings.exploring()
        if guide.log_open[node] == -math.inf:
            return BLOCKED
        children = [child for child in children if guide.tree.upper[child] > self._high]
        promising = guide.tree.upper[node] > self._high
        allowed = promising and _may_widen(guide, node, children, settings.widening)
        choices, by_p, by_value = _weights(guide, node, children, promising, allowed)
        if not choices:
            guide.close(node)
            return PRUNED
        if walker.explores or settings.bonus is None:
            return _enter(guide, draw_index(choices, by_p if walker.explores else by_value, walker.rng.random()))
        return _enter(guide, self._by_bound(node, children, allowed, settings.bonus))

    def _by_bound(self, node: int, children: list[int], allowed: bool, bonus: float) -> int:
        guide, tree = self._guide, self._guide.tree
        weight = bonus * math.sqrt(guide.entered[node])
        scores = [
            self._scaled(guide.value(child)) + weight * math.exp(tree.log_p[child]) / (1 + guide.entered[child])
            for child in children
        ]
        choices = list(children)
        if allowed:
            choices.append(EXPAND)
            extra = weight * math.exp(tree.log_unexplored[node]) / (1 + tree.n_children[node])
            scores.append(self._scaled(guide.rest(node)) + extra)
        return choices[scores.index(max(scores))]

    def _scaled(self, value: float) -> float:
        return (value - self._low) / (self._high - self._low) if self._high > self._low else 0.0

    def expand(self, search: Search, walkers: Sequence[Walker]) -> list[int]:
        return _tilted_draw(search, walkers, [self._guide.tilt(walker.node)[0] for walker in walkers])

    def pruned(self, walker: Walker) -> bool:
        if self._guide.tree.upper[walker.node] > self._high:
            return False
        self._guide.close(walker.node)
        return True

    def finish(self, walker: Walker) -> None:
        reward = self._guide.tree.reward[walker.node]
        self._low, self._high = min(self._low, reward), max(self._high, reward)
        self._guide.finish(walker.node)
        self._values.finish(walker.node)


def _open_children(values: SoftValues, node: int) -> list[int]:
    """Children below which something is left to finish."""
    values.grow()
    if node == ROOT:
        values.entered[ROOT] += 1
    return [child for child in values.tree.children(node) if values.log_open[child] > -math.inf]


def _may_widen(values: SoftValues, node: int, open_children: list[int], widening: float) -> bool:
    tree = values.tree
    if tree.log_unexplored[node] == -math.inf:
        return False
    return not open_children or tree.n_children[node] < values.entered[node] ** widening


def _weights(
    values: SoftValues, node: int, children: list[int], rest: bool, allowed: bool
) -> tuple[list[int], list[float], list[float]]:
    """The choices at a node, their logs of p, and those of p exp F over what is open. With `rest`, what is no child yet
    is a choice; unless `allowed`, only for paths that follow p."""
    tree, choices = values.tree, list(children)
    by_p = [tree.log_p[child] for child in children]
    by_value = [log_p + values.log_open[child] for log_p, child in zip(by_p, children, strict=True)]
    if rest and tree.log_unexplored[node] > -math.inf:
        choices.append(EXPAND)
        by_p.append(tree.log_unexplored[node])
        by_value.append(tree.log_unexplored[node] + values.log_rest[node] if allowed else -math.inf)
    return choices, by_p, by_value


def _tilted_draw(search: Search, walkers: Sequence[Walker], tilts: Sequence[dict[int, float]]) -> list[int]:
    """New children: tilted by what a look-ahead found, or from p alone for paths that follow it."""
    factors = [{} if walker.explores else tilt for walker, tilt in zip(walkers, tilts, strict=True)]
    return search.draw([w.node for w in walkers], [w.rng.random() for w in walkers], factors)


def _enter(values: SoftValues, choice: int) -> int:
    """Count a path into the child it chose: at once, so that paths decoded together spread out."""
    if choice >= 0:
        values.entered[choice] += 1
    return choice


def draw_index(choices: Sequence[int], log_weights: Sequence[float], uniform: float) -> int:
    """One of `choices` with probability proportional to exp(log_weights)."""
    top = max(log_weights)
    weights = [math.exp(w - top) for w in log_weights]
    left = uniform * math.fsum(weights)
    for choice, weight in zip(choices, weights, strict=True):
        left -= weight
        if left < 0:
            return choice
    return choices[weights.index(max(weights))]  # rounding left a sliver
