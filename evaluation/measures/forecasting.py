"""What a history lets one expect, and how several forecasts become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 1000  # values of the history that count, the last ones
ORIGINS = 12  # forecasts of the past that are checked
SHARPNESS = 3.0  # a rule's weight is its mean absolute error to the power -3
YEAR = 52  # steps; of a series without a season (M4's weekly ones have the period 1)
FLOOR = 1e-3  # of the standard deviation: no error counts as smaller


@dataclass(frozen=True, slots=True)
class Expectation:
    """The steps after a history, judged by that history alone."""

    centre: np.ndarray  # float64 [steps]
    band: np.ndarray  # float64 [steps], above 0: median error of such centres in the past


def expect(history: np.ndarray, season: int, steps: int) -> Expectation:
    """A weighted mean of simple rules, each weighted by how well it did on earlier parts of the same history.

    Rules: last value, mean of the last four, half the recent drift; with a season of 2 steps or more the last season,
    the one seven seasons ago, and the mean of the last seven; without one the values a year ago, as they are and
    moved to the present level. Nothing after the history is used.
    """
    values = np.asarray(history, float)[-POINTS:]
    now = _rules(values, season, steps)
    tried = _tries(values, season, steps, set(now))
    floor = FLOOR * float(values.std()) or 1e-9
    if not tried:
        change = max(float(np.abs(np.diff(values)).mean()) if len(values) > 1 else 0.0, floor)
        return Expectation(np.mean(list(now.values()), axis=0), np.full(steps, change))
    error = {name: float(np.mean([np.abs(actual - rules[name]) for actual, rules in tried])) for name in now}
    weight = {name: max(value, floor) ** -SHARPNESS for name, value in error.items()}
    total = sum(weight.values())

    def mixed(rules: dict[str, np.ndarray]) -> np.ndarray:
        return np.sum([weight[name] / total * rules[name] for name in weight], axis=0)

    band = np.median([np.abs(actual - mixed(rules)) for actual, rules in tried], axis=0)
    # Few tries make single steps look certain by chance: none is taken as surer than 0.3 of the usual.
    return Expectation(mixed(now), np.maximum(band, max(0.3 * float(np.median(band)), floor)))


def _rules(values: np.ndarray, season: int, steps: int) -> dict[str, np.ndarray]:
    """Forecasts [steps] by rule; those that need more history than there is are left out."""
    n = len(values)
    recent = values[-(2 * steps + 1) :]
    slope = (recent[-1] - recent[0]) / max(len(recent) - 1, 1)
    rules = {
        "last value": np.repeat(values[-1], steps),
        "last four": np.repeat(values[-4:].mean(), steps),
        "half drift": values[-1] + 0.5 * slope * np.arange(1, steps + 1),
    }
    if season > 1:
        rules |= {f"lag {lag}": np.resize(values[-lag:], steps) for lag in (season, 7 * season) if n >= max(2 * lag, 2)}
        seasons = min(7, n // season)
        if seasons >= 3:
            profile = values[-seasons * season :].reshape(seasons, season).mean(axis=0)
            rules["profile"] = np.resize(profile, steps)
    elif n >= 2 * YEAR:
        rules["year"] = np.resize(values[-YEAR:], steps)
        rules["year, at this level"] = rules["year"] + values[-4:].mean() - values[-YEAR - 4 : -YEAR].mean()
    return rules


def _tries(
    values: np.ndarray, season: int, steps: int, names: set[str]
) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Earlier steps and what the rules said before them, the latest first; only where every rule could speak."""
    tried = []
    origins = range(len(values) - steps, max(len(values) // 2, 2) - 1, -max(steps // 2, 1))
    for origin in origins[:ORIGINS]:
        rules = _rules(values[:origin], season, steps)
        if not names <= set(rules):
            break
        tried.append((values[origin : origin + steps], rules))
    return tried


class Spectrum:
    """How well a forecast continues the rhythm of its history, in [0, 1].

    The power spectrum (Hann window, mean removed) of the history's end with the forecast, P, is held against the mean
    spectrum of windows of the same length within the history, Q: 2 sum(sqrt(P Q)) / (sum P + sum Q). It is 1 for
    equal spectra, and falls with a wrong shape as with a wrong scale: a flat line after a seasonal history loses both.
    """

    def __init__(self, history: np.ndarray, season: int, steps: int) -> None:
        values = np.asarray(history, float)[-POINTS:]
        self._length = min(max(2 * steps, 2 * season, 16), len(values))
        self._history = values
        starts = range(len(values) - self._length, -1, -max(self._length // 2, 1))[:40]
        self._mean = np.mean([_power(values[start : start + self._length]) for start in starts], axis=0)

    def overlap(self, forecast: np.ndarray) -> float:
        """Of a forecast [steps] in the history's units."""
        power = _power(np.concatenate([self._history, np.asarray(forecast, float)])[-self._length :])
        both = float(power.sum() + self._mean.sum())
        return 2 * float(np.sqrt(power * self._mean).sum()) / both if both > 0 else 1.0


def _power(window: np.ndarray) -> np.ndarray:
    """[len(window) // 2] from the lowest frequency above 0."""
    taper = np.hanning(len(window) + 2)[1:-1]
    return np.abs(np.fft.rfft((window - window.mean()) * taper))[1:] ** 2


def weighted_median(values: np.ndarray, weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Median of `values` [n, steps] over n, each row with a weight >= 0: [steps].

    Per step the smallest value with at least half of the weight at or below it; where the weight splits exactly in
    half, the middle of the two. A missing value (NaN) has no say in its step; a step that all lack is NaN.
    """
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    if values.ndim != 2 or weights.shape != values.shape[:1]:
        raise ValueError(
            f"weighted_median needs values [n, steps] and weights [n], got {values.shape}, {weights.shape}"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weighted_median needs finite weights >= 0")
    return np.array([_median(column, weights) for column in values.T])


def _median(column: np.ndarray, weights: np.ndarray) -> float:
    known = ~np.isnan(column) & (weights > 0)
    if not known.any():
        return float("nan")
    order = np.argsort(column[known], kind="stable")
    sorted_values, cumulated = column[known][order], np.cumsum(weights[known][order])
    half = cumulated[-1] / 2
    low = int(np.searchsorted(cumulated, half * (1 - 1e-12)))
    split = low + 1 < len(sorted_values) and abs(cumulated[low] - half) <= 1e-12 * half
    return float((sorted_values[low] + sorted_values[low + 1]) / 2 if split else sorted_values[low])


def weighted_vote(answers: Sequence[str | None], weights: Sequence[float]) -> str | None:
    """The answer with the most weight, the first of equals; None where nothing that counts was answered."""
    totals: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None and weight > 0:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=lambda answer: totals[answer]) if totals else None
