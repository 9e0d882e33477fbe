"""Label-free rewards that read the text as it grows. All are monotone: what a path earned, it keeps.

Each sees the completion, and where a task builds it, the task's input (a window, a history). None can see a
reference answer: no constructor takes one, and `dts.rewards.Context` has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.rewards import Context, Finished
from dts.text import Decode, TextState, advance, flush


@dataclass(frozen=True, slots=True)
class _Path:
    """State of a `TextReward`: how far the text was read, and what the reward noted."""

    decode: Decode
    text: TextState
    notes: Any


class TextReward:
    """A reward that reads new text once. A subclass says what it notes, and what the notes are worth.

    `read(notes, piece)` must return new notes and cost O(len(piece)); `worth(notes)` gives the lower and the upper
    bound; `final(notes)` closes what the end of the text decides and gives the reward.
    """

    monotone = True
    name = "text"

    def empty(self) -> Any:
        raise NotImplementedError

    def read(self, notes: Any, piece: str) -> Any:
        raise NotImplementedError

    def worth(self, notes: Any) -> tuple[float, float]:
        raise NotImplementedError

    def final(self, notes: Any) -> float:
        raise NotImplementedError

    def start(self, context: Context) -> _Path:
        return _Path(context.decode, TextState(), self.empty())

    def extend(self, states: Sequence[_Path], tokens: Sequence[int]) -> list[_Path]:
        return [self._step(state, token) for state, token in zip(states, tokens, strict=True)]

    def _step(self, state: _Path, token: int) -> _Path:
        text, piece = advance(state.decode, state.text, token)
        return _Path(state.decode, text, self.read(state.notes, piece) if piece else state.notes)

    def earned(self, states: Sequence[_Path]) -> list[float]:
        return [self.worth(state.notes)[0] for state in states]

    def upper(self, states: Sequence[_Path]) -> list[float]:
        return [self.worth(state.notes)[1] for state in states]

    def finish(self, states: Sequence[_Path], finished: Sequence[Finished]) -> list[float]:
        return [self._close_path(state) for state in states]

    def _close_path(self, state: _Path) -> float:
        rest = flush(state.decode, state.text)
        return self.final(self.read(state.notes, rest) if rest else state.notes)

    def score_text(self, text: str) -> float:
        """The reward of a whole text."""
        return self.final(self.read(self.empty(), text))


# The label that a text commits to --------------------------------------------------------------------------------


def shown(label: str) -> str:
    """A label as prompts show it: words with spaces."""
    return label.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Commit:
    """Notes of `LabelParser`: the end of the text so far, and the label once it is certain."""

    tail: str = ""
    label: str | None = None


class LabelParser:
    """Finds the first `<marker> <label>` of a text; what follows changes nothing.

    `marker` is a regular expression such as `answer ?:`; up to 8 spaces, quotes or stars may stand between it and
    the label. Case, and space against underscore, do not matter. A label that begins a longer one ("walking",
    "walking upstairs") is certain only when the text no longer fits the longer.
    """

    def __init__(self, labels: Sequence[str], marker: str) -> None:
        self._labels = {_plain(label): label for label in sorted(labels, key=len, reverse=True)}
        self._marker = re.compile(rf"(?:{marker})[\W_]{{0,8}}", re.IGNORECASE)
        self._keep = max(map(len, self._labels)) + 48  # characters: marker, separators and label

    def read(self, notes: Commit, piece: str, *, last: bool = False) -> Commit:
        """Notes after more text. `last` says that no more will come, so an open label is taken as it stands."""
        if notes.label is not None:
            return notes
        text = notes.tail + piece
        for match in self._marker.finditer(text):
            rest = _plain(text[match.end() :])
            open_longer = any(name.startswith(rest) and name != rest for name in self._labels)
            if open_longer and not last:
                break  # this marker is still undecided, so later ones must wait
            label = next((label for name, label in self._labels.items() if rest.startswith(name)), None)
            if label is not None:
                return Commit("", label)
        return Commit(text[-self._keep :], None)

    def find(self, text: str) -> str | None:
        """The label that a whole text commits to."""
        return self.read(Commit(), text, last=True).label


def _plain(text: str) -> str:
    return re.sub(r"[_\s]", " ", text.lower())


class LabelReward(TextReward):
    """`format_weight` for committing to a valid label, the rest times a verifier's probability of that label.

    Both are earned when the label is complete. In [0, 1]; 0 for a text that commits to none. The probabilities come
    from the input window; they are the same whatever the right answer is.
    """

    def __init__(
        self,
        parser: LabelParser,
        probabilities: Mapping[str, float],
        format_weight: float = 0.2,
        name: str = "verifier",
    ) -> None:
        self.name = name
        self._parser = parser
        self._values = {label: format_weight + (1 - format_weight) * p for label, p in probabilities.items()}
        self._best = max(self._values.values())

    def empty(self) -> Commit:
        return Commit()

    def read(self, notes: Commit, piece: str) -> Commit:
        return self._parser.read(notes, piece)

    def worth(self, notes: Commit) -> tuple[float, float]:
        if notes.label is None:
            return 0.0, self._best
        return self._values[notes.label], self._values[notes.label]

    def final(self, notes: Commit) -> float:
        label = self._parser.read(notes, "", last=True).label
        return 0.0 if label is None else self._values[label]


# Forecasts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Numbers:
    """Notes of `NumberParser` and of `ForecastReward`."""

    run: str = ""  # digits of a number that may go on; "x" where the number cannot count
    values: tuple[int, ...] = ()  # complete numbers, at most as many as the forecast has steps
    score: float = 0.0  # sum over the complete numbers, each in [0, 1]


class NumberParser:
    """Reads whole numbers of exactly `width` digits; other numbers ("the next 8 values", 1234, 51.7) do not count."""

    def __init__(self, width: int, count: int) -> None:
        self.width, self.count = width, count

    def read(self, notes: Numbers, piece: str, score: Callable[[Numbers, int], float]) -> Numbers:
        """Notes after more text; `score` values the number that just became complete."""
        for character in piece:
            if len(notes.values) >= self.count:
                return notes
            if "0" <= character <= "9":
                # One digit too many is remembered as such, so the state stays small.
                full = notes.run == "x" or len(notes.run) == self.width
                notes = Numbers("x" if full else notes.run + character, notes.values, notes.score)
            elif notes.run:
                # "1,234" and "51.7" are one number each, none of `width` digits.
                glued = character in ".," and (notes.run == "x" or len(notes.run) < self.width)
                notes = Numbers("x", notes.values, notes.score) if glued else self.close(notes, score)
        return notes

    def close(self, notes: Numbers, score: Callable[[Numbers, int], float]) -> Numbers:
        """Notes after the end of a number."""
        if notes.run == "x" or len(notes.run) != self.width or len(notes.values) >= self.count:
            return Numbers("", notes.values, notes.score)
        value = int(notes.run)
        return Numbers("", (*notes.values, value), notes.score + score(notes, value))

    def find(self, text: str) -> list[int]:
        """The numbers of a whole text, at most `count`."""
        notes = self.close(self.read(Numbers(), text, lambda _, __: 0.0), lambda _, __: 0.0)
        return list(notes.values)


class ForecastReward(TextReward):
    """Plausibility of a forecast, judged by the history alone: the mean over its steps of a value in [0, 1].

    A step earns 0.2 for being there, and 0.8 times the mean of three kernels `min(1, (band / distance)^2)`, each
    flat within what the history itself does: *level* (distance outside the range of the history, against its standard
    deviation), *season* (distance to the value of the last season at this phase, against the median change over the
    same lag) and *roughness* (change from the step before, against the 90 % quantile of such changes). The flat
    tops leave the forecast to the model: repeating the last season is one of many forecasts with full marks.
    """

    def __init__(
        self, parser: NumberParser, history: np.ndarray, season: int, present: float = 0.2, name: str = "plausibility"
    ) -> None:
        """`history` [n] in the units of the serialised numbers, `season` in steps."""
        if len(history) < 2:
            raise UsageError(f"a forecast reward needs a history of at least 2 values, got {len(history)}")
        self.name = name
        self._parser, self._present = parser, present
        season = season if len(history) > 2 * season else 1
        self._low, self._high = float(history.min()), float(history.max())
        self._deviation = max(float(history.std()), 1.0)  # at least one unit: the numbers are rounded
        self._rough = max(float(np.quantile(np.abs(np.diff(history)), 0.9)), 1.0)
        self._last = float(history[-1])
        self._expected, self._change = _seasonal_bands(history, season, parser.count)

    def _step_score(self, notes: Numbers, value: int) -> float:
        step = len(notes.values)
        before = notes.values[-1] if notes.values else self._last
        outside = max(self._low - value, value - self._high, 0.0)
        kernels = (
            _kernel(outside, self._deviation),
            _kernel(value - self._expected[step], self._change[step]),
            _kernel(value - before, self._rough),
        )
        return self._present + (1 - self._present) * sum(kernels) / len(kernels)

    def empty(self) -> Numbers:
        return Numbers()

    def read(self, notes: Numbers, piece: str) -> Numbers:
        return self._parser.read(notes, piece, self._step_score)

    def worth(self, notes: Numbers) -> tuple[float, float]:
        count = self._parser.count
        return notes.score / count, (notes.score + count - len(notes.values)) / count

    def final(self, notes: Numbers) -> float:
        return self._parser.close(notes, self._step_score).score / self._parser.count


def _kernel(distance: float, band: float) -> float:
    return min(1.0, (band / distance) ** 2) if distance else 1.0


def _seasonal_bands(history: np.ndarray, season: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Per step the last value at its phase, and the median |change| over the lag that lies between, at least 1."""
    expected, change = np.empty(steps), np.empty(steps)
    for step in range(steps):
        lag = season * (step // season + 1)
        expected[step] = history[len(history) - season + step % season]
        usable = min(lag, max(season, (len(history) - 1) // season * season))  # a short history has no longer lags
        change[step] = max(float(np.median(np.abs(history[usable:] - history[:-usable]))), 1.0)
    return expected, change


# Captions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claimed:
    """Notes of `ClaimReward`: the word that may go on, and the facts that were claimed, right or wrong."""

    word: str = ""
    right: frozenset[str] = frozenset()
    wrong: frozenset[str] = frozenset()


class ClaimReward(TextReward):
    """Share of facts that the text states rightly, each judged by its first claim; in [0, 1].

    `vocabulary` maps fact -> claim -> words that make the claim; `facts` maps fact -> true claim, computed from the
    input. A fact never mentioned earns nothing; a wrong first claim cannot be taken back, so the reward is monotone.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, Mapping[str, Sequence[str]]],
        facts: Mapping[str, str],
        name: str = "faithfulness",
    ) -> None:
        self.name = name
        self._facts = dict(facts)
        self._claims = {
            word: (fact, claim)
            for fact, claims in vocabulary.items()
            if fact in facts
            for claim, words in claims.items()
            for word in words
        }

    def empty(self) -> Claimed:
        return Claimed()

    def read(self, notes: Claimed, piece: str) -> Claimed:
        for character in piece.lower():
            if character.isalpha():
                # A word longer than any in the vocabulary stays "too long" without growing.
                notes = Claimed((notes.word + character)[:32], notes.right, notes.wrong)
            elif notes.word:
                notes = self._close(notes)
        return notes

    def _close(self, notes: Claimed) -> Claimed:
        fact, claim = self._claims.get(notes.word, ("", ""))
        if not fact or fact in notes.right or fact in notes.wrong:
            return Claimed("", notes.right, notes.wrong)
        if self._facts[fact] == claim:
            return Claimed("", notes.right | {fact}, notes.wrong)
        return Claimed("", notes.right, notes.wrong | {fact})

    def worth(self, notes: Claimed) -> tuple[float, float]:
        count = len(self._facts)
        return len(notes.right) / count, (count - len(notes.wrong)) / count

    def final(self, notes: Claimed) -> float:
        return self.worth(self._close(notes))[0]

    def claimed(self, text: str) -> Claimed:
        """What a whole text claims."""
        return self._close(self.read(Claimed(), text))


# Any task --------------------------------------------------------------------------------------------------------


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


class Length:
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


class Repetition:
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
