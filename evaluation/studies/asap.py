"""Adaptive sampling with approximate expected futures, ASAp (grammar-aligned decoding, arXiv 2405.21047): a baseline.

A mask takes away tokens after which no member of the language L remains, and samples from another distribution than
p(x | x in L), for it does not know how much of p is lost later. ASAp learns that: c(s) bounds from above the p-mass of
members among the continuations of s. It is 1 where nothing is known and 0 outside L. A path takes the token a with
probability p(a|s) c(sa) over their sum, and at its end c(s) = sum_a p(a|s) c(sa) goes up along it. In the limit the
paths are draws from p(x | x in L).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dts.logspace import draw
from dts.results import Estimate
from dts.search import GeneratorRun, Run, Search, readings
from dts.search.choice import Choice
from dts.search.method import by_reward
from dts.search.paths import Path, Plain, rollouts
from dts.search.readings import Reading, Readings
from dts.search.sampling import check_size
from dts.settings import Budget
from dts.tree import NONE, ROOT


@dataclass(frozen=True, slots=True)
class ASAp:
    """rollouts: paths to draw. language: has `start(lm)`, `advance(states, tokens)`, `allowed(states)` (bool [n, V])
    and `accepts(states)`; EOS is allowed where the text so far is accepted. learn: False is the mask alone.

    A text that is cut outside L counts as a rollout and is no completion. `result.shares` are frequencies of members.
    """

    rollouts: int
    language: Any
    learn: bool = True

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)

    @property
    def name(self) -> str:
        return "asap" if self.learn else "mask"

    def batch_size(self) -> int:
        return 1

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def start(self, search: Search) -> Run:
        policy = _Policy(search, self)
        return GeneratorRun(search, rollouts(search, policy), rank=policy.members, estimate=policy.estimate)


class _Policy(Plain):
    def __init__(self, search: Search, settings: ASAp) -> None:
        super().__init__(search)
        self._language, self._learns = settings.language, settings.learn
        self._states = {ROOT: settings.language.start(search.lm)}
        self._barred: dict[int, dict[int, float]] = {}  # by evaluated node: log 0 for each token that is not allowed
        self._allowed: dict[int, float] = {}  # by evaluated node: p-mass of the tokens that are allowed
        self._future: dict[int, float] = {}  # c by node; 1 where it is missing
        self._visits = Counter[int]()  # members by leaf

    def arrived(self, nodes: Sequence[int]) -> Iterable[Reading]:
        states = [self._states[node] for node in nodes]
        mask = self._language.allowed(states).clone()
        for row, accepted in enumerate(self._language.accepts(states)):
            mask[row, sorted(self.search.lm.eos_ids)] = accepted
        for node, allowed, p in zip(nodes, mask, self.search.probabilities(nodes), strict=True):
            self._barred[node] = dict.fromkeys((~allowed).nonzero()[:, 0].tolist(), -math.inf)
            self._allowed[node] = float(p[allowed].sum())
        return ()

    def select(self, path: Path) -> int | Choice:
        children, masses, rest = self._options(path.node)
        options: list[int | Choice] = [*children, Choice.EXPAND]
        known = [(option, math.log(mass)) for option, mass in zip(options, [*masses, rest], strict=True) if mass > 0]
        if not known:
            self._back_up(path.node, 0.0)
            return Choice.BLOCKED if path.node == ROOT else Choice.PRUNED
        return draw([option for option, _ in known], [log for _, log in known], path.rng.random())

    def _options(self, node: int) -> tuple[list[int], list[float], float]:
        """The children, p(a|s) c(sa) of each, and the p-mass of what is allowed and no child."""
        tree = self.search.tree
        children = list(tree.children(node))
        p = [math.exp(tree.log_p[child]) for child in children]
        rest = self._allowed[node] - math.fsum(p)
        exhausted = len(self._barred[node]) + len(children) >= self.search.lm.vocab_size
        masses = [one * self._future.get(child, 1.0) for one, child in zip(p, children, strict=True)]
        return children, masses, 0.0 if exhausted else max(rest, 0.0)

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        nodes = [path.node for path in paths]
        tilts = [self._barred[node] for node in nodes]
        children = yield from readings.draw(self.search, nodes, [path.rng.random() for path in paths], tilts)
        for node, child in zip(nodes, children, strict=True):
            state, token = self._states[node], self.search.tree.token[child]
            ends = token in self.search.lm.eos_ids
            self._states[child] = state if ends else self._language.advance([state], [token])[0]
        return children

    def learn(self, path: Path) -> None:
        member = self._is_member(path.node)
        self._visits[path.node] += member
        self._back_up(path.node, float(member))

    def _is_member(self, leaf: int) -> bool:
        return bool(self._language.accepts([self._states[leaf]])[0])

    def _back_up(self, node: int, future: float) -> None:
        if not self._learns:
            return
        self._future[node] = future
        node = self.search.tree.parent[node]
        while node != NONE:
            _, masses, rest = self._options(node)
            self._future[node] = math.fsum([*masses, rest])
            node = self.search.tree.parent[node]

    def members(self) -> list[int]:
        return [leaf for leaf in by_reward(self.search) if self._is_member(leaf)]

    def estimate(self) -> Estimate | None:
        total = self._visits.total()
        return Estimate(shares={leaf: n / total for leaf, n in self._visits.items() if n}) if total else None
