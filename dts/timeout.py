"""A limit on the time that a reward may take."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dts.errors import RewardError, UsageError
from dts.rewards import Context, Finished, Reward, State, as_reward, promised


class TookTooLong(RewardError):
    """A reward took longer than it may."""


def with_timeout(reward: Reward | Callable[..., Any], seconds: float) -> Reward:
    """The reward, whose scoring raises `RewardError` where it takes longer than `seconds` for each completion.

    The call runs in a thread. Python cannot end a thread, so one that hangs keeps its memory and its core until it
    returns or the process ends; it keeps neither the search nor the end of the process waiting. Native code that holds
    Python's global lock cannot be timed: run such code in a process of its own.
    """
    return _Timed(as_reward(reward), check_seconds(seconds))


def check_seconds(seconds: float) -> float:
    """Raises `UsageError` for what is no limit."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise UsageError(f"reward timeout {seconds!r} is not allowed; give a number of seconds > 0")
    return seconds


class _Timed(Reward):
    """`extend` and `finish` with a limit; what only reads a state (`earned`, `upper`) is not timed."""

    def __init__(self, reward: Reward, seconds: float) -> None:
        self.name, self.monotone, self.parts = reward.name, reward.monotone, (reward,)
        self.partial = getattr(reward, "partial", True)
        self.of_text = bool(getattr(reward, "of_text", False))
        self._inner, self._seconds = reward, seconds

    def start(self, context: Context) -> State:
        return self._inner.start(context)

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        about = f"reading {len(tokens)} tokens, the first of them {tokens[0] if tokens else None}"
        return self._within(lambda: self._inner.extend(states, tokens), len(tokens), about)

    def earned(self, states: Sequence[State]) -> list[float]:
        return self._inner.earned(states)

    def upper(self, states: Sequence[State]) -> list[float]:
        return self._inner.upper(states)

    def promise(self, states: Sequence[State]) -> list[float]:
        return promised(self._inner, states)

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        first = repr(finished[0].text[:200]) if finished else "none"
        about = f"scoring {len(finished)} completions, the first of them {first}"
        return self._within(lambda: self._inner.finish(states, finished), len(finished), about)

    def _within(self, call: Callable[[], list[Any]], count: int, about: str) -> list[Any]:
        limit = self._seconds * max(count, 1)
        values: list[list[Any]] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                values.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(limit)
        if errors:
            raise errors[0]
        if not values:
            raise TookTooLong(
                f"reward {self.name!r} took longer than {limit:g} s {about}; raise the reward timeout, or mend the "
                "reward (it continues in a thread that cannot be ended)"
            )
        return values[0]
