"""What a search asks of its reward: every call is counted, and no text is scored twice."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from dts.errors import RewardError
from dts.results import Usage
from dts.rewards import NO_REWARD, Context, Finished, Reward, State, checked_finish, promised

Asked = tuple[bytes, State, Finished]  # a text by its key
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
        self._scores: dict[bytes, float] = {}  # nan: it failed on the text, which was not finished then
        self._together = math.inf  # unfinished texts to ask about in one call

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
        asked = list(zip((self._key(done) for done in finished), states, finished, strict=True))
        if new := self._unscored(asked):
            self._ask(new, calls)
        return self._found(asked)

    def so_far(self, states: Sequence[State], finished: Sequence[Finished], calls: float) -> list[float]:
        """The same of unfinished texts: nan where the reward fails on one, as some do on half a text."""
        asked = list(zip((self._key(done) for done in finished), states, finished, strict=True))
        new = [one for one in self._unscored(asked) if one[0] not in self._scores]
        if len(new) > calls:
            raise BudgetSpent
        limit = self._usage.reward_calls + calls
        while new:
            size = 1 if getattr(self._reward, "one_by_one", False) else int(min(self._together, len(new)))
            self._try(new[:size], limit)
            new = new[size:]
        return self._found(asked)

    def _try(self, asked: Sequence[Asked], limit: float) -> None:
        """Ask about these texts together. Where the reward fails, nobody knows on which, so each is asked about alone,
        and fewer are together from now on."""
        try:
            self._ask(asked, limit - self._usage.reward_calls)
        except RewardError:
            if len(asked) == 1:
                self._scores[asked[0][0]] = math.nan
                return
            for one in asked:
                self._try([one], limit)
            self._together = len(asked) // 2
        else:
            self._together = max(self._together, 2 * len(asked))

    def _ask(self, asked: Sequence[Asked], calls: float) -> None:
        """Score these texts, and count them whether or not the reward fails. Raises `BudgetSpent` above `calls`."""
        if len(asked) > calls:
            raise BudgetSpent
        if self._reward is not NO_REWARD:
            self._usage.reward_calls += len(asked)
        keys, states, finished = zip(*asked, strict=True)
        with self._meter:
            self._scores.update(zip(keys, checked_finish(self._reward, states, finished), strict=True))

    def _found(self, asked: Sequence[Asked]) -> list[float]:
        scores = [self._scores[key] for key, _, _ in asked]
        while len(self._scores) > REMEMBERED:
            del self._scores[next(iter(self._scores))]
        return scores

    def within(self, finished: Sequence[Finished], calls: float) -> int:
        """How many of these sequences, from the first on, can be scored with so many calls."""
        keys = [self._key(done) for done in finished]
        new = list(dict.fromkeys(key for key in keys if self._has_none(key)))
        return len(finished) if len(new) <= calls else keys.index(new[int(calls)])

    def forget(self) -> None:
        """Let go of the scores."""
        self._scores.clear()

    def _unscored(self, asked: Sequence[Asked]) -> list[Asked]:
        """Each text once."""
        first: dict[bytes, Asked] = {}
        for one in asked:
            if self._has_none(one[0]):
                first.setdefault(one[0], one)
        return list(first.values())

    def _has_none(self, key: bytes) -> bool:
        return math.isnan(self._scores.get(key, math.nan))

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
