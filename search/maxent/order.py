"""What "best" means: three orders of completions, and which prefixes may still hold a better one than was found.

The log-probability of a prefix never rises as tokens are added and the reward has an upper bound, so every order has an
admissible bound: what cannot beat the best completion found is left out, and nothing else is.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Literal

from dts.search.method import by_reward, ranked_by

if TYPE_CHECKING:
    from dts.search.search import Search

Order = Literal["reward", "likelihood", "target"]
ORDERS: tuple[Order, ...] = ("reward", "likelihood", "target")


class Best:
    """The best completion that one search has found, in an order."""

    def __init__(self, search: Search, order: Order, reward_scale: float, sharpness: float) -> None:
        """sharpness: the tree's weights are those of the target to this power."""
        self._search, self._tree, self.order = search, search.tree, order
        self._scale, self._sharpness = reward_scale, sharpness
        self._log_p = array("d", [0.0])  # of each prefix: the model's own, or with the order "target" the target's part
        self._key = -math.inf, -math.inf  # score and log p of the best one

    def log_p(self, node: int) -> float:
        """log p of the prefix; with the order "target" of its power."""
        tree = self._tree
        for new in range(len(self._log_p), len(tree)):
            step = tree.log_p[new] / self._sharpness if self.order == "target" else tree.own_log_p(new)
            self._log_p.append(self._log_p[tree.parent[new]] + step)
        return self._log_p[node]

    def score(self, leaf: int) -> float:
        """What the search improves, as far as one number says it: the reward, or the log of the target."""
        if self.order == "target":
            return self.log_p(leaf) + self._scale * self._tree.reward[leaf]
        return self._tree.reward[leaf]

    @property
    def top(self) -> float:
        """The score of the best completion."""
        return self._key[0]

    def learn(self, leaf: int) -> None:
        """A completion was finished."""
        self._key = max(self._key, (self.score(leaf), self.log_p(leaf)))

    def beatable(self, node: int, log_next: float = 0.0) -> bool:
        """Whether a completion that begins like this may rank above the best one; log_next: no weight of the next token
        has a higher log."""
        upper = self._tree.upper[node]
        if self.order == "reward":
            return upper > self._key[0]
        if self.order == "target":
            most = self._scale * upper if self._scale > 0 else 0.0
            return self.log_p(node) + min(log_next, 0.0) / self._sharpness + most > self._key[0]
        return (upper, self.log_p(node) + min(log_next, 0.0) / self._tree.power) > self._key

    def beatable_by_new(self, node: int) -> bool:
        """The same of tokens that are no children of the node yet."""
        return self.beatable(node, self._tree.log_unexplored[node])

    def rank(self) -> list[int]:
        """Scored leaves, best first."""
        if self.order != "target":
            return by_reward(self._search)
        return ranked_by(self._search, lambda leaf: (self.score(leaf),))
