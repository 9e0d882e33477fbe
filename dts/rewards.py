"""Rewards on token ids: a state per path, extended token by token, bounded at every prefix.

The whole model is four steps. `start` gives the state of the empty completion; `extend` the states after one more token
each; `earned`, `upper` and `promise` bound the reward of an unfinished text; `finish` scores finished ones. The search
keeps one state per tree node, so a token is read once however many rollouts pass through it. States are values:
`extend` returns new ones and never changes the old, because several children grow from the same parent.

A function of finished text becomes a reward through `as_reward`. No reward can see a reference answer: neither
`Context` nor `Finished` carries one.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from dts.errors import RewardError, UsageError

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


class Reward:
    """A token-level reward. Subclass it and override what you know; the defaults know nothing before the end.

    All methods are batched over paths: lists in, lists of the same length out. `monotone=True` promises that `earned`
    never falls along a path and never exceeds the final reward. An object that has `name`, `monotone` and all methods
    but `promise` is accepted without subclassing, too.
    """

    name: str
    monotone: bool = False

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


class TerminalReward(Reward):
    """A batch function of finished sequences as a reward: nothing is known before the end."""

    def __init__(self, score: Callable[[Context, Sequence[Finished]], Sequence[float]], name: str) -> None:
        self.name = name
        self._score = score

    def start(self, context: Context) -> State:
        return context

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        return list(self._score(states[0], finished)) if finished else []


_MEMBERS = ("name", "monotone", "start", "extend", "earned", "upper", "finish")


def as_reward(reward: Reward | Callable[..., Any], name: str | None = None, *, batched: bool | None = None) -> Reward:
    """A reward object as it is, or a function as a terminal reward.

    Functions may be `text -> float`, `list[str] -> list[float]`, or TRL's `f(prompts, completions, **kwargs)`,
    which is recognised by a parameter called `completions` and gets prompts, completions and completion_ids.
    batched: whether the function takes a list of texts; None: by its annotation, and where it has none, by what it does
    with the first text. Raises `UsageError` for what is no reward.
    """
    if isinstance(reward, type):
        raise UsageError(f"reward={reward.__name__} is a class; give an instance of it: {reward.__name__}(...)")
    if isinstance(reward, Reward) or all(hasattr(reward, member) for member in _MEMBERS):
        return reward  # type: ignore[return-value]  # with these members it is one
    if not callable(reward):
        raise UsageError(f"reward={reward!r} is neither a function nor an object with the methods of dts.Reward")
    label: str = name or getattr(reward, "__name__", None) or type(reward).__name__
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
        raise UsageError(
            f"reward={label!r} is an async function, which is not supported; wrap it: lambda text: asyncio.run(f(text))"
        )
    parameters = _parameters(reward)
    if "completions" in parameters:
        return TerminalReward(_trl_scorer(reward), label)
    first = next(iter(parameters.values()), None)
    takes_list = _takes_list(first.annotation if first else None) if batched is None else batched
    return TerminalReward(_text_scorer(reward, takes_list), label)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's parameters, with annotations as objects where that is possible; none where it has no signature."""
    try:
        return inspect.signature(function, eval_str=True).parameters
    except NameError:  # an annotation that only a type checker can see
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return {}


def _takes_list(annotation: Any) -> bool | None:
    """Whether a parameter of this type takes several texts; None where the annotation does not say."""
    if annotation in (None, inspect.Parameter.empty, Any, object):
        return None
    if annotation is str or annotation == "str":
        return False
    if isinstance(annotation, str):
        return annotation.lower().startswith(("list", "sequence", "iterable", "collection", "tuple"))
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, str)


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
        return _several(function(**{k: v for k, v in arguments.items() if takes_all or k in parameters}))

    return score


def _text_scorer(
    function: Callable[..., Any], batched: bool | None
) -> Callable[[Context, Sequence[Finished]], Sequence[float]]:
    def score(context: Context, finished: Sequence[Finished]) -> Sequence[float]:
        nonlocal batched
        texts, first = [f.text for f in finished], list[Any]()
        if batched is None:
            batched, first = _find_out(function, texts[0])
        if batched:
            return _several(function(texts))
        return [*first, *(_one(function(text)) for text in texts[len(first) :])]

    return score


def _find_out(function: Callable[..., Any], text: str) -> tuple[bool, list[Any]]:
    """Whether a function without annotations takes a list of texts, and its value for this one where it does not.

    It takes a list if it gives no number for one text, or fails on it, and two values for two. Where it does neither,
    what it did with one text counts.
    """
    try:
        value = function(text)
    except Exception:
        if _gives_two(function, text):
            return True, []
        raise
    scalar = isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0
    return (True, []) if not scalar and _gives_two(function, text) else (False, [_one(value)])


def _gives_two(function: Callable[..., Any], text: str) -> bool:
    try:
        return len(_several(function([text, text]))) == 2
    except Exception:
        return False


def _one(value: Any) -> Any:
    """The number in an array of one element; anything else as it is."""
    if inspect.isawaitable(value):
        raise _no_coroutine(value)
    return value.reshape(()) if getattr(value, "ndim", 0) and math.prod(value.shape) == 1 else value


def _no_coroutine(value: Any) -> TypeError:
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that nobody awaited it
    return TypeError("it returned a coroutine, and async functions are not supported; wrap it with asyncio.run")


def _several(values: Any) -> list[Any]:
    """What a batch function returned, as a list. Raises `TypeError` with what was returned for anything else."""
    if inspect.isawaitable(values):
        raise _no_coroutine(values)
    if (
        isinstance(values, Iterable)
        and not isinstance(values, str | bytes | Mapping)
        and getattr(values, "ndim", None) != 0
    ):
        return list(values)
    raise TypeError(f"it returned {str(values)[:80]} for a list of completions; return a list with a number for each")


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
    if not hasattr(values, "__len__") or len(values) != len(finished):
        count = f"{len(values)} values" if hasattr(values, "__len__") else str(values)[:80]
        raise RewardError(
            f"reward {reward.name!r} returned {count} for {len(finished)} completions, the first of them {shown(0)}; "
            "return one number per completion"
        )
    return [_finite(value, reward, shown(index)) for index, value in enumerate(values)]


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


class CheckMonotone(Reward):
    """Wraps a reward and raises `RewardError` where its promise breaks: earned falls, or a bound is crossed."""

    monotone = True

    def __init__(self, reward: Reward, tolerance: float = 1e-9) -> None:
        self._inner, self._tolerance = as_reward(reward), tolerance
        self.name = self._inner.name

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
