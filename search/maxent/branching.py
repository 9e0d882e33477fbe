"""Where a rollout leaves the tree: at the prefix from which a new text promises the largest improvement for its tokens.

The reward of a finished text says something about every text that begins alike, and more the longer they are the same.
`SharedPrefixes` is a Gaussian process over texts that knows nothing else: the value of a prefix is a random walk along
the text, so two rewards have the covariance v k(s), s the share of the longest text that both texts share, and a new
text from a prefix at s has the variance v (1 - k(s)) beside what is unknown of the prefix's value. Nested variances of
a tree, as in AB-MCTS (arXiv 2503.04412), but along every token. k(s) = s^g; v, g and the mean are fitted to the texts
of the search by maximum likelihood.

With a value model the prediction at a prefix is a second opinion of its value; both are weighted by their precision.
The expected improvement over the best reward (Mockus 1975; Jones et al. 1998) is divided by the tokens that a new text
from there costs and multiplied by the mass of the tokens that are no children yet: few texts go another way there.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from dts.search.maxent.valuemodel import USABLE
from dts.tree import ROOT, Tree

Floats = NDArray[np.float64]
Nodes = NDArray[np.int64]
EXPONENTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # g; at 1 every token has the same part in the reward
PREFER_ONE = 0.3  # log-likelihood that an exponent away from 1 by a factor of 2 has to make up for
NUGGET = 1e-3  # variance of a text that the prefixes do not explain
MOST_TEXTS = 128  # the process keeps the best of more; its cost is cubic
FEWEST_TEXTS = 4  # below this the mean and the variance are guesses
GREED = 2.0  # a prefix is drawn by this power of its improvement per token: paths that start together spread out
BINS = 8  # of the share of the text, for the errors of a value model


def column(values: array[Any], nodes: Nodes) -> NDArray[Any]:
    """A column of the tree at these nodes. A copy: an array that is looked at cannot grow."""
    return np.asarray(np.frombuffer(values, values.typecode)[nodes])


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Nodes where a path could leave the tree, [N] each."""

    nodes: Nodes
    depths: Floats  # tokens after the prompt
    means: Floats  # of the value
    variances: Floats  # of the value
    fresh: Floats  # variance of a new text's reward around the value


class SharedPrefixes:
    """Gaussian process over the finished texts of one tree."""

    def __init__(self, longest: int) -> None:
        self._longest = longest  # tokens
        self._nodes = np.full((0, longest), -1, np.int64)  # [texts, tokens]
        self._shared = np.zeros(
            (0, 0), np.int64
        )  # tokens that two texts share, [texts, texts]; their lengths on the diagonal
        self.rewards = np.zeros(0)
        self._found: Prefixes | None = None  # kept until the next text

    def add(self, path: Sequence[int], reward: float) -> None:
        """A finished text: its nodes from the root's child to the leaf, and its reward."""
        self._found = None
        row = np.full(self._longest, -1, np.int64)
        row[: len(path)] = path
        shared = ((self._nodes == row) & (row >= 0)).sum(1)  # a node has one path to it, so equal nodes come first
        n = len(self.rewards)
        grown = np.zeros((n + 1, n + 1), np.int64)
        grown[:n, :n], grown[n, :n], grown[:n, n], grown[n, n] = self._shared, shared, shared, len(path)
        self._nodes, self._shared = np.vstack([self._nodes, row]), grown
        self.rewards = np.append(self.rewards, reward)
        if len(self.rewards) > MOST_TEXTS:
            self._drop(int(np.argmin(self.rewards[:-1])))

    def _drop(self, text: int) -> None:
        keep = np.arange(len(self.rewards)) != text
        self._nodes, self.rewards = self._nodes[keep], self.rewards[keep]
        self._shared = self._shared[np.ix_(keep, keep)]

    def scaled(self, values: Any) -> Floats:
        """Values in units of the rewards: 0 is the lowest of the texts, 1 the highest. No size of rewards overflows."""
        largest = np.abs(self.rewards).max()
        low, high = self.rewards.min() / largest, self.rewards.max() / largest
        return np.asarray((np.asarray(values) / largest - low) / (high - low))

    def prefixes(self) -> Prefixes | None:
        """The root and every inner node of the texts, with what the process says of them in `scaled` units; None while
        all rewards are equal or too few."""
        if len(self.rewards) < FEWEST_TEXTS or self.rewards.min() == self.rewards.max():
            return None
        if self._found is None:
            self._found = self._prefixes()
        return self._found

    def _prefixes(self) -> Prefixes:
        """Along a segment, a part of a text where nothing branches, the prefix at depth d has the correlation k(d) with
        the texts S that pass it and c, which does not depend on d, with the others. So what is known of its value is a
        polynomial in k(d), b K^-1 b = k(d)^2 (S K^-1 S) + 2 k(d) (S K^-1 c) + c K^-1 c, and so is its mean."""
        exponent, mean, variance, inverse = self._fit()
        weights = inverse @ (self.scaled(self.rewards) - mean)
        k = self._correlation(np.arange(self._longest + 1), exponent)
        texts, first, last = self._segments()
        shared = self._shared[texts]  # [segments, texts]
        passing = (shared >= last[:, None]).astype(float)
        others = k[shared] * (1 - passing)
        solved, solved_others = passing @ inverse, others @ inverse
        lengths = np.maximum(np.minimum(last, self._shared[texts, texts] - 1) - first + 1, 0)  # without the leaf
        segment = np.repeat(np.arange(len(texts)), lengths)
        depths = first[segment] + np.arange(len(segment)) - np.repeat(lengths.cumsum() - lengths, lengths)
        own = k[depths]
        known = own**2 * (solved * passing).sum(1)[segment] + 2 * own * (solved * others).sum(1)[segment]
        known += (solved_others * others).sum(1)[segment]
        means = mean + own * (passing @ weights)[segment] + (others @ weights)[segment]
        return Prefixes(
            np.append(ROOT, self._nodes[texts[segment], depths - 1]),
            np.append(0.0, depths),
            np.append(mean, means),
            variance * np.append(1 / len(self.rewards), np.maximum(own - known, 0)),
            variance * (1 - np.append(0.0, own)),
        )

    def _segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Text, first and last depth of each, [segments]. A node belongs to the first text that passes it."""
        found = []
        for text, shared in enumerate(self._shared.tolist()):
            new = max(shared[:text], default=0)
            ends = sorted({end for end in shared if end >= new} | {new})
            found += [(text, begin + 1, end) for begin, end in pairwise(ends)]
        texts, first, last = np.array(found, np.int64).T
        return texts, first, last

    def _correlation(self, tokens: Any, exponent: float) -> Any:
        return (tokens / self._longest) ** exponent

    def _fit(self) -> tuple[float, float, float, Floats]:
        """g, the mean, v, and the inverse of the correlation matrix."""
        best = None
        n, rewards = len(self.rewards), self.scaled(self.rewards)
        for exponent in EXPONENTS:
            matrix = self._correlation(np.arange(self._longest + 1), exponent)[self._shared]
            np.fill_diagonal(matrix, 1 + NUGGET)
            inverse = np.linalg.inv(matrix)
            mean = float(inverse.sum(0) @ rewards / inverse.sum())
            rest = rewards - mean
            variance = max(float(rest @ inverse @ rest) / n, 1e-12)
            log_likelihood = -0.5 * (n * math.log(variance) + np.linalg.slogdet(matrix)[1])
            log_likelihood -= PREFER_ONE * math.log2(exponent) ** 2
            if best is None or log_likelihood > best[0]:
                best = log_likelihood, (exponent, mean, variance, inverse)
        assert best is not None
        return best[1]


class Errors:
    """Mean squared error of a value model's predictions, by the share of the text that is written."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._weight, self._total = np.zeros(BINS), np.zeros(BINS)

    def add(self, depths: Floats, errors: Floats) -> None:
        """Of one text: its predictions are alike, so each counts for a part."""
        bins = self._bins(depths)
        np.add.at(self._weight, bins, 1 / len(depths))
        np.add.at(self._total, bins, errors**2 / len(depths))

    def variances(self, depths: Floats, prior: Floats) -> Floats:
        """With the weight of two texts on `prior`."""
        bins = self._bins(depths)
        return np.asarray((self._total[bins] + 2 * prior) / (self._weight[bins] + 2))

    def _bins(self, depths: Floats) -> NDArray[np.int64]:
        return np.minimum((BINS * depths / self._longest).astype(np.int64), BINS - 1)


