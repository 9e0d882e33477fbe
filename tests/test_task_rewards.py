"""Incremental text, and rewards that read it: bounds hold on any token sequence, streamed equals whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dts.errors import UsageError
from dts.evaluation import rewards
from dts.rewards import CheckMonotone, Context, Finished, Reward
from dts.text import MAX_PENDING, TextState, advance, flush

HISTORY = np.array([300.0, 400, 500, 400] * 6)
LABELS = ("walking", "walking_upstairs", "sitting")
PARSER = rewards.LabelParser(LABELS, r"answer\s{0,2}:")
NUMBERS = rewards.NumberParser(3, 4)
VOCABULARY = {"trend": {"up": ["rising"], "down": ["falling"]}, "season": {"yes": ["seasonal"]}}

# Words that matter to the rewards, as tokens next to the 256 bytes.
PIECES = [
    "Answer",
    "answer:",
    "Answer: ",
    "walking",
    "_upstairs",
    " upstairs",
    "sitting",
    "301",
    " 402",
    "1234 ",
    "cat",
]
PIECES += ["concat", "dog", "rising", "falling", " seasonal", "\n", " ", ".", ",", "é€", "😀"]


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = {bytes_to_text(piece): None for piece in PIECES}
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(t for t in to_bytes if t not in alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def bytes_to_text(piece: str) -> str:
    """A piece in the byte-level alphabet."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)[0][0]


TOKENIZER = _byte_tokenizer()
SIZE = TOKENIZER.get_vocab_size()


def decode(ids):
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def encode(text):
    """Ids of a text, one token per byte."""
    return [TOKENIZER.token_to_id(character) for character in bytes_to_text(text)]


# Half of the draws are single bytes, most of which never make a character; half are words that rewards look for.
ANY = st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(255, SIZE - 1)), max_size=60)


def _pieces(decoder, ids):
    state, pieces = TextState(), []
    for token in ids:
        state, piece = advance(decoder, state, token)
        pieces.append(piece)
    return [*pieces, flush(decoder, state)]


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_pieces_join_to_the_whole_text(ids):
    assert "".join(_pieces(decode, ids)) == decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_a_character_comes_out_whole(text):
    pieces = _pieces(decode, encode(text) if text else [])
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_spaces_and_fallback_bytes():
    vocabulary = ["<unk>", "▁", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    euro = [vocabulary.index(f"<0x{byte:02X}>") for byte in "€😀".encode()]
    for ids in ([2, 3, 4, 2, 3], [1, 2, 3], [1, 1, 4], [2, *euro, 3, *euro, 4], [*euro, 2]):
        pieces = _pieces(lambda chosen: tokenizer.decode(list(chosen)), ids)
        assert "".join(pieces) == tokenizer.decode(ids)


def test_window_stays_small():
    seen = []

    def watched(ids):
        seen.append(len(ids))
        return decode(ids)

    generator = np.random.default_rng(0)
    _pieces(watched, generator.integers(0, SIZE, 2000).tolist())
    assert max(seen) <= 2 * MAX_PENDING + 2


BUILT_IN = {
    "label": lambda: rewards.LabelReward(PARSER, {"walking": 0.1, "walking_upstairs": 0.7, "sitting": 0.2}),
    "forecast": lambda: rewards.ForecastReward(NUMBERS, HISTORY, 4),
    "claims": lambda: rewards.ClaimReward(VOCABULARY, {"trend": "up", "season": "yes"}),
    "keywords": lambda: rewards.Keywords(["cat", "dog", "walking upstairs"]),
    "length": lambda: rewards.Length(7),
    "repetition": lambda: rewards.Repetition(2, 3, 10),
}


def test_every_exported_reward_is_in_the_suite():
    built = {type(make()).__name__ for make in BUILT_IN.values()}
    public = {
        name
        for name, item in vars(rewards).items()
        if isinstance(item, type) and item.__module__ == rewards.__name__ and hasattr(item, "finish")
    }
    assert built == public - {"TextReward"}


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=150, deadline=None)
@given(ids=ANY)
def test_bounds_hold_on_any_tokens(name, ids):
    inner = BUILT_IN[name]()
    assert isinstance(inner, Reward)
    assert inner.monotone
    reward = CheckMonotone(inner)
    states = [reward.start(Context("p", (), decode))]
    highest = reward.upper(states)[0]
    for token in ids:
        states = reward.extend(states, [token])
        assert reward.upper(states)[0] <= highest + 1e-12  # the upper bound never rises
        highest = reward.upper(states)[0]
    text = decode(ids)
    value = reward.finish(states, [Finished(tuple(ids), text)])[0]  # raises where it leaves its bounds
    assert 0 <= value <= 1
    if isinstance(inner, rewards.TextReward):
        assert value == pytest.approx(inner.score_text(text))  # streamed equals read at once


