"""Maximum-entropy tree search: Diffusion Tree Sampling (DTS) and DTS*, on tokens (arXiv 2506.20701).

Both grow one tree and keep the soft values of `dts.softvalue`. DTS spends each rollout where the estimated target
pi* = p exp(lambda r) / Z has the most mass that is not finished yet, so no sequence is drawn twice and the tree's
distribution converges to pi*. DTS* looks for the best sequence: it descends by a sharper target and leaves out what
cannot beat the best reward found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dts.errors import UsageError, shown
from dts.search.maxent.branching import Brancher
from dts.search.maxent.descent import Optimiser, Sampler
from dts.search.maxent.lookahead import LookAhead, source_for
from dts.search.maxent.order import ORDERS, Best, Order
from dts.search.maxent.valuemodel import OnlineValues, ValueModel, check_value_model
from dts.search.method import GeneratorRun, Run
from dts.search.paths import rollouts
from dts.search.sampling import check_size
from dts.search.scoring import runs_a_model
from dts.settings import Budget, check_real, check_whole
from dts.target import LARGEST_POWER, Target

if TYPE_CHECKING:
    from dts.rewards import Reward
    from dts.search.search import Search

MODE_SHARPNESS = 4.0  # the power of the target whose soft values lead to its mode


@dataclass(frozen=True, slots=True)
class MaxEnt:
    """Maximum-entropy tree search.

    rollouts: finished sequences to spend. reward_scale: lambda >= 0. search: "sample" (DTS) or "best" (`DTS*`).
    explore: share of rollouts that follow p instead of the values (but still finish nothing twice).
    widening: a node that n paths entered may have up to `n ** widening` children (progressive widening, Coulom 2007),
    and one more when all it has are finished, so that paths go deep where others went. 1 lets p alone decide. What is
    not a child keeps its mass and its value all the same, and exploring rollouts ignore the limit. None: 0.5 for DTS,
    0.7 for `DTS*`.
    sharpness: `DTS*` only, paths are led by the soft values at sharpness times lambda.
    bonus: `DTS*` only. None: children are drawn by those values. A number: the child of the largest value plus PUCT's
    confidence bonus of this weight, in units of the reward range seen so far.
    lookahead: how many of the likeliest next tokens of a node are tried on the reward (not on the model), so that those
    that gain are drawn more often; 0 turns it off. For monotone rewards, and others with a value model. None: 16, and 0
    for rewards that run a model, which would read each of these tokens.
    values: for rewards that are not monotone. "online": the reward is asked about unfinished texts, too, and the search
    learns what its answer says of the final reward; a value model: the same, with one that may have learnt from other
    prompts (`dts.search.OnlineValues`); None: the reward is asked about finished texts only. "auto": "online" for
    `DTS*` where the reward's `partial` allows it and the budget limits no cost of the reward, else None. It decides
    where paths go. The target, Z and the bounds do not depend on it.
    branch: `DTS*` only, how a path finds the node where it leaves the tree. "values": it descends by the soft values.
    "improvement": the node is chosen by the expected improvement of the best reward for each new token
    (`dts.search.maxent.branching`). None: "values" for monotone rewards and with a bonus, else "improvement".
    power: the target is p^power exp(lambda r): above 1 it sharpens the model, also without a reward (power sampling,
    arXiv 2510.14901).
    order: what the best completion is. "reward": the highest reward, the likeliest of equals; `DTS*` stops where no
    reward can be higher. "likelihood": the same, but `DTS*` continues to likelier texts of the best reward. "target":
    the mode of the target, power log p + lambda r; `DTS*` is led by soft values of the target to a power, which has the
    same mode, and estimates no distribution.
    greedy: the ninth rollout, or the last of fewer, takes the likeliest token at each step, so that nothing worse than
    greedy decoding is returned unless another budget ends the search before. It is no draw and no estimate takes it for
    one. DTS of one rollout does without.
    """

    rollouts: int
    reward_scale: float = 4.0
    search: str = "sample"
    explore: float | None = None
    widening: float | None = None
    sharpness: float = 8.0
    bonus: float | None = None
    lookahead: int | None = None
    values: Literal["auto", "online"] | ValueModel | None = "auto"
    branch: Literal["values", "improvement"] | None = None
    power: float = 1.0
    order: Order = "reward"
    greedy: bool = True

    def __post_init__(self) -> None:
        check_size("rollouts", self.rollouts)
        Target(self.reward_scale, self.power)  # checks both
        if self.search not in ("sample", "best"):
            raise UsageError(f"search={self.search!r} is not known; give 'sample' (DTS) or 'best' (DTS*)")
        if self.explore is not None:
            check_real("explore", self.explore, lambda x: 0 <= x <= 1, "a share from 0 to 1")
        if self.widening is not None:
            check_real("widening", self.widening, lambda x: 0 < x <= 1, "an exponent above 0 and up to 1, or None")
        check_real("sharpness", self.sharpness, lambda x: 0 < x < math.inf, "a number > 0")
        if self.bonus is not None:
            check_real("bonus", self.bonus, lambda x: 0 <= x < math.inf, "a number >= 0, or None")
        if self.order not in ORDERS:
            raise UsageError(f"order={shown(self.order)} is not known; give 'reward', 'likelihood' or 'target'")
        if not isinstance(self.greedy, bool):
            raise UsageError(f"greedy={shown(self.greedy)} is not allowed; give True or False")
        if self.branch not in (None, "values", "improvement"):
            raise UsageError(f"branch={shown(self.branch)} is not known; give 'values', 'improvement' or None")
        if self.values not in (None, "auto", "online"):
            check_value_model(self.values)
        if self.lookahead is not None:
            check_whole("lookahead", self.lookahead, 0, allowed="a whole number of tokens >= 0, or None")

    @property
    def target(self) -> Target:
        """Without what the settings of `decode` add to it."""
        sharpness = 1.0
        if self.search == "best" and self.order == "target":
            sharpness = min(MODE_SHARPNESS, LARGEST_POWER / self.power)
        return Target(self.reward_scale, self.power, sharpness=sharpness)

    @property
    def name(self) -> str:
        return "maxent" if self.search == "sample" else "maxent-star"

    def batch_size(self) -> int:
        """A quarter of the rollouts, so that later paths learn from earlier ones, but at least 4: a step of few paths
        costs nearly what a step of one does."""
        return min(16, max(4, self.rollouts // 4), self.rollouts)

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)

    def exploring(self) -> float:
        """`explore`, or what its default stands for."""
        if self.explore is not None:
            return self.explore
        return 0.35 if self.search == "sample" else 0.1

    def start(self, search: Search) -> Run:
        policy = self._policy(search)
        return GeneratorRun(search, rollouts(search, policy), rank=policy.rank, estimate=policy.estimate)

    def _policy(self, search: Search) -> Sampler | Optimiser:
        sharpness = self.target.sharpness
        best = Best(search, self.order, self.reward_scale, sharpness)
        model = None if search.reward.monotone else self._value_model(search)
        tokens = self._lookahead(search.reward)
        ahead = LookAhead(search, source_for(search, model, tokens), tokens)
        explore, widening = self.exploring(), self._widening()
        if self.search == "sample":
            return Sampler(
                search, self.reward_scale, ahead, explore=explore, widening=widening, greedy=self.greedy, best=best
            )
        return Optimiser(
            search, self.reward_scale, ahead, explore=explore, widening=widening,
            sharpness=sharpness if self.order == "target" else self.sharpness, bonus=self.bonus,
            brancher=self._brancher(search, model), greedy=self.greedy, best=best,
        )  # fmt: skip

    def _lookahead(self, reward: Reward) -> int:
        if self.lookahead is not None:
            return self.lookahead
        return 0 if runs_a_model(reward) else 16

    def _widening(self) -> float:
        if self.widening is not None:
            return self.widening
        return 0.5 if self.search == "sample" else 0.7

    def _value_model(self, search: Search) -> ValueModel | None:
        if self.values == "auto":
            budget, partial = search.budget, getattr(search.reward, "partial", True)
            limits = (budget.reward_calls, budget.reward_tokens, budget.reward_seconds)
            asks = self.search == "best" and partial and all(limit is None for limit in limits)
            return OnlineValues() if asks else None
        return OnlineValues() if self.values == "online" else self.values

    def _brancher(self, search: Search, model: ValueModel | None) -> Brancher | None:
        by_default = "values" if search.reward.monotone or self.bonus is not None else "improvement"
        if (self.branch or by_default) == "values":
            return None
        predicted = model is not None and self.order != "target"  # a value model knows the reward alone
        return Brancher(search.tree, search.decoding.max_new_tokens, predicted=predicted)
