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
LEAST_SPREAD = 1e-3  # variance of the scores, in units of the rewards' variance, below which they say nothing


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
    """Running means and central moments of score and reward over finished texts; a text counts once however many of
    its beginnings are in the bin. Welford's updates: a spread far below the mean is not lost to rounding."""

    __slots__ = ("reward", "reward_reward", "score", "score_reward", "score_score", "texts")

    def __init__(self) -> None:
        self.texts = self.score = self.reward = 0.0  # number, means
        self.score_score = self.score_reward = self.reward_reward = 0.0  # sums of products of deviations

    def add(self, scores: list[float], reward: float) -> None:
        weight = 1 / len(scores)
        for score in scores:
            self.texts += weight
            from_score, from_reward = score - self.score, reward - self.reward
            self.score += weight / self.texts * from_score
            self.reward += weight / self.texts * from_reward
            self.score_score += weight * from_score * (score - self.score)
            self.score_reward += weight * from_score * (reward - self.reward)
            self.reward_reward += weight * from_reward * (reward - self.reward)

    def line(self, prior_slope: float) -> tuple[float, float]:
        """Intercept and slope of the reward on the score: ridge regression towards the prior slope."""
        if not self.texts:
            return 0.0, prior_slope
        prior = PRIOR_TEXTS * max(self.score_score, LEAST_SPREAD * self.reward_reward) / self.texts
        weight, slope = self.score_score + prior, prior_slope
        if weight > 0:
            slope = max((self.score_reward + prior_slope * prior) / weight, 0.0)
        return self.reward - slope * self.score, slope


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


class ScoreSoFar:
    """The score of the text so far, taken for the final reward as it is. For rewards that mean the same at any length,
    such as a sentiment, in searches of so few rollouts that nothing can be learnt from them."""

    def predict(self, share: float, score: float) -> float:
        return score

    def observe(self, path: Iterable[tuple[float, float]], reward: float) -> None:
        """There is nothing to learn."""


def _bin(share: float) -> int:
    return min(int(BINS * share), BINS - 1)
