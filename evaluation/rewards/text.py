"""The base of rewards that read the text as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dts.rewards import Context, Finished, Reward
from dts.text import Decode, TextState, advance, flush


@dataclass(frozen=True, slots=True)
class _Path:
    """State of a `TextReward`: how far the text was read, and what the reward noted."""

    decode: Decode
    text: TextState
    notes: Any


class TextReward(Reward):
    """A reward that reads new text once. A subclass says what it notes, and what the notes are worth.

    `read(notes, piece)` must return new notes and cost O(len(piece)); `worth(notes)` gives the lower and the upper
    bound; `final(notes)` closes what the end of the text decides and gives the reward; `likely(notes)` may say better
    than `final` what a text will get that has just begun something.
    """

    monotone = True
    name = "text"

    def empty(self) -> Any:
        raise NotImplementedError

    def read(self, notes: Any, piece: str) -> Any:
        raise NotImplementedError

    def worth(self, notes: Any) -> tuple[float, float]:
        raise NotImplementedError

    def final(self, notes: Any) -> float:
        raise NotImplementedError

    def likely(self, notes: Any) -> float:
        return self.final(notes)

    def start(self, context: Context) -> _Path:
        return _Path(context.decode, TextState(), self.empty())

    def extend(self, states: Sequence[_Path], tokens: Sequence[int]) -> list[_Path]:
        return [self._step(state, token) for state, token in zip(states, tokens, strict=True)]

    def _step(self, state: _Path, token: int) -> _Path:
        text, piece = advance(state.decode, state.text, token)
        return _Path(state.decode, text, self.read(state.notes, piece) if piece else state.notes)

    def earned(self, states: Sequence[_Path]) -> list[float]:
        return [self.worth(state.notes)[0] for state in states]

    def upper(self, states: Sequence[_Path]) -> list[float]:
        return [self.worth(state.notes)[1] for state in states]

    def promise(self, states: Sequence[_Path]) -> list[float]:
        """What each text would get if it ended here, in view of what it has begun."""
        return [self.likely(self._all_read(state)) for state in states]

    def finish(self, states: Sequence[_Path], finished: Sequence[Finished]) -> list[float]:
        return [self.final(self._all_read(state)) for state in states]

    def _all_read(self, state: _Path) -> Any:
        rest = flush(state.decode, state.text)
        return self.read(state.notes, rest) if rest else state.notes

    def score_text(self, text: str) -> float:
        """The reward of a whole text."""
        return self.final(self.read(self.empty(), text))
