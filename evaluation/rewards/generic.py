"""Rewards for any task: keywords, the form of the text, length, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dts.errors import UsageError
from dts.evaluation.rewards.text import TextReward
from dts.rewards import Context, Finished, Reward


@dataclass(frozen=True, slots=True)
class Found:
    """Notes of `Keywords`."""

    tail: str = ""
    found: frozenset[str] = frozenset()


class Keywords(TextReward):
    """Share of keywords that occur as whole words, whatever the case; each is earned at its first occurrence."""

    def __init__(self, keywords: Sequence[str], name: str = "keywords") -> None:
        words = [word.strip().lower() for word in keywords]
        if not words or not all(words):
            raise UsageError(f"keywords={list(keywords)!r}: give at least one keyword, none of them empty")
        self.name = name
        self._patterns = {word: re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in words}
        self._keep = max(map(len, words)) + 1  # characters: a whole keyword and the one before it

    def empty(self) -> Found:
        return Found()

    def read(self, notes: Found, piece: str) -> Found:
        return self._scan(notes, piece, last=False)

    def _scan(self, notes: Found, piece: str, *, last: bool) -> Found:
        text = notes.tail + piece.lower()
        # A match that ends at the end of the text may be part of a longer word: it waits for what follows.
        end = len(text) if last else len(text) - 1
        new = {
            word
            for word, pattern in self._patterns.items()
            if word not in notes.found and _ends_within(pattern, text, max(len(notes.tail) - len(word), 0), end)
        }
        return Found(text[-self._keep :], notes.found | new)

    def worth(self, notes: Found) -> tuple[float, float]:
        return len(notes.found) / len(self._patterns), 1.0

    def final(self, notes: Found) -> float:
        return len(self._scan(notes, "", last=True).found) / len(self._patterns)


def _ends_within(pattern: re.Pattern[str], text: str, start: int, end: int) -> bool:
    """Whether a match begins at `start` or later (earlier ones were judged before) and ends by `end`."""
    match = pattern.search(text, start)
    return match is not None and match.end() <= end


class Format(TextReward):
    """1 once a regular expression is found in the text, else 0.

    Earned when what follows cannot change the match. A match longer than `reach` characters may be missed.
    """

    def __init__(self, pattern: str, reach: int = 256, name: str = "format") -> None:
        if reach < 1:
            raise UsageError(f"Format reach must be at least 1 character, got {reach}")
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise UsageError(f"Format pattern {pattern!r} is no regular expression: {error}") from error
        self.name, self._reach = name, reach

    def empty(self) -> str | None:
        """The end of the text; None once the form was found."""
        return ""

    def read(self, notes: str | None, piece: str) -> str | None:
        if notes is None:
            return None
        text = notes + piece
        match = self._pattern.search(text)
        if match is not None and match.end() < len(text):
            return None
        return text[-self._reach :]

    def worth(self, notes: str | None) -> tuple[float, float]:
        return (1.0, 1.0) if notes is None else (0.0, 1.0)

    def final(self, notes: str | None) -> float:
        return 1.0 if notes is None or self._pattern.search(notes) else 0.0


class Length(Reward):
    """min(tokens, target) / target: earned token by token."""

    monotone = True

    def __init__(self, target: int, name: str = "length") -> None:
        if target < 1:
            raise UsageError(f"Length target must be at least 1 token, got {target}")
        self.name, self._target = name, target

    def start(self, context: Context) -> int:
        return 0

    def extend(self, states: Sequence[int], tokens: Sequence[int]) -> list[int]:
        return [state + 1 for state in states]

    def earned(self, states: Sequence[int]) -> list[float]:
        return [min(state, self._target) / self._target for state in states]

    def upper(self, states: Sequence[int]) -> list[float]:
        return [1.0] * len(states)

    def finish(self, states: Sequence[int], finished: Sequence[Finished]) -> list[float]:
        return self.earned(states)


class Repetition(Reward):
    """1 for no repeated n-gram of tokens, down to 0 at `limit` repeats.

    Nothing is earned before the end (the lower bound is 0), but each repeat lowers the upper bound. An n-gram counts
    as a repeat if it occurred within the last `window` tokens, which keeps a state small.
    """

    monotone = True

    def __init__(self, n: int = 3, limit: int = 8, window: int = 64, name: str = "repetition") -> None:
        if n < 1 or limit < 1 or window <= n:
            raise UsageError(
                f"Repetition needs n >= 1, limit >= 1, window > n; got n={n}, limit={limit}, window={window}"
            )
        self.name = name
        self._n, self._limit, self._window = n, limit, window

    def start(self, context: Context) -> tuple[tuple[int, ...], int]:
        return (), 0

    def extend(
        self, states: Sequence[tuple[tuple[int, ...], int]], tokens: Sequence[int]
    ) -> list[tuple[tuple[int, ...], int]]:
        return [self._step(recent, count, token) for (recent, count), token in zip(states, tokens, strict=True)]

    def _step(self, recent: tuple[int, ...], count: int, token: int) -> tuple[tuple[int, ...], int]:
        recent = (*recent, token)[-self._window :]
        gram = recent[-self._n :]
        starts = range(len(recent) - self._n)  # the last start is the gram itself
        repeated = len(gram) == self._n and any(recent[i : i + self._n] == gram for i in starts)
        return recent, min(count + repeated, self._limit)

    def earned(self, states: Sequence[tuple[tuple[int, ...], int]]) -> list[float]:
        return [0.0] * len(states)

    def upper(self, states: Sequence[tuple[tuple[int, ...], int]]) -> list[float]:
        return [1.0 - count / self._limit for _, count in states]

    def finish(self, states: Sequence[tuple[tuple[int, ...], int]], finished: Sequence[Finished]) -> list[float]:
        return self.upper(states)
