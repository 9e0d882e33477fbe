"""Random regular languages over token ids: constraints so small that their mass under p is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DEAD = -1
STATES = 5


@dataclass(frozen=True)
class Automaton:
    """A deterministic finite automaton as a `dts.constraints.Constraint`.

    moves: next state, int [states, V], `DEAD` where there is none. accepting: bool [states]. It starts in state 0.
    Its mask sees which tokens can still lead to a member of any length, not how many tokens are left.
    """

    moves: np.ndarray
    accepting: np.ndarray

    def __repr__(self) -> str:
        return f"Automaton({len(self.moves)} states)"

    def start(self, lm: Any) -> int:
        return 0

    def advance(self, states: Sequence[int], tokens: Sequence[int]) -> list[int]:
        return self._next(np.array(states, int), np.array(tokens, int)).tolist()

    def allowed(self, states: Sequence[int]) -> torch.Tensor:
        here = np.array(states, int)
        return torch.from_numpy(self._open()[here] & (here != DEAD)[:, None])

    def accepts(self, states: Sequence[int]) -> list[bool]:
        here = np.array(states, int)
        return (self.accepting[here] & (here != DEAD)).tolist()

    def members(self, sequences: np.ndarray, eos: int | None) -> np.ndarray:
        """Which sequences belong to the language, bool [N]. sequences: int [N, longest], filled up with EOS."""
        states = np.zeros(len(sequences), int)
        for tokens in sequences.T:
            states = np.where(tokens == eos, states, self._next(states, tokens))
        return np.array(self.accepts(states.tolist()))

    def _next(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.where(states == DEAD, DEAD, self.moves[states, tokens])

    def _open(self) -> np.ndarray:
        """Tokens after which a member may still follow, bool [states, V]."""
        alive = self.accepting
        for _ in self.moves:
            leads = (self.moves != DEAD) & alive[self.moves]
            alive = self.accepting | leads.any(1)
        return leads


def random_automaton(rng: np.random.Generator, vocab_size: int) -> Automaton:
    moves = rng.integers(STATES, size=(STATES, vocab_size))
    moves[rng.random(moves.shape) < rng.uniform(0.1, 0.8)] = DEAD
    return Automaton(moves, rng.random(STATES) < 0.4)
