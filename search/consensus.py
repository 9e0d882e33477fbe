"""Self-consistency: sample several completions and keep the answer that most of them give."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from dts.search.method import GeneratorRun, Run, ranked_by
from dts.search.paths import rollouts
from dts.search.sampling import Ancestral, check_size
from dts.settings import Budget, check_callable

if TYPE_CHECKING:
    from dts.search.search import Search


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """n independent samples from p; completions with the answer that has the most votes come first, then by reward.

    extract: from a completion's text to its answer, or to None where it has none and no vote. weighted: a vote counts
    its reward instead of one (weighted best-of-N); where some are negative, votes count from the lowest.
    Wang et al., arXiv 2203.11171; weighted: Li et al., arXiv 2206.02336.
    """

    n: int
    extract: Callable[[str], Hashable | None] = str.strip
    _: KW_ONLY
    weighted: bool = False

    def __post_init__(self) -> None:
        check_size("n", self.n)
        check_callable("extract", self.extract, "a function from a completion's text to its answer")

    @property
    def name(self) -> str:
        return "weighted-best-of-n" if self.weighted else "self-consistency"

    def batch_size(self) -> int:
        return min(self.n, 16)

    def budget(self) -> Budget:
        return Budget(rollouts=self.n)

    def start(self, search: Search) -> Run:
        return GeneratorRun(search, rollouts(search, Ancestral(search)), rank=lambda: self._rank(search))

    def _rank(self, search: Search) -> list[int]:
        low = min([0.0, *(rollout.reward for rollout in search.rollouts)])
        votes: dict[Hashable, float] = {}
        for rollout in search.rollouts:
            answer = self.extract(rollout.text)
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + (rollout.reward - low if self.weighted else 1.0)

        def count(leaf: int) -> tuple[float]:
            answer = self.extract(search.finished(leaf).text)
            return (-1.0 if answer is None else votes.get(answer, 0.0),)

        return ranked_by(search, count)
