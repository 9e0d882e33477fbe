"""Stop strings: text decides, whatever the tokens, and the text is cut where `finished_by` says that it ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import dts
from dts.models.table import TableModel
from dts.search import Greedy, Sampling


class Pieces:
    """A tokenizer whose tokens are byte strings; `special` ones are dropped by decoding."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.special = tokens, special

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        added = dataclasses.make_dataclass("Added", ["content", "special"])
        return {i: added(self.tokens[i].decode(), True) for i in self.special}


@dataclasses.dataclass(frozen=True)
class Speaker(TableModel):
    """Says the given tokens one after the other. Encoding text gives one token for all of it, as merges may."""

    tokenizer: Any = None

    def encode(self, prompt: Any, chat_template_kwargs: Any = None) -> list[int]:
        return [0] if isinstance(prompt, str) else list(prompt)

    def decode(self, token_ids: Any) -> str:
        kept = [self.tokenizer.tokens[i] for i in token_ids if i not in self.tokenizer.special]
        return b"".join(kept).decode(errors="replace")


def says(*pieces: bytes, special: tuple[bytes, ...] = ()) -> Speaker:
    tokens = [b"", *dict.fromkeys(pieces)]
    order = [tokens.index(piece, 1) for piece in pieces]

    def table(prefix: tuple[int, ...]) -> np.ndarray:
        at = len(prefix) - 1
        return np.where(np.arange(len(tokens)) == (order[at] if at < len(order) else 0), 0.0, -100.0)

    tokenizer = Pieces(tokens, [tokens.index(piece) for piece in special])
    return Speaker(table, len(tokens), tokenizer=tokenizer)


def ended(lm: Speaker, stop: Any, tokens: int = 40) -> tuple[str, str, int]:
    best = dts.decode(lm, (0,), method=Greedy(), max_new_tokens=tokens, stop=stop).best
    return best.text, best.finished_by, len(best.token_ids)


def test_a_stop_that_is_one_token_when_written_may_come_in_sixteen():
    assert ended(says(b"yes", *[b"="] * 30), "=" * 16) == ("yes", "stop", 17)


def test_a_stop_may_come_in_one_token_in_the_middle_of_one_and_first():
    assert ended(says(b"a", b"b==c"), "==") == ("ab", "stop", 2)
    assert ended(says(b"==c"), "==") == ("", "stop", 1)
    assert ended(says(b"ab=", b"=d"), "==") == ("ab", "stop", 2)


def test_of_overlapping_stops_the_one_complete_first_ends_and_the_earliest_cuts():
    assert ended(says(b"x", b"a", b"b", b"c"), ["bc", "ab"]) == ("x", "stop", 3)
    assert ended(says(b"x", b"abc", b"d"), ["c", "bcd", "abc"]) == ("x", "stop", 2)
    assert ended(says(b"x", b"aab", b"d"), ["aab", "ab"]) == ("x", "stop", 2)
    assert ended(says(*[b"a"] * 5, b"b"), "aab") == ("aaa", "stop", 6)


def test_bytes_of_a_character_count_once_it_is_complete():
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert ended(says(b"n", first, second, b"x"), "é") == ("n", "stop", 3)
    # Half a character decodes to the same mark as bytes that never become one, and is no stop.
    assert ended(says(b"n", first, second, b"x"), "\ufffd", tokens=4) == ("néx", "length", 4)
    # The stop is followed, inside its token, by half a character.
    assert ended(says(b"n", b"." + first, second), ".") == ("n", "stop", 2)


def test_tokens_without_text_do_not_hide_a_stop():
    silent = [b""] * 20
    assert ended(says(b"a", b"=", *silent, b"=", b"c"), "==") == ("a", "stop", 23)


def test_a_special_token_is_a_stop():
    mark = b"<|im_start|>"
    assert ended(says(b"a", mark, b"b", special=(mark,)), mark.decode()) == ("a", "stop", 2)
    assert ended(says(mark, b"b", special=(mark,)), mark.decode()) == ("", "stop", 1)


def test_a_special_token_may_be_part_of_a_stop():
    mark = b"<|im_start|>"
    lm = says(b"a\n", mark, b"us", b"er", special=(mark,))
    assert ended(lm, "<|im_start|>user") == ("a\n", "stop", 4)
    assert ended(lm, "\n<|im_start|>") == ("a", "stop", 2)
    assert ended(lm, ["er"], tokens=4) == ("a\nus", "stop", 4)


def test_a_special_token_spelled_in_letters_is_a_stop_too():
    mark = b"<|im_start|>"
    lm = says(b"a", b"<|im_", b"start|>", mark, special=(mark,))
    assert ended(lm, mark.decode()) == ("a", "stop", 3)


def test_text_is_cut_exactly_where_a_stop_ended_it(tiny_lm):
    """Against the obvious way: decode the whole sequence after each token."""
    stops = ["e", "th", "\u00e9", "0"]
    result = dts.decode(tiny_lm, "Once", method=Sampling(60), max_new_tokens=40, stop=stops, seed=3)
    assert {c.finished_by for c in result.completions} >= {"stop"}
    for completion in result.completions:
        text = tiny_lm.decode(completion.token_ids)
        before = tiny_lm.decode(completion.token_ids[:-1])
        cuts = [text.find(stop) for stop in stops if stop in text]
        assert (completion.finished_by == "stop") == bool(cuts)
        assert not any(stop in before for stop in stops)
        assert completion.text == (text[: min(cuts)] if cuts else text)


def test_a_token_is_decoded_a_bounded_number_of_times():
    lm = says(*[b""] * 300, *[b"a", b""] * 300)
    sizes: list[int] = []

    class Counted(Speaker):
        def decode(self, token_ids: Any) -> str:
            sizes.append(len(token_ids))
            return super().decode(token_ids)

    counted = Counted(lm.table, lm.vocab_size, tokenizer=lm.tokenizer)
    dts.decode(counted, (0,), method=Greedy(), max_new_tokens=1000, stop="=" * 16)
    assert sorted(sizes)[-10] <= 16 and len(sizes) < 4000  # the few whole ones are the finished text


def test_real_tokenizer(smollm):
    """`=` sixteen times is one token of this vocabulary."""
    assert len(smollm.encode("=" * 16)) == 1
    one = smollm.encode("=")[0]

    def only(ids, row):
        row = row.clone().fill_(-100.0)
        row[:, one if ids.shape[1] < 30 else smollm.encode("<|im_start|>")[0]] = 0.0
        return row

    def best(stop):
        result = dts.decode(smollm, "Title", method=Greedy(), max_new_tokens=40, stop=stop, logits_processor=only)
        return result.best.text, result.best.finished_by

    assert best("=" * 16) == ("", "stop")
    text, finished_by = best("<|im_start|>")
    assert finished_by == "stop" and text == "=" * len(text) and text


@pytest.mark.parametrize("stop", [3, b"x", ["a", 3], "", ["a", ""], {"a": 1}, "a\ud800"])
def test_stops_that_are_no_text_are_refused(stop, tiny_lm):
    with pytest.raises(dts.UsageError, match="stop"):
        dts.decode(tiny_lm, "Once", method=Greedy(), max_new_tokens=2, stop=stop)
