"""What several doors share: a method and a reward by name, and the completions of rollouts in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dts.errors import UsageError, shown
from dts.evaluation.decode import find_method, find_reward
from dts.results import Completion, Result
from dts.rewards import Reward
from dts.search import Method, aimed
from dts.settings import check_real, check_whole

AnyReward = Reward | Callable[..., Any]


def method_by_name(
    name: Any, rollouts: Any = 16, reward_scale: Any = 4.0, power: Any = 1.0, order: Any = "reward"
) -> Method:
    """The method of the command line with this name and size. Raises `UsageError` for what it does not take."""
    if not isinstance(name, str):
        raise UsageError(f"method={shown(name)} is not allowed; give the name of a method, such as maxent-star")
    check_whole("rollouts", rollouts, 1, allowed="a whole number >= 1")
    check_real("reward_scale", reward_scale, lambda value: 0 <= value < 1e300, "a number >= 0")
    made: Method = aimed(find_method(name, "method=")(rollouts, float(reward_scale)), power, order)
    for option, value, usual in (("power", power, 1), ("order", order, "reward")):
        if value != usual and not hasattr(made, option):
            raise UsageError(f"{option}={shown(value)} has no effect with method={name}; leave it out, or use maxent")
    return made


def reward_by_name(name: Any, file: Any = None) -> AnyReward | None:
    """The reward that `reward` or `reward_file` (FILE.py:FUNCTION) stands for; None where neither was given."""
    if name is not None and file is not None:
        raise UsageError("reward and reward_file were both given; give one of them")
    given = name if file is None else file
    if given is None:
        return None
    option = "reward=" if file is None else "reward_file="
    if not isinstance(given, str):
        raise UsageError(f"{option}{shown(given)} is not allowed; give FILE.py:FUNCTION or the name of a reward")
    return find_reward(given, option)


def first_rollouts(result: Result, n: int) -> list[Completion]:
    """What the first n rollouts wrote, the same text again included: for `Sampling`, independent draws from p."""
    by_ids = {one.token_ids: one for one in result.completions}
    return [by_ids[result.tree.tokens(rollout.leaf)] for rollout in result.rollouts[:n]]
