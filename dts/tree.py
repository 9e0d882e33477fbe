"""The tree of tokens: an arena of arrays that grows in place.

Node 0 is the prompt; every other node is one token after its parent. A node knows its parent, so a sequence is
read by walking up; nothing holds a copied prefix. Children form a linked list in the order they were added.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Iterator
from typing import Any

ROOT = 0
NONE = -1  # no node, no slot, no token


class Tree:
    """Columns indexed by node id; a column may be read directly, `add` and the setters below keep them consistent.

    Edges hold the weights of the target (`dts.target`): log p where nothing else is asked for. `log_probs` and
    `log_prob` are the model's own whatever the target.
    """

    def __init__(self, power: float = 1.0, *, measured: bool = False) -> None:
        """measured: rows of weights need not sum to 1, and `measure` says of each what it sums to."""
        self.power, self._measured = power, measured
        self._masses: dict[int, tuple[float, int]] = {}  # by depth: sum over measured nodes, and how many
        self.parent = array("i", [NONE])
        self.token = array("i", [NONE])
        self.depth = array("i", [0])  # tokens after the prompt
        self.log_p = array("d", [0.0])  # log of the weight of `token` after `parent`, nats: power * log p
        self.first_child = array("i", [NONE])
        self.last_child = array("i", [NONE])
        self.next_sibling = array("i", [NONE])
        self.n_children = array("i", [0])
        self.log_unexplored = array("d", [0.0])  # log of the mass of tokens that are not children; -inf if none
        self.log_mass = array("d", [math.nan if measured else 0.0])  # log of the sum of the weights after this node
        self.log_kept = array("d", [0.0])  # log of the p-mass after this node that a mask left before it was normalised
        self.slot = array("i", [NONE])  # where the model keeps this prefix; NONE until it was forwarded
        self.terminal = array("b", [0])  # 1: the sequence is complete here
        self.outside = array("b", [0])  # 1: nothing at or below this node is in the target
        self.reward = array("d", [math.nan])  # of a complete sequence once it was scored
        self.earned = array("d", [-math.inf])  # reward bounds at this prefix
        self.upper = array("d", [math.inf])
        self.promise = array("d", [0.0])  # reward if the sequence ended here; 0 for rewards that cannot say

    def __len__(self) -> int:
        return len(self.parent)

    def add(self, parent: int, token: int, log_p: float, log_unexplored: float) -> int:
        """A new child of `parent`; `log_unexplored` is the parent's mass outside its children from now on."""
        node = len(self.parent)
        self.parent.append(parent)
        self.token.append(token)
        self.depth.append(self.depth[parent] + 1)
        self.log_p.append(log_p)
        for links in (self.first_child, self.last_child, self.next_sibling, self.slot):
            links.append(NONE)
        self.n_children.append(0)
        self.log_unexplored.append(0.0)
        self.log_mass.append(math.nan if self._measured else 0.0)
        self.log_kept.append(0.0)
        self.terminal.append(0)
        self.outside.append(0)
        self.reward.append(math.nan)
        self.earned.append(-math.inf)
        self.upper.append(math.inf)
        self.promise.append(0.0)
        if self.first_child[parent] == NONE:
            self.first_child[parent] = node
        else:
            self.next_sibling[self.last_child[parent]] = node
        self.last_child[parent] = node
        self.n_children[parent] += 1
        self.log_unexplored[parent] = log_unexplored
        return node

    def copy(self) -> Tree:
        """A tree of its own with the same nodes."""
        other = copy.copy(self)
        for name, column in vars(self).items():
            if isinstance(column, array):
                setattr(other, name, column[:])
        other._masses = dict(self._masses)
        return other

    def measure(self, node: int, log_mass: float, log_kept: float) -> None:
        """Note what the weights after an evaluated node sum to; where that is 0, nothing of the target is below it."""
        self.log_mass[node], self.log_kept[node] = log_mass, log_kept
        if self.n_children[node] == 0:
            self.log_unexplored[node] = log_mass
        self.outside[node] |= log_mass == -math.inf
        total, count = self._masses.get(self.depth[node], (0.0, 0))
        self._masses[self.depth[node]] = total + math.exp(log_mass), count + 1

    def usual_log_mass(self, depth: int) -> float:
        """log of the mean sum of weights after the nodes of this depth; 0 where nothing is known."""
        total, count = self._masses.get(depth, (0.0, 0))
        return math.log(total / count) if total > 0 else 0.0

    def children(self, node: int) -> Iterator[int]:
        """Children in the order they were added."""
        child, links = self.first_child[node], self.next_sibling
        while child != NONE:
            yield child
            child = links[child]

    def child_with(self, node: int, token: int) -> int:
        """The child that holds `token`, or NONE."""
        return next((child for child in self.children(node) if self.token[child] == token), NONE)

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parent[node]
        return nodes[::-1]

    def tokens(self, node: int) -> tuple[int, ...]:
        """The completion's token ids up to and including `node`."""
        return tuple(self.token[n] for n in self.path(node))

    def log_probs(self, node: int) -> tuple[float, ...]:
        """The model's own log p of each token up to and including `node`, nats."""
        if not self._measured:  # the weights are p
            return tuple(self.log_p[n] for n in self.path(node))
        return tuple(self.own_log_p(n) for n in self.path(node))

    def own_log_p(self, node: int) -> float:
        """The model's own log p of `node`'s token, nats; 0 for the root."""
        return self.log_p[node] / self.power + self.log_kept[self.parent[node]] if node != ROOT else 0.0

    def log_prob(self, node: int) -> float:
        """log p(tokens up to `node` | prompt), nats."""
        return math.fsum(self.log_probs(node))

    def leaves(self) -> list[int]:
        """Complete, scored sequences in the order they were added."""
        return [n for n in range(len(self)) if self.terminal[n] and not math.isnan(self.reward[n])]

    def statistics(self) -> dict[str, float]:
        """Shape of the tree: nodes, leaves, greatest depth, mean children of inner nodes."""
        inner = [n for n in self.n_children if n > 0]
        return {
            "nodes": len(self),
            "leaves": len(self.leaves()),
            "depth": max(self.depth),
            "branching": sum(inner) / len(inner) if inner else 0.0,
        }

    def to_dict(self) -> dict[str, list[Any]]:
        """Structure and rewards as plain lists for JSON, unknown numbers as None."""

        def finite(column: array[float]) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in column]

        return {
            "parent": list(self.parent),
            "token": list(self.token),
            "log_p": finite(array("d", map(self.own_log_p, range(len(self))))),
            "log_unexplored": finite(self.log_unexplored),
            "terminal": list(self.terminal),
            "reward": finite(self.reward),
        }
