"""Soft values on the tree, and the distribution over sequences that they imply.

For a prefix s the soft value is V(s) = (1/lambda) log E_{x ~ p(.|s)} exp(lambda r(x)); we store F(s) = lambda V(s),
so that lambda = 0 divides by nothing. The soft Bellman equation with the true p(a|s) of every child a and the mass
u(s) of tokens that are not children reads

    exp F(s) = sum_a p(a|s) exp F(sa)  +  u(s) exp G(s),

where G(s) estimates the log-mean of exp F over the unexplored tokens: their mass is never dropped.
(Diffusion Tree Sampling, arXiv 2506.20701, eq. 6-8, with the exact transition weights that tokens allow.)

A monotone reward says at every prefix what it would give if the sequence ended there, phi(s) (`Tree.promise`; 0 for
other rewards). What is pooled is the gain beyond that, R(s): the log-mean of exp(F(sa) - lambda phi(sa)) over the
children that were seen and pseudo-observations, R of the parent. A prefix that has just earned something is
therefore worth it at once. G adds back lambda phi(s) and the log-mean of exp(lambda gain) over the unexplored tokens,
as far as a look-ahead has found tokens that gain. The reward's own bounds limit every estimate.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from dts.tree import NONE, ROOT, Tree

Terms = list[float]


def logsumexp(terms: Terms) -> float:
    """log sum exp of a short list; -inf for an empty one."""
    top = max(terms, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(t - top) for t in terms))


class SoftValues:
    """Columns beside the tree's, updated in place along the path of each finished sequence: O(depth x children)."""

    def __init__(self, tree: Tree, reward_scale: float, prior_strength: float = 1.0) -> None:
        self.tree, self.reward_scale, self._prior_strength = tree, reward_scale, prior_strength
        self.log_value = array("d")  # F
        self.log_rest = array("d")  # G
        self.log_beyond = array("d")  # R
        self.log_open = array("d")  # like F, counting only sequences that were not finished yet
        self.mean = array("d")  # E[r], the limit of V as lambda -> 0
        self.mean_rest = array("d")
        self.visits = array("i")  # finished sequences below
        self.entered = array("i")  # paths sent through, under way or finished; counted by the policies
        self.closed = array("b")  # 1: given up for good
        self._gains: dict[int, dict[int, tuple[float, float]]] = {}  # node -> token -> log p, lambda * gain
        self._foreseen: dict[int, float] = {}  # node -> log-mean of exp(lambda * gain) of its next token
        self.grow()

    def value(self, node: int = ROOT) -> float:
        """V(node) in units of the reward."""
        return self.log_value[node] / self.reward_scale if self.reward_scale > 0 else self.mean[node]

    def rest(self, node: int) -> float:
        """The value of `node`'s unexplored tokens, in units of the reward."""
        return self.log_rest[node] / self.reward_scale if self.reward_scale > 0 else self.mean_rest[node]

    def grow(self) -> None:
        """Rows for nodes that were added since: valued by what the parent hands down."""
        tree = self.tree
        for node in range(len(self.log_value), len(tree)):
            parent = tree.parent[node]
            prior, mean = (0.0, 0.0) if parent == NONE else (self._handed_down(node), self.mean_rest[parent])
            for column in (self.log_value, self.log_rest, self.log_open):
                column.append(prior)
            self.log_beyond.append(0.0 if parent == NONE else self.log_beyond[parent])
            self.mean.append(mean)
            self.mean_rest.append(mean)
            self.visits.append(0)
            self.closed.append(0)
            self.entered.append(1 if parent != NONE else 0)  # the path that made it

    def _handed_down(self, node: int) -> float:
        """F of a node of which nothing is known but what it promises: its gain beyond is its parent's."""
        return self._bounded(
            node, self.log_beyond[self.tree.parent[node]] + self.reward_scale * self.tree.promise[node]
        )

    def _bounded(self, node: int, log_value: float) -> float:
        scale, tree = self.reward_scale, self.tree
        return min(max(log_value, scale * tree.earned[node]), scale * tree.upper[node]) if scale > 0 else log_value

    def look_ahead(self, node: int, gains: dict[int, tuple[float, float]]) -> None:
        """Of tokens that would raise the promise of `node`: log p and the gain, in units of the reward."""
        self._gains[node] = {token: (log_p, self.reward_scale * gain) for token, (log_p, gain) in gains.items()}
        self._foreseen[node] = self.tilt(node)[1]
        self.log_beyond[node] = self._prior(node)
        self.log_rest[node] = self._rest(node)

    def _prior(self, node: int) -> float:
        """R by what the parent's R says: the gain of the next token is part of it, so what is foreseen comes off."""
        beyond = self.log_beyond[self.tree.parent[node]] if node != ROOT else 0.0
        foreseen = self._foreseen.get(node)
        return beyond if foreseen is None else max(beyond - foreseen, 0.0)

    def tilt(self, node: int) -> tuple[dict[int, float], float]:
        """lambda * gain of the unexplored tokens that a look-ahead found, and the log-mean of its exponential over all
        unexplored tokens (the others gain nothing)."""
        found = self._gains.get(node)
        log_u = self.tree.log_unexplored[node]
        if not found or log_u == -math.inf:
            return {}, 0.0
        children = {self.tree.token[child] for child in self.tree.children(node)}
        left = {token: pair for token, pair in found.items() if token not in children}
        others = 1 - math.fsum(math.exp(log_p - log_u) for log_p, _ in left.values())
        terms = [log_p - log_u + gain for log_p, gain in left.values()]
        return {token: gain for token, (_, gain) in left.items()}, logsumexp([math.log(max(others, 1e-300)), *terms])

    def _rest(self, node: int) -> float:
        promise = self.reward_scale * self.tree.promise[node]
        return self._bounded(node, self.log_beyond[node] + promise + self.tilt(node)[1])

    def finish(self, leaf: int) -> None:
        """Back up a finished sequence from `leaf` to the root. A leaf that was already finished changes nothing."""
        self.grow()
        if self.visits[leaf]:
            return
        tree = self.tree
        self.log_value[leaf] = self.reward_scale * tree.reward[leaf]
        self.mean[leaf] = tree.reward[leaf]
        self.log_open[leaf] = -math.inf
        self.visits[leaf] = 1
        node = tree.parent[leaf]
        while node != NONE:
            self.visits[node] += 1
            self._update(node)
            node = tree.parent[node]

    def close(self, node: int) -> None:
        """Leave what is unfinished below `node` out of `log_open`, for good."""
        self.grow()
        self.closed[node] = 1
        self.log_open[node] = -math.inf
        node = self.tree.parent[node]
        while node != NONE:
            self._update(node)
            node = self.tree.parent[node]

    def settle(self, prior_strength: float = 2.0, sweeps: int = 12, tolerance: float = 1e-6) -> None:
        """Make all values agree with each other when a search is over: a backup used what the parents held at its time,
        and they learnt on. Sweeps from the leaves to the root, until no value moves more than `tolerance`.

        A search does better when few children are trusted (it corrects itself), an estimate when they are trusted less.
        """
        self._prior_strength = prior_strength
        self.grow()
        inner = [
            node for node in range(len(self.tree) - 1, -1, -1) if self.visits[node] and not self.tree.terminal[node]
        ]
        for _ in range(sweeps):
            before = [self.log_value[node] for node in inner]
            for node in inner:
                self._update(node)
            if all(abs(self.log_value[node] - old) <= tolerance for node, old in zip(inner, before, strict=True)):
                return

    def _update(self, node: int) -> None:
        tree, children = self.tree, list(self.tree.children(node))
        seen = [a for a in children if self.visits[a]]
        self._pool(node, seen)
        for child in children:
            if not self.visits[child]:  # in flight: still worth what the parent hands down
                self.log_value[child] = self._handed_down(child)
                self.log_open[child] = -math.inf if self.closed[child] else self.log_value[child]
                self.mean[child] = self.mean_rest[node]
        log_u = tree.log_unexplored[node]
        values, opens = [log_u + self.log_rest[node]], [log_u + self.log_rest[node]]
        mean = math.exp(log_u) * self.mean_rest[node]
        for child in children:
            log_p = tree.log_p[child]
            values.append(log_p + self.log_value[child])
            opens.append(log_p + self.log_open[child])
            mean += math.exp(log_p) * self.mean[child]
        self.log_value[node], self.mean[node] = logsumexp(values), mean
        self.log_open[node] = -math.inf if self.closed[node] else logsumexp(opens)

    def _pool(self, node: int, seen: list[int]) -> None:
        """R, G and its linear twin from the children seen so far and the parent's pseudo-observation."""
        promise, scale = self.tree.promise, self.reward_scale
        terms = [self.log_value[a] - scale * promise[a] for a in seen]
        means, weight = sum(self.mean[a] for a in seen), float(len(seen))
        if node != ROOT and self._prior_strength > 0:
            parent = self.tree.parent[node]
            terms.append(math.log(self._prior_strength) + self._prior(node))
            means += self._prior_strength * self.mean_rest[parent]
            weight += self._prior_strength
        if not terms:
            return  # the root, before anything was finished
        self.log_beyond[node] = logsumexp(terms) - math.log(weight)
        self.log_rest[node], self.mean_rest[node] = self._rest(node), means / weight

    def transitions(self, node: int) -> tuple[list[int], list[float], float]:
        """The tree's estimate of log pi*(a|s): children, their log-probabilities, and that of the unexplored rest."""
        self.grow()
        tree = self.tree
        children = list(tree.children(node))
        terms = [tree.log_p[a] + self.log_value[a] for a in children]
        rest = tree.log_unexplored[node] + self.log_rest[node]
        total = logsumexp([*terms, rest])
        return children, [t - total for t in terms], rest - total

    def log_shares(self) -> dict[int, float]:
        """By finished leaf: log of its share among all of them. At every node the mass of what was not finished is
        divided equally among the children that were, as draws from it, like G takes them to be. So a sequence counts
        for those near it, and its share is not its own probability, which is tiny for a long one."""
        self.grow()
        tree, shares = self.tree, dict[int, float]()
        stack = [(ROOT, 0.0)] if self.visits[ROOT] else []
        while stack:
            node, above = stack.pop()
            if tree.terminal[node]:
                shares[node] = above
                continue
            seen, others = list[int](), [tree.log_unexplored[node]]
            for child in tree.children(node):
                if self.visits[child]:
                    seen.append(child)
                else:
                    others.append(tree.log_p[child])
            rest = logsumexp(others) - math.log(len(seen))
            terms = [logsumexp([tree.log_p[child], rest]) + self.log_value[child] for child in seen]
            total = logsumexp(terms)
            stack.extend((child, above + term - total) for child, term in zip(seen, terms, strict=True))
        return shares

    def log_prob(self, tokens: Sequence[int], log_p: Sequence[float]) -> float:
        """The tree's estimate of log pi* of a complete sequence, given the model's log p of each of its tokens.

        Where the sequence leaves the tree, the unexplored mass is divided as p divides it.
        """
        node, total = ROOT, 0.0
        for position, token in enumerate(tokens):
            children, log_probs, log_rest = self.transitions(node)
            log_prob = {self.tree.token[c]: (c, lp) for c, lp in zip(children, log_probs, strict=True)}
            if token not in log_prob:
                return total + log_rest - self.tree.log_unexplored[node] + math.fsum(log_p[position:])
            node, step = log_prob[token]
            total += step
        return total
