"""Rows of weights: what a search reads instead of p where its target says so (`dts.target`).

A row is w(a|s) = p(a|s)^power * 1[a is allowed after s]. It is not normalised: its sum, the mass that is left after s,
is noted in the tree (`Tree.log_mass`), and draws are proportional to it.

How a constraint gets in: `Members` keeps a state for each node of a tree. `weigh` asks it for the tokens that are
allowed after the nodes whose p was computed, bool [nodes, V], and takes the others out. With the reading "condition"
nothing else happens, and the target is p among the texts of the constraint; with "mask" each row of p is normalised
again. `Search` asks `Members` whether a text that ends is one of the constraint.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dts.constraints.constraint import Constraint
from dts.lm import LanguageModel
from dts.results import Usage
from dts.tree import Tree


class Members:
    """Which paths of one tree are, or may become, texts of a constraint: a state for each node. Its seconds are counted
    in `usage.constraint_seconds`."""

    def __init__(self, constraint: Constraint, lm: LanguageModel, usage: Usage) -> None:
        self._constraint, self._eos, self._usage = constraint, sorted(lm.eos_ids), usage
        began = time.perf_counter()
        self._states: list[Any] = [constraint.start(lm)]  # by node; EOS leaves the state as it is
        self.charge(began)

    def copy(self) -> Members:
        """The same, for a tree that grows apart from here on."""
        other = copy.copy(self)
        other._states = list(self._states)
        return other

    def charge(self, began: float, shared_by: int = 1) -> None:
        """Count the seconds since `began`, which so many searches share."""
        self._usage.constraint_seconds += (time.perf_counter() - began) / shared_by

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """New nodes of the tree, in order: these tokens after these nodes."""
        began = time.perf_counter()
        moved = [(self._states[parent], token) for parent, token in zip(parents, tokens, strict=True)
                 if token not in self._eos]  # fmt: skip
        after = iter(self._constraint.advance([state for state, _ in moved], [token for _, token in moved]))
        before = [self._states[parent] for parent in parents]
        self._states += [state if token in self._eos else next(after)
                         for state, token in zip(before, tokens, strict=True)]  # fmt: skip
        self.charge(began)

    def accepts(self, node: int) -> bool:
        """Whether the text up to `node` is one of the constraint."""
        return bool(self._constraint.accepts([self._states[node]])[0])

    def allowed(self, nodes: Sequence[int], vocab_size: int) -> torch.Tensor:
        """Tokens that may come after these nodes, bool [len(nodes), vocab_size]: EOS where the text may end."""
        states = [self._states[node] for node in nodes]
        found = self._constraint.allowed(states)[:, :vocab_size]
        mask = torch.zeros(len(states), vocab_size, dtype=torch.bool)
        mask[:, : found.shape[1]] = found
        mask[:, self._eos] = torch.tensor(self._constraint.accepts(states), dtype=torch.bool)[:, None]
        return mask


class Weighed(Protocol):
    """What `weigh` needs of a search."""

    tree: Tree
    members: Members | None  # of its constraint
    masks: bool  # whether rows are normalised after the constraint's mask


def weigh(p: torch.Tensor, asked: Sequence[tuple[Weighed, Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of weights [B, V] from rows of p after these nodes of each search, which are written to; for the reading
    "mask" also the log of the p-mass that each row kept, [B]. All searches have equal settings, but any may be without
    a constraint."""
    some, log_kept, began = asked[0][0], None, time.perf_counter()
    held = [search.members for search, _ in asked if search.members is not None]
    if held:
        masks = [search.members.allowed(nodes, p.shape[-1]) if search.members is not None
                 else torch.ones(len(nodes), p.shape[-1], dtype=torch.bool) for search, nodes in asked]  # fmt: skip
        p = p.mul_(torch.cat(masks).to(p.device))  # a row of NaN stays one
        if some.masks:
            kept = p.sum(-1, keepdim=True)
            p, log_kept = torch.where(kept > 0, p / kept, p), torch.where(kept > 0, kept.log(), 0.0)[:, 0]
        for members in held:
            members.charge(began, len(held))
    power = some.tree.power
    if power != 1:  # p ** power has other last bits for a row in company than for the same row alone
        p = p * p if power == 2 else (power * p.log()).exp()
    return p, log_kept
