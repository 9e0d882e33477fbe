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

With another target than p exp(lambda r) the rows hold weights whose sums are not 1 (`dts.target`), and F counts in the
mass of what follows, for a power above 1 or a constraint usually far below 1. The equation is the same; what is handed
down differs. R of the parent is the level of the values one token up, so the usual mass of a row at this depth comes
off it; and it is unknown until something is finished, because a guess that is too high would outweigh what was seen.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Mapping, Sequence

from dts.errors import UsageError
from dts.foresight import Foresight, Gain
from dts.logspace import logsumexp
from dts.tree import NONE, ROOT, Tree
from dts.visits import Visits


def log_factor(reward_scale: float, reward: float) -> float:
    """lambda r, the log of a sequence's factor on p. Raises `UsageError` where it is too large for a float."""
    log = reward_scale * reward
    if not math.isfinite(log):
        raise UsageError(
            f"reward_scale={reward_scale!r} times a reward of {reward!r} is not a finite number; lower reward_scale or "
            "give rewards in smaller units"
        )
    return log


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _mean(values: Sequence[float], log_weights: Sequence[float]) -> float:
    """Weighted mean; 0 where no weight is."""
    total = logsumexp(log_weights)
    if total == -math.inf:
        return 0.0
    return math.fsum(math.exp(log - total) * value for log, value in zip(log_weights, values, strict=True))


