"""Functions of finished text as rewards."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, get_origin

from dts.errors import RewardError, UsageError, shown
from dts.rewards.calls import Workers, awaited, begun, is_async
from dts.rewards.reward import Context, Finished, Reward, State, failed


class TerminalReward(Reward):
    """A batch function of finished sequences as a reward: nothing is known before the end."""

    def __init__(
        self,
        score: Callable[[Context, Sequence[Finished]], Sequence[float]],
        name: str,
        parts: Sequence[Any] = (),
        *,
        of_text: bool = False,
        partial: bool = True,
    ) -> None:
        self.name, self.parts, self.of_text, self.partial = name, tuple(parts), of_text, partial
        self._score = score

    @property
    def one_by_one(self) -> bool:  # type: ignore[override]  # not known before a function without annotations is called
        return bool(getattr(self._score, "one_by_one", False))

    def start(self, context: Context) -> State:
        return context

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        return list(self._score(states[0], finished)) if finished else []


class _Nothing(TerminalReward):
    """0 for every completion, and known from the start: it costs nothing."""

    def __init__(self) -> None:
        super().__init__(lambda context, finished: [0.0] * len(finished), "none", of_text=True, partial=False)

    def earned(self, states: Sequence[State]) -> list[float]:
        return [0.0] * len(states)

    upper = earned


NO_REWARD = _Nothing()

_MEMBERS = ("name", "monotone", "start", "extend", "earned", "upper", "finish")


def as_reward(
    reward: Reward | Callable[..., Any],
    name: str | None = None,
    *,
    batched: bool | None = None,
    workers: Workers = None,
    partial: bool | None = None,
) -> Reward:
    """A reward object as it is, or a function as a terminal reward.

    Functions may be `text -> float`, `list[str] -> list[float]`, or TRL's `f(prompts, completions, **kwargs)`,
    which is recognised by a parameter called `completions` and gets prompts, completions and completion_ids. Each may
    be an `async def`; the calls for several texts then wait together, in an event loop of their own.
    batched: whether the function takes a list of texts; None: by its annotation, and where it has none, by what it does
    with the first text (an async function and one with workers take one text).
    workers: for functions of one text that wait or compute long: how many texts at a time, in threads, or at most so
    many calls of an async function; or an executor, such as `ProcessPoolExecutor(4)`. The values are the same.
    partial: whether a search may ask about unfinished texts, too, as a guide; give False where that costs much and says
    nothing, as with tests of a program. None: what the function's attribute `partial` says, or True.
    Raises `UsageError` for what is no reward.
    """
    if isinstance(reward, type) and all(hasattr(reward, member) for member in ("start", "finish")):
        raise UsageError(f"reward={reward.__name__} is a class; give an instance of it: {reward.__name__}(...)")
    if isinstance(reward, Reward) or all(hasattr(reward, member) for member in _MEMBERS):
        if workers is not None:
            raise UsageError(
                f"workers={shown(workers)} is for functions of one text; {shown(reward)} is a reward object"
            )
        return reward  # type: ignore[return-value]  # with these members it is one
    if not callable(reward):
        raise UsageError(f"reward={shown(reward)} is neither a function nor an object with the methods of dts.Reward")
    label: str = name or getattr(reward, "__name__", None) or type(reward).__name__
    parameters = _parameters(reward)
    if "completions" in parameters:
        takes_list: bool | None = True
    else:
        first = next(iter(parameters.values()), None)
        takes_list = _takes_list(first.annotation if first else None) if batched is None else batched
    partial = bool(getattr(reward, "partial", True)) if partial is None else partial
    _check_workers(label, workers, takes_list, is_async(reward))
    if "completions" in parameters:
        of_text = not _takes("completion_ids", parameters)
        return TerminalReward(_trl_scorer(reward), label, [reward], of_text=of_text, partial=partial)
    if workers is not None or is_async(reward):
        takes_list = bool(takes_list)
    score = _TextScorer(reward, takes_list, label, workers)
    return TerminalReward(score, label, [reward], of_text=True, partial=partial)


def _check_workers(label: str, workers: Any, takes_list: bool | None, waits: bool) -> None:
    if workers is None:
        return
    whole = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    if not whole and not isinstance(workers, Executor):
        raise UsageError(f"workers={shown(workers)} is not allowed; give a whole number >= 1, an executor or None")
    if takes_list:
        raise UsageError(f"workers={shown(workers)} is for functions of one text; {label!r} takes a list")
    if waits and not whole:
        raise UsageError(f"workers={shown(workers)} cannot run the async function {label!r}; give a whole number")


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


def _takes(name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _trl_scorer(function: Callable[..., Any]) -> Callable[[Context, Sequence[Finished]], Sequence[float]]:
    parameters = inspect.signature(function).parameters

    def score(context: Context, finished: Sequence[Finished]) -> Sequence[float]:
        messages = isinstance(context.prompt, list) and bool(context.prompt) and isinstance(context.prompt[0], dict)
        arguments = {
            "prompts": [context.prompt] * len(finished),
            "completions": [[{"role": "assistant", "content": f.text}] if messages else f.text for f in finished],
            "completion_ids": [list(f.token_ids) for f in finished],
        }
        return _several(_called(function, **{k: v for k, v in arguments.items() if _takes(k, parameters)}))

    return score


class _TextScorer:
    """A function of one text or, with `batched`, of a list of texts; None: what it does with the first text says it."""

    def __init__(self, function: Callable[..., Any], batched: bool | None, label: str, workers: Workers) -> None:
        self._function, self._batched, self._label, self._workers = function, batched, label, workers

    @property
    def one_by_one(self) -> bool:
        return self._batched is False and self._workers in (None, 1) and not is_async(self._function)

    def __call__(self, context: Context, finished: Sequence[Finished]) -> Sequence[float]:
        texts, first = [f.text for f in finished], list[Any]()
        if self._batched is None:
            self._batched, first = _find_out(self._function, texts[0])
        if self._batched:
            return _several(_called(self._function, texts))
        return [*first, *_each(self._function, texts[len(first) :], self._label, self._workers)]


def _called(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    value = function(*arguments, **named)
    return awaited(value) if is_async(function) else value


def _each(function: Callable[..., Any], texts: Sequence[str], label: str, workers: Workers) -> list[Any]:
    """A value for each text. Raises `RewardError` with the first text for which the function fails."""
    futures: list[Future[Any]] = []
    if is_async(function) or workers not in (None, 1):
        futures = begun(function, texts, workers)
    calls: Sequence[Callable[[], Any]] = [future.result for future in futures] or [
        functools.partial(function, text) for text in texts
    ]
    values = []
    try:
        for text, call in zip(texts, calls, strict=True):
            try:
                values.append(_one(call()))
            except RewardError:
                raise
            except Exception as error:
                raise failed(label, error, text) from error
    finally:
        for future in futures:
            future.cancel()  # where one failed, those after it need not run
    return values


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
    return TypeError("it returned a coroutine, but is no async function; write it with async def")


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
