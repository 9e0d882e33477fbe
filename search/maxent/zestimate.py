"""An unbiased estimate of Z = E_p exp(lambda r) from paths that were chosen adaptively.

Path t starts when the finished sequences hold the mass K_t = sum p(x) exp(lambda r(x)) and ends in a sequence x that
was not finished then. With q(x) the probability of all choices on its way, K_t + p(x) exp(lambda r(x)) / q(x) has
expectation Z whatever was learnt before, so the mean over a number of paths fixed in advance is unbiased. (Des Raj,
JASA 51, 1956, for draws without replacement.) Paths run side by side: where one finishes y below the node s at which
another stands, the other can no longer end in y. It is credited with its weight so far times p(y|s) exp(lambda r(y)),
which keeps the expectation. The errors of different paths are uncorrelated, so their squares add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dts.logspace import logsumexp
from dts.results import LogZ
from dts.search.paths import Path
from dts.softvalue import log_factor
from dts.tree import NONE, ROOT, Tree

NORMAL_95 = 1.959964


@dataclass(slots=True)
class Trace:
    """One path's part in the estimate. Its choices come from a mixture of policies with fixed shares."""

    index: int
    known: float  # log K when the path started
    log_p: float = 0.0  # of the choices so far
    log_q: list[float] = field(default_factory=list)  # of the choices so far, times its share, for each policy
    credits: list[float] = field(default_factory=list)  # logs

    def chose(self, log_p: float, log_q: Sequence[float]) -> None:
        """Count in one choice: its log-probability under the model, and under each policy."""
        self.log_p += log_p
        self.log_q = [total + step for total, step in zip(self.log_q, log_q, strict=True)]

    @property
    def log_weight(self) -> float:
        """log p / q of the choices so far."""
        return self.log_p - logsumexp(self.log_q)


class Partition:
    """Collects the draws of one search. `shares` of the policies sum to 1; `limit` is the number of paths planned."""

    def __init__(
        self, tree: Tree, reward_scale: float, shares: Sequence[float], limit: int | None, *, conserves: bool = True
    ) -> None:
        """conserves: whether weights are those of p (`Target.conserves`). Those of a power of p, or of a constraint,
        may lie nearly all on what was finished; the interval then looks at what was still open."""
        self._tree, self._scale, self._limit, self._conserves = tree, reward_scale, limit, conserves
        self._log_shares = [math.log(share) if share > 0 else -math.inf for share in shares]
        self._known = -math.inf  # log K
        self._under_way: dict[int, tuple[Trace, Path]] = {}
        self._estimates: list[float] = []  # log estimate of Z by draw; nan while under way
        self._opens: list[float] = []  # of that, what was open when the draw started

    def start(self, path: Path) -> Trace:
        """A path starts at the root; its choices are to be noted in the trace that is returned."""
        trace = Trace(len(self._estimates), self._known, log_q=list(self._log_shares))
        self._under_way[trace.index] = trace, path
        self._estimates.append(math.nan)
        self._opens.append(math.nan)
        return trace

    def close(self, trace: Trace | None, leaf: int) -> None:
        """The path of `trace` ended in the scored `leaf`, which no path had finished. None: a path that was no draw."""
        tree, value = self._tree, log_factor(self._scale, self._tree.reward[leaf])
        if trace:
            self._settle(trace, trace.log_weight + value)
        log_p, node = {}, leaf  # by ancestor: log p(leaf | ancestor)
        total = 0.0
        while node != NONE:
            log_p[node] = total
            total += tree.log_p[node]
            node = tree.parent[node]
        self._known = logsumexp([self._known, log_p[ROOT] + value])
        for other, path in self._under_way.values():
            if path.node in log_p:
                other.credits.append(other.log_weight + log_p[path.node] + value)

    def give_up(self, trace: Trace) -> None:
        """Other paths finished everything that this one could still have reached."""
        self._settle(trace, -math.inf)

    def _settle(self, trace: Trace, own: float) -> None:
        del self._under_way[trace.index]
        self._estimates[trace.index] = logsumexp([trace.known, *trace.credits, own])
        self._opens[trace.index] = logsumexp([*trace.credits, own])

    def log_z(self, *, exhausted: bool) -> LogZ:
        """The estimate; exact where the space is exhausted.

        The 95 % interval corrects for the skewness of the draws by Hall's transformation (JRSS B 54, 1992), and
        never lies below what the finished sequences hold. Where a budget of tokens or time ends the search, the
        number of paths is not fixed in advance and the estimate is unbiased only approximately.
        """
        if exhausted:
            return LogZ(self._known, 0.0, (self._known, self._known))
        closed = min(self._under_way, default=len(self._estimates))
        logs = np.array(self._estimates[: min(closed, self._limit or closed)])
        if not len(logs):
            return LogZ(-math.inf, math.inf, (-math.inf, math.inf))
        top = float(logs.max())
        if top == -math.inf:  # no draw ended in the target
            return LogZ(-math.inf, math.inf, (-math.inf, math.inf))
        terms = np.exp(logs - top)
        mean, spread = float(terms.mean()), float(terms.std())
        if len(logs) < 3 or spread <= 1e-12 * mean:
            error = 0.0 if spread <= 1e-12 * mean and len(logs) > 1 else math.inf
            estimate = top + math.log(mean)
            return LogZ(estimate, error, (estimate - error, estimate + error))
        low, high = _hall_interval(terms)
        bounds = (top + math.log(low) if low > 0 else -math.inf, top + math.log(high))
        error = spread / math.sqrt(len(logs)) / mean
        most = self._known if self._conserves else logsumexp([self._known, self._most_open(len(logs))])
        return LogZ(top + math.log(mean), error, (max(bounds[0], self._known), max(bounds[1], most)))

    def _most_open(self, count: int) -> float:
        """log of an upper bound on what is open now, by normal theory: no more than what later draws found open."""
        logs = np.array(self._opens[count // 2 : count])
        top = float(logs.max())
        if top == -math.inf:
            return -math.inf
        terms = np.exp(logs - top)
        return top + math.log(float(terms.mean() + NORMAL_95 * terms.std() / math.sqrt(len(terms))))


def _hall_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values` [n], which must not all be equal."""
    count, mean, spread = len(values), float(values.mean()), float(values.std())
    skewness = float((((values - mean) / spread) ** 3).mean())

    def quantile(normal: float) -> float:
        t = normal / math.sqrt(count)
        if abs(skewness) < 1e-9:
            return t
        return 3 / skewness * (float(np.cbrt(1 + skewness * (t - skewness / (6 * count)))) - 1)

    return mean - spread * quantile(NORMAL_95), mean - spread * quantile(-NORMAL_95)
