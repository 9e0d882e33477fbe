"""Rewards that see the reference answer: an upper limit for experiments, never a method.

They are never a default. `is_oracle` decides whether a reward is one, also inside combined and wrapped rewards, and
every record, table and chart of such a run says so (`sees_reference`, `marked`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dts.errors import UsageError
from dts.evaluation.tasks.base import Example, Task
from dts.rewards import Context, Finished, Reward, TerminalReward

PREFIX = "oracle-"
WARNING = "It sees the reference answer: these figures are an upper bound for analysis, not a result."


class OracleReward(TerminalReward):
    """A terminal reward that sees the reference. Any reward or function with `oracle = True` counts as one."""

    oracle = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, partial=False)  # an upper bound of choosing among finished texts


def is_oracle(reward: Any) -> bool:
    """Whether a reward (or function), or a part of a combined or wrapped one, sees references."""
    parts = getattr(reward, "parts", ())
    return getattr(reward, "oracle", False) is True or (isinstance(parts, list | tuple) and any(map(is_oracle, parts)))


def sees_reference(record: Mapping[str, Any]) -> bool:
    """Whether a sample, or an aggregate of samples, used an oracle. Samples of older versions say it by their name."""
    return bool(record["oracle"]) if "oracle" in record else PREFIX in record.get("reward", "")


def marked(text: str, oracle: bool) -> str:
    """A name in a table or chart, with the mark where the reward was an oracle."""
    return f"{text} (oracle)" if oracle else text


def oracles(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the oracle rewards of these samples."""
    return sorted({sample["reward"] for sample in samples if sees_reference(sample)})


def oracle_names(task: Task) -> list[str]:
    """The oracle rewards that a task can give: one per metric of a single example."""
    return [PREFIX + metric for metric in task.metrics]


def oracle_reward(task: Task, example: Example, name: str) -> Reward:
    """The metric in `name` ("oracle-accuracy", "oracle-smape") of a completion, negated where less is better.

    The reference is read by `task.score`, as for any finished run.
    """
    metric = name.removeprefix(PREFIX)
    if name not in oracle_names(task):
        raise UsageError(f"reward {name!r}: task {task.name!r} has {', '.join(oracle_names(task))}")
    sign = 1.0 if task.metrics[metric] == "max" else -1.0

    def score(context: Context, finished: Sequence[Finished]) -> list[float]:
        return [sign * task.score({example.id: done.text})[metric] for done in finished]

    return OracleReward(score, name)
