"""The tree's estimate of pi*: shares of what was finished, and draws that the model continues where the tree ends."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from dts.logspace import draw, logsumexp
from dts.results import Completion, Estimate, LogZ
from dts.search.paths import Path, advance
from dts.search.readings import alone
from dts.search.sampling import Ancestral
from dts.softvalue import SoftValues

if TYPE_CHECKING:
    from dts.search.search import Search


def tree_estimate(search: Search, values: SoftValues, log_z: LogZ | None) -> Estimate:
    """The estimate of the target by the soft values on a tree, made to agree with each other first."""
    settled = values.settled()
    logs = settled.log_shares()
    total = logsumexp(list(logs.values()))
    shares = {leaf: math.exp(log - total) for leaf, log in logs.items()}
    return Estimate(log_z, shares, functools.partial(_draw, search, settled), settled)


def _draw(search: Search, values: SoftValues, k: int, seed: int) -> list[Completion]:
    """k independent draws. New tokens go into a fork of the search, one for each call, so the tree that the estimate is
    about stays as it is and equal seeds give equal draws."""
    paths = [_leave_tree(values, np.random.default_rng([seed, 1, index])) for index in range(k)]
    fork, known = search.fork(), values.tree
    policy = Ancestral(fork, explored=len(known), log_mass=known.log_unexplored)
    waiting = [path for path in paths if not known.terminal[path.node]]
    active: list[Path] = []
    while waiting or active:
        while waiting and len(active) < fork.batch_size:
            active.append(waiting.pop(0))
        active = alone(advance(fork, policy, active, lambda ended: fork.score([path.node for path in ended])))
        if active:
            fork.evaluate(list(dict.fromkeys(path.node for path in active)))
    return [fork.completion(path.node) for path in paths]


def _leave_tree(values: SoftValues, rng: np.random.Generator) -> Path:
    """Walk down by the estimate of pi* to a leaf, or to the node after which nothing is known."""
    path = Path(rng)
    while not values.tree.terminal[path.node]:
        children, log_probs, log_rest = values.transitions(path.node)
        child = draw([*children, None], [*log_probs, log_rest], rng.random())
        if child is None:
            break
        path.node = child
    return path
