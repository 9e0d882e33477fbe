"""Rollouts: paths that walk down the tree by a policy and grow it where the policy says so.

`rollouts` is shared by every method whose unit of work is one path from the prompt to an end. A path that ends leaves
the batch at once and the next one takes its place, so forward calls stay full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dts.search.choice import Choice
from dts.search.readings import Reading, Readings, draw
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.method import Steps
    from dts.search.search import Search


@dataclass(slots=True)
class Path:
    """One path under way."""

    rng: np.random.Generator
    node: int = ROOT
    left_at: int | None = None  # depth where it left the tree that was there; None while it still follows it
    note: Any = None  # of its policy, and read by nobody else


class Policy(Protocol):
    """How a path chooses at an evaluated node, and what is learnt when it ends."""

    @property
    def distinct(self) -> bool:
        """A path that comes to a node which another is expanding waits until the new child is there, then selects."""

    @property
    def independent(self) -> bool:
        """Paths are draws from p that walk to their ends."""

    def arrived(self, nodes: Sequence[int]) -> Iterable[Reading]:
        """These nodes were evaluated. Yields what has to be read."""

    def launch(self, path: Path) -> None:
        """A path is about to choose at the root."""

    def select(self, path: Path) -> int | Choice:
        """A child of the path's node, EXPAND, BLOCKED or PRUNED."""

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        """A child for each path's node, a new one as a rule. Yields what has to be read."""

    def prunes(self, path: Path) -> bool:
        """Whether a path that has just entered its node should end there, unfinished."""

    def learn(self, path: Path) -> None:
        """A path ended at the scored leaf that is its node."""

    def lose(self, path: Path) -> None:
        """A path ended at a node that leads to nothing of the target, and is no completion."""


class Plain:
    """What most policies do: draw new children from p, prune nothing, learn nothing."""

    distinct = independent = False

    def __init__(self, search: Search) -> None:
        self.search = search

    def arrived(self, nodes: Sequence[int]) -> Iterable[Reading]:
        return ()

    def launch(self, path: Path) -> None:
        pass

    def expand(self, paths: Sequence[Path]) -> Readings[list[int]]:
        return draw(self.search, [path.node for path in paths], [path.rng.random() for path in paths])

    def prunes(self, path: Path) -> bool:
        return False

    def learn(self, path: Path) -> None:
        pass

    def lose(self, path: Path) -> None:
        pass


def rollouts(search: Search, policy: Policy) -> Steps:
    """Walk paths until the budget is used up or the whole space is finished."""
    limit = search.budget.rollouts
    paths: list[Path] = []
    launched, streams, blocked = 0, 0, False
    pruned: list[Path] = []

    def end(ended: list[Path]) -> None:
        finished: list[Path] = []
        for path in ended:
            found_before = policy.distinct and search.scored(path.node)
            (finished if search.tree.terminal[path.node] and not found_before else pruned).append(path)
            if search.tree.outside[path.node] and not search.tree.terminal[path.node]:
                policy.lose(path)
        recorded = len(search.rollouts)
        try:
            search.record([path.node for path in finished], [_left_tree_at(search, path) for path in finished])
        finally:  # a budget may allow the reward to score some of them
            for path in finished[: len(search.rollouts) - recorded]:
                policy.learn(path)

    yield from policy.arrived([ROOT])
    while True:
        room = 0 if blocked else search.batch_size - len(paths)
        new = room if limit is None else min(room, limit - launched)
        paths += [Path(search.rng(streams + i)) for i in range(new)]
        launched, streams = launched + new, streams + new
        under_way, before = len(paths), len(search.rollouts)
        paths = yield from advance(search, policy, paths, end)
        if search.exhausted():
            return bool(paths) or limit is None or len(search.rollouts) < limit
        # A path that finds nothing left to do is no rollout; wait for another to end before the next try. One that
        # was pruned is spent if it cost a token, and the tree is smaller for the next.
        ended_now = len(search.rollouts) - before + len(pruned)
        given_up = under_way - len(paths) - ended_now
        launched -= given_up + sum(path.left_at is None for path in pruned)
        pruned.clear()
        blocked = given_up > 0 and not ended_now
        if not blocked and len(paths) < search.batch_size and (limit is None or launched < limit):
            continue  # fill the batch before paying for a forward call
        if not paths:
            return False
        if policy.independent:
            search.expect([path.node for path in paths])
        nodes = list(dict.fromkeys(path.node for path in paths))
        yield nodes
        yield from policy.arrived(nodes)


def advance(
    search: Search, policy: Policy, paths: list[Path], end: Callable[[list[Path]], None]
) -> Readings[list[Path]]:
    """Move every path to a node that must be forwarded, or to its end; returns those that wait for a forward call."""
    waiting: list[Path] = []
    while paths:
        stopped: dict[Choice | None, list[Path]] = {choice: [] for choice in (None, *Choice)}
        busy: set[int] = set()  # nodes that a path is expanding
        for path in paths:
            choice = _descend(search, policy, path, busy if policy.distinct else set())
            stopped[choice].append(path)
            if choice is Choice.EXPAND:
                busy.add(path.node)
        expanding = stopped[Choice.EXPAND]
        if expanding:
            yield from _expand(search, policy, expanding)
        ended = stopped[Choice.PRUNED]
        for path in stopped[None] + expanding:
            if search.tree.terminal[path.node] or search.tree.outside[path.node] or policy.prunes(path):
                ended.append(path)
            elif search.evaluated(path.node):  # a policy may choose an old child here
                stopped[Choice.LATER].append(path)
            else:
                waiting.append(path)
        if ended:
            end(ended)
        paths = stopped[Choice.LATER]
    return waiting


def _left_tree_at(search: Search, path: Path) -> int:
    return path.left_at if path.left_at is not None else search.tree.depth[path.node]


def _descend(search: Search, policy: Policy, path: Path, busy: set[int]) -> Choice | None:
    """Follow the policy to a leaf or a node that must be forwarded (None), or to a node where it says something else or
    that is busy (LATER)."""
    tree = search.tree
    while not tree.terminal[path.node] and search.evaluated(path.node):
        if tree.outside[path.node]:
            path.left_at = _left_tree_at(search, path)  # it is spent, although it may have drawn no new token
            return Choice.PRUNED
        if path.node in busy:
            return Choice.LATER
        if path.node == ROOT:
            policy.launch(path)
        choice = policy.select(path)
        if isinstance(choice, Choice):
            return choice
        path.node = choice
    return None


def _expand(search: Search, policy: Policy, paths: list[Path]) -> Readings[None]:
    """Give each path a child of its node, a new one as a rule."""
    known = len(search.tree)
    children = yield from policy.expand(paths)
    for path, child in zip(paths, children, strict=True):
        if path.left_at is None and child >= known:
            path.left_at = search.tree.depth[path.node]
        path.node = child
    at_hand = [node for node in range(known, len(search.tree)) if search.evaluated(node)]
    if at_hand:  # an engine has told more than it was asked for
        yield from policy.arrived(at_hand)
