"""Rewards made of rewards: sums, limits, gates, and a check of what a reward promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dts.errors import RewardError, UsageError
from dts.rewards.functions import as_reward
from dts.rewards.reward import Context, Finished, Reward, State, checked_finish, promised


class CheckMonotone(Reward):
    """Wraps a reward and raises `RewardError` where its promise breaks: earned falls, or a bound is crossed."""

    monotone = True

    def __init__(self, reward: Reward, tolerance: float = 1e-9) -> None:
        self._inner, self._tolerance = as_reward(reward), tolerance
        self.name, self.parts = self._inner.name, (self._inner,)

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


class _Combined(Reward):
    """Several rewards joined value by value; `join` maps one value per part to one value."""

    def __init__(self, parts: Iterable[Reward | Callable[..., Any]], join: Callable[[list[float]], float]) -> None:
        self._parts = [as_reward(part) for part in parts]
        if not self._parts:
            raise UsageError("a combined reward needs at least one part")
        self.parts = tuple(self._parts)
        self._join = join
        self.name = "combined"
        self.monotone = all(part.monotone for part in self._parts)
        self.partial = all(getattr(part, "partial", True) for part in self._parts)
        self.of_text = all(getattr(part, "of_text", False) for part in self._parts)

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
