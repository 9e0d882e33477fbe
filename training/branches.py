"""Groups of completions that share beginnings, and what each token of them is worth.

Paths are drawn from the policy and split at fixed depths, so that siblings are independent draws of how their common
beginning continues. With V(b) the mean reward of what was drawn below a stretch b, averaged at every split, the
estimate of the gradient of E[r] is

    sum over stretches b of w(b) (V(b) - B(b)) grad log p(tokens of b | beginning),   w(b) = product of 1/siblings,

with the baseline B(b) = mean of V over the other siblings and, with the weight of one of them, the baseline of the
stretch before. It has no bias: V(b) is an unbiased estimate of the value after b, and B(b) does not depend on b. In
plain groups (no splits) it is REINFORCE with the leave-one-out baseline (Kool et al. 2019), that is n/(n - 1) times
GRPO's. A split compares tokens with others after the same beginning, and the beginning with several of its endings.
The stretch before counts because two siblings are few: without it the variance is up to a third larger (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dts.search import Budget, GeneratorRun
from dts.search.method import Run
from dts.training.packed import Packed
from dts.tree import ROOT

if TYPE_CHECKING:
    import numpy as np

    from dts.search.method import Steps
    from dts.search.search import Search

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Branching:
    """Draws from p that share beginnings: `roots` paths, each split in two after every `segment` tokens, `splits`
    times, unless it ends before. Rollouts are in the order of the branches."""

    roots: int
    segment: int
    splits: int

    @property
    def name(self) -> str:
        return "branching"

    def batch_size(self) -> int:
        return self.roots * 2**self.splits

    def budget(self) -> Budget:
        return Budget()

    def start(self, search: Search) -> Run:
        return GeneratorRun(search, self._steps(search))

    def split_at(self, depth: int) -> bool:
        """Whether paths are split after so many tokens."""
        return depth > 0 and depth % self.segment == 0 and depth <= self.segment * self.splits

    def _steps(self, search: Search) -> Steps:
        """All paths grow together, so that draws after one node are made in one call, and are independent."""
        tree, depth = search.tree, 0
        paths = [(ROOT, search.rng(index)) for index in range(self.roots)]
        streams = self.roots
        while any(not tree.terminal[node] for node, _ in paths):
            if self.split_at(depth):
                grown: list[tuple[int, np.random.Generator]] = []
                for node, rng in paths:
                    grown.append((node, rng))
                    if not tree.terminal[node]:
                        grown.append((node, search.rng(streams)))
                        streams += 1
                paths = grown
            live = [index for index, (node, _) in enumerate(paths) if not tree.terminal[node]]
            nodes = [paths[index][0] for index in live]
            if new := [node for node in dict.fromkeys(nodes) if not search.evaluated(node)]:
                yield new
            children = search.draw(nodes, [paths[index][1].random() for index in live])
            for index, child in zip(live, children, strict=True):
                paths[index] = child, paths[index][1]
            depth += 1
        search.record([node for node, _ in paths], [0] * len(paths))
        return False

    def branches(self, drawn: Sequence[tuple[Tokens, float]]) -> tuple[Branch, ...]:
        """The branches of completions with their rewards, in the order of the rollouts."""
        rest = list(drawn)[::-1]
        return tuple(self._branch(rest, 0) for _ in range(self.roots))

    def _branch(self, rest: list[tuple[Tokens, float]], depth: int) -> Branch:
        tokens, reward = rest[-1]
        end = depth + self.segment
        if not self.split_at(end) or len(tokens) <= end:  # split are those that are longer
            rest.pop()
            return Branch(tokens[depth:], reward)
        children = tuple(self._branch(rest, end) for _ in range(2))
        return Branch(tokens[depth:end], None, children)


@dataclass(frozen=True, slots=True)
class Branch:
    """A stretch of drawn tokens, and how it continued."""

    tokens: Tokens
    reward: float | None  # of the sequence that ends here
    children: tuple[Branch, ...] = ()  # independent draws

    @property
    def value(self) -> float:
        """The mean reward below, averaged at every split."""
        if self.reward is not None:
            return self.reward
        return math.fsum(child.value for child in self.children) / len(self.children)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn after a beginning."""

    before: Tokens
    token: int
    weight: float  # of the draw: those of the first token sum to 1
    advantage: float


def drawn_tokens(
    siblings: Sequence[Branch], before: Tokens = (), weight: float = 1.0, above: float | None = None
) -> Iterator[Drawn]:
    """Every token of independent draws after one beginning, and of what follows, with its advantage. above: the
    baseline of the stretch before."""
    values, each = [branch.value for branch in siblings], weight / len(siblings)
    for index, branch in enumerate(siblings):
        known = [value for other, value in enumerate(values) if other != index] + ([] if above is None else [above])
        baseline = math.fsum(known) / len(known)
        for place, token in enumerate(branch.tokens):
            yield Drawn(before + branch.tokens[:place], token, each, branch.value - baseline)
        if branch.children:
            yield from drawn_tokens(branch.children, before + branch.tokens, each, baseline)


def packed_draws(prompt_ids: Sequence[int], drawn: Sequence[Drawn]) -> tuple[Packed, list[int]]:
    """The beginnings as a tree, and the row of each draw."""
    beginnings = sorted({draw.before for draw in drawn}, key=lambda before: (len(before), before))
    row_of = {before: row for row, before in enumerate(beginnings)}  # () is the first
    tokens = tuple(before[-1] for before in beginnings[1:])
    parents = tuple(row_of[before[:-1]] for before in beginnings[1:])
    return Packed(tuple(prompt_ids), tokens, parents), [row_of[draw.before] for draw in drawn]
