"""What several doors share: a method and a reward by name, and the completions of rollouts in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dts.errors import UsageError, shown
from dts.evaluation.decode import Settings, find_reward, make_method
from dts.results import Completion, Result
from dts.rewards import Reward
from dts.search import Method

AnyReward = Reward | Callable[..., Any]


def method_by_name(name: Any, given: Settings | None = None) -> Method:
    """The method of the command line with this name and these settings. Raises `UsageError` for what it does not
    take."""
    if not isinstance(name, str):
        raise UsageError(f"method={shown(name)} is not allowed; give the name of a method, such as maxent-star")
    method: Method = make_method(name, given or Settings(), _as_argument)
    return method


def _as_argument(name: str, value: object) -> str:
    return f"{name}={value if name == 'method' else shown(value)}"


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
