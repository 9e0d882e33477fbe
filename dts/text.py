"""Text of a growing token sequence, piece by piece, at a constant cost per token.

Decoding tokens one by one is wrong (a character may span tokens, and sentencepiece drops the space of a first
token) and decoding the whole sequence at each step is quadratic. Here each step decodes a short window: the
tokens of the last finished piece and those after it. What the window gains is the new text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"  # how decoders show bytes that are not, or not yet, a character
MAX_PENDING = 8  # tokens; a UTF-8 character has at most 4 bytes, a run of fallback bytes may hold two
KEEP = 4  # tokens; they surely hold the whole of an unfinished character


@dataclass(frozen=True, slots=True)
class TextState:
    """How far a path's text has been given out. A value: `advance` returns a new one."""

    ids: tuple[int, ...] = ()  # the window
    piece: int = 0  # index in `ids` where the unfinished piece starts
    given: int = 0  # characters of `decode(ids)` that were given out


def advance(decode: Decode, state: TextState, token: int) -> tuple[TextState, str]:
    """The state after one more token, and the text that this token settled.

    Text that ends in an unfinished character is held back until it is finished; `flush` gives what is left. All
    pieces and the flush joined equal `decode` of all tokens, provided that `decode` drops special tokens and does
    not clean up spaces (`clean_up_tokenization_spaces=False`).
    """
    ids = (*state.ids, token)
    text = decode(ids)
    if text.endswith(REPLACEMENT):
        if len(ids) - state.piece <= MAX_PENDING:
            settled = len(text.rstrip(REPLACEMENT))
            return TextState(ids, state.piece, max(settled, state.given)), text[state.given : settled]
        # Bytes that never become a character: only the last mark can still change.
        kept = ids[-KEEP:]
        return TextState(kept, 0, max(len(decode(kept)) - 1, 0)), text[state.given : -1]
    new = text[state.given :]
    if not new:
        # A token without text (a special one) must not become the window: the next token would lose its space.
        return (state if text else TextState(ids[-KEEP:])), ""
    window = ids[state.piece :]
    return TextState(window, len(window), len(decode(window) if state.piece else text)), new


def flush(decode: Decode, state: TextState) -> str:
    """The text held back at the end of a sequence."""
    return decode(state.ids)[state.given :] if state.ids else ""
