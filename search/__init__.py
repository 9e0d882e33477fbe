"""The algorithms: one search loop, injected policies."""

from collections.abc import Callable

from dts.search.loop import Method, Search, run
from dts.search.maxent import MaxEnt
from dts.search.sampling import BestOfN, Greedy, Sampling
from dts.settings import Budget

# Names for the command line: number of rollouts and reward scale to a method.
METHODS: dict[str, Callable[[int, float], Method]] = {
    "maxent": lambda rollouts, scale: MaxEnt(rollouts, reward_scale=scale),
    "maxent-star": lambda rollouts, scale: MaxEnt(rollouts, reward_scale=scale, search="best"),
    "best-of-n": lambda rollouts, scale: BestOfN(rollouts),
    "sampling": lambda rollouts, scale: Sampling(rollouts),
    "greedy": lambda rollouts, scale: Greedy(),
}

__all__ = ["METHODS", "BestOfN", "Budget", "Greedy", "MaxEnt", "Method", "Sampling", "Search", "run"]
