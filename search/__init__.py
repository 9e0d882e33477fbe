"""The algorithms: one search loop, injected policies."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from dts.search.beam import Beam
from dts.search.consensus import SelfConsistency
from dts.search.earlyend import EarlyEnd
from dts.search.maxent import MaxEnt
from dts.search.maxent.valuemodel import OnlineValues, ScoreSoFar, ValueModel
from dts.search.mcts import MCTS
from dts.search.method import GeneratorRun, Method, Outcome, Run
from dts.search.particles import ParticleFilter
from dts.search.run import run
from dts.search.sampling import BestOfN, Greedy, Sampling
from dts.search.search import Search
from dts.settings import Budget

METHODS: dict[str, Callable[[int, float], Method]] = {
    "maxent": lambda rollouts, scale: MaxEnt(rollouts, reward_scale=scale),
    "maxent-star": lambda rollouts, scale: MaxEnt(rollouts, reward_scale=scale, search="best"),
    "best-of-n": lambda rollouts, scale: BestOfN(rollouts),
    "sampling": lambda rollouts, scale: Sampling(rollouts),
    "greedy": lambda rollouts, scale: Greedy(),
    "beam": lambda rollouts, scale: Beam(rollouts),
    "beam-guided": lambda rollouts, scale: Beam(rollouts, reward_weight=scale),
    "mcts": lambda rollouts, scale: MCTS(rollouts),
    "uct": lambda rollouts, scale: MCTS(rollouts, puct=False),
    "particle-filter": lambda rollouts, scale: ParticleFilter(rollouts, reward_scale=scale),
    "entropic-particle-filter": lambda rollouts, scale: ParticleFilter(rollouts, reward_scale=scale, entropic=True),
    "self-consistency": lambda rollouts, scale: SelfConsistency(rollouts),
    "weighted-best-of-n": lambda rollouts, scale: SelfConsistency(rollouts, weighted=True),
    "confidence-vote": lambda rollouts, scale: SelfConsistency(rollouts, confidence="lowest"),
}
"""Names of the command line: from number of rollouts and reward scale to a method."""


def aimed(method: Any, power: float = 1.0, order: str = "reward") -> Any:
    """The method with this power of p in its target, and this order of completions, as far as it knows them."""
    known = {field.name for field in fields(method)} if is_dataclass(method) else set()
    wanted = {"power": power, "order": order}
    return replace(method, **{name: value for name, value in wanted.items() if name in known})


__all__ = [
    "MCTS",
    "METHODS",
    "Beam",
    "BestOfN",
    "Budget",
    "EarlyEnd",
    "GeneratorRun",
    "Greedy",
    "MaxEnt",
    "Method",
    "OnlineValues",
    "Outcome",
    "ParticleFilter",
    "Run",
    "Sampling",
    "ScoreSoFar",
    "Search",
    "SelfConsistency",
    "ValueModel",
    "aimed",
    "run",
]
