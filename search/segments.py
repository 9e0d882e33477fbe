"""What methods share that compare unfinished prefixes: paths that grow by segments drawn from p, and a prefix's worth.

A segment is one token, n tokens, or whatever ends with a given string; methods compare prefixes where segments end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dts.errors import UsageError
from dts.search.choice import Choice
from dts.search.paths import Path
from dts.search.readings import Reading, Readings
from dts.search.sampling import Ancestral
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.search import Search

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


def grow(
    search: Search, records: Records | None, paths: Sequence[Path], segment: Segment
) -> Iterator[Sequence[int] | Reading]:
    """Move every path to the end of its next segment by draws from p. Paths that end are recorded as they do, where
    there are records."""
    tree = search.tree
    ends = {id(path): _segment_end(search, path.node, segment) for path in paths}
    moving = [path for path in paths if not tree.outside[path.node]]
    while moving and not search.exhausted():
        yield from evaluate(search, [path.node for path in moving])
        moving = [path for path in moving if not tree.outside[path.node]]
        yield from _one_token(search, moving)
        if records is not None:
            records.add([path.node for path in moving if tree.terminal[path.node]])
        moving = [
            path
            for path in moving
            if not tree.terminal[path.node]
            and not tree.outside[path.node]
            and _position(search, path.node, segment) < ends[id(path)]
        ]


def _segment_end(search: Search, node: int, segment: Segment) -> int:
    return _position(search, node, segment) + (segment if isinstance(segment, int) else 1)


def _position(search: Search, node: int, segment: Segment) -> int:
    """Tokens, or ends of segments, up to `node`."""
    if isinstance(segment, int):
        return search.tree.depth[node]
    return search.finished(node).text.count(segment) if node != ROOT else 0


def _one_token(search: Search, paths: Sequence[Path]) -> Readings[None]:
    policy = Ancestral(search)
    choices = [policy.select(path) for path in paths]
    expanding = [path for path, choice in zip(paths, choices, strict=True) if isinstance(choice, Choice)]
    drawn = iter((yield from policy.expand(expanding)) if expanding else [])
    for path, choice in zip(paths, choices, strict=True):
        path.node = next(drawn) if isinstance(choice, Choice) else choice


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

    def add(self, leaves: Sequence[int]) -> None:
        """Score and record paths that end here; several may end at the same leaf."""
        limit = self._search.budget.rollouts
        if limit is not None:
            leaves = leaves[: limit - len(self._search.rollouts)]
        self._search.record(leaves, [self._left_at(leaf) for leaf in leaves])
        for leaf in leaves:
            self._known.update(self._search.tree.path(leaf))

    def _left_at(self, leaf: int) -> int:
        node = leaf
        while node not in self._known:
            node = self._search.tree.parent[node]
        return self._search.tree.depth[node]
