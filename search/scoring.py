"""What a search asks of its reward: every call is counted, and no text is scored twice."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from dts.results import Usage
from dts.rewards import NO_REWARD, Context, Finished, Reward, State, checked_finish, promised

REMEMBERED = 1 << 17  # scores, of about 150 bytes each; the oldest are dropped


class BudgetSpent(Exception):
    """The budget does not allow the reward to score more texts. Ends a run, which keeps what it has found."""


class Scoring:
    """The reward of one search, with its costs in `usage` and the scores that it has given.

    A score is kept by the text where the reward says that nothing else counts (`Reward.of_text`), otherwise by text
    and token ids. So a reward that is not deterministic keeps its first answer.
    """

    def __init__(self, reward: Reward, usage: Usage) -> None:
        self._reward, self._usage = reward, usage
        self._of_text = bool(getattr(reward, "of_text", False))
        self._meter = _Meter(reward, usage)
        self._scores: dict[bytes, float] = {}

    @property
    def needs_log_probs(self) -> bool:
        """Whether `Finished.token_logprobs` may be looked at."""
        return not self._of_text

    def start(self, context: Context) -> State:
        with self._meter:
            return self._reward.start(context)

    def extend(self, states: Sequence[State], tokens: Sequence[int]) -> list[State]:
        with self._meter:
            return self._reward.extend(states, tokens)

    def bounds(self, states: Sequence[State]) -> tuple[list[float], list[float], list[float]]:
        """Earned, upper and promise."""
        with self._meter:
            return self._reward.earned(states), self._reward.upper(states), promised(self._reward, states)

    def promise(self, states: Sequence[State]) -> list[float]:
        with self._meter:
            return promised(self._reward, states)

    def finish(self, states: Sequence[State], finished: Sequence[Finished], calls: float) -> list[float]:
        """The reward of these sequences. Raises `BudgetSpent` where it would have to score more than `calls` texts."""
        keys = [self._key(done) for done in finished]
        rows = self._unknown(keys)
        if len(rows) > calls:
            raise BudgetSpent
        if rows:
            with self._meter:
                values = checked_finish(self._reward, [states[row] for row in rows], [finished[row] for row in rows])
            if self._reward is not NO_REWARD:
                self._usage.reward_calls += len(rows)
            self._scores.update(zip((keys[row] for row in rows), values, strict=True))
        scores = [self._scores[key] for key in keys]
        while len(self._scores) > REMEMBERED:
            del self._scores[next(iter(self._scores))]
        return scores

    def within(self, finished: Sequence[Finished], calls: float) -> int:
        """How many of these sequences, from the first on, can be scored with so many calls."""
        rows = self._unknown([self._key(done) for done in finished])
        return len(finished) if len(rows) <= calls else rows[int(calls)]

    def forget(self) -> None:
        """Let go of the scores."""
        self._scores.clear()

    def _unknown(self, keys: Sequence[bytes]) -> list[int]:
        """Where the keys stand first that have no score yet."""
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self._scores:
                first.setdefault(key, row)
        return list(first.values())

    def _key(self, done: Finished) -> bytes:
        digest = blake2b(done.text.encode(errors="surrogatepass"), digest_size=16)
        if not self._of_text:
            digest.update(array("q", done.token_ids).tobytes())
        return digest.digest()


class _Meter:
    """Adds the seconds and the model's tokens that a reward needs inside a `with` block to `usage`."""

    def __init__(self, reward: Reward, usage: Usage) -> None:
        self._usage = usage
        self._counters = list({id(one): one for one in _with_models(reward)}.values())
        self._tokens, self._began = 0, 0.0

    def __enter__(self) -> None:
        self._tokens, self._began = self._forwarded(), time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._usage.reward_seconds += time.perf_counter() - self._began
        self._usage.reward_tokens += self._forwarded() - self._tokens

    def _forwarded(self) -> int:
        return sum(one.tokens for one in self._counters) if self._counters else 0


def runs_a_model(reward: Reward) -> bool:
    """Whether the reward, or a part of it, counts what a model of its own forwards."""
    return any(True for _ in _with_models(reward))


def _with_models(reward: Any) -> Iterator[Any]:
    """The rewards and functions that count what their model forwards, a reward before its parts."""
    if isinstance(getattr(reward, "tokens", None), int):
        yield reward
        return
    parts = getattr(reward, "parts", ())
    for part in parts if isinstance(parts, list | tuple) else ():
        yield from _with_models(part)
