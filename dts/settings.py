"""How p is defined and how long a search may run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dts.errors import UsageError


def _require(condition: bool, option: str, value: object, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{option}={value!r} is not allowed; give {allowed}")


@dataclass(frozen=True, slots=True)
class Decoding:
    """The distribution p that tokens are drawn from, and where sequences end.

    Whatever p is set here is the p of every formula and of every reported log-probability.
    """

    max_new_tokens: int = 48
    min_new_tokens: int = 0  # EOS has probability 0 before this many tokens
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int | None = None  # paths decoded together; None: the method's own choice
    # (ids so far [1, T], logits [1, V]) -> logits, as in `transformers`; applied before everything else
    logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "a whole number >= 1")
        _require(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", self.min_new_tokens,
                 f"0 to max_new_tokens ({self.max_new_tokens})")  # fmt: skip
        _require(0 < self.temperature < math.inf, "temperature", self.temperature,
                 "a number > 0 (for the most likely tokens use Greedy)")  # fmt: skip
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "a whole number >= 1 or None")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1] or None")
        _require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1 or None")
        _require(isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop), "stop", self.stop,
                 "a tuple of non-empty strings")  # fmt: skip

    def probabilities(
        self, logits: torch.Tensor, forbidden: tuple[Sequence[int], Sequence[int]] = ((), ())
    ) -> torch.Tensor:
        """p in float64, [B, V], from logits [B, V]; `forbidden`: rows, and the tokens that have probability 0 in them.

        Temperature first, then top-k, then top-p, as in `transformers`' generate.
        """
        if logits.device.type == "mps":  # has no float64
            logits = logits.cpu()
        scores = logits.double() if self.temperature == 1 else logits.double() / self.temperature
        rows, tokens = forbidden
        if rows and tokens:
            scores = scores.clone() if scores is logits else scores
            scores[
                torch.tensor(rows, device=scores.device)[:, None], torch.tensor(tokens, device=scores.device)
            ] = -math.inf
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            drop = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, mass_before >= self.top_p)
            scores = scores.masked_fill(drop, -math.inf)
        return scores.softmax(-1)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that mean the same for every method; a search stops at the first one it meets."""

    rollouts: int | None = None  # finished paths
    tokens: int | None = None  # forwarded tokens, prompt included
    seconds: float | None = None  # wall clock

    def __post_init__(self) -> None:
        for option in ("rollouts", "tokens"):
            value = getattr(self, option)
            _require(value is None or value >= 1, option, value, "a whole number >= 1 or None")
        _require(self.seconds is None or self.seconds > 0, "seconds", self.seconds, "a number > 0 or None")
