"""A reward whose failures stay with the request that asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from dts.doors.choices import AnyReward
from dts.errors import RewardError
from dts.rewards import Context, Finished, Reward, State, as_reward, promised
from dts.timeout import TookTooLong, with_timeout

T = TypeVar("T")


class Contained(Reward):
    """The reward, for one request. SystemExit and the like, which would end the searches of all requests, are raised as
    `RewardError`. Once it took longer than `seconds` for a text, it is not asked again, so that it holds up the others
    once."""

    def __init__(self, reward: AnyReward, seconds: float | None = None) -> None:
        inner = as_reward(reward) if seconds is None else with_timeout(reward, seconds)
        self.name, self.monotone, self.parts = inner.name, inner.monotone, (inner,)
        self.partial = getattr(inner, "partial", True)
        self.of_text = bool(getattr(inner, "of_text", False))
        self._inner = inner
        self._late: TookTooLong | None = None

    @property
    def one_by_one(self) -> bool:  # type: ignore[override]  # may be known after the first call only
        return bool(getattr(self._inner, "one_by_one", False))

    def start(self, context: Context) -> State:
        return self._kept(lambda: self._inner.start(context))

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        return self._kept(lambda: self._inner.extend(states, tokens))

    def earned(self, states: Sequence[State]) -> list[float]:
        return self._kept(lambda: self._inner.earned(states))

    def upper(self, states: Sequence[State]) -> list[float]:
        return self._kept(lambda: self._inner.upper(states))

    def promise(self, states: Sequence[State]) -> list[float]:
        return self._kept(lambda: promised(self._inner, states))

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        return self._kept(lambda: self._inner.finish(states, finished))

    def _kept(self, call: Callable[[], T]) -> T:
        if self._late is not None:
            raise self._late
        try:
            return call()
        except TookTooLong as error:
            self._late = error
            raise
        except Exception:
            raise
        except BaseException as error:
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error
