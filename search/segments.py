"""What methods share that compare unfinished prefixes: paths that grow by segments drawn from p, and a prefix's worth.

A segment is one token, n tokens, or whatever ends with a given string; methods compare prefixes where segments end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dts.errors import UsageError
from dts.search.sampling import Ancestral
from dts.search.walkers import EXPAND, Walker
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.loop import Search

Segment = int | str


def check_segment(segment: Segment) -> None:
    """Raise `UsageError` unless this is a number of tokens or a string that ends a segment."""
    tokens = isinstance(segment, int) and not isinstance(segment, bool) and segment >= 1
    if not tokens and not (isinstance(segment, str) and segment):
        raise UsageError(f"segment={segment!r} is not allowed; give a whole number of tokens >= 1 or a string")


def evaluate(search: Search, nodes: Sequence[int]) -> Iterator[Sequence[int]]:
    """Ask for the distributions that are missing at `nodes`, at most `batch_size` in one forward call."""
    missing = [node for node in dict.fromkeys(nodes) if not search.evaluated(node)]
    for start in range(0, len(missing), search.batch_size):
        yield missing[start : start + search.batch_size]


def grow(search: Search, records: Records, walkers: Sequence[Walker], segment: Segment) -> Iterator[Sequence[int]]:
    """Move every path to the end of its next segment by draws from p. Paths that end are recorded as they do."""
    ends = {id(walker): _segment_end(search, walker.node, segment) for walker in walkers}
    moving = list(walkers)
    while moving and not search.exhausted():
        yield from evaluate(search, [walker.node for walker in moving])
        _one_token(search, moving)
        records.finish([w.node for w in moving if search.tree.terminal[w.node]])
        moving = [
            w for w in moving if not search.tree.terminal[w.node] and _position(search, w.node, segment) < ends[id(w)]
        ]


def _segment_end(search: Search, node: int, segment: Segment) -> int:
    return _position(search, node, segment) + (segment if isinstance(segment, int) else 1)


def _position(search: Search, node: int, segment: Segment) -> int:
    """Tokens, or ends of segments, up to `node`."""
    if isinstance(segment, int):
        return search.tree.depth[node]
    return search.finished(node).text.count(segment) if node != ROOT else 0


def _one_token(search: Search, walkers: Sequence[Walker]) -> None:
    policy = Ancestral(search.tree)
    choices = [policy.select(walker) for walker in walkers]
    expanding = [walker for walker, choice in zip(walkers, choices, strict=True) if choice == EXPAND]
    drawn = iter(search.draw([w.node for w in expanding], [w.rng.random() for w in expanding]) if expanding else [])
    for walker, choice in zip(walkers, choices, strict=True):
        walker.node = next(drawn) if choice == EXPAND else choice


def worth(search: Search, nodes: Sequence[int]) -> list[float]:
    """What the reward says of each prefix: the reward itself at an end, what was surely earned elsewhere, and where
    nothing is known yet, the reward of the text so far."""
    tree = search.tree
    values = {n: tree.earned[n] for n in nodes if not tree.terminal[n] and math.isfinite(tree.earned[n])}
    unknown = [node for node in dict.fromkeys(nodes) if node not in values]
    values.update(zip(unknown, search.rewards(unknown), strict=True))
    return [values[node] for node in nodes]


class Records:
    """One rollout for each path that finished, within the budget."""

    def __init__(self, search: Search) -> None:
        self._search, self._known = search, {ROOT}  # nodes on paths that finished

    def finish(self, leaves: Sequence[int]) -> None:
        """Score and record paths that end here; several may end at the same leaf."""
        limit = self._search.budget.rollouts
        if limit is not None:
            leaves = leaves[: limit - len(self._search.rollouts)]
        self._search.finish(leaves, [self._left_at(leaf) for leaf in leaves])
        for leaf in leaves:
            self._known.update(self._search.tree.path(leaf))

    def _left_at(self, leaf: int) -> int:
        node = leaf
        while node not in self._known:
            node = self._search.tree.parent[node]
        return self._search.tree.depth[node]
