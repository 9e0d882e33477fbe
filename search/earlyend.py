"""An early end for samples that the model itself is unsure of (Fu et al., arXiv 2508.15260).

The first samples are drawn to their ends and set a threshold. A later one stops where a run of its tokens is less
confident than that: it costs no more tokens, and is no answer.
"""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dts.rewards import Confidence
from dts.search.choice import Choice
from dts.search.paths import Path, Plain, Policy
from dts.settings import check_real, check_whole
from dts.tree import Tree

if TYPE_CHECKING:
    from dts.search.search import Search


@dataclass(frozen=True, slots=True)
class EarlyEnd:
    """When a sample ends early.

    after: the first samples, which are never ended. keep: share of them whose least confident group lies above the
    threshold (a quantile of `Confidence("lowest", window)`). window: tokens of a group.
    The others are not compared before the first ones have finished, so a wide batch ends fewer of them.
    """

    after: int = 16
    keep: float = 0.9
    window: int = 16

    def __post_init__(self) -> None:
        check_real("keep", self.keep, lambda x: 0 <= x <= 1, "a share from 0 to 1")
        for option in ("after", "window"):
            check_whole(option, getattr(self, option), 1, allowed="a whole number >= 1")


class Confident(Plain):
    """Paths go as `draws` says until they end early; the nodes where they do so are added to `cut`."""

    def __init__(self, search: Search, draws: Policy, settings: EarlyEnd, cut: list[int]) -> None:
        super().__init__(search)
        self._draws, self._settings, self._cut = draws, settings, cut
        self._confidence = Confidence("lowest", settings.window)
        self._launched, self._threshold = 0, -math.inf
        self._first: list[float] = []  # confidence of the first samples

    def launch(self, path: Path) -> None:
        path.note = _Reader(self._launched, self._settings.window)
        self._launched += 1

    def select(self, path: Path) -> int | Choice:
        return Choice.PRUNED if self.prunes(path) else self._draws.select(path)

    def prunes(self, path: Path) -> bool:
        tree, reader = self.search.tree, path.note
        reader.read(tree, path.node)
        if reader.index < self._settings.after or reader.lowest >= self._threshold:
            return False
        if path.left_at is None:  # it is spent, although it drew no new token
            path.left_at = tree.depth[path.node]
        self._cut.append(path.node)
        return True

    def learn(self, path: Path) -> None:
        if path.note.index < self._settings.after:
            self._first.append(self._confidence(self.search.tree.log_probs(path.node)))
            if len(self._first) == self._settings.after:
                self._threshold = float(np.quantile(self._first, 1 - self._settings.keep))


@dataclass(slots=True)
class _Reader:
    """The least confident group of a path so far, read token by token."""

    index: int  # of the path
    window: int
    lowest: float = math.inf
    depth: int = 0  # tokens read
    sums: collections.deque[float] = field(default_factory=lambda: collections.deque([0.0]))  # of log p, [window + 1]

    def read(self, tree: Tree, node: int) -> None:
        new = []
        while tree.depth[node] > self.depth:
            new.append(tree.own_log_p(node))
            node = tree.parent[node]
        for log_p in reversed(new):
            self.sums.append(self.sums[-1] + log_p)
            if len(self.sums) > self.window:
                self.lowest = min(self.lowest, (self.sums[-1] - self.sums[0]) / self.window)
                self.sums.popleft()
        self.depth += len(new)
