"""Monte Carlo tree search over tokens: UCT (Kocsis & Szepesvári 2006) and PUCT (Silver et al. 2017).

Each rollout descends the search tree by an upper confidence bound, adds one node to it, and is completed by draws
from p; its reward is averaged (or maximised) into every node of the search tree that it passed. What rollouts drew
beyond the search tree stays in the token tree, so a later rollout that follows it pays for no forward pass twice.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch

from dts.errors import UsageError
from dts.search.choice import Choice
from dts.search.method import GeneratorRun, Run
from dts.search.paths import Path, Plain, rollouts
from dts.search.sampling import Ancestral, check_size
from dts.settings import Budget, check_real
from dts.tree import NONE, ROOT

if TYPE_CHECKING:
    from dts.search.search import Search


@dataclass(frozen=True, slots=True)
class MCTS:
    """Monte Carlo tree search for the highest reward.

    rollouts: finished sequences to spend. puct: the bonus follows p(a|s), and every token of the vocabulary competes;
    without it, UCT with progressive widening (sqrt(visits) children, drawn from p). bonus: weight of the confidence
    bonus in units of the reward range seen so far. value: "mean" or "max" of the rollouts below a node.
    """

    rollouts: int
    _: KW_ONLY
    puct: bool = True
    bonus: float = 1.25
    value: str = "mean"

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)
        check_real("bonus", self.bonus, lambda x: 0 <= x < math.inf, "a number >= 0")
        if self.value not in ("mean", "max"):
            raise UsageError(f"value={self.value!r} is not known; give 'mean' or 'max'")

    @property
    def name(self) -> str:
        return "mcts" if self.puct else "uct"

    def batch_size(self) -> int:
        """As `MaxEnt`: a quarter of the rollouts, so that later paths learn from earlier ones, but at least 4."""
        return min(16, max(4, self.rollouts // 4), self.rollouts)

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def start(self, search: Search) -> Run:
        return GeneratorRun(search, rollouts(search, _Confidence(search, self)))


class _Statistics:
    """A node of the search tree: its children there, and what the rollouts through it gave."""

    __slots__ = ("best", "children", "finished", "next_token", "selected", "total")

    def __init__(self) -> None:
        self.children: list[int] = []
        self.selected = 0  # rollouts that chose this node, those under way included, so that parallel paths spread
        self.finished = 0
        self.total, self.best = 0.0, -math.inf  # rewards of the finished ones
        self.next_token: tuple[int, float] | None = None  # PUCT: most likely token outside `children`, and its p


class _Confidence(Plain):
    """The tree policy inside the search tree, draws from p beyond it: a path's note says whether it is beyond."""

    def __init__(self, search: Search, settings: MCTS) -> None:
        super().__init__(search)
        self._settings = settings
        self._nodes = {ROOT: _Statistics()}  # the search tree
        self._draws = Ancestral(search)
        self._low, self._high = math.inf, -math.inf

    def launch(self, path: Path) -> None:
        path.note = False
        self._nodes[ROOT].selected += 1

    def select(self, path: Path) -> int | Choice:
        if path.note:
            return self._draws.select(path)
        here = self._nodes[path.node]
        child = self._puct(path, here) if self._settings.puct else self._uct(path, here)
        if child not in self._nodes:
            self._nodes[child] = _Statistics()
            here.children.append(child)
            here.next_token = None
            path.note = True
        self._nodes[child].selected += 1
        return child

    def _puct(self, path: Path, here: _Statistics) -> int:
        """Q + c p(a|s) sqrt(N(s)) / (1 + N(sa)); a token that was never tried has the mean value of its parent."""
        weight = self._settings.bonus * math.sqrt(here.selected)
        best, best_score = NONE, -math.inf
        for child in here.children:
            bonus = math.exp(self.search.tree.log_p[child]) / (1 + self._nodes[child].selected)
            score = self._value(child, here) + weight * bonus
            if score > best_score:
                best, best_score = child, score
        if here.next_token is None:
            mass = self._outside(path.node, here)[: self.search.lm.vocab_size]
            token = int(mass.argmax())
            here.next_token = token, float(mass[token])
        token, p = here.next_token
        if p > 0 and (best == NONE or self._scaled(_mean(here)) + weight * p > best_score):
            return self._take(path, token)
        return best

    def _uct(self, path: Path, here: _Statistics) -> int:
        """Q + c sqrt(log N(s) / N(sa)) over at most sqrt(N(s)) children."""
        if len(here.children) < math.sqrt(here.selected):
            cumulative = self._outside(path.node, here).cumsum(-1)
            if cumulative[-1] > 0:
                target = cumulative[-1:] * path.rng.random()
                token = int(torch.searchsorted(cumulative, target, right=True))
                return self._take(path, min(token, len(cumulative) - 1))
        log_n = math.log(here.selected)
        return max(
            here.children,
            key=lambda a: self._value(a, here) + self._settings.bonus * math.sqrt(log_n / self._nodes[a].selected),
        )

    def _outside(self, node: int, here: _Statistics) -> torch.Tensor:
        """p(. | node), [V], with 0 for tokens that are children in the search tree."""
        p = self.search.probabilities([node])[0].clone()
        p[[self.search.tree.token[child] for child in here.children]] = 0.0
        return p

    def _take(self, path: Path, token: int) -> int:
        tree = self.search.tree
        nodes = len(tree)
        (child,) = self.search.take([path.node], [token])
        if child >= nodes and path.left_at is None:
            path.left_at = tree.depth[path.node]
        return child

    def _value(self, node: int, parent: _Statistics) -> float:
        here = self._nodes[node]
        if not here.finished:
            return self._scaled(_mean(parent))
        return self._scaled(here.best if self._settings.value == "max" else _mean(here))

    def _scaled(self, reward: float) -> float:
        return (reward - self._low) / (self._high - self._low) if self._high > self._low else 0.0

    def learn(self, path: Path) -> None:
        tree, leaf = self.search.tree, path.node
        reward = tree.reward[leaf]
        self._low, self._high = min(self._low, reward), max(self._high, reward)
        node = leaf
        while node != NONE:
            here = self._nodes.get(node)
            if here is not None:
                here.finished += 1
                here.total += reward
                here.best = max(here.best, reward)
            node = tree.parent[node]


def _mean(here: _Statistics) -> float:
    return here.total / here.finished if here.finished else 0.0