class SoftValues:
    """Columns beside the tree's, updated in place along the path of each finished sequence: O(depth x children)."""

    def __init__(
        self,
        tree: Tree,
        reward_scale: float,
        visits: Visits | None = None,
        foresight: Foresight | None = None,
        prior_strength: float = 1.0,
        *,
        conserves: bool = True,
    ) -> None:
        """visits, foresight: shared with what else works on this tree; without them, of its own. conserves: whether
        the weights of all that follows a prefix sum to 1 (`Target.conserves`)."""
        self.tree, self.reward_scale, self._prior_strength = tree, reward_scale, prior_strength
        self._conserves = conserves
        self.visits = visits or Visits(tree)
        self.foresight = foresight or Foresight(tree, reward_scale)
        self.log_value = array("d")  # F
        self.log_rest = array("d")  # G
        self.log_beyond = array("d")  # R
        self.log_open = array("d")  # like F, counting only sequences that were not finished yet
        self.mean = array("d")  # E[r], the limit of V as lambda -> 0
        self.mean_rest = array("d")
        self._closed = set[int]()  # nodes given up for good
        self._forced = set[int]()  # children that were no draws: they say nothing of the unexplored tokens
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
        self.visits.grow()
        for node in range(len(self.log_value), len(tree)):
            parent = tree.parent[node]
            prior, mean = (0.0, 0.0) if parent == NONE else (self._handed_down(node), self.mean_rest[parent])
            for column in (self.log_value, self.log_rest, self.log_open):
                column.append(prior)
            if self._conserves:
                self.log_beyond.append(0.0 if parent == NONE else self.log_beyond[parent])
            else:
                self.log_beyond.append(self._inherited(node))
            self.mean.append(mean)
            self.mean_rest.append(mean)

    def _handed_down(self, node: int) -> float:
        """F of a node of which nothing is known but what it promises, and where weights do not sum to 1 its mass: its
        gain beyond is its parent's."""
        beyond = self.log_beyond[self.tree.parent[node]]
        if not self._conserves:
            mass = self.tree.log_mass[node] - self.tree.usual_log_mass(self.tree.depth[node])
            beyond = _or_zero(beyond) + _or_zero(mass)
        return self._bounded(node, beyond + self.reward_scale * self.tree.promise[node])

    def _bounded(self, node: int, log_value: float) -> float:
        scale, tree = self.reward_scale, self.tree
        if not self._conserves:  # the mass may be anything up to 1, or above it for a power below 1
            return min(log_value, scale * tree.upper[node] if scale > 0 else 0.0) if tree.power >= 1 else log_value
        return min(max(log_value, scale * tree.earned[node]), scale * tree.upper[node]) if scale > 0 else log_value

    def arrive(self, nodes: Sequence[int]) -> None:
        """These nodes were evaluated, so the sums of their weights are known."""
        if self._conserves:
            return
        self.grow()
        for node in nodes:
            self.log_beyond[node] = self._prior(node)
            self.log_rest[node] = self._rest(node)
            self.log_value[node] = self.log_open[node] = self.tree.log_unexplored[node] + self.log_rest[node]

    def foresee(self, node: int, gains: Mapping[int, Gain]) -> None:
        """Count in the tokens of `node` that would change its promise."""
        self.grow()
        self.foresight.learn(node, gains)
        self.log_beyond[node] = self._prior(node)
        self.log_rest[node] = self._rest(node)

    def _prior(self, node: int) -> float:
        """R by what the parent's R says: the gain of the next token is part of it, so what is foreseen comes off. NaN
        where weights do not sum to 1 and nothing is known yet."""
        foreseen = self.foresight.expected(node)
        if not self._conserves:
            beyond = self._inherited(node)
            return beyond if foreseen is None else max(beyond - foreseen, min(beyond, 0.0))
        beyond = self.log_beyond[self.tree.parent[node]] if node != ROOT else 0.0
        return beyond if foreseen is None else max(beyond - foreseen, 0.0)

    def _inherited(self, node: int) -> float:
        """R by the nearest ancestor that has one, less the usual masses of the rows from there on; NaN where none has
        one, and for the root."""
        tree, masses = self.tree, 0.0
        while node != ROOT:
            masses += tree.usual_log_mass(tree.depth[node])
            node = tree.parent[node]
            if not math.isnan(self.log_beyond[node]):
                return self.log_beyond[node] - masses
        return math.nan

    def _rest(self, node: int) -> float:
        promise = self.reward_scale * self.tree.promise[node]
        return self._bounded(node, _or_zero(self.log_beyond[node]) + promise + self.foresight.tilt(node).log_mean)

    def learn(self, leaf: int) -> None:
        """Take in a finished sequence, or a node that leads to nothing of the target, once, and back it up. Its visit
        was counted before."""
        self.grow()
        tree = self.tree
        if tree.outside[leaf]:
            self.log_value[leaf], self.mean[leaf] = -math.inf, 0.0
        else:
            self.log_value[leaf], self.mean[leaf] = log_factor(self.reward_scale, tree.reward[leaf]), tree.reward[leaf]
        self.log_open[leaf] = -math.inf
        self._back_up(leaf)

    def force(self, child: int) -> None:
        """A new child was not drawn: it counts with its own mass, and not as a sample of the unexplored tokens."""
        self._forced.add(child)

    def close(self, node: int) -> None:
        """Leave what is unfinished below `node` out of `log_open`, for good."""
        self.grow()
        self._closed.add(node)
        self.log_open[node] = -math.inf
        self._back_up(node)

    def _back_up(self, node: int) -> None:
        """Update all ancestors of `node`, the nearest first."""
        node = self.tree.parent[node]
        while node != NONE:
            self._update(node)
            node = self.tree.parent[node]

    def settled(self, prior_strength: float = 2.0, sweeps: int = 12, tolerance: float = 1e-6) -> SoftValues:
        """A copy in which all values agree with each other: a backup used what the parents held at its time, and they
        learnt more since. Sweeps from the leaves to the root, until no value moves more than `tolerance`.

        A search does better when few children are trusted (it corrects itself), an estimate when they are trusted less.
        """
        self.grow()
        other = copy.copy(self)
        for name in ("log_value", "log_rest", "log_beyond", "log_open", "mean", "mean_rest"):
            setattr(other, name, getattr(self, name)[:])
        other._settle(prior_strength, sweeps, tolerance)
        return other

    def _settle(self, prior_strength: float, sweeps: int, tolerance: float) -> None:
        self._prior_strength = prior_strength
        finished, terminal, outside = self.visits.finished, self.tree.terminal, self.tree.outside
        inner = [
            node for node in range(len(self.tree) - 1, -1, -1)
            if finished[node] and not terminal[node] and not outside[node]
        ]  # fmt: skip
        for _ in range(sweeps):
            before = [self.log_value[node] for node in inner]
            for node in inner:
                self._update(node)
            after = [self.log_value[node] for node in inner]
            if all(new == old or abs(new - old) <= tolerance for new, old in zip(after, before, strict=True)):
                return

    def _update(self, node: int) -> None:
        tree, finished, children = self.tree, self.visits.finished, list(self.tree.children(node))
        self._pool(node, [a for a in children if finished[a] and a not in self._forced])
        for child in children:
            if not finished[child]:  # in flight: still worth what the parent hands down
                self.log_value[child] = self._handed_down(child)
                self.log_open[child] = -math.inf if child in self._closed else self.log_value[child]
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
        if not self._conserves:
            self.mean[node] = _mean([self.mean_rest[node], *(self.mean[child] for child in children)], values)
        self.log_open[node] = -math.inf if node in self._closed else logsumexp(opens)

    def _pool(self, node: int, seen: list[int]) -> None:
        """R, G and its linear twin from the children seen so far and the parent's pseudo-observation."""
        promise, scale = self.tree.promise, self.reward_scale
        if not self._conserves:
            self._pool_masses(node, seen)
            return
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

    def _pool_masses(self, node: int, seen: list[int]) -> None:
        """The same where weights do not sum to 1."""
        promise, scale = self.tree.promise, self.reward_scale
        terms = [self.log_value[a] - scale * promise[a] for a in seen]
        means, weight = [self.mean[a] for a in seen], float(len(seen))
        prior = self._prior(node) if self._prior_strength > 0 else math.nan
        if not math.isnan(prior):
            terms.append(math.log(self._prior_strength) + prior)
            means.append(self.mean_rest[self.tree.parent[node]])
            weight += self._prior_strength
        elif node == ROOT and all(term == -math.inf for term in terms):  # as if the next one were in the target
            terms, means, weight = [*terms, 0.0], [*means, 0.0], weight + 1
        if all(term == -math.inf for term in terms):
            if not self._forced or math.isfinite(self.log_beyond[node]):
                return
            forced = [a for a in self.tree.children(node) if a in self._forced and self.visits.finished[a]]
            terms = [self.log_value[a] - scale * promise[a] for a in forced]  # better than nothing
            means, weight = [self.mean[a] for a in forced], float(len(forced))
            if all(term == -math.inf for term in terms):
                return
        self.log_beyond[node] = logsumexp(terms) - math.log(weight)
        self.log_rest[node], self.mean_rest[node] = self._rest(node), _mean(means, terms)

    def transitions(self, node: int) -> tuple[list[int], list[float], float]:
        """The tree's estimate of log pi*(a|s): children, their log-probabilities, and that of the unexplored rest."""
        self.grow()
        tree = self.tree
        children = list(tree.children(node))
        terms = [tree.log_p[a] + self.log_value[a] for a in children]
        rest = tree.log_unexplored[node] + self.log_rest[node]
        total = logsumexp([*terms, rest])
        if total == -math.inf:  # nothing of the target is below
            return children, terms, rest
        return children, [t - total for t in terms], rest - total

    def log_shares(self) -> dict[int, float]:
        """By finished leaf in the target: log of its share among all of them. At every node the mass of what was not
        finished is divided equally among the children that were, as draws from it, like G takes them to be. So a
        sequence counts for those near it, and its share is not its own probability, which is tiny for a long one."""
        self.grow()
        tree, shares = self.tree, dict[int, float]()
        stack = [(ROOT, 0.0)] if self.visits.finished[ROOT] else []
        while stack:
            node, above = stack.pop()
            if tree.terminal[node]:
                shares[node] = above
                continue
            seen, others = list[int](), [tree.log_unexplored[node]]
            for child in tree.children(node):
                if self.visits.finished[child]:
                    seen.append(child)
                else:
                    others.append(tree.log_p[child])
            forced = {child for child in seen if child in self._forced}
            forced = forced if len(forced) < len(seen) else set()  # if need be they stand for the others
            rest = logsumexp(others) - math.log(len(seen) - len(forced))
            terms = [
                (tree.log_p[child] if child in forced else logsumexp([tree.log_p[child], rest])) + self.log_value[child]
                for child in seen
            ]
            total = logsumexp(terms)
            stack.extend(
                (child, above + term - total) for child, term in zip(seen, terms, strict=True) if term > -math.inf
            )
        return shares

    def log_prob(self, tokens: Sequence[int], log_p: Sequence[float]) -> float:
        """The tree's estimate of log pi* of a complete sequence, given log p of each of its tokens, by which the model
        continues: its own log p, or with a power or a constraint, the log of the row's weight over the sum of the row.

        Where the sequence leaves the tree, the unexplored mass is divided as p divides it.
        """
        node, total = ROOT, 0.0
        for position, token in enumerate(tokens):
            children, log_probs, log_rest = self.transitions(node)
            log_prob = {self.tree.token[c]: (c, lp) for c, lp in zip(children, log_probs, strict=True)}
            if token not in log_prob:
                if log_rest == -math.inf:
                    return -math.inf
                log_share = self.tree.log_unexplored[node] - self.tree.log_mass[node]
                return total + log_rest - log_share + math.fsum(log_p[position:])
            node, step = log_prob[token]
            total += step
        return total
