"""Text of a growing token sequence."""

from __future__ import annotations

import numpy as np

from dts.text import TextState, advance, flush


def as_bytes(ids):
    """Ids are bytes; above 255 lie tokens without text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def stream(ids):
    state, pieces = TextState(), []
    for token in ids:
        state, piece = advance(as_bytes, state, token)
        pieces.append(piece)
        assert len(state.ids) <= 17  # the window stays short: a piece of nine, eight that are not settled
    return pieces, flush(as_bytes, state)


def test_characters_come_when_they_are_whole():
    assert stream("né!".encode()) == (["n", "", "é", "!"], "")
    assert stream([*"é".encode()[:1]]) == ([""], "\ufffd")
    assert stream([104, 300, 105]) == (["h", "", "i"], "") and stream([300, 105]) == (["", "i"], "")
    assert stream([]) == ([], "")
    for wrong in ([255] * 20, [0xF0, 0x9F] * 9, [65, *[0x80] * 15, 66]):
        pieces, last = stream(wrong)
        assert "".join(pieces) + last == as_bytes(wrong)
    rng = np.random.default_rng(0)
    for _ in range(200):  # letters, parts of characters and tokens without text in any order
        ids = rng.choice([65, 300, *"é😀".encode(), 255], size=rng.integers(1, 25)).tolist()
        pieces, last = stream(ids)
        assert "".join(pieces) + last == as_bytes(ids)
    # Nine bytes that are no character: all but the last mark are settled. Four are kept, and so on.
    pieces, last = stream([255] * 20)
    assert [len(piece) for piece in pieces] == [0] * 8 + [8] + [0] * 4 + [5] + [0] * 4 + [5, 0] and len(last) == 2
