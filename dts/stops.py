"""Stop strings: where generated text first holds one, at a constant cost per token.

What counts is text, whatever the tokens: a stop of sixteen characters may arrive in one token or in sixteen, begin in
the middle of a token, and share a token with the text before it. A path keeps the last characters of its text, one
fewer than the longest stop has; a stop that is new ends in the newest piece. Text is taken from `dts.text`, so a
character counts once it is complete.

Decoding drops special tokens, but a stop may be one ("<|im_start|>") or hold one. So the kept characters spell special
tokens out, and the text is cut in front of what belongs to the stop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dts.text import TextState, advance, flush
from dts.tree import ROOT

IN_TEXT, SPECIAL = "1", "0"


@dataclass(frozen=True, slots=True)
class StopState:
    """A path's text as far as a stop may have begun in it."""

    text: TextState
    tail: str  # the last characters, special tokens spelled out
    kinds: str  # IN_TEXT or SPECIAL for each character of the tail


class Stops:
    """The stop strings of one search and the state of each of its paths, by node."""

    def __init__(
        self, strings: Sequence[str], decode: Callable[[Sequence[int]], str], special: Mapping[int, str]
    ) -> None:
        """special: the text of tokens that `decode` drops, by id."""
        self._strings, self._decode, self._special = strings, decode, special
        self._keep = max(map(len, strings), default=1) - 1
        self._states = {ROOT: StopState(TextState(), "", "")}
        self._cuts: dict[int, int] = {}  # characters from the stop to the end of the text, by leaf

    def copy(self) -> Stops:
        """The same, for a tree that grows apart from here on."""
        other = copy.copy(self)
        other._states, other._cuts = dict(self._states), dict(self._cuts)
        return other

    def reached(self, parent: int, node: int, token: int) -> bool:
        """Whether the text of the path to `node` holds a stop now. Asked once for each new node."""
        state = self._next(self._states[parent], token)
        starts = [start for string in self._strings if (start := state.tail.find(string)) >= 0]
        if starts:
            unfinished = "" if token in self._special else flush(self._decode, state.text)
            self._cuts[node] = state.kinds[min(starts) :].count(IN_TEXT) + len(unfinished)
        else:
            old = max(len(state.tail) - self._keep, 0)
            self._states[node] = StopState(state.text, state.tail[old:], state.kinds[old:])
        return bool(starts)

    def _next(self, state: StopState, token: int) -> StopState:
        if token in self._special:
            text, piece, kind = state.text, self._special[token], SPECIAL
        else:
            (text, piece), kind = advance(self._decode, state.text, token), IN_TEXT
        return StopState(text, state.tail + piece, state.kinds + kind * len(piece))

    def cut(self, leaf: int, text: str) -> str:
        """The text of a finished path without the stop that ended it and what came with it."""
        return text[: len(text) - self._cuts.get(leaf, 0)]


def special_tokens(lm: Any) -> dict[int, str]:
    """Ids and text of the special tokens, which `lm.decode` drops; empty for models without a tokenizer."""
    added = getattr(getattr(lm, "tokenizer", None), "added_tokens_decoder", {})
    return {int(token): content.content for token, content in added.items() if content.special}
