"""The reward interface, and what the search asks of a reward."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dts.errors import RewardError

Prompt = str | list[dict[str, str]] | Sequence[int]
State = Any


@dataclass(frozen=True, slots=True)
class Context:
    """What a reward may know about the request."""

    prompt: Prompt  # as the caller gave it: text, chat messages or token ids
    prompt_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]  # completion token ids -> text, special tokens dropped


@dataclass(frozen=True, slots=True)
class Finished:
    """A complete sequence: ended by EOS, by a stop string or by the length limit."""

    token_ids: tuple[int, ...]  # with the EOS token where one was generated
    text: str  # without EOS and without the stop string
    token_logprobs: tuple[float, ...] = ()  # log p of each token, nats; empty for rewards with `of_text`


class Reward:
    """A token-level reward. Subclass it and override what you know; the defaults know nothing before the end.

    All methods are batched over paths: lists in, lists of the same length out. `monotone=True` promises that `earned`
    never falls along a path and never exceeds the final reward. An object that has `name`, `monotone` and all methods
    but `promise` is accepted without subclassing, too.

    A reward (or a function) that runs a model may count in an attribute `tokens`, a whole number, the token positions
    that have entered the model so far; a search adds what it grows by to `usage.reward_tokens`.
    """

    name: str
    monotone: bool = False
    partial: bool = True  # whether an unfinished text may be given to `finish`, too, as a guide for the search
    of_text: bool = False  # whether `finish` looks at nothing but the text: a search asks once about equal texts
    one_by_one: bool = False  # whether `finish` asks about one text after another, so several together save nothing
    parts: Sequence[Any] = ()  # rewards or functions that it was made from

    def start(self, context: Context) -> State:
        """State of the empty completion."""
        return None

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        """States after one more token each, O(1) per token."""
        return list(states)

    def earned(self, states: Sequence[State]) -> list[float]:
        """Lower bounds: what each path has surely earned, `-inf` where nothing is known."""
        return [-math.inf] * len(states)

    def upper(self, states: Sequence[State]) -> list[float]:
        """Upper bounds on the final reward, `inf` where nothing is known."""
        return [math.inf] * len(states)

    def promise(self, states: Sequence[State]) -> list[float]:
        """What each path would get if it ended here, as far as a monotone reward can say at once. A guide for the
        search, never a bound."""
        return self.earned(states)

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        """Rewards of complete sequences."""
        raise NotImplementedError(f"{type(self).__name__} has no finish(states, finished)")


def promised(reward: Reward, states: Sequence[State]) -> list[float]:
    """What each path promises: 0 for rewards that are not monotone, and where nothing is known."""
    if not reward.monotone or not states:
        return [0.0] * len(states)
    promise = getattr(reward, "promise", reward.earned)  # an object that is no subclass may lack it
    return [float(value) if math.isfinite(value) else 0.0 for value in promise(states)]


def checked_finish(reward: Reward, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
    """`reward.finish` with its answer checked. Raises `RewardError` naming the reward and the completion."""

    def shown(index: int) -> str:
        return repr(finished[index].text[:200])

    try:
        values = reward.finish(states, finished)
    except RewardError:
        raise
    except Exception as error:
        raise failed(reward.name, error, finished[0].text) from error
    if not hasattr(values, "__len__") or len(values) != len(finished):
        count = f"{len(values)} values" if hasattr(values, "__len__") else str(values)[:80]
        raise RewardError(
            f"reward {reward.name!r} returned {count} for {len(finished)} completions, the first of them {shown(0)}; "
            "return one number per completion"
        )
    return [_finite(value, reward, shown(index)) for index, value in enumerate(values)]


def failed(name: str, error: Exception, text: str) -> RewardError:
    """What to raise where a reward fails on a text."""
    return RewardError(f"reward {name!r} raised {type(error).__name__}: {error} on completion {text[:200]!r}")


def _finite(value: Any, reward: Reward, completion: str) -> float:
    """A value as a float. Raises `RewardError` for what is no finite number."""
    shown = f"reward {reward.name!r} returned {repr(value)[:80]}"
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) != 0:
        raise RewardError(f"{shown}, not a number, on completion {completion}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"{shown}, not a number that fits a float, on completion {completion}") from error
    if not math.isfinite(number):
        raise RewardError(f"{shown} on completion {completion}")
    return number
