"""Self-consistency: sample several completions and keep the answer that most of them give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

from dts.search.sampling import Ancestral, check_size
from dts.search.walkers import rollouts
from dts.settings import Budget

if TYPE_CHECKING:
    from dts.search.loop import Search


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
    name: str = field(default="self-consistency", init=False)

    def __post_init__(self) -> None:
        check_size("n", self.n)
        if self.weighted:
            object.__setattr__(self, "name", "weighted-best-of-n")

    def batch_size(self) -> int:
        return min(self.n, 16)

    def budget(self) -> Budget:
        return Budget(rollouts=self.n)

    def plan(self, search: Search) -> Iterator[Sequence[int]]:
        search.rank = functools.partial(self._rank, search)
        return rollouts(search, Ancestral(search.tree))

    def _rank(self, search: Search, leaves: Sequence[int]) -> list[tuple[float, ...]]:
        low = min([0.0, *(rollout.reward for rollout in search.rollouts)])
        votes: dict[Hashable, float] = {}
        for rollout in search.rollouts:
            answer = self.extract(rollout.text)
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + (rollout.reward - low if self.weighted else 1.0)
        answers = [self.extract(search.finished(leaf).text) for leaf in leaves]
        counts = [-1.0 if answer is None else votes.get(answer, 0.0) for answer in answers]
        return [(count, search.tree.reward[leaf]) for count, leaf in zip(counts, leaves, strict=True)]
