"""A glance one token ahead, without the model: which likely tokens would the reward pay for?

The next-token distribution of a node is known when the node was evaluated, and asking a reward costs no forward pass.
`dts.foresight` says what the gains found are used for. What a prefix is worth is said by one of two sources: a monotone
reward itself, or a value model on the scores of unfinished texts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dts.foresight import Gain
from dts.search.readings import Readings, top
from dts.softvalue import SoftValues

if TYPE_CHECKING:
    from dts.search.maxent.valuemodel import ValueModel
    from dts.search.search import Search

TOLERANCE = 1e-12


class Source(Protocol):
    """What says how much an unfinished text is worth."""

    def value(self, nodes: Sequence[int]) -> None:
        """Write what these new nodes promise into the tree."""

    def after(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """What each of these nodes would promise after one more token."""

    def before(self, node: int, log_p: Sequence[float], after: Sequence[float]) -> float:
        """What a token outside those that were tried is taken to promise. log_p, after: of the tokens tried."""

    def learn(self, leaf: int) -> None:
        """A sequence was finished and scored."""


class Earned:
    """A monotone reward says it at each token; the tree has it already."""

    def __init__(self, search: Search) -> None:
        self._tree, self.after = search.tree, search.glance

    def before(self, node: int, log_p: Sequence[float], after: Sequence[float]) -> float:
        """What the prefix has: other tokens gain nothing."""
        return self._tree.promise[node]

    def value(self, nodes: Sequence[int]) -> None:
        pass

    def learn(self, leaf: int) -> None:
        pass


class Scored:
    """A value model on the reward's own score of the text so far."""

    def __init__(self, search: Search, model: ValueModel) -> None:
        self._search, self._model = search, model
        self._scores: dict[int, float] = {}  # by node
        self._tried: dict[tuple[int, int], float] = {}  # by node and token, of what a glance has asked already

    def value(self, nodes: Sequence[int]) -> None:
        tree = self._search.tree
        leaves = [node for node in nodes if tree.terminal[node]]
        self._search.score(leaves)  # finished texts keep their reward, so nobody asks again
        for leaf in leaves:
            tree.promise[leaf] = tree.reward[leaf]
        known = {
            node: self._tried.get((tree.parent[node], tree.token[node])) for node in nodes if not tree.terminal[node]
        }
        asked = [node for node, score in known.items() if score is None]
        known.update(zip(asked, self._search.rewards(asked), strict=True))
        for node, score in known.items():
            assert score is not None
            self._scores[node] = score
            tree.promise[node] = self._predict(tree.depth[node], score)

    def after(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[float]:
        search = self._search
        scores = search.scores_after(nodes, tokens)
        self._tried.update(zip(zip(nodes, tokens, strict=True), scores, strict=True))
        return [
            score if token in search.lm.eos_ids else self._predict(search.tree.depth[node] + 1, score)
            for node, token, score in zip(nodes, tokens, scores, strict=True)
        ]

    def before(self, node: int, log_p: Sequence[float], after: Sequence[float]) -> float:
        """The mean over the tokens that were tried: a prediction is as likely to rise as to fall."""
        weights = [math.exp(log) for log in log_p]
        return math.fsum(w * v for w, v in zip(weights, after, strict=True)) / math.fsum(weights)

    def _predict(self, depth: int, score: float) -> float:
        return self._model.predict(depth / self._search.decoding.max_new_tokens, score)

    def learn(self, leaf: int) -> None:
        tree, longest = self._search.tree, self._search.decoding.max_new_tokens
        path = [node for node in tree.path(leaf) if node in self._scores]
        beginnings = [(tree.depth[node] / longest, self._scores[node]) for node in path]
        self._model.observe(beginnings, tree.reward[leaf])


def source_for(search: Search, model: ValueModel | None) -> Source | None:
    """Who says what unfinished texts are worth: the reward where it is monotone, otherwise the value model if any."""
    if search.reward.monotone:
        return Earned(search)
    return Scored(search, model) if model is not None else None


def look_ahead(
    search: Search, source: Source | None, values: SoftValues, nodes: Sequence[int], tokens: int
) -> Readings[None]:
    """Tell `values` what the `tokens` likeliest tokens of each of these evaluated nodes gain."""
    if not tokens or source is None or not nodes:
        return
    likeliest = yield from top(search, nodes, tokens)
    tries = [[(token, log) for token, log in row if log > -700.0] for row in likeliest]
    pairs = [(node, token) for node, row in zip(nodes, tries, strict=True) for token, _ in row]
    promises = iter(source.after([node for node, _ in pairs], [token for _, token in pairs]))
    for node, row in zip(nodes, tries, strict=True):
        after = list(itertools.islice(promises, len(row)))
        before = source.before(node, [log for _, log in row], after)
        gains = {
            token: Gain(log, promise - before)
            for (token, log), promise in zip(row, after, strict=True)
            if abs(promise - before) > TOLERANCE
        }
        if gains:
            values.foresee(node, gains)
