"""Rewards for GRPO: the library's own, functions, and learned ones, as TRL's reward functions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dts.errors import RewardError, UsageError
from dts.lm import LanguageModel
from dts.rewards import Context, Finished, Reward, as_reward, checked_finish
from dts.training.data import Row
from dts.training.diversity import bleu_distance, distance_matrix, gate_values, named, well_formed
from dts.training.estimator import mean_distances

TrlReward = Callable[..., list[float]]


def find_reward(
    name: str, rows: Sequence[Row], *, search: bool = False, option: str = "grpo.reward"
) -> Reward | Callable[..., Any]:
    """`heuristic` (fitted on these rows where it fits anything), a saved reward model's path, or `module:function`.

    search: the reward guides a search too, so it must not depend on the other completions of a call.
    """
    if name == "heuristic":
        from dts.training.heuristic_reward import heuristic_reward

        heuristic = heuristic_reward(rows)
        return heuristic.for_search() if search else heuristic
    if Path(name).exists():
        from dts.training.reward_model import load_reward_model

        return load_reward_model(name)
    found: Callable[..., Any] = named(name, {"heuristic": None}, option)
    return found


def check_prompts(reward: Reward | Callable[..., Any], rows: Sequence[Row], option: str) -> None:
    """Raise `UsageError` naming the first row whose prompt the reward cannot use; no model is needed.

    A reward is asked through `start`, a function through its attribute `check`, a function of a prompt that raises
    `UsageError`; one without is tried on the first prompt with an empty completion.
    """
    for row in rows:
        try:
            if isinstance(reward, Reward):
                reward.start(Context(row.prompt, (), lambda ids: ""))
            elif hasattr(reward, "check"):
                reward.check(row.prompt)
            else:
                _try_out(reward, row.prompt)
                return
        except UsageError as error:
            raise UsageError(f"{row.source}: {option} cannot use this row: {error}") from error


def _try_out(function: Callable[..., Any], prompt: Any) -> None:
    """What else it raises may be about the empty completion, and is left for later."""
    scorer = as_reward(function)
    with contextlib.suppress(RewardError):
        try:
            checked_finish(scorer, [scorer.start(Context(prompt, (), lambda ids: ""))], [Finished((), "")])
        except RewardError as error:
            if isinstance(error.__cause__, UsageError):
                raise error.__cause__ from None
            raise


def score(reward: Reward, lm: LanguageModel, prompt: Any, finished: Sequence[Finished]) -> list[float]:
    """The reward of complete sequences of one prompt, token by token as a search would have it."""
    start = reward.start(Context(prompt, tuple(lm.encode(prompt)), lm.decode))
    states = [start] * len(finished)
    for position in range(max(len(done.token_ids) for done in finished)):
        live = [i for i, done in enumerate(finished) if position < len(done.token_ids)]
        grown = reward.extend([states[i] for i in live], [finished[i].token_ids[position] for i in live])
        for i, state in zip(live, grown, strict=True):
            states[i] = state
    return checked_finish(reward, states, finished)


def as_trl(reward: Reward | Callable[..., Any], lm: LanguageModel) -> TrlReward:
    """TRL's `f(prompts, completions, completion_ids, **kwargs) -> list[float]`; a function of that form as it is."""
    if not isinstance(reward, Reward) and "completions" in inspect.signature(reward).parameters:
        return reward
    scorer = as_reward(reward)

    def trl_reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        texts = completion_texts(completions)
        finished = [Finished(tuple(ids), text) for ids, text in zip(completion_ids, texts, strict=True)]
        values: list[float] = []
        for prompt, part in runs(prompts):
            values += score(scorer, lm, prompt, finished[part])
        return values

    trl_reward.__name__ = scorer.name
    return trl_reward


def diversity_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """r_i: the gated mean distance of a completion to the others of its prompt."""
    texts, values = completion_texts(completions), []
    for _prompt, part in runs(prompts):
        group = texts[part]
        values += mean_distances(distance_matrix(group, bleu_distance), gate_values(group, well_formed)).tolist()
    return values


def completion_texts(completions: Sequence[Any]) -> list[str]:
    """Text of TRL completions: text as it is, or the content of the one message."""
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def runs(prompts: Sequence[Any]) -> Iterator[tuple[Any, slice]]:
    """Each run of equal prompts, and where it stands."""
    start = 0
    for prompt, members in groupby(prompts):
        count = sum(1 for _ in members)
        yield prompt, slice(start, start + count)
        start += count
