"""Search without values: independent samples, the best of them, and the most likely path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from dts.errors import UsageError, shown
from dts.search.choice import Choice
from dts.search.earlyend import Confident, EarlyEnd
from dts.search.method import GeneratorRun, Run
from dts.search.paths import Path, Plain, Policy, rollouts
from dts.search.readings import Readings, most_likely
from dts.settings import Budget, check_whole
from dts.tree import NONE

if TYPE_CHECKING:
    from dts.search.search import Search


class Ancestral(Plain):
    """Draw from p: an existing child with its own probability, otherwise a new token."""

    independent = True

    def select(self, path: Path) -> int | Choice:
        tree, node = self.search.tree, path.node
        if not tree.n_children[node]:
            return Choice.EXPAND
        if (drafted := self.search.drafted(node)) is not None:
            return Choice.EXPAND if drafted == NONE else drafted
        u = path.rng.random() * math.exp(tree.log_mass[node])
        last: int | Choice = Choice.EXPAND
        for child in tree.children(node):
            u -= math.exp(tree.log_p[child])
            last = child
            if u < 0:
                return child
        # Rounding may leave a sliver of u although every token is a child.
        return Choice.EXPAND if tree.log_unexplored[node] > -math.inf else last


class _MostLikely(Plain):
    """The most likely token at every step."""

    def select(self, path: Path) -> int | Choice:
        tree = self.search.tree
        return tree.first_child[path.node] if tree.n_children[path.node] else Choice.EXPAND

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        return most_likely(self.search, [path.node for path in paths])


def check_size(option: str, value: int) -> None:
    """Raise `UsageError` unless a method's size is a whole number >= 1."""
    check_whole(option, value, 1, allowed="a whole number >= 1")


def check_early_end(early_end: EarlyEnd | None) -> None:
    if early_end is not None and not isinstance(early_end, EarlyEnd):
        raise UsageError(f"early_end={shown(early_end)} is not allowed; give dts.search.EarlyEnd() or None")


def drawn(search: Search, early_end: EarlyEnd | None, rank: Callable[[], list[int]] | None = None) -> Run:
    """A run of independent samples, some of which may end early."""
    policy: Policy = Ancestral(search)
    cut: list[int] = []
    if early_end is not None:
        policy = Confident(search, policy, early_end, cut)
    return GeneratorRun(search, rollouts(search, policy), rank=rank, cut=cut)


@dataclass(frozen=True, slots=True)
class Sampling:
    """n independent samples from p. Samples that agree on a prefix share its forward passes.

    early_end: samples that the model is unsure of end early; they count among the n, and are no completions.
    """

    n: int
    _: KW_ONLY
    early_end: EarlyEnd | None = None

    def __post_init__(self) -> None:
        check_size("n", self.n)
        check_early_end(self.early_end)

    @property
    def name(self) -> str:
        return "sampling"

    def batch_size(self) -> int:
        return min(self.n, 16)

    def budget(self) -> Budget:
        return Budget(rollouts=self.n)

    def start(self, search: Search) -> Run:
        return drawn(search, self.early_end)


@dataclass(frozen=True, slots=True)
class BestOfN(Sampling):
    """n independent samples from p; `result.best` is the one with the highest reward."""

    @property
    def name(self) -> str:
        return "best-of-n"


@dataclass(frozen=True, slots=True)
class Greedy:
    """The most likely token at every step: one path, no randomness."""

    @property
    def name(self) -> str:
        return "greedy"

    def batch_size(self) -> int:
        return 1

    def budget(self) -> Budget:
        return Budget(rollouts=1)

    def start(self, search: Search) -> Run:
        return GeneratorRun(search, rollouts(search, _MostLikely(search)))
