"""Rollouts: paths that walk down the tree by a policy and grow it where the policy says so.

`rollouts` is the plan shared by every method whose unit of work is one path from the prompt to an end. A path that
ends leaves the batch at once and the next one takes its place, so forward calls stay full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.loop import Search
    from dts.search.partition import Draw

EXPAND = -1  # choose a token that is no child yet
LATER = -3  # another path is expanding this node: select when it has
BLOCKED = -2  # nothing below is left to choose; every remaining sequence is being finished by another path
PRUNED = -4  # nothing below is worth finishing


class Policy(Protocol):
    """How a path chooses at an evaluated node, and what is learnt when it ends."""

    @property
    def distinct(self) -> bool:
        """A path that comes to a node which another is expanding waits until the new child is there, then selects."""

    def arrived(self, search: Search, nodes: Sequence[int]) -> None:
        """These nodes were evaluated."""

    def select(self, walker: Walker) -> int:
        """A child of the path's node, EXPAND, BLOCKED or PRUNED."""

    def expand(self, search: Search, walkers: Sequence[Walker]) -> list[int]:
        """A new child for each path's node."""

    def pruned(self, walker: Walker) -> bool:
        """Whether a path that has just entered its node should end there, unfinished."""

    def finish(self, walker: Walker) -> None:
        """A path ended at the scored leaf that is its node."""


@dataclass(slots=True)
class Walker:
    """One path under way."""

    rng: np.random.Generator
    node: int = ROOT
    start_depth: int = -1  # where it left the tree that was there; -1 while it still follows it
    explores: bool = False  # follows p instead of the values
    draw: Draw | None = None  # its part in an estimate of Z


def rollouts(search: Search, policy: Policy) -> Iterator[Sequence[int]]:
    """Walk paths until the budget is used up or the whole space is finished."""
    limit = search.budget.rollouts
    walkers: list[Walker] = []
    launched, streams, blocked = 0, 0, False
    pruned: list[Walker] = []

    def end(ended: list[Walker]) -> None:
        finished = [w for w in ended if search.tree.terminal[w.node]]
        pruned.extend(w for w in ended if not search.tree.terminal[w.node])
        search.finish([w.node for w in finished], [_left_tree_at(search, w) for w in finished])
        for walker in finished:
            policy.finish(walker)

    policy.arrived(search, [ROOT])
    while True:
        room = 0 if blocked else search.batch_size - len(walkers)
        new = room if limit is None else min(room, limit - launched)
        walkers += [Walker(search.rng(streams + i)) for i in range(new)]
        launched, streams = launched + new, streams + new
        under_way, before = len(walkers), len(search.rollouts)
        walkers = advance(search, policy, walkers, end)
        if search.exhausted():
            search.cut_short = bool(walkers) or limit is None or len(search.rollouts) < limit
            return
        # A path that finds nothing left to do is no rollout; wait for another to end before the next try. One that
        # was pruned is spent if it cost a token, and the tree is smaller for the next.
        ended_now = len(search.rollouts) - before + len(pruned)
        given_up = under_way - len(walkers) - ended_now
        launched -= given_up + sum(w.start_depth < 0 for w in pruned)
        pruned.clear()
        blocked = given_up > 0 and not ended_now
        if not blocked and len(walkers) < search.batch_size and (limit is None or launched < limit):
            continue  # fill the batch before paying for a forward call
        if not walkers:
            return
        nodes = list(dict.fromkeys(walker.node for walker in walkers))
        yield nodes
        policy.arrived(search, nodes)


def advance(search: Search, policy: Policy, walkers: list[Walker], end: Callable[[list[Walker]], None]) -> list[Walker]:
    """Move every path to a node that must be forwarded, or to its end; returns those that wait for a forward call."""
    waiting: list[Walker] = []
    while walkers:
        expanding: list[Walker] = []
        expanded: set[int] = set()
        entered: list[Walker] = []
        later: list[Walker] = []
        ended: list[Walker] = []
        for walker in walkers:
            choice = _descend(search, policy, walker, expanded if policy.distinct else set())
            if choice == LATER:
                later.append(walker)
            elif choice == EXPAND:
                expanding.append(walker)
                expanded.add(walker.node)
            elif choice == PRUNED:
                ended.append(walker)
            elif choice != BLOCKED:
                entered.append(walker)
        if expanding:
            _expand(search, policy, expanding)
        for walker in entered + expanding:
            over = search.tree.terminal[walker.node] or policy.pruned(walker)
            (ended if over else waiting).append(walker)
        if ended:
            end(ended)
        walkers = later
    return waiting


def _left_tree_at(search: Search, walker: Walker) -> int:
    return walker.start_depth if walker.start_depth >= 0 else search.tree.depth[walker.node]


def _descend(search: Search, policy: Policy, walker: Walker, busy: set[int]) -> int:
    """Follow the policy to a leaf or a node that must be forwarded (returned), or until it says EXPAND or BLOCKED, or
    to a busy node (LATER)."""
    tree = search.tree
    while not tree.terminal[walker.node] and search.evaluated(walker.node):
        if walker.node in busy:
            return LATER
        choice = policy.select(walker)
        if choice < 0:
            return choice
        walker.node = choice
    return walker.node


def _expand(search: Search, policy: Policy, walkers: list[Walker]) -> None:
    """Give each path a new child of its node."""
    for walker, child in zip(walkers, policy.expand(search, walkers), strict=True):
        if walker.start_depth < 0:
            walker.start_depth = search.tree.depth[walker.node]
        walker.node = child


class Plain:
    """What most policies do: draw new children from p, prune nothing, learn nothing."""

    distinct = False

    def arrived(self, search: Search, nodes: Sequence[int]) -> None:
        pass

    def expand(self, search: Search, walkers: Sequence[Walker]) -> list[int]:
        return search.draw([w.node for w in walkers], [w.rng.random() for w in walkers])

    def pruned(self, walker: Walker) -> bool:
        return False

    def finish(self, walker: Walker) -> None:
        pass
