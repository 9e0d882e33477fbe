"""Confidence: how sure the model was of what it wrote, by the log-probabilities of its tokens.

After "Deep Think with Confidence" (Fu et al., arXiv 2508.15260), with the log-probability of each token that was drawn
in the place of the mean over the k likeliest ones, so that it needs nothing that a completion does not have.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from dts.errors import RewardError, UsageError, shown
from dts.rewards.reward import Finished, Reward, State

BOTTOM = 0.1  # share of the groups


class Confidence(Reward):
    """Mean log-probability of a group of tokens, in nats: at most 0, and 0 is certain.

    Groups are all runs of `window` tokens; a shorter text is one group. group: "lowest" is the least confident group,
    "bottom" the mean over the least confident tenth of the groups, "tail" the last group, "mean" all tokens.
    A reward for a search, which knows the log-probabilities; as a function it takes those of a
    `Completion.token_logprobs`.
    """

    def __init__(self, group: str = "lowest", window: int = 16) -> None:
        if group not in _GROUPS:
            raise UsageError(f"group={shown(group)} is not known; give {', '.join(map(repr, _GROUPS))}")
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise UsageError(f"window={shown(window)} is not allowed; give a whole number of tokens >= 1")
        self.name, self.window, self._of = f"confidence-{group}", window, _GROUPS[group]

    def __call__(self, log_probs: Sequence[float]) -> float:
        """log_probs: of each token, nats."""
        return self._of(log_probs, self.window)

    def upper(self, states: Sequence[State]) -> list[float]:
        return [0.0] * len(states)

    def finish(self, states: Sequence[State], finished: Sequence[Finished]) -> list[float]:
        if not all(done.token_logprobs for done in finished):
            raise RewardError(f"reward {self.name!r} needs the log-probabilities of the tokens, which a search gives")
        return [self(done.token_logprobs) for done in finished]


def _means(log_probs: Sequence[float], window: int) -> list[float]:
    """Of all runs of `window` tokens."""
    sums, size = list(itertools.accumulate(log_probs, initial=0.0)), min(window, len(log_probs))
    return [(after - before) / size for before, after in zip(sums, sums[size:], strict=False)]


def _bottom(log_probs: Sequence[float], window: int) -> float:
    means = sorted(_means(log_probs, window))
    return statistics.fmean(means[: math.ceil(BOTTOM * len(means))])


_GROUPS: dict[str, Callable[[Sequence[float], int], float]] = {
    "lowest": lambda log_probs, window: min(_means(log_probs, window)),
    "bottom": _bottom,
    "tail": lambda log_probs, window: statistics.fmean(log_probs[-window:]),
    "mean": lambda log_probs, window: statistics.fmean(log_probs),
}
