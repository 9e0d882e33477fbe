"""Particle filter: sequential Monte Carlo towards p(x) exp(lambda r(x)) (Lew et al., arXiv 2306.03081; Zhao et al.,
arXiv 2404.17546, for the twists).

Particles are drawn from p token by token. A prefix s carries the twist exp(lambda g(s)), where g is what the reward
has surely given so far; a particle's weight is the twist of its prefix, replaced by exp(lambda r) at its end.
Resampling happens when the effective sample size of the weights is low, and divides each weight by the expected
number of copies, so that the mean final weight is an unbiased estimate of Z = E_p exp(lambda r), whatever the twists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dts.errors import UsageError
from dts.search.sampling import check_size
from dts.search.segments import Records, Segment, check_segment, grow, worth
from dts.search.walkers import Walker
from dts.settings import Budget
from dts.softvalue import logsumexp
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.loop import Search


@dataclass(frozen=True, slots=True)
class ParticleFilter:
    """n particles, resampled as they grow; `result.log_weights` holds the weighted samples.

    n: particles. reward_scale: lambda >= 0. ess_threshold: resample when the effective share of the particles under
    way falls below this. entropic: resample by tempered weights (entropic annealing of arXiv 2510.05825, with the
    weights corrected for it, so that Z stays unbiased). segment: None resamples at any token, by what the reward has
    earned; a number of tokens or a string resamples where such a segment ends, and there a reward that knows nothing
    before the end is asked about the text so far.
    """

    n: int
    _: KW_ONLY
    reward_scale: float = 4.0
    ess_threshold: float = 0.5
    entropic: bool = False
    segment: Segment | None = None
    name: str = field(default="particle-filter", init=False)

    def __post_init__(self) -> None:
        check_size("n", self.n)
        if not 0 <= self.reward_scale < math.inf:
            raise UsageError(f"reward_scale={self.reward_scale!r} is not allowed; give a number >= 0")
        if not 0 <= self.ess_threshold <= 1:
            raise UsageError(f"ess_threshold={self.ess_threshold!r} is not allowed; give a share from 0 to 1")
        if self.segment is not None:
            check_segment(self.segment)
        if self.entropic:
            object.__setattr__(self, "name", "entropic-particle-filter")

    def batch_size(self) -> int:
        return self.n

    def budget(self) -> Budget:
        return Budget(rollouts=self.n)

    def plan(self, search: Search) -> Iterator[Sequence[int]]:
        """Particles that end wait with their weight; only those under way are resampled, among themselves."""
        n = min(self.n, search.budget.rollouts or self.n)
        walkers = [Walker(search.rng(index)) for index in range(n)]
        chance = search.rng(n)
        records = Records(search)
        log_weight, log_twist = np.zeros(n), np.zeros(n)
        live = np.arange(n)
        while len(live):
            yield from grow(search, records, [walkers[i] for i in live], self.segment or 1)
            nodes = [walkers[i].node for i in live]
            ended = np.array([bool(search.tree.terminal[node]) for node in nodes])
            if search.exhausted() and not ended.all():
                search.cut_short = True
                return
            log_now = np.array(self._log_twists(search, nodes))
            log_weight[live] += log_now - log_twist[live]
            log_twist[live] = log_now
            live = live[~ended]
            if len(live) and _effective_share(log_weight[live]) < self.ess_threshold:
                done = max(search.tree.depth[walkers[i].node] for i in live) / search.decoding.max_new_tokens
                log_scores = log_weight[live] * (_inverse_temperature(log_weight[live], done) if self.entropic else 1.0)
                picked, log_copies = systematic(log_scores, chance.random())
                nodes = [walkers[i].node for i in live[picked]]
                log_weight[live] = (log_weight[live] - log_copies)[picked]
                log_twist[live] = log_twist[live][picked]
                for i, node in zip(live, nodes, strict=True):
                    walkers[i].node = node
        leaves = np.array([walker.node for walker in walkers])
        search.log_weights = {
            leaf: logsumexp((log_weight[leaves == leaf] - math.log(n)).tolist()) for leaf in np.unique(leaves).tolist()
        }

    def _log_twists(self, search: Search, nodes: Sequence[int]) -> list[float]:
        """lambda times the reward at an end, times what is known at a prefix; 0 where nothing is."""
        tree, scale = search.tree, self.reward_scale
        if scale == 0:
            return [0.0] * len(nodes)
        if self.segment is not None:
            return [scale * value for value in worth(search, nodes)]
        # The twist of the prompt cancels everywhere; leaving it out keeps prefixes of unknown worth comparable.
        base = tree.earned[ROOT] if math.isfinite(tree.earned[ROOT]) else 0.0
        values = [tree.reward[n] if tree.terminal[n] else tree.earned[n] - base for n in nodes]
        return [scale * value if math.isfinite(value) else 0.0 for value in values]


def systematic(log_scores: np.ndarray, uniform: float) -> tuple[np.ndarray, np.ndarray]:
    """Systematic resampling of m particles: m indices, [m], and the log of each one's expected copies, [m]."""
    m = len(log_scores)
    share = np.exp(log_scores - log_scores.max())
    share /= share.sum()
    picked = np.searchsorted(share.cumsum(), (np.arange(m) + uniform) / m, side="right")
    with np.errstate(divide="ignore"):
        return np.minimum(picked, np.flatnonzero(share)[-1]), np.log(m * share)


def _effective_share(log_weights: np.ndarray) -> float:
    """Effective sample size over the number of particles: (sum w)^2 / (m sum w^2)."""
    w = np.exp(log_weights - log_weights.max())
    return float(w.sum() ** 2 / (w**2).sum()) / len(w)


def _inverse_temperature(log_weights: np.ndarray, progress: float) -> float:
    """beta = H + (1 - H) t/T with H the entropy of the weights over its maximum: flat while few particles hold most of
    the weight and much is still to come."""
    w = np.exp(log_weights - log_weights.max())
    w = w[w > 0] / w.sum()
    entropy = float(-(w * np.log(w)).sum()) / math.log(len(log_weights))
    return entropy + (1 - entropy) * progress
