"""Small models, trees, random streams and rewards that several tests share."""

from __future__ import annotations

import math

import numpy as np

from dts.models.table import TableModel
from dts.rewards import Reward
from dts.softvalue import SoftValues
from dts.tree import Tree

LOG = math.log


class Paid(Reward):
    """1 for each time that a token comes: monotone."""

    name, monotone = "paid", True

    def __init__(self, token: int) -> None:
        self._token = token

    def start(self, context):
        return 0

    def extend(self, states, tokens):
        return [state + (token == self._token) for state, token in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [float(state) for state in states]

    def finish(self, states, finished):
        return self.earned(states)


class Uniforms:
    """A random stream of known numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def leaf(tree: Tree, parent: int, token: int, log_p: float, rest: float, reward: float) -> int:
    node = tree.add(parent, token, log_p, rest)
    tree.terminal[node], tree.reward[node] = 1, reward
    return node


def table(rows):
    """Logits by the tokens after the prompt; zeros elsewhere."""
    return TableModel(lambda prefix: np.array(rows.get(prefix[1:], np.zeros(3)), float), 3, eos=0, name="broken")


def chain(*tokens):
    """A model that surely writes these tokens."""
    rows = {tokens[:i]: np.where(np.arange(4) == token, 0.0, -math.inf) for i, token in enumerate(tokens)}
    return TableModel(lambda prefix: rows[prefix[1:]], 4, eos=0)


def finish(values: SoftValues, leaf: int) -> None:
    """Count a scored leaf and learn from it; a second time changes nothing."""
    if values.visits.close(leaf):
        values.learn(leaf)
