"""A glance one token ahead, without the model: which likely tokens would the reward pay for?

The next-token distribution of a node is known when the node was evaluated, and asking a reward costs no forward pass.
`dts.foresight` says what the gains found are used for. What a prefix is worth is said by one of two sources: a monotone
reward itself, or a value model on the scores of unfinished texts.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dts.errors import UsageError, shown
from dts.foresight import Gain
from dts.search.maxent.valuemodel import USABLE
from dts.search.readings import Readings, top
from dts.search.scoring import BudgetSpent

if TYPE_CHECKING:
    from dts.search.maxent.valuemodel import ValueModel
    from dts.search.search import Search

TOLERANCE = 1e-12
ENOUGH_TEXTS = 16  # to see whether a value model is worth its calls of the reward


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

    def on(self, fork: Search) -> Source:
        """The same on a fork of the search."""


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

    def on(self, fork: Search) -> Earned:
        return Earned(fork)


class Scored:
    """A value model on the reward's own score of the text so far.

    The reward is not asked any more once its answers turn out to say nothing about the final reward. Where no next
    tokens are tried, a score tells a path under way nothing: all beginnings of a text are then scored together once it
    is finished, which a reward model does in one pass.
    """

    def __init__(self, search: Search, model: ValueModel, *, at_once: bool) -> None:
        """at_once: whether each token is scored when it is drawn, and not when its text is finished."""
        self._search, self._model, self._skill, self._at_once = search, model, Skill(), at_once
        self._scores: dict[int, float] = {}  # by node

    def value(self, nodes: Sequence[int]) -> None:
        """A finished text is scored where its rollout is recorded, and `learn` writes what it got."""
        tree = self._search.tree
        if self._at_once:
            self._ask([node for node in nodes if not tree.terminal[node]])
        self._promise(nodes)

    def _ask(self, nodes: Sequence[int]) -> None:
        if not self._skill.none:
            self._scores.update(zip(nodes, _usable(self._search.scores_so_far(nodes)), strict=True))

    def _promise(self, nodes: Sequence[int]) -> None:
        tree = self._search.tree
        for node in nodes:
            score = self._scores.get(node, math.nan)
            tree.promise[node] = tree.promise[tree.parent[node]] if math.isnan(score) else self._predict(node, 0, score)

    def after(self, nodes: Sequence[int], tokens: Sequence[int]) -> list[float]:
        if self._skill.none:
            return [math.nan] * len(nodes)
        scores = _usable(self._search.scores_after(nodes, tokens))
        return [
            score if token in self._search.lm.eos_ids or math.isnan(score) else self._predict(node, 1, score)
            for node, token, score in zip(nodes, tokens, scores, strict=True)
        ]

    def before(self, node: int, log_p: Sequence[float], after: Sequence[float]) -> float:
        """The mean over the tokens that were tried: a prediction is as likely to rise as to fall."""
        known = [(math.exp(log), value) for log, value in zip(log_p, after, strict=True) if not math.isnan(value)]
        weights = math.fsum(weight for weight, _ in known)
        return math.fsum(weight * value for weight, value in known) / weights if weights else math.nan

    def _predict(self, node: int, more: int, score: float) -> float:
        promise = self._model.predict((self._search.tree.depth[node] + more) / self._longest, score)
        if not math.isfinite(promise):
            raise UsageError(f"values={shown(self._model)} predicted {promise!r}; return a finite number")
        return promise

    @property
    def _longest(self) -> int:
        return self._search.decoding.max_new_tokens

    def learn(self, leaf: int) -> None:
        tree, reward = self._search.tree, self._search.tree.reward[leaf]
        if not self._at_once:
            new = [node for node in tree.path(leaf)[:-1] if node not in self._scores]
            with contextlib.suppress(BudgetSpent):  # the end of the run finds out
                self._ask(new)
            self._promise(new)
        tree.promise[leaf] = reward
        asked = [node for node in tree.path(leaf) if node in self._scores]
        path = [node for node in asked if not math.isnan(self._scores[node])]
        if asked and abs(reward) < USABLE:
            self._skill.add([tree.promise[node] for node in path], [self._scores[node] for node in path], reward)
        if path and abs(reward) < USABLE:
            self._model.observe([(tree.depth[node] / self._longest, self._scores[node]) for node in path], reward)

    def on(self, fork: Search) -> Scored:
        other = Scored(fork, self._model, at_once=self._at_once)
        other._skill = self._skill
        return other


def _usable(scores: Sequence[float]) -> list[float]:
    return [score if abs(score) < USABLE else math.nan for score in scores]


class Skill:
    """Whether predictions along the text are better than the mean of the rewards seen before."""

    def __init__(self) -> None:
        self._texts, self._mean = 0, 0.0
        self._model_error = self._mean_error = 0.0  # sums over texts of mean squares
        self._low, self._high = math.inf, -math.inf  # scores seen

    def add(self, predictions: Sequence[float], scores: Sequence[float], reward: float) -> None:
        """A finished text with the predictions and the scores of its beginnings."""
        if self._texts and predictions:
            self._model_error += sum((reward - value) ** 2 for value in predictions) / len(predictions)
            self._mean_error += (reward - self._mean) ** 2
        self._texts += 1
        self._mean += (reward - self._mean) / self._texts
        self._low, self._high = min([self._low, *scores]), max([self._high, *scores])

    @property
    def none(self) -> bool:
        """True once `ENOUGH_TEXTS` have shown none."""
        if self._texts < ENOUGH_TEXTS:
            return False
        return self._high <= self._low or self._model_error > self._mean_error > 0


def source_for(search: Search, model: ValueModel | None, tokens: int) -> Source | None:
    """Who says what unfinished texts are worth: the reward where it is monotone, otherwise the value model if any.
    tokens: how many are tried at each node."""
    if search.reward.monotone:
        return Earned(search)
    return Scored(search, model, at_once=tokens > 0) if model is not None else None


class LookAhead:
    """What the likeliest next tokens of a node gain, by a source; nothing without one."""

    def __init__(self, search: Search, source: Source | None, tokens: int) -> None:
        self._search, self._source, self._tokens = search, source, tokens

    def on(self, fork: Search) -> LookAhead:
        """The same on a fork of the search."""
        return LookAhead(fork, self._source.on(fork) if self._source else None, self._tokens)

    def value(self, nodes: Sequence[int]) -> None:
        """Write what these new nodes promise into the tree."""
        if self._source:
            self._source.value(nodes)

    def learn(self, leaf: int) -> None:
        """A sequence was finished and scored."""
        if self._source:
            self._source.learn(leaf)

    def gains(self, nodes: Sequence[int]) -> Readings[dict[int, dict[int, Gain]]]:
        """By evaluated node: its likeliest next tokens that gain or lose something."""
        if not self._tokens or self._source is None or not nodes:
            return {}
        likeliest = yield from top(self._search, nodes, self._tokens)
        tries = [[(token, log) for token, log in row if log > -700.0] for row in likeliest]
        pairs = [(node, token) for node, row in zip(nodes, tries, strict=True) for token, _ in row]
        promises = iter(self._source.after([node for node, _ in pairs], [token for _, token in pairs]))
        return {
            node: found
            for node, row in zip(nodes, tries, strict=True)
            if (found := self._of_node(node, row, list(itertools.islice(promises, len(row)))))
        }

    def _of_node(self, node: int, row: Sequence[tuple[int, float]], after: Sequence[float]) -> dict[int, Gain]:
        assert self._source
        before = self._source.before(node, [log for _, log in row], after)
        return {
            token: Gain(log, promise - before)
            for (token, log), promise in zip(row, after, strict=True)
            if abs(promise - before) > TOLERANCE
        }