class Brancher:
    """Chooses branch points on one tree. predicted: whether `Tree.promise` holds predictions of a value model."""

    def __init__(self, tree: Tree, longest: int, *, predicted: bool) -> None:
        self._tree, self._longest, self._predicted = tree, longest, predicted
        self._texts, self._errors = SharedPrefixes(longest), Errors(longest)

    def learn(self, leaf: int, left_at: int, score: float | None = None) -> None:
        """A text was finished that left the tree at this depth. score: what is to be improved; None: its reward."""
        tree = self._tree
        path = tree.path(leaf)
        self._texts.add(path, tree.reward[leaf] if score is None else score)
        new = path[left_at:-1]
        if self._predicted and new and abs(tree.reward[leaf]) < USABLE:
            errors = tree.reward[leaf] - np.array([tree.promise[node] for node in new])
            self._errors.add(np.array([tree.depth[node] for node in new], float), errors)

    def choose(self, best: float, may_branch: Callable[[Nodes], Any], uniform: float) -> int | None:
        """A node to leave the tree from, by the expected improvement over the score `best`; None while too little is
        known. may_branch: whether nodes are open to new children."""
        found = self._texts.prefixes()
        if found is None:
            return None
        mean, variance = self._both_opinions(found)
        spread = np.sqrt(variance + found.fresh + 1e-300)
        z = (mean - self._texts.scaled(best)) / spread
        gain = spread * (np.exp(-z * z / 2) / math.sqrt(2 * math.pi) + z * ndtr(z))
        tree = self._tree
        outside = np.exp(column(tree.log_unexplored, found.nodes) - column(tree.log_mass, found.nodes))
        worth = np.where(may_branch(found.nodes), np.maximum(gain, 0) * outside / (self._longest - found.depths), 0.0)
        if not worth.max() > 0:
            return None
        cumulative = ((worth / worth.max()) ** GREED).cumsum()
        return int(found.nodes[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])

    def _both_opinions(self, found: Prefixes) -> tuple[Floats, Floats]:
        """Mean and variance of the values: of the process and the value model together, weighted by precision."""
        rewards = self._texts.rewards
        if not self._predicted or np.abs(rewards).max() >= USABLE:
            return found.means, found.variances
        unit = (rewards.max() - rewards.min()) ** 2
        prior = unit * found.fresh[0] * (1 - found.depths / self._longest)
        errors = self._errors.variances(found.depths, prior) / (unit or 1.0)
        own = np.maximum(errors - found.fresh, 0.1 * errors) + 1e-300  # without what no prefix can know
        weight = found.variances / (found.variances + own)
        weight[0] = 0.0  # of the root a score says nothing
        predicted = self._texts.scaled(column(self._tree.promise, found.nodes))
        return found.means + weight * (predicted - found.means), found.variances * (1 - weight)
