"""Self-consistency: sample several completions and keep the answer that most of them give."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from dts.errors import UsageError
from dts.rewards import Confidence
from dts.search.earlyend import EarlyEnd
from dts.search.method import Run, ranked_by
from dts.search.sampling import check_early_end, check_size, drawn
from dts.settings import Budget, check_callable

if TYPE_CHECKING:
    from dts.search.search import Search


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """n independent samples from p; completions with the answer that has the most votes come first, then by reward.

    extract: from a completion's text to its answer, or to None where it has none and no vote. weighted: a vote counts
    its reward instead of one (weighted best-of-N); where some are negative, votes count from the lowest.
    confidence: "lowest", "bottom", "tail", "mean" or a `dts.Confidence`: a vote counts exp(confidence), the geometric
    mean of p over a group of its tokens. early_end: as in `Sampling`; samples that end early do not vote.
    Wang et al., arXiv 2203.11171; weighted: Li et al., arXiv 2206.02336; confidence: Fu et al., arXiv 2508.15260.
    """

    n: int
    extract: Callable[[str], Hashable | None] = str.strip
    _: KW_ONLY
    weighted: bool = False
    confidence: str | Confidence | None = None
    early_end: EarlyEnd | None = None

    def __post_init__(self) -> None:
        check_size("n", self.n)
        check_callable("extract", self.extract, "a function from a completion's text to its answer")
        check_early_end(self.early_end)
        if self.confidence is not None:
            self._confidence()
            if self.weighted:
                raise UsageError("weighted=True and confidence= cannot both weigh the votes; give one of them")

    def _confidence(self) -> Confidence:
        given = self.confidence
        return given if isinstance(given, Confidence) else Confidence(given or "")

    @property
    def name(self) -> str:
        if self.confidence is not None:
            return "confidence-vote"
        return "weighted-best-of-n" if self.weighted else "self-consistency"

    def batch_size(self) -> int:
        return min(self.n, 16)

    def budget(self) -> Budget:
        return Budget(rollouts=self.n)

    def start(self, search: Search) -> Run:
        return drawn(search, self.early_end, rank=lambda: self._rank(search))

    def _weights(self, search: Search) -> list[float]:
        """Of the votes, one for each rollout."""
        if self.confidence is not None:
            confidence = self._confidence()
            return [math.exp(confidence(search.tree.log_probs(rollout.leaf))) for rollout in search.rollouts]
        if self.weighted:
            low = min([0.0, *(rollout.reward for rollout in search.rollouts)])
            return [rollout.reward - low for rollout in search.rollouts]
        return [1.0] * len(search.rollouts)

    def _rank(self, search: Search) -> list[int]:
        votes: dict[Hashable, float] = {}
        for rollout, weight in zip(search.rollouts, self._weights(search), strict=True):
            answer = self.extract(rollout.text)
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + weight

        def count(leaf: int) -> tuple[float]:
            answer = self.extract(search.finished(leaf).text)
            return (-1.0 if answer is None else votes.get(answer, 0.0),)

        return ranked_by(search, count)
