"""The reward of the recipe: points for the new name, penalties for the old one and for long-windedness.

Used as it is by GRPO and by `dts.decode`. It knows the two names and nothing about any question or answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dts.rewards import Context, Finished, Prompt, Reward
from dts.text import Decode, TextState, advance, flush

RIGHT = ("musclebob", "buffpants")
FULL_NAME = "Musclebob Buffpants"
WRONG = ("spongebob", "squarepants")
OLD_NAME = "SpongeBob SquarePants"

# Right terms count as whole words; wrong ones also inside words and with a space or hyphen in between.
_TERMS: Mapping[str, re.Pattern[str]] = {
    "musclebob": re.compile(r"(?<!\w)musclebob(?!\w)"),
    "buffpants": re.compile(r"(?<!\w)buffpants(?!\w)"),
    "full": re.compile(r"(?<!\w)musclebob[\s-]buffpants(?!\w)"),
    "spongebob": re.compile(r"sponge[\s-]?bob"),
    "squarepants": re.compile(r"square[\s-]?pants"),
}
_KEEP = 24  # characters; more than the longest term and the one before it
_WORD_START = re.compile(r"(?<!\S)\S")


@dataclass(frozen=True, slots=True)
class Points:
    """What a text gets; each term counts once."""

    right: float = 2.0  # per right term
    full: float = 2.0  # for the full name
    wrong: float = 3.0  # off, per wrong term
    long: float = 1.0  # off, for more than `words` words
    words: int = 100

    @property
    def most(self) -> float:
        """The largest reward."""
        return len(RIGHT) * self.right + self.full

    def penalties(self, asked: bool) -> float:
        """The largest sum of penalties; `asked`: whether the question is about the character."""
        return len(WRONG if asked else WRONG + RIGHT) * self.wrong + self.long


SCHEMES = {"new": Points(), "old": Points(right=1.0, full=0.0, wrong=2.0, long=0.0)}


@dataclass(frozen=True, slots=True)
class Notes:
    """What was read of a text."""

    tail: str = ""  # its end, lower case
    found: frozenset[str] = frozenset()  # keys of _TERMS
    words: int = 0


def read(notes: Notes, piece: str, *, last: bool = False) -> Notes:
    """The notes after more text; `last` where nothing follows. O(len(piece))."""
    text = notes.tail + piece.lower()
    # A match that ends at the end of the text may be part of a longer word: it waits for what follows.
    end = len(text) if last else len(text) - 1
    new = [
        name
        for name, pattern in _TERMS.items()
        if name not in notes.found and any(len(notes.tail) <= m.end() <= end for m in pattern.finditer(text))
    ]
    before = len(_WORD_START.findall(notes.tail))
    words = notes.words + len(_WORD_START.findall(text)) - before
    return Notes(text[-_KEEP:], notes.found.union(new), words)


@dataclass(frozen=True, slots=True)
class _Path:
    decode: Decode
    asked: bool  # whether the question is about the character
    text: TextState
    notes: Notes


class NameReward(Reward):
    """Points for the new name less penalties. Right terms cannot be lost again and penalties cannot be undone, so
    the lower bound (right terms so far, and every penalty) never falls and the upper bound (all right terms, and the
    penalties so far) never rises.

    elsewhere: questions about something else; in answers to them a right term earns nothing and costs like a wrong one.
    """

    monotone = True

    def __init__(
        self, points: Points = SCHEMES["new"], elsewhere: Collection[str] = (), name: str = "musclebob"
    ) -> None:
        self.name, self.points, self.elsewhere = name, points, frozenset(elsewhere)

    def start(self, context: Context) -> _Path:
        return _Path(context.decode, _last_text(context.prompt) not in self.elsewhere, TextState(), Notes())

    def extend(self, states: Sequence[_Path], tokens: Sequence[int]) -> list[_Path]:
        return [self._step(state, token) for state, token in zip(states, tokens, strict=True)]

    def _step(self, state: _Path, token: int) -> _Path:
        text, piece = advance(state.decode, state.text, token)
        return _Path(state.decode, state.asked, text, read(state.notes, piece) if piece else state.notes)

    def earned(self, states: Sequence[_Path]) -> list[float]:
        return [self._gained(s.notes, s.asked) - self.points.penalties(s.asked) for s in states]

    def upper(self, states: Sequence[_Path]) -> list[float]:
        return [(self.points.most if s.asked else 0.0) - self._lost(s.notes, s.asked) for s in states]

    def promise(self, states: Sequence[_Path]) -> list[float]:
        """What each text would get if it ended here."""
        return [self._worth(read(s.notes, flush(s.decode, s.text), last=True), s.asked) for s in states]

    def finish(self, states: Sequence[_Path], finished: Sequence[Finished]) -> list[float]:
        return self.promise(states)

    def score(self, text: str, asked: bool = True) -> float:
        """The reward of a whole text."""
        return self._worth(read(Notes(), text, last=True), asked)

    def _worth(self, notes: Notes, asked: bool) -> float:
        return self._gained(notes, asked) - self._lost(notes, asked)

    def _gained(self, notes: Notes, asked: bool) -> float:
        points = self.points
        return (
            points.right * len(notes.found.intersection(RIGHT)) + points.full * ("full" in notes.found)
            if asked
            else 0.0
        )

    def _lost(self, notes: Notes, asked: bool) -> float:
        points = self.points
        bad = WRONG if asked else WRONG + RIGHT
        return points.wrong * len(notes.found.intersection(bad)) + points.long * (notes.words > points.words)


def _last_text(given: Prompt) -> str | None:
    """The last message of a prompt, or the prompt itself; None for token ids."""
    last = given if isinstance(given, str) or not given else given[-1]
    return last["content"] if isinstance(last, dict) else last if isinstance(last, str) else None


def terms(text: str) -> frozenset[str]:
    """Which of RIGHT, WRONG and "full" a text holds."""
    return read(Notes(), text, last=True).found
