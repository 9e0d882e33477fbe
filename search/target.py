"""Draws from the tree's estimate of pi*, continued with the model where the tree ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dts.results import Completion
from dts.search.maxent import draw_index
from dts.search.sampling import Ancestral
from dts.search.walkers import Walker, advance
from dts.softvalue import SoftValues

if TYPE_CHECKING:
    from dts.search.loop import Search

LEAVE = -1


def draw_completions(search: Search, k: int, seed: int) -> list[Completion]:
    """k independent draws. New tokens join the tree and are counted; the estimate they are drawn from stays as it was
    when the call began."""
    assert search.values is not None
    walkers = [_leave_tree(search.values, np.random.default_rng([seed, 1, index])) for index in range(k)]
    policy = Ancestral(search.tree, explored=len(search.tree), log_mass=search.tree.log_unexplored[:])
    waiting = [w for w in walkers if not search.tree.terminal[w.node]]
    active: list[Walker] = []
    while waiting or active:
        while waiting and len(active) < search.batch_size:
            active.append(waiting.pop(0))
        active = advance(search, policy, active, lambda ended: search.score([w.node for w in ended]))
        if active:
            search.evaluate(list(dict.fromkeys(w.node for w in active)))
    return [search.completion(w.node) for w in walkers]


def draw_weighted(search: Search, k: int, seed: int) -> list[Completion]:
    """k independent draws from weighted samples."""
    assert search.log_weights is not None
    leaves, log_weights = list(search.log_weights), list(search.log_weights.values())
    uniforms = np.random.default_rng([seed, 1]).random(k)
    return [search.completion(draw_index(leaves, log_weights, u)) for u in uniforms]


def _leave_tree(values: SoftValues, rng: np.random.Generator) -> Walker:
    """Walk down by the estimate of pi* to a leaf, or to the node behind which nothing is known."""
    walker = Walker(rng)
    while not values.tree.terminal[walker.node]:
        children, log_probs, log_rest = values.transitions(walker.node)
        choice = draw_index([*children, LEAVE], [*log_probs, log_rest], rng.random())
        if choice == LEAVE:
            return walker
        walker.node = choice
    return walker
