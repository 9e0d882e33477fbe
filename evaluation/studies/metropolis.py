"""Metropolis-Hastings power sampling (arXiv 2510.14901, algorithm 1), with a reward if one is given: a baseline.

The target is p(x)^power exp(lambda r(x)). A text grows by blocks. After each, moves draw the text anew from one of its
tokens on, each as likely, up to the end of the block, and accept the proposal with the exact probability. The paper
draws proposals at temperature 1 / power, which is an option of `dts.decode`, as any other temperature is.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from dts.results import Estimate
from dts.search import GeneratorRun, Run, Search
from dts.search.method import Steps
from dts.search.paths import Path
from dts.search.readings import Reading
from dts.search.sampling import check_size
from dts.search.segments import Records, grow
from dts.settings import Budget, check_real, check_whole
from dts.softvalue import log_factor
from dts.tree import ROOT


@dataclass(frozen=True, slots=True)
class MetropolisHastings:
    """rollouts: complete texts to propose, all chains together. power, reward_scale: alpha and lambda of the target.
    block: tokens by which texts grow; None: a text is complete before the first move. moves: of each chain after each
    block but the last, after which chains move until the budget is used up. chains: independent ones, moved together.

    `result.shares` are the frequencies of complete states.
    """

    rollouts: int
    _: KW_ONLY
    power: float = 1.0
    reward_scale: float = 0.0
    block: int | None = None
    moves: int = 10
    chains: int = 1

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)
        check_real("power", self.power, lambda x: 0 < x < math.inf, "a number > 0")
        check_real("reward_scale", self.reward_scale, lambda x: 0 <= x < math.inf, "a number >= 0")
        for option in ("moves", "chains", *(() if self.block is None else ("block",))):
            check_whole(option, getattr(self, option), 1, allowed="a whole number >= 1")

    @property
    def name(self) -> str:
        return "metropolis-hastings"

    def batch_size(self) -> int:
        return self.chains

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def start(self, search: Search) -> Run:
        chains = _Chains(search, self)
        return GeneratorRun(search, chains.steps(), estimate=chains.estimate)


class _Chains:
    """The chains of one run: where each is, and the log of its target over the density of its proposal there."""

    def __init__(self, search: Search, settings: MetropolisHastings) -> None:
        self._search, self._settings, self._records = search, settings, Records(search)
        count = min(settings.chains, search.budget.rollouts or settings.chains)
        self._paths = [Path(search.rng(index)) for index in range(count)]
        self._chance = search.rng(count)
        self._log_ratio = np.zeros(count)  # [chains]
        self._log_norm: dict[int, float] = {}  # by node: log of the sum of q^temperature, q what is drawn from
        self._visits = Counter[int]()  # times that a chain was at a complete text, by leaf

    def steps(self) -> Steps:
        search, longest = self._search, self._search.decoding.max_new_tokens
        block = min(self._settings.block or longest, longest)
        for end in [*range(block, longest, block), longest]:
            yield from self._extend(self._paths, end)
            if not self._arrived(self._paths, end):
                return True
            self._log_ratio = self._log_ratios(self._paths)
            for _ in itertools.count() if end == longest else range(self._settings.moves):
                if search.exhausted():
                    break
                yield from self._move(end)
        return search.budget.rollouts is None or len(search.rollouts) < search.budget.rollouts

    def _move(self, end: int) -> Iterator[Sequence[int] | Reading]:
        """Propose a text that leaves each chain's at one of its tokens, and accept it or not."""
        tree = self._search.tree
        old = [tree.path(path.node) for path in self._paths]
        kept = [int(self._chance.integers(len(nodes))) for nodes in old]
        proposals = [Path(path.rng, nodes[k - 1] if k else ROOT)
                     for path, nodes, k in zip(self._paths, old, kept, strict=True)]  # fmt: skip
        yield from self._extend(proposals, end)
        if not self._arrived(proposals, end):
            return
        log_ratio = self._log_ratios(proposals)
        lengths = np.array([len(nodes) / tree.depth[path.node] for nodes, path in zip(old, proposals, strict=True)])
        with np.errstate(divide="ignore"):
            chance = np.log(self._chance.random(len(proposals)))
        accepted = chance < log_ratio - self._log_ratio + np.log(lengths)  # a longer text has more places to leave it
        self._log_ratio = np.where(accepted, log_ratio, self._log_ratio)
        for path, proposal, taken in zip(self._paths, proposals, accepted, strict=True):
            path.node = proposal.node if taken else path.node
        if end == self._search.decoding.max_new_tokens:
            self._visits.update(path.node for path in self._paths)

    def _extend(self, paths: Sequence[Path], end: int) -> Iterator[Sequence[int] | Reading]:
        """Draw tokens until each text has `end` of them or is complete. Complete ones are scored and recorded."""
        search = self._search
        while (moving := self._under_way(paths, end)) and not search.exhausted():
            nodes = [path.node for path in moving]
            yield from grow(search, self._records, moving, 1)
            self._measure(nodes)

    def _under_way(self, paths: Sequence[Path], end: int) -> list[Path]:
        tree = self._search.tree
        return [path for path in paths if not tree.terminal[path.node] and tree.depth[path.node] < end]

    def _arrived(self, paths: Sequence[Path], end: int) -> bool:
        """Whether all of them came to the end: a budget may end them half way, or before all are scored."""
        tree = self._search.tree
        unscored = any(tree.terminal[path.node] and math.isnan(tree.reward[path.node]) for path in paths)
        return not unscored and not self._under_way(paths, end)

    def _measure(self, nodes: Sequence[int]) -> None:
        """Take the temperature out of q at these nodes: p = q^temperature over its sum."""
        temperature = self._search.decoding.temperature
        new = [node for node in dict.fromkeys(nodes) if node not in self._log_norm]
        if temperature != 1 and new:
            sums = (temperature * self._search.probabilities(new).log()).logsumexp(-1)
            self._log_norm.update(zip(new, sums.tolist(), strict=True))

    def _log_ratios(self, paths: Sequence[Path]) -> np.ndarray:
        return np.array([self._of(path.node) for path in paths])

    def _of(self, node: int) -> float:
        """log of p^power exp(lambda r) over q, of a text up to `node`; the reward only of complete ones."""
        tree, settings, temperature = self._search.tree, self._settings, self._search.decoding.temperature
        log_q = tree.log_prob(node)
        log_norm = math.fsum(self._log_norm.get(tree.parent[n], 0.0) for n in tree.path(node))
        log_p = temperature * log_q - log_norm
        reward = log_factor(settings.reward_scale, tree.reward[node]) if tree.terminal[node] else 0.0
        return settings.power * log_p - log_q + reward

    def estimate(self) -> Estimate | None:
        """The frequencies of complete states; of Z nothing."""
        total = self._visits.total()
        return Estimate(shares={leaf: count / total for leaf, count in self._visits.items()}) if total else None
