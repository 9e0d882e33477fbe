"""The tree's estimate of pi*: shares of what was finished, and draws that the model continues where the tree ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dts.foresight import Foresight
from dts.logspace import draw, logsumexp
from dts.results import Completion, Estimate, LogZ
from dts.search import readings
from dts.search.choice import Choice
from dts.search.maxent.lookahead import LookAhead
from dts.search.paths import Path, Plain, advance
from dts.search.readings import Readings, alone
from dts.softvalue import SoftValues
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.search import Search

MOST_LOST = 100  # draws outside the target, for each that is wanted


def tree_estimate(search: Search, values: SoftValues, log_z: LogZ | None, ahead: LookAhead) -> Estimate:
    """The estimate of the target by the soft values on a tree, made to agree with each other first."""
    settled = values.settled()
    logs = settled.log_shares()
    total = logsumexp(list(logs.values()))
    shares = {leaf: math.exp(log - total) for leaf, log in logs.items()}
    return Estimate(log_z, shares, functools.partial(_draw, search, settled, ahead), settled)


def _draw(search: Search, values: SoftValues, ahead: LookAhead, k: int, seed: int) -> list[Completion]:
    """k independent draws. New tokens go into a fork of the search, one for each call, so the tree that the estimate is
    about stays as it is and equal seeds give equal draws."""
    if values.log_value[ROOT] == -math.inf:
        raise RuntimeError(f"no completion in the target {search.target} was found; raise the budget")
    paths = [_leave_tree(values, Path(np.random.default_rng([seed, 1, index]))) for index in range(k)]
    fork, known = search.fork(), values.tree
    policy = Onward(fork, len(known), values.foresight.on(fork.tree), ahead.on(fork))
    waiting = [path for path in paths if not known.terminal[path.node]]
    active: list[Path] = []
    lost = 0

    def end(ended: Sequence[Path]) -> None:
        """Score those in the target; the others begin again."""
        nonlocal lost
        inside = [path for path in ended if not fork.tree.outside[path.node]]
        fork.score([path.node for path in inside])
        again = [path for path in ended if fork.tree.outside[path.node]]
        lost += len(again)
        if lost > MOST_LOST * k:
            raise RuntimeError(
                f"of {lost} draws that left the tree none or few were in the target {search.target}; search for longer"
            )
        waiting.extend(path for path in again if not known.terminal[_leave_tree(values, path).node])

    while waiting or active:
        while waiting and len(active) < fork.batch_size:
            active.append(waiting.pop(0))
        active = alone(advance(fork, policy, active, end))
        if active:
            nodes = list(dict.fromkeys(path.node for path in active))
            fork.evaluate(nodes)
            fork.measure(nodes)
            alone(policy.arrived(nodes))
    return [fork.completion(path.node) for path in paths]


class Onward(Plain):
    """Independent draws from where the tree ends: p times exp(lambda gain), as far as a look-ahead sees gains."""

    def __init__(self, fork: Search, explored: int, foresight: Foresight, ahead: LookAhead) -> None:
        super().__init__(fork)
        self._explored, self._foresight, self._ahead = explored, foresight, ahead

    def arrived(self, nodes: Sequence[int]) -> Readings[None]:
        found = yield from self._ahead.gains(nodes)
        for node, gains in found.items():
            self._foresight.learn(node, gains)

    def select(self, path: Path) -> int | Choice:
        """A child that another draw has made, or a new one. Children from before are left: the draw is among others."""
        tree, node, foresight = self.search.tree, path.node, self._foresight
        children = [child for child in tree.children(node) if child >= self._explored and not tree.outside[child]]
        logs = [tree.log_p[child] + foresight.log_factor(node, tree.token[child]) for child in children]
        rest = tree.log_unexplored[node] + foresight.tilt(node).log_mean
        if max([*logs, rest]) == -math.inf:  # all that may follow was tried and lost
            tree.outside[node] = True
            return Choice.PRUNED
        options: list[int | Choice] = [*children, Choice.EXPAND]
        return draw(options, [*logs, rest], path.rng.random())

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        tilts = [self._foresight.tilt(path.node).by_token for path in paths]
        return readings.draw(self.search, [path.node for path in paths], [path.rng.random() for path in paths], tilts)


def _leave_tree(values: SoftValues, path: Path) -> Path:
    """Walk down from the root by the estimate of pi* to a leaf, or to the node after which nothing is known."""
    path.node = ROOT
    while not values.tree.terminal[path.node]:
        children, log_probs, log_rest = values.transitions(path.node)
        child = draw([*children, None], [*log_probs, log_rest], path.rng.random())
        if child is None:
            break
        path.node = child
    return path
