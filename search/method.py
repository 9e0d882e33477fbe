"""What an algorithm is: settings that start a run, and a run that asks for distributions and owns its answer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dts.errors import EngineError
from dts.results import Estimate
from dts.search.readings import Reading, answer, measure
from dts.settings import Budget
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.search import Search


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has found when it is asked."""

    ranked: list[int]  # scored leaves, best first
    cut_short: bool  # a budget ended it with paths still under way
    estimate: Estimate | None = None  # of the target distribution, where the method has one
    cut: Sequence[int] = ()  # nodes at which paths were given up (`EarlyEnd`)


class Run(Protocol):
    """One search under way: ask and tell."""

    def ask(self) -> Sequence[int] | None:
        """The nodes (distinct, not evaluated) whose next-token distribution is needed, or None when the run is over.
        The caller evaluates them and asks again."""

    def outcome(self) -> Outcome:
        """The answer so far, at any moment: a budget can end the loop midway. Changes nothing."""


class Method(Protocol):
    """An algorithm. Objects hold settings only; everything that changes lives in the run and in the search."""

    @property
    def name(self) -> str:
        """As on the command line."""

    def batch_size(self) -> int:
        """Paths to extend together when the user does not say."""

    def budget(self) -> Budget:
        """The limits the method was given."""

    def start(self, search: Search) -> Run:
        """A run that grows the tree of `search`."""


# Yields the nodes to evaluate, one batch after another, and what it has to read of distributions that are at hand;
# returns whether a budget cut it short.
Steps = Generator[Sequence[int] | Reading, None, bool | None]


class GeneratorRun:
    """A run whose steps are a generator, which is resumed when the nodes it yielded are evaluated.

    rank: scored leaves, best first; without it by reward, the likeliest of equals first. estimate: the method's
    estimate of the target distribution, made anew each time the outcome is asked for. cut: nodes at which paths were
    given up, in a list that grows.
    """

    def __init__(
        self,
        search: Search,
        steps: Steps,
        *,
        rank: Callable[[], list[int]] | None = None,
        estimate: Callable[[], Estimate | None] | None = None,
        cut: Sequence[int] = (),
    ) -> None:
        self._search, self._rank, self._estimate, self._cut = search, rank, estimate, cut
        self._steps = measuring(search, steps) if search.weighs else steps
        self._next: list[Sequence[int] | Reading | Exception | None] = []  # of the steps, for `ask`
        self._cut_short = True  # until the generator ends by itself and says otherwise

    def reading(self) -> Reading | None:
        """What has to be answered before the run can say which nodes it needs; None when `ask` can say it at once. To
        ask for it is never needed: it lets the caller answer several runs together."""
        if not self._next or (isinstance(self._next[0], Reading) and self._next[0].answered):
            self._next = [self._step()]
        return self._next[0] if isinstance(self._next[0], Reading) else None

    def _step(self) -> Sequence[int] | Reading | Exception | None:
        try:
            return next(self._steps)
        except StopIteration as end:
            self._cut_short = bool(end.value)
            return None
        except EngineError:  # of all runs, so at once
            raise
        except Exception as error:  # for `ask` to raise
            return error

    def ask(self) -> Sequence[int] | None:
        while (reading := self.reading()) is not None:
            answer([reading])
        found = self._next.pop()
        if isinstance(found, Exception):
            raise found
        assert not isinstance(found, Reading)
        return found

    def outcome(self) -> Outcome:
        ranked = self._rank() if self._rank else by_reward(self._search)
        return Outcome(ranked, self._cut_short, self._estimate() if self._estimate else None, tuple(self._cut))


def measuring(search: Search, steps: Steps) -> Steps:
    """The same steps, with the masses of new rows of weights noted in the tree as soon as they are there."""
    yield from measure(search, [ROOT])
    while True:
        try:
            wanted = next(steps)
        except StopIteration as end:
            return bool(end.value)
        yield wanted
        if not isinstance(wanted, Reading):
            yield from measure(search, wanted)


def by_reward(search: Search) -> list[int]:
    """Scored leaves by reward, the likeliest of equals first."""
    return ranked_by(search, lambda leaf: ())


def ranked_by(search: Search, key: Callable[[int], tuple[float, ...]]) -> list[int]:
    """Scored leaves by a key, highest first; equal ones by reward, then by likelihood, then in order of finishing.
    Those that are not in the target come last."""
    tree = search.tree
    return sorted(
        tree.leaves(),
        key=lambda leaf: (search.belongs(leaf), *key(leaf), tree.reward[leaf], tree.log_prob(leaf)),
        reverse=True,
    )