def test_extend_leaves_the_parent_alone():
    for make in BUILT_IN.values():
        reward = make()
        parent = reward.start(Context("p", (), decode))
        for token in encode("Answer: walking cat 301 "):
            parent = reward.extend([parent], [token])[0]
        before = reward.earned([parent])
        children = reward.extend([parent, parent], [encode("9")[0], encode(" ")[0]])
        assert reward.earned([parent]) == before
        assert len(children) == 2


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Reason: it moves.\nAnswer: walking", "walking"),
        ("answer : **Walking_Upstairs**", "walking_upstairs"),
        ("Answer: walking upstairs.", "walking_upstairs"),
        ("Answer: walking up", "walking"),
        ("Answer:\nsitting\nAnswer: walking", "sitting"),  # the first one stands
        ("Answer: running\nAnswer: sitting", "sitting"),  # the first valid one
        ("walking, I think", None),
        ("Answer: ", None),
        ("Answer: wal", None),
    ],
)
def test_label_of_a_text(text, label):
    assert PARSER.find(text) == label


def test_label_is_earned_when_it_is_certain():
    reward = BUILT_IN["label"]()
    state = reward.start(Context("p", (), decode))
    earned = []
    for token in encode("Answer: walking upstairs"):
        state = reward.extend([state], [token])[0]
        earned.append(reward.earned([state])[0])
    assert earned[:-1] == [0.0] * (len(earned) - 1)  # "walking" alone may go on
    assert earned[-1] == pytest.approx(0.2 + 0.8 * 0.7) == reward.upper([state])[0]
    assert reward.score_text("Answer: walking") == pytest.approx(0.2 + 0.8 * 0.1)
    assert reward.score_text("no idea") == 0.0


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("301 402 503 604 705", [301, 402, 503, 604]),
        ("The next 4 values: 301, 402,503", [301, 402, 503]),
        ("301 40", [301]),
        ("1234 301", [301]),
        ("1,234 51.700 12. 301.5", [301]),
        ("none", []),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert NUMBERS.find(text) == numbers


def test_forecast_reward_prefers_what_the_history_does():
    reward = BUILT_IN["forecast"]()
    assert reward.score_text("300 400 500 400") == pytest.approx(1.0)
    # Within the usual step-to-step change nothing is lost, so the last season is not the only best forecast.
    assert reward.score_text("301 400 500 400") > 0.95
    assert (
        reward.score_text("300 400 500 400") > reward.score_text("400 400 400 400") > reward.score_text("999 0 999 0")
    )
    assert reward.score_text("300 400") == pytest.approx(0.5)  # half the steps
    assert reward.score_text("I cannot say") == 0.0
    flat = rewards.ForecastReward(NUMBERS, np.full(3, 500.0), 24)  # shorter than a season
    assert flat.score_text("500 500 500 500") == pytest.approx(1.0)


def test_first_claim_counts():
    reward = BUILT_IN["claims"]()
    assert reward.score_text("It is rising and seasonal.") == 1.0
    assert reward.score_text("Falling, no, rising; seasonal") == 0.5
    assert reward.score_text("unseasonally rising") == 0.5


def test_generic_rewards_at_known_points():
    keywords = BUILT_IN["keywords"]()
    assert keywords.score_text("concat cats") == 0.0
    assert keywords.score_text("A Cat, a dog") == pytest.approx(2 / 3)
    context = Context("p", (), decode)
    repetition = rewards.Repetition(2, 4)
    state = [repetition.start(context)]
    for token in [1, 2, 3, 1, 2, 3]:  # (1, 2) and (2, 3) come twice
        state = repetition.extend(state, [token])
    assert repetition.finish(state, [Finished((), "")]) == [0.5]
    for make in (lambda: rewards.Keywords([]), lambda: rewards.Length(0), lambda: rewards.Repetition(0)):
        with pytest.raises(UsageError):
            make()
