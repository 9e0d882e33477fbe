"""Small models whose every sequence is known, and the exact target over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dts.models.table import TableModel, random_logits

PROMPT = (1,)


@dataclass(frozen=True)
class Instance:
    """A table model, a reward of its sequences in [0, 1], and what enumeration says about both."""

    lm: TableModel
    horizon: int
    sequences: tuple[tuple[int, ...], ...]
    log_p: np.ndarray  # of each sequence
    rewards: np.ndarray

    def reward(self, text: str) -> float:
        """The reward as a function of decoded text, as a user would write it."""
        return self._by_text[text]

    @functools.cached_property
    def _by_text(self) -> dict[str, float]:
        # "0 3 " with EOS dropped names a sequence uniquely: EOS can only be last, and its absence means full length.
        return {self.lm.decode(s): r for s, r in zip(self.sequences, self.rewards.tolist(), strict=True)}

    def target(self, scale: float) -> np.ndarray:
        """pi*(x) of each sequence."""
        weights = self.log_p + scale * self.rewards
        weights = np.exp(weights - weights.max())
        return weights / weights.sum()

    def value(self, scale: float) -> float:
        """V of the empty completion."""
        if scale == 0:
            return float(np.exp(self.log_p) @ self.rewards)
        return float(np.log(np.exp(self.log_p) @ np.exp(scale * self.rewards))) / scale

    @functools.cached_property
    def step_log_p(self) -> list[list[float]]:
        """log p of each token of each sequence."""

        @functools.cache
        def row(prefix: tuple[int, ...]) -> list[float]:
            return torch.from_numpy(self.lm.table(PROMPT + prefix)).double().log_softmax(-1).tolist()

        return [[row(s[:i])[token] for i, token in enumerate(s)] for s in self.sequences]

    def distribution(self, log_prob: Callable[[tuple[int, ...], list[float]], float]) -> np.ndarray:
        """A tree's distribution over all sequences, from `SoftValues.log_prob`."""
        return np.exp([log_prob(s, steps) for s, steps in zip(self.sequences, self.step_log_p, strict=True)])


def instance(seed: int, *, vocab_size: int = 6, horizon: int = 5, structured: bool = True, eos: int | None = 0,
             spread: float = 1.5) -> Instance:  # fmt: skip
    """Random logits; a reward summed over adjacent token pairs (structured) or independent for every sequence."""
    lm = TableModel(random_logits(vocab_size, seed, spread), vocab_size, eos)
    pairs = list(lm.sequences(horizon, PROMPT))
    sequences = tuple(s for s, _ in pairs)
    rng = np.random.default_rng(seed)
    if structured:
        table = rng.normal(size=(horizon, vocab_size, vocab_size))
        raw = np.array([sum(table[i, s[i - 1] if i else 0, a] for i, a in enumerate(s)) for s in sequences])
    else:
        raw = rng.uniform(size=len(sequences))
    rewards = (raw - raw.min()) / (raw.max() - raw.min() or 1.0)
    return Instance(lm, horizon, sequences, np.array([lp for _, lp in pairs]), rewards)


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum()) / 2


def log_mean_exp(values: np.ndarray) -> float:
    return float(np.logaddexp.reduce(values)) - math.log(len(values))
