"""Forecasts as numbers in a text, valued by the history alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dts.errors import UsageError
from dts.evaluation.forecasting import Spectrum, expect
from dts.evaluation.rewards.text import TextReward

PRESENT, STEPS, SPECTRUM = 0.1, 0.8, 0.1  # shares of the reward
REACH = 4.0  # bands: a step this far from the centre earns half


@dataclass(frozen=True, slots=True)
class Numbers:
    """Notes of `NumberParser` and of `ForecastReward`."""

    run: str = ""  # digits of a number that may go on; "x" where the number cannot count
    values: tuple[int, ...] = ()  # complete numbers, at most as many as the forecast has steps
    score: float = 0.0  # earned by the complete numbers


class NumberParser:
    """Reads whole numbers of exactly `width` digits; other numbers ("the next 8 values", 1234, 51.7) do not count.

    `spaced`: a space stands between the digits of a number, and anything else ends it ("3 0 1, 4 0 2").
    """

    def __init__(self, width: int, count: int, *, spaced: bool = False) -> None:
        self.width, self.count, self._inside = width, count, " " if spaced else ""

    def read(self, notes: Numbers, piece: str, score: Callable[[Numbers, int], float]) -> Numbers:
        """Notes after more text; `score` values the number that just became complete."""
        for character in piece:
            if len(notes.values) >= self.count:
                return notes
            if "0" <= character <= "9":
                # One digit too many is remembered as such, so the state stays small.
                full = notes.run == "x" or len(notes.run) == self.width
                notes = Numbers("x" if full else notes.run + character, notes.values, notes.score)
            elif notes.run and character != self._inside:
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
    """Plausibility of a forecast in [0, 1]: does it go on as the history does?

    Each step earns as soon as its number is complete: 0.1 / steps for being there, and 0.8 / steps times
    1 / (1 + d / 4), where d is its distance from what the history lets one expect, in units of how far off such
    expectations were in the past (`dts.evaluation.forecasting.expect`): level, trend and season, each trusted as far
    as it held before. The last step also earns 0.1 times the overlap of the power spectra of history and forecast
    (`Spectrum`). A short forecast keeps what its steps earned.
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
        if not notes.run.isdecimal():
            return notes.score
        open_digits = self._parser.width - len(notes.run)
        return notes.score + self._step_score(notes, int(notes.run + "50000000000"[:open_digits]))

    def final(self, notes: Numbers) -> float:
        return self._parser.close(notes, self._step_score).score
