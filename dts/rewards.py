"""Rewards on token ids: a state per path, extended token by token, bounded at every prefix.

A reward is any object with the methods of `Reward`. The search keeps one state per tree node, so a token is
scored once however many rollouts pass through it. States are values: `extend` returns new ones and never
changes the old, because several children grow from the same parent.

A function of finished text becomes a reward through `as_reward`. No reward can see a reference answer: neither
`Context` nor `Finished` carries one.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dts.errors import RewardError, UsageError, shown

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


@runtime_checkable
class Reward(Protocol):
    """A token-level reward. All methods are batched over paths: lists in, lists of the same length out.

    `monotone=True` promises that `earned` never falls along a path and never exceeds the final reward.
    """

    name: str
    monotone: bool

    def start(self, context: Context) -> State:
        """State of the empty completion."""

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        """States after one more token each, O(1) per token."""

    def earned(self, states: Sequence[State]) -> list[float]:
        """Lower bounds: what each path has surely earned, `-inf` where nothing is known."""

    def upper(self, states: Sequence[State]) -> list[float]:
        """Upper bounds on the final reward, `inf` where nothing is known."""

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        """Rewards of complete sequences."""


def promised(reward: Reward, states: Sequence[State]) -> list[float]:
    """What each path would get if it ended here, as far as a monotone reward can say so at once: its `promise(states)`
    where it has that method, otherwise what is earned. 0 for rewards that are not monotone. A guide for the search,
    never a bound."""
    if not reward.monotone or not states:
        return [0.0] * len(states)
    values = getattr(reward, "promise", reward.earned)(states)
    return [float(value) if math.isfinite(value) else 0.0 for value in values]


class TerminalReward:
    """A batch function of finished sequences as a reward: nothing is known before the end."""

    monotone = False

    def __init__(self, score: Callable[[Context, Sequence[Finished]], Sequence[float]], name: str) -> None:
        self.name = name
        self._score = score

    def start(self, context: Context) -> State:
        return context

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        return list(states)

    def earned(self, states: Sequence[State]) -> list[float]:
        return [-math.inf] * len(states)

    def upper(self, states: Sequence[State]) -> list[float]:
        return [math.inf] * len(states)

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        return list(self._score(states[0], finished)) if finished else []


def as_reward(reward: Reward | Callable[..., Any], name: str | None = None) -> Reward:
    """A reward object as it is, or a function as a terminal reward.

    Functions may be `text -> float`, `list[str] -> list[float]`, or TRL's `f(prompts, completions, **kwargs)`,
    which is recognised by a parameter called `completions` and gets prompts, completions and completion_ids.
    """
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise UsageError(f"reward={shown(reward)} is neither a function nor an object with the methods of dts.Reward")
    label: str = name or getattr(reward, "__name__", None) or type(reward).__name__
    parameters = _parameters(reward)
    if "completions" in parameters:
        return TerminalReward(_trl_scorer(reward), label)
    first = next(iter(parameters.values()), None)
    takes_list = first is not None and str(first.annotation).lower().startswith(("list", "sequence", "<class 'list"))
    return TerminalReward(_text_scorer(reward, batched=takes_list), label)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # built in, such as int: not known
        return {}


def _trl_scorer(function: Callable[..., Any]) -> Callable[[Context, Sequence[Finished]], Sequence[float]]:
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def score(context: Context, finished: Sequence[Finished]) -> Sequence[float]:
        messages = isinstance(context.prompt, list) and bool(context.prompt) and isinstance(context.prompt[0], dict)
        arguments = {
            "prompts": [context.prompt] * len(finished),
            "completions": [[{"role": "assistant", "content": f.text}] if messages else f.text for f in finished],
            "completion_ids": [list(f.token_ids) for f in finished],
        }
        return list(function(**{k: v for k, v in arguments.items() if takes_all or k in parameters}))

    return score


def _text_scorer(
    function: Callable[..., Any], *, batched: bool
) -> Callable[[Context, Sequence[Finished]], Sequence[float]]:
    def score(context: Context, finished: Sequence[Finished]) -> Sequence[float]:
        texts = [f.text for f in finished]
        if batched:
            return list(function(texts))
        first = function(texts[0])
        if isinstance(first, numbers.Real) or getattr(first, "ndim", None) == 0:
            return [first, *(function(text) for text in texts[1:])]
        return list(function(texts))  # it returned a sequence for a string, so it takes a list of strings

    return score


def checked_finish(reward: Reward, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
    """`reward.finish` with its answer checked. Raises `RewardError` naming the reward and the completion."""

    def shown(index: int) -> str:
        return repr(finished[index].text[:200])

    try:
        values = reward.finish(states, finished)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {reward.name!r} raised {type(error).__name__}: {error} on completion {shown(0)}"
        ) from error
    if len(values) != len(finished):
        raise RewardError(
            f"reward {reward.name!r} returned {len(values)} values for {len(finished)} completions, the first of "
            f"them {shown(0)}; return one number per completion"
        )
    for index, value in enumerate(values):
        if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) != 0:
            raise RewardError(f"reward {reward.name!r} returned {value!r}, not a number, on completion {shown(index)}")
        if not math.isfinite(value):
            raise RewardError(f"reward {reward.name!r} returned {float(value)} on completion {shown(index)}")
    return [float(value) for value in values]


class CheckMonotone:
    """Wraps a reward and raises `RewardError` where its promise breaks: earned falls, or a bound is crossed."""

    monotone = True

    def __init__(self, reward: Reward, tolerance: float = 1e-9) -> None:
        self.name = reward.name
        self._inner, self._tolerance = reward, tolerance

    def start(self, context: Context) -> State:
        return self._inner.start(context)

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        after = self._inner.extend(states, tokens)
        for token, was, now in zip(tokens, self._inner.earned(states), self._inner.earned(after), strict=True):
            if now < was - self._tolerance:
                raise RewardError(f"reward {self.name!r} is not monotone: token {token} took earned {was} to {now}")
        return after

    def earned(self, states: Sequence[State]) -> list[float]:
        return self._inner.earned(states)

    def upper(self, states: Sequence[State]) -> list[float]:
        return self._inner.upper(states)

    def promise(self, states: Sequence[State]) -> list[float]:
        return promised(self._inner, states)

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        values = checked_finish(self._inner, states, finished)
        bounds = zip(self.earned(states), values, self.upper(states), finished, strict=True)
        for low, value, high, done in bounds:
            if not low - self._tolerance <= value <= high + self._tolerance:
                raise RewardError(
                    f"reward {self.name!r} gave {value}, outside its own bounds [{low}, {high}], on {done.text[:200]!r}"
                )
        return values


class _Combined:
    """Several rewards joined value by value; `join` maps one value per part to one value."""

    def __init__(self, parts: Iterable[Reward | Callable[..., Any]], join: Callable[[list[float]], float]) -> None:
        self._parts = [as_reward(part) for part in parts]
        if not self._parts:
            raise UsageError("a combined reward needs at least one part")
        self._join = join
        self.name = "combined"
        self.monotone = all(part.monotone for part in self._parts)

    def start(self, context: Context) -> State:
        return tuple(part.start(context) for part in self._parts)

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        columns = [p.extend([s[i] for s in states], tokens) for i, p in enumerate(self._parts)]
        return list(zip(*columns, strict=True))

    def _rows(self, columns: list[list[float]]) -> list[float]:
        return [self._join(list(row)) for row in zip(*columns, strict=True)]

    def earned(self, states: Sequence[State]) -> list[float]:
        return self._rows([p.earned([s[i] for s in states]) for i, p in enumerate(self._parts)])

    def upper(self, states: Sequence[State]) -> list[float]:
        return self._rows([p.upper([s[i] for s in states]) for i, p in enumerate(self._parts)])

    def promise(self, states: Sequence[State]) -> list[float]:
        return self._rows([promised(p, [s[i] for s in states]) for i, p in enumerate(self._parts)])

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        return self._rows([checked_finish(p, [s[i] for s in states], finished) for i, p in enumerate(self._parts)])


def _named(reward: _Combined, form: str) -> _Combined:
    reward.name = f"{form}({', '.join(part.name for part in reward._parts)})"
    return reward


def weighted_sum(parts: dict[Any, float] | Sequence[tuple[Reward | Callable[..., Any], float]]) -> Reward:
    """`sum_i w_i * r_i` with weights >= 0 (a negative weight would turn lower bounds into upper ones)."""
    pairs = list(parts.items()) if isinstance(parts, dict) else list(parts)
    weights = [float(weight) for _, weight in pairs]
    if any(not (0 <= weight < math.inf) for weight in weights):
        raise UsageError(f"weighted_sum weights must be finite and >= 0, got {weights}; negate the reward instead")

    def join(row: list[float]) -> float:
        return sum(w * v for w, v in zip(weights, row, strict=True) if w > 0)

    return _named(_Combined([part for part, _ in pairs], join), "sum")


def minimum(*parts: Reward | Callable[..., Any]) -> Reward:
    """The smallest of several rewards."""
    return _named(_Combined(parts, min), "min")


def clip(reward: Reward | Callable[..., Any], low: float, high: float) -> Reward:
    """The reward limited to [low, high], which also gives it finite bounds."""
    if not low < high:
        raise UsageError(f"clip needs low < high, got low={low}, high={high}")
    return _named(_Combined([reward], lambda row: min(max(row[0], low), high)), "clip")


def gate(reward: Reward | Callable[..., Any], by: Reward | Callable[..., Any]) -> Reward:
    """`r * g` with r >= 0 and a gate g in [0, 1]. Raises `RewardError` where a value leaves its range."""

    def join(row: list[float]) -> float:
        value, opening = row
        if value == -math.inf or opening == -math.inf:  # nothing known yet of a product that cannot be negative
            return 0.0
        opening = 1.0 if opening == math.inf else opening
        if value < 0 or not 0 <= opening <= 1:
            raise RewardError(f"gate needs a reward >= 0 and a gate in [0, 1], got {value} and {opening}")
        return value * opening if opening > 0 else 0.0

    return _named(_Combined([reward, by], join), "gate")
