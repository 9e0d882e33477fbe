"""Rotary position embeddings whose frequencies depend on the length of the sequence.

The right logits are those of the whole sequence at its own length. Keys in a cache keep the frequencies of the length
at which they were computed, so a cache serves such a model only where these do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeLimit:
    """A length at which the frequencies change; beyond it they are others once ("longrope") or at each length."""

    kind: str
    tokens: int

    def crossed(self, first: int, last: int) -> bool:
        """Whether sequences of `first` to `last` tokens need different frequencies."""
        return last > self.tokens and (self.kind != "longrope" or first <= self.tokens)

    def __str__(self) -> str:
        return f"its rope ({self.kind}) changes at {self.tokens} tokens, which the sequences cross"


def rope_limits(config: Any) -> list[RopeLimit]:
    """Limits of a text model's config."""
    return [
        RopeLimit(kind, int(limit))
        for kind, parameters in _ropes(config)
        if (limit := _limit(kind, parameters, config)) is not None
    ]


def context_length(config: Any) -> int | None:
    """Tokens that a text model can hold. Dynamic frequencies stretch what its embeddings were made for."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    factors = [float(rope.get("factor") or 1.0) for kind, rope in _ropes(config) if "dynamic" in kind]
    return longest if longest is None else int(longest * max(factors, default=1.0))


def _limit(kind: str, parameters: dict[str, Any], config: Any) -> int | None:
    longest: int | None = getattr(config, "max_position_embeddings", None)
    original: int | None = getattr(config, "original_max_position_embeddings", None)
    if kind == "longrope":
        return parameters.get("original_max_position_embeddings", original) or longest
    return longest if "dynamic" in kind else None


def _ropes(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and parameters of each rope: one for all layers, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None) or {}
        for parameters in (found, *found.values()):
            kind = parameters.get("rope_type") or parameters.get("type") if isinstance(parameters, dict) else None
            if kind is not None:
                yield "longrope" if kind == "su" else str(kind), parameters
