"""Sums and draws in log space, so that no finite weight overflows or vanishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def logsumexp(terms: Sequence[float]) -> float:
    """log sum exp of a short list; -inf for an empty one."""
    top = max(terms, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(t - top) for t in terms))


def draw(choices: Sequence[T], log_weights: Sequence[float], uniform: float) -> T:
    """One of `choices` with probability proportional to exp(log_weights), by inverse transform of `uniform`."""
    top = max(log_weights)
    weights = [math.exp(w - top) for w in log_weights]
    left = uniform * math.fsum(weights)
    for choice, weight in zip(choices, weights, strict=True):
        left -= weight
        if left < 0:
            return choice
    return choices[weights.index(max(weights))]  # rounding left a sliver
