"""What the next token would gain: tokens of a node that a look-ahead found to raise the reward's promise.

New children are drawn from p(a|s) exp(lambda gain(a)) instead of p, and the value of the unexplored tokens counts the
gain in (the twist of twisted sequential Monte Carlo, one token long; Whiteley and Lee, Ann. Stat. 42, 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dts.logspace import logsumexp
from dts.tree import Tree


@dataclass(frozen=True, slots=True)
class Gain:
    """A token that would change what its prefix promises."""

    log_p: float  # log p(token | prefix), nats
    amount: float  # change of the promise, in units of the reward


@dataclass(frozen=True, slots=True)
class Tilt:
    """Factors on p over the unexplored tokens of a node."""

    by_token: Mapping[int, float]  # token -> lambda * gain, the log of its factor; every other token has 0
    log_mean: float  # log-mean of the factors under p over all unexplored tokens


NO_TILT = Tilt({}, 0.0)


class Foresight:
    """Gains by node, at one sharpness lambda."""

    def __init__(self, tree: Tree, reward_scale: float) -> None:
        self._tree, self._scale = tree, reward_scale
        self._gains: dict[int, Mapping[int, Gain]] = {}
        self._expected: dict[int, float] = {}

    def learn(self, node: int, gains: Mapping[int, Gain]) -> None:
        """Note the tokens of `node` that gain something."""
        self._gains[node] = gains
        self._expected[node] = self.tilt(node).log_mean

    def expected(self, node: int) -> float | None:
        """The log-mean of exp(lambda gain) when the node was first looked at; None where nothing gains."""
        return self._expected.get(node)

    def log_factor(self, node: int, token: int) -> float:
        """lambda * gain of a token of `node`, whether it is a child or not."""
        gain = self._gains.get(node, {}).get(token)
        return self._scale * gain.amount if gain else 0.0

    def on(self, tree: Tree) -> Foresight:
        """The same gains on a tree that has these nodes and may grow others."""
        other = Foresight(tree, self._scale)
        other._gains = dict(self._gains)
        return other

    def tilt(self, node: int) -> Tilt:
        """The factors on the tokens of `node` that are no children yet."""
        gains, log_u = self._gains.get(node), self._tree.log_unexplored[node]
        if not gains or log_u == -math.inf:
            return NO_TILT
        children = {self._tree.token[child] for child in self._tree.children(node)}
        left = {token: gain for token, gain in gains.items() if token not in children}
        others = 1 - math.fsum(math.exp(gain.log_p - log_u) for gain in left.values())  # they gain nothing
        terms = [gain.log_p - log_u + self._scale * gain.amount for gain in left.values()]
        by_token = {token: self._scale * gain.amount for token, gain in left.items()}
        return Tilt(by_token, logsumexp([math.log(others) if others > 0 else -math.inf, *terms]))
