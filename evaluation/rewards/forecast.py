"""Forecasts as numbers in a text, valued by the history alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dts.errors import UsageError
from dts.evaluation.measures.forecasting import Spectrum, expect
from dts.evaluation.rewards.text import TextReward

PRESENT, STEPS, SPECTRUM = 0.1, 0.8, 0.1  # shares of the reward
REACH = 4.0  # bands: a step this far from the centre earns half


@dataclass(frozen=True, slots=True)
class Numbers:
    """Notes of `NumberParser` and of `ForecastReward`."""

    run: str = ""  # digits of a number that may continue and what follows them, or `WORD` or `DEAD`
    values: tuple[int, ...] = ()  # complete numbers, at most as many as the forecast has steps
    score: float = 0.0  # earned by the complete numbers


WORD, DEAD = "a", "x"  # in a word; in something that is not a number of this form, up to the next break
DIGITS = frozenset("0123456789")
WIDE = frozenset("\u00a0\u202f\u2009")  # spaces that group digits, as in "301 402" for 301,402
LABEL_ENDS = frozenset(":=([{")  # after a word: "Forecast:301"
OPENERS = LABEL_ENDS | WIDE | frozenset("\"'`*_#>~+$€£“‘«")
FOLLOWERS = WIDE | frozenset(".'’_٬)]}\"`*!?”»")  # a number may end there, unless a digit comes next


class NumberParser:
    """Reads whole numbers of exactly `width` digits, each the whole of what stands there.

    What is part of another number or word does not count: "the next 8 values", 1234, 51.7, -301, 1e301, 301%, 12:301.
    A comma separates numbers of `width` digits (301,402) and makes everything else one number (301,5 and 12,301).
    `spaced`: spaces may stand between the digits of a number, and a comma always ends it ("3 0 1, 4 0 2").
    """

    def __init__(self, width: int, count: int, *, spaced: bool = False) -> None:
        self.width, self.count, self._spaced = width, count, spaced

    def read(self, notes: Numbers, piece: str, score: Callable[[Numbers, int], float]) -> Numbers:
        """Notes after more text; `score` values a number that just became complete."""
        for character in piece:
            if len(notes.values) >= self.count:
                return notes
            found, run = self._next(notes.run, character)
            notes = replace(self._with(notes, found, score), run=run)
        return notes

    def close(self, notes: Numbers, score: Callable[[Numbers, int], float]) -> Numbers:
        """Notes after the end of the text."""
        return replace(self._with(notes, self.whole(notes.run), score), run="")

    def find(self, text: str) -> list[int]:
        """The numbers of a whole text, at most `count`."""
        notes = self.close(self.read(Numbers(), text, lambda _, __: 0.0), lambda _, __: 0.0)
        return list(notes.values)

    def whole(self, run: str) -> list[str]:
        """The numbers of a run that ends here: none, one, or two with a comma between them."""
        groups = [group for group in re.split("[^0-9]+", run) if group]
        return groups if all(len(group) == self.width for group in groups) else []

    def _with(self, notes: Numbers, found: Sequence[str], score: Callable[[Numbers, int], float]) -> Numbers:
        for digits in found[: self.count - len(notes.values)]:
            value = int(digits)
            notes = Numbers(notes.run, (*notes.values, value), notes.score + score(notes, value))
        return notes

    def _next(self, run: str, character: str) -> tuple[list[str], str]:
        """The numbers that a character completes, and the run after it."""
        if self._breaks(character):
            return self.whole(run), ""
        if run == DEAD:
            return [], DEAD
        if run in ("", WORD):
            return [], self._begin(run, character)
        if character in DIGITS:
            return [], self._longer(run, character)
        if character == ",":
            return self._comma(run)
        if character == " ":
            return self._space(run)
        if run[-1] == "," or run[-1] in FOLLOWERS:
            return self.whole(run), DEAD
        if character in FOLLOWERS:
            return [], run + character if self.whole(run) else DEAD
        if not self._spaced or not character.isalpha() or character in "eE":  # "1 e 3 0 1" is one number
            return [], DEAD
        return self.whole(run) if run[-1] == " " else [], WORD

    def _breaks(self, character: str) -> bool:
        """Whether what came before ends, whatever it was."""
        if character in ";|" or (self._spaced and character == ","):
            return True
        return character.isspace() and character not in WIDE and not (self._spaced and character == " ")

    def _begin(self, run: str, character: str) -> str:
        """The run after a character that follows no digit."""
        if character in DIGITS:
            return DEAD if run == WORD else character
        if character in (LABEL_ENDS if run == WORD else OPENERS) or character == " ":
            return ""
        return WORD if character.isalpha() or run == WORD else DEAD

    def _longer(self, run: str, digit: str) -> str:
        group = run.rpartition(",")[2].rstrip(" ")
        return DEAD if len(group) == self.width or not (group + "0").isdecimal() else run.rstrip(" ") + digit

    def _space(self, run: str) -> tuple[list[str], str]:
        """Between spaced digits, where it ends nothing; "3 0 1. " is the end of a sentence, "3 0 1 . " is not."""
        if run[-1] in DIGITS or run[-1] == " " or run[-2:] == " .":
            return [], run.rstrip(" ") + " " if run[-1] in DIGITS else run
        return self.whole(run), ""

    def _comma(self, run: str) -> tuple[list[str], str]:
        found = self.whole(run)
        if not found or run[-1] not in DIGITS:  # "8,301" and "402,5,": one number; "301.,": an end
            return found, DEAD
        return found[:-1], found[-1] + ","


class ForecastReward(TextReward):
    """Plausibility of a forecast in [0, 1]: does it continue as the history does?

    Each step earns as soon as its number is complete: 0.1 / steps for being there, and 0.8 / steps times
    1 / (1 + d / 4), where d is its distance from what the history lets one expect, in units of how far off such
    expectations were in the past (`dts.evaluation.measures.forecasting.expect`): level, trend and season, each trusted
    as far as it held before. The last step also earns 0.1 times the overlap of the power spectra of history and
    forecast (`Spectrum`). A short forecast keeps what its steps earned.
    """

    def __init__(self, parser: NumberParser, history: np.ndarray, season: int, name: str = "plausibility") -> None:
        """`history` [n] in the units of the written numbers, `season` in steps."""
        if len(history) < 2:
            raise UsageError(f"a forecast reward needs a history of at least 2 values, got {len(history)}")
        self.name = name
        self._parser = parser
        expected = expect(history, season, parser.count)
        self._centre = expected.centre
        self._reach = REACH * np.maximum(expected.band, 0.5)  # written numbers are rounded by up to half a unit
        self._spectrum = Spectrum(history, season, parser.count)

    def _step_score(self, notes: Numbers, value: int) -> float:
        step, count = len(notes.values), self._parser.count
        near = 1 / (1 + abs(value - self._centre[step]) / self._reach[step])
        earned = (PRESENT + STEPS * float(near)) / count
        if step + 1 == count:
            earned += SPECTRUM * self._spectrum.overlap(np.array([*notes.values, value], float))
        return earned

    def empty(self) -> Numbers:
        return Numbers()

    def read(self, notes: Numbers, piece: str) -> Numbers:
        return self._parser.read(notes, piece, self._step_score)

    def worth(self, notes: Numbers) -> tuple[float, float]:
        open_share = 1 - len(notes.values) / self._parser.count
        most = notes.score + open_share * (PRESENT + STEPS) + (SPECTRUM if open_share else 0.0)
        return notes.score, min(most, 1.0)

    def likely(self, notes: Numbers) -> float:
        """As if the number under way went on in the middle of what its first digits allow."""
        before, _, digits = notes.run.rstrip(" ").rpartition(",")
        if not digits.isdecimal():
            return self.final(notes)
        middle = digits + "50000000000"[: self._parser.width - len(digits)]
        guess = Numbers(f"{before},{middle}", notes.values, notes.score)
        return self.final(guess)

    def final(self, notes: Numbers) -> float:
        return self._parser.close(notes, self._step_score).score
