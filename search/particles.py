"""Particle filter: sequential Monte Carlo towards p(x) exp(lambda r(x)) (Lew et al., arXiv 2306.03081; Zhao et al.,
arXiv 2404.17546, for the twists).

Particles are drawn from p token by token. A prefix s carries the twist exp(lambda g(s)), where g is what the reward
has surely given so far; a particle's weight is the twist of its prefix, replaced by exp(lambda r) at its end.
Resampling happens when the effective sample size of the weights is low, and divides each weight by the expected
number of copies, so that the mean final weight is an unbiased estimate of Z = E_p exp(lambda r), whatever the twists.

Copies are alike until they grow apart. Metropolis-Hastings moves after a resampling (resample-move; Gilks and Berzuini
2001) draw the end of a particle anew from p, from one of its earlier steps on, each as likely. The new prefix s' takes
the place of s with probability min(1, exp(lambda (g(s') - g(s)))): p is in the target and in the proposal and cancels.
So p(s) exp(lambda g(s)) among the prefixes under way stays what the particles are weighted samples of, and one that
ended before the others were there is refused. Weights, and the expectation of Z's estimate, stay as they are.

Where the target has weights that do not sum to 1 (`dts.target`), a token is drawn in proportion to its weight and the
particle takes the sum of the row into its own weight, and into g of a move. One that comes to a dead end has weight 0
until it is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import numpy as np

from dts.logspace import draw, logsumexp
from dts.results import Completion, Estimate, LogZ
from dts.search.method import GeneratorRun, Run, Steps
from dts.search.paths import Path
from dts.search.readings import Reading
from dts.search.sampling import check_size
from dts.search.segments import Records, Segment, check_segment, grow, worth
from dts.settings import Budget, check_real, check_whole
from dts.softvalue import log_factor
from dts.target import Target
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.search import Search


@dataclass(frozen=True, slots=True)
class ParticleFilter:
    """n particles, resampled as they grow; `result.log_weights` holds the weighted samples.

    n: particles. reward_scale: lambda >= 0. ess_threshold: resample when the effective share of the particles under
    way falls below this. entropic: resample by tempered weights (entropic annealing of arXiv 2510.05825, with the
    weights corrected for it, so that Z stays unbiased). segment: None resamples at any token, by what the reward has
    earned; a number of tokens or a string resamples where such a segment ends, and there a reward that knows nothing
    before the end is asked about the text so far. power: the target is p^power exp(lambda r) (power sampling, arXiv
    2510.14901). moves: Metropolis-Hastings moves of each particle under way after each resampling; what they forward
    is counted.
    """

    n: int
    _: KW_ONLY
    reward_scale: float = 4.0
    ess_threshold: float = 0.5
    entropic: bool = False
    segment: Segment | None = None
    power: float = 1.0
    moves: int = 0

    def __post_init__(self) -> None:
        check_size("n", self.n)
        Target(self.reward_scale, self.power)  # checks both
        check_real("ess_threshold", self.ess_threshold, lambda x: 0 <= x <= 1, "a share from 0 to 1")
        if self.segment is not None:
            check_segment(self.segment)
        check_whole("moves", self.moves, 0, allowed="a whole number >= 0")

    @property
    def target(self) -> Target:
        """Without what the settings of `decode` add to it."""
        return Target(self.reward_scale, self.power)

    @property
    def name(self) -> str:
        return "entropic-particle-filter" if self.entropic else "particle-filter"

    def batch_size(self) -> int:
        return self.n

    def budget(self) -> Budget:
        return Budget(rollouts=self.n)

    def start(self, search: Search) -> Run:
        particles = _Particles(search, self)
        return GeneratorRun(search, particles.steps(), estimate=particles.estimate)


class _Particles:
    """The particles of one run and their weights. Those that end keep theirs; only those under way are resampled."""

    def __init__(self, search: Search, settings: ParticleFilter) -> None:
        self._search, self._settings = search, settings
        count = min(settings.n, search.budget.rollouts or settings.n)
        self._paths = [Path(search.rng(index)) for index in range(count)]
        self._chance = search.rng(count)
        self._log_weight, self._log_twist = np.zeros(count), np.zeros(count)  # [n]
        self._live = np.arange(count)
        self._steps = [[ROOT] for _ in range(count)]  # where each particle under way was after each of its steps

    def steps(self) -> Steps:
        search, records = self._search, Records(self._search)
        while len(self._live):
            yield from grow(search, records, [self._paths[i] for i in self._live], self._settings.segment or 1)
            ended = np.array([bool(search.tree.terminal[self._paths[i].node]) for i in self._live])
            if search.exhausted() and not ended.all():
                return True
            self._reweight()
            self._live = self._live[~ended]
            for i in self._live:
                self._steps[i].append(self._paths[i].node)
            if (self._log_weight[self._live] == -math.inf).all():
                self._live = self._live[:0]
            if len(self._live) and _effective_share(self._log_weight[self._live]) < self._settings.ess_threshold:
                self._resample()
                for _ in range(self._settings.moves):
                    yield from self._move()
        return False

    def _reweight(self) -> None:
        """Replace the twist of the prefix that each particle had by that of the prefix it has now."""
        log_now = np.array(self._log_twists([self._paths[i].node for i in self._live]))
        lost = log_now == -math.inf
        self._log_weight[self._live[lost]] = -math.inf
        self._log_weight[self._live[~lost]] += (log_now - self._log_twist[self._live])[~lost]
        self._log_twist[self._live] = log_now

    def _resample(self) -> None:
        live, search = self._live, self._search
        nodes = [self._paths[i].node for i in live]
        log_scores = self._log_weight[live]
        if self._settings.entropic:
            done = max(search.tree.depth[node] for node in nodes) / search.decoding.max_new_tokens
            log_scores = log_scores * _inverse_temperature(log_scores, done)
        picked, log_copies = systematic(log_scores, self._chance.random())
        self._log_weight[live] = (self._log_weight[live] - log_copies)[picked]
        self._log_twist[live] = self._log_twist[live][picked]
        steps = [self._steps[i] for i in live]
        for i, source in zip(live, picked, strict=True):
            self._paths[i].node, self._steps[i] = nodes[source], list(steps[source])

    def _move(self) -> Iterator[Sequence[int] | Reading]:
        """A Metropolis-Hastings move of each particle under way; all have made as many steps."""
        search, live = self._search, self._live
        count = len(self._steps[live[0]]) - 1
        kept = self._chance.integers(count, size=len(live))  # steps that each keeps
        steps = [self._steps[i][: k + 1] for i, k in zip(live, kept, strict=True)]
        paths = [Path(self._paths[i].rng, own[-1]) for i, own in zip(live, steps, strict=True)]
        for step in range(count):
            moving = [row for row, path in enumerate(paths)
                      if kept[row] <= step and not search.tree.terminal[path.node]]  # fmt: skip
            yield from grow(search, None, [paths[row] for row in moving], self._settings.segment or 1)
            for row in moving:
                steps[row].append(paths[row].node)
        if search.exhausted():
            return  # some may be half way
        whole = np.array([row for row, path in enumerate(paths) if not search.tree.terminal[path.node]], int)
        log_new = np.array(self._log_twists([paths[row].node for row in whole]))
        with np.errstate(divide="ignore", invalid="ignore"):  # a particle at a dead end
            accepted = np.log(self._chance.random(len(whole))) < log_new - self._log_twist[live[whole]]
        self._log_twist[live[whole[accepted]]] = log_new[accepted]
        for row in whole[accepted]:
            self._paths[live[row]].node, self._steps[live[row]] = paths[row].node, steps[row]

    def _log_twists(self, nodes: Sequence[int]) -> list[float]:
        """lambda times the reward at an end, times what is known at a prefix; 0 where nothing is."""
        outside = self._search.tree.outside
        inside = [node for node in nodes if not outside[node]]
        twists = dict(zip(inside, self._log_values(inside), strict=True))
        return [twists[node] + self._log_mass(node) if node in twists else -math.inf for node in nodes]

    def _log_mass(self, node: int) -> float:
        """log of the product of the sums of the rows that the tokens up to `node` were drawn from."""
        tree = self._search.tree
        return math.fsum(tree.log_mass[tree.parent[n]] for n in tree.path(node)) if self._search.weighs else 0.0

    def _log_values(self, nodes: Sequence[int]) -> list[float]:
        tree, scale = self._search.tree, self._settings.reward_scale
        if scale == 0:
            return [0.0] * len(nodes)
        if self._settings.segment is not None:
            return [log_factor(scale, value) for value in worth(self._search, nodes)]
        # The twist of the prompt cancels everywhere; leaving it out keeps prefixes of unknown worth comparable.
        base = tree.earned[ROOT] if math.isfinite(tree.earned[ROOT]) else 0.0
        values = [tree.reward[n] if tree.terminal[n] else tree.earned[n] - base for n in nodes]
        return [log_factor(scale, value) if math.isfinite(value) else 0.0 for value in values]

    def estimate(self) -> Estimate | None:
        """The particles as weighted samples; None while some are under way."""
        if len(self._live):
            return None
        leaves, count = np.array([path.node for path in self._paths]), len(self._paths)
        return weighted(
            self._search,
            {
                leaf: logsumexp((self._log_weight[leaves == leaf] - math.log(count)).tolist())
                for leaf in np.unique(leaves).tolist()
                if self._search.belongs(leaf)
            },
        )


NOTHING = "no completion in the target was found: raise the budget, max_new_tokens, or the number of particles"


def weighted(search: Search, log_weights: Mapping[int, float]) -> Estimate:
    """The estimate of the target by weighted samples: log weights by leaf, whose sum is an unbiased estimate of Z."""
    leaves, logs = list(log_weights), list(log_weights.values())
    log_z = logsumexp(logs)

    def sample(k: int, seed: int) -> list[Completion]:
        if not leaves:
            raise RuntimeError(NOTHING)
        uniforms = np.random.default_rng([seed, 1]).random(k)
        return [search.completion(draw(leaves, logs, uniform)) for uniform in uniforms]

    shares = {leaf: math.exp(log - log_z) for leaf, log in log_weights.items()}
    return Estimate(LogZ(log_z), shares, sample, log_weights=log_weights)


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
