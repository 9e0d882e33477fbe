"""Functions of finished text as rewards."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_origin

from dts.errors import UsageError, shown
from dts.rewards.reward import Context, Finished, Reward, State


class TerminalReward(Reward):
    """A batch function of finished sequences as a reward: nothing is known before the end."""

    def __init__(
        self,
        score: Callable[[Context, Sequence[Finished]], Sequence[float]],
        name: str,
        parts: Sequence[Any] = (),
        partial: bool = True,
    ) -> None:
        self.name, self.parts, self.partial = name, tuple(parts), partial  # parts: what it was made from
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
    if isinstance(reward, type) and all(hasattr(reward, member) for member in ("start", "finish")):
        raise UsageError(f"reward={reward.__name__} is a class; give an instance of it: {reward.__name__}(...)")
    if isinstance(reward, Reward) or all(hasattr(reward, member) for member in _MEMBERS):
        return reward  # type: ignore[return-value]  # with these members it is one
    if not callable(reward):
        raise UsageError(f"reward={shown(reward)} is neither a function nor an object with the methods of dts.Reward")
    label: str = name or getattr(reward, "__name__", None) or type(reward).__name__
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
        raise UsageError(
            f"reward={label!r} is an async function, which is not supported; wrap it: lambda text: asyncio.run(f(text))"
        )
    parameters = _parameters(reward)
    if "completions" in parameters:
        return TerminalReward(_trl_scorer(reward), label, [reward])
    first = next(iter(parameters.values()), None)
    takes_list = _takes_list(first.annotation if first else None) if batched is None else batched
    return TerminalReward(_text_scorer(reward, takes_list), label, [reward])


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
