"""What the score of an unfinished text says about the final reward, learnt while searching.

Many rewards judge a finished text, and can be asked about an unfinished one as well: a classifier, a readability score,
a count. How much that says is not known beforehand and grows along the text. `OnlineValues` regresses final rewards on
scores, in bins of the share of the text that is written. It is a guide: it decides where paths go and what is tried,
never what is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from dts.errors import UsageError, shown

USABLE = 1e100  # scores and rewards beyond it are no guide: their squares are no floats
BINS = 8  # of the share of the text that is written, 0 to 1
PRIOR_TEXTS = 6.0  # finished texts that the prior slope counts for
LEAST_SPREAD = 1e-4  # variance of the scores below which they say nothing


class ValueModel(Protocol):
    """Predicts the final reward of an unfinished text. May be shared by the searches of many prompts."""

    def predict(self, share: float, score: float) -> float:
        """The expected final reward; share: how much of the longest text is written, 0 to 1; score: what the reward
        gives for the text so far."""

    def observe(self, path: Iterable[tuple[float, float]], reward: float) -> None:
        """Learn from a finished text: (share, score) of its beginnings, and its reward."""


def check_value_model(model: object) -> None:
    """Raise `UsageError` for what cannot be asked."""
    if isinstance(model, type) or not (hasattr(model, "predict") and hasattr(model, "observe")):
        raise UsageError(f"values={shown(model)} is not allowed; give 'online', None or an object like OnlineValues()")


class _Bin:
    """Running moments of score and reward over finished texts; a text counts once however many of its beginnings are
    in the bin."""

    __slots__ = ("reward", "score", "score_reward", "score_score", "texts")

    def __init__(self) -> None:
        self.texts = self.score = self.reward = self.score_score = self.score_reward = 0.0

    def add(self, scores: list[float], reward: float) -> None:
        weight = 1 / len(scores)
        self.texts += 1
        self.reward += reward
        for score in scores:
            self.score += weight * score
            self.score_score += weight * score * score
            self.score_reward += weight * score * reward

    def line(self, prior_slope: float) -> tuple[float, float]:
        """Intercept and slope of the reward on the score: ridge regression towards the prior slope."""
        if not self.texts:
            return 0.0, prior_slope
        score, reward = self.score / self.texts, self.reward / self.texts
        variance = max(self.score_score / self.texts - score * score, 0.0)
        covariance = self.score_reward / self.texts - score * reward
        prior = PRIOR_TEXTS * max(variance, LEAST_SPREAD)
        slope = max((covariance * self.texts + prior_slope * prior) / (variance * self.texts + prior), 0.0)
        return reward - slope * score, slope


class OnlineValues:
    """Final reward = a(t) + b(t) * score, fitted by bins of t, the share of the text that is written.

    Before anything is finished b(t) = t: at the start of a text its score says nothing, at the end everything. A slope
    is never negative.
    """

    def __init__(self) -> None:
        self._bins = [_Bin() for _ in range(BINS)]

    def predict(self, share: float, score: float) -> float:
        intercept, slope = self._bins[_bin(share)].line(min(share, 1.0))
        return intercept + slope * score

    def observe(self, path: Iterable[tuple[float, float]], reward: float) -> None:
        by_bin: dict[int, list[float]] = {}
        for share, score in path:
            if math.isfinite(score):
                by_bin.setdefault(_bin(share), []).append(score)
        for index, scores in by_bin.items():
            self._bins[index].add(scores, reward)


def _bin(share: float) -> int:
    return min(int(BINS * share), BINS - 1)
