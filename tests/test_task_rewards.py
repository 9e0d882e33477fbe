"""Incremental text, and rewards that read it: bounds hold on any token sequence, streamed equals whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import dts
from dts.errors import UsageError
from dts.evaluation import rewards
from dts.rewards import CheckMonotone, Context, Finished, Reward
from dts.search import Sampling
from dts.text import MAX_PENDING, TextState, advance, flush

HISTORY = np.array([300.0, 400, 500, 400] * 6)
LABELS = ("walking", "walking_upstairs", "sitting")
PARSER = rewards.LabelParser(LABELS, r"answer\s{0,2}:")
NUMBERS = rewards.NumberParser(3, 4)
VOCABULARY = {
    "trend": {"up": ["rising"], "down": ["falling"]},
    "season": {"yes": ["seasonal"]},
    "air": {"humid": ["humid", "high"], "very humid": ["very high"], "dry": ["dry", "low"]},
    "wind": {"light": ["light"], "high": ["high"]},
}
SUBJECTS = {"air": ["air", "humidity"], "wind": ["wind", "breeze"]}

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
PIECES += [
    "concat",
    "dog",
    "rising",
    " humidity",
    " very",
    " high",
    "air",
    " not",
    " breeze",
    "3 0 1, ",
    "falling",
    " seasonal",
    "\n",
    " ",
    ".",
    ",",
    "é€",
    "😀",
]


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
    "forecast, spaced": lambda: rewards.ForecastReward(rewards.NumberParser(3, 4, spaced=True), HISTORY, 4),
    "claims": lambda: rewards.ClaimReward(VOCABULARY, {"trend": "up", "season": "yes"}),
    "claims of subjects": lambda: rewards.ClaimReward(
        VOCABULARY, {"trend": "up", "air": "very humid", "wind": "light"}, SUBJECTS
    ),
    "format": lambda: rewards.Format(r"answer: \w+"),
    "keywords": lambda: rewards.Keywords(["cat", "dog", "walking upstairs"]),
    "length": lambda: rewards.Length(7),
    "repetition": lambda: rewards.Repetition(2, 3, 10),
}


def test_every_exported_reward_is_in_the_suite():
    """Those that a model gives are terminal, and have tests of their own below."""
    built = {type(make()).__name__ for make in BUILT_IN.values()}
    public = {name for name in rewards.__all__ if hasattr(getattr(rewards, name), "finish")}
    assert built == public - {"TextReward", "ClassifierReward", "LikelihoodReward"}


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
        *[(f"Answer: {word}", None) for word in ("walkingstick", "sittings", "sitting2", "not walking", "outsitting")],
        ("Answer: walking upstairsx", "walking"),
        ("Answer: walkings\nAnswer: sitting", "sitting"),
    ],
)
def test_label_of_a_text(text, label):
    assert PARSER.find(text) == label


def test_label_is_earned_when_it_is_certain():
    reward = BUILT_IN["label"]()
    state = reward.start(Context("p", (), decode))
    earned = []
    for token in encode("Answer: walking upstairs."):
        state = reward.extend([state], [token])[0]
        earned.append(reward.earned([state])[0])
    assert earned[:-1] == [0.0] * (len(earned) - 1)  # "walking" alone may continue, and so may a word
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
        ("1,234 51.700 12. 301.5", []),
        ("none", []),
        # a part of another number is none: signs, exponents, decimals, groups, units, times, fractions
        *[(text, []) for text in ("-301", "−301", "–301", "1e301", "301e5", "301E-2", "301.5", ".301", ".5", "5.")],
        *[
            (text, [])
            for text in ("301,5", "301,402.5", "12,301", "301,4021", "1.301", "301.402", "301'402", "301_402")
        ],
        *[(text, []) for text in ("301\u00a0402", "12\u202f301", "3 01", "30 1", "301%", "301km", "301abc", "x301")],
        *[(text, []) for text in ("12:301", "301/402", "301-402", "301²", "３０１", "30１", "٣٠١", "2024-01-301")],
        # what stands around a number does not change it
        *[(text, [301]) for text in ("301", "301.", "301!", "+301", "(301)", "**301**", "Values:301", "=301", "`301`")],
        *[(text, [301, 402]) for text in ("301. 402", "301;402", "|301|402|", "301\n402", "[301, 402]", "301,402,")],
        ("-301 402", [402]),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert NUMBERS.find(text) == numbers


def test_forecast_reward_prefers_what_the_history_does():
    reward = BUILT_IN["forecast"]()
    season, near, flat, wild = (
        reward.score_text(text) for text in ("300 400 500 400", "301 400 500 401", "400 400 400 400", "999 000 999 000")
    )
    assert season > 0.95
    assert season > near > flat > wild
    assert flat < 0.7  # a flat line after a seasonal history is not plausible
    # Two of four steps: half of what steps earn, nothing for the spectrum.
    assert reward.score_text("300 400") == pytest.approx((season - 0.1) / 2, abs=0.01)
    assert reward.score_text("I cannot say") == 0.0
    constant = rewards.ForecastReward(NUMBERS, np.full(3, 500.0), 24)  # shorter than a season
    assert constant.score_text("500 500 500 500") == pytest.approx(1.0)
    assert rewards.ForecastReward(NUMBERS, HISTORY[:2], 4).score_text("300 400 500 400") > 0


def test_a_number_under_way_promises_what_the_middle_of_its_digits_would_earn():
    reward = BUILT_IN["forecast"]()
    state = reward.start(Context("p", (), decode))
    promised = []
    for token in encode("300 4"):
        (state,) = reward.extend([state], [token])
        promised.append(reward.promise([state])[0])
    middles = ("350", "305", "300", "300", "300 450")
    assert promised == pytest.approx([reward.score_text(text) for text in middles], abs=1e-12)
    assert reward.earned([state])[0] == pytest.approx(reward.score_text("300"))  # a guide, not a bound
    (broken,) = reward.extend([state], encode("."))  # "4." can be no number of three digits
    assert reward.promise([broken]) == reward.earned([broken])


def test_forecast_steps_are_earned_one_by_one():
    reward = BUILT_IN["forecast"]()
    state = reward.start(Context("p", (), decode))
    earned, upper = [], []
    for token in encode("300 900 500 400 "):
        state = reward.extend([state], [token])[0]
        earned.append(reward.earned([state])[0])
        upper.append(reward.upper([state])[0])
    # A number counts at the first character after it, so at the 4th, 8th, 12th and 16th.
    rises = [i for i, (was, now) in enumerate(zip([0.0, *earned], earned, strict=False)) if now > was]
    assert rises == [3, 7, 11, 15]
    assert upper[2] == pytest.approx(1.0) and upper[7] < 0.85  # the bad second step is lost for good
    assert earned[-1] == upper[-1] == reward.score_text("300 900 500 400 ")


def test_numbers_written_with_spaced_digits():
    spaced = rewards.NumberParser(3, 3, spaced=True)
    assert spaced.find("3 0 1, 4 0 2,505") == [301, 402, 505]
    assert spaced.find("3 0 1 9, 4 0") == []
    assert spaced.find("The next 4 values: 3 0 1, 4 0 2") == spaced.find("3 0 1. 4 0 2") == [301, 402]
    for part in ("-3 0 1", "- 3 0 1", "3 0 1.5", "3 0 1 . 5", "1 e 3 0 1", "3 0 1e5"):
        assert spaced.find(f"{part}, 4 0 2") == [402], part


def test_a_comma_makes_one_number_of_parts_that_have_another_width():
    two = rewards.NumberParser(2, 4)
    assert two.find("12,345") == two.find("12,3") == two.find("1,23") == [] and two.find("12,34 56") == [12, 34, 56]


def test_first_claim_counts():
    reward = BUILT_IN["claims"]()
    assert reward.score_text("It is rising and seasonal.") == 1.0
    assert reward.score_text("Falling, no, rising; seasonal") == 0.5
    assert reward.score_text("unseasonally rising") == 0.5
    assert reward.score_text("It is not rising. It is rising, and never really seasonal.") == 0.5
    for denial in ("It is non-seasonal.", "It wasn't seasonal.", "It cannot be seasonal.", "They don't look seasonal."):
        assert reward.score_text(f"{denial} It is rising.") == 0.5, denial


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("The humidity is very high.", {"air"}, set()),
        ("The humidity is high.", set(), {"air"}),
        ("A light breeze and very high humidity", {"wind", "air"}, set()),  # claims wait for the next subject
        ("The wind is light and the air is dry; the humidity is very high", {"wind"}, {"air"}),  # the first counts
        ("It is very high. Humidity, light.", set(), set()),  # no subject in the sentence; no claim about the air
        ("The breeze is not light but the humidity is not so low", set(), set()),
        ("Rising wind, light", {"trend", "wind"}, set()),
    ],
)
def test_claims_belong_to_the_nearest_subject(text, right, wrong):
    claimed = BUILT_IN["claims of subjects"]().claimed(text)
    assert (claimed.right, claimed.wrong) == (right, wrong)


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
    form = rewards.Format(r"<b>\w+</b>")
    assert [form.score_text(text) for text in ("a <b>x</b>", "<b>x</b> y", "<b></b>")] == [1.0, 1.0, 0.0]
    for make in (
        lambda: rewards.Format("("),
        lambda: rewards.Keywords([]),
        lambda: rewards.Length(0),
        lambda: rewards.Repetition(0),
    ):
        with pytest.raises(UsageError):
            make()


# Rewards that a model gives ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    """A random BERT with three labels over the byte tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2}, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=_plain_bytes(), pad_token="!", padding_side="right")
    return transformers.BertForSequenceClassification(config).eval(), wrapped


def _plain_bytes() -> Tokenizer:
    """The byte tokenizer, also for encoding: one token per byte."""
    tokenizer = _byte_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), "isolated"),
        ]
    )
    return tokenizer


TEXTS = ["a cat", "the dog barks at night", "x"]


def _finish(reward, texts, prompt="p"):
    states = [reward.start(Context(prompt, (), decode))] * len(texts)
    return reward.finish(states, [Finished((), text) for text in texts])


def test_classifier_reward_is_the_label_probability_whatever_the_batch(classifier):
    model, tokenizer = classifier
    with torch.no_grad():
        single = [
            float(model(**tokenizer([text], return_tensors="pt")).logits.double().softmax(1)[0, 2]) for text in TEXTS
        ]
    for size in (1, 2, 16):
        reward = rewards.ClassifierReward(model, tokenizer, "good", batch_size=size)
        assert _finish(reward, TEXTS) == pytest.approx(single, abs=1e-6)
    assert len(set(single)) == 3 and len(tokenizer("a cat")["input_ids"]) == 5
    checked = CheckMonotone(rewards.ClassifierReward(model, tokenizer, 2))
    assert _finish(checked, TEXTS) == pytest.approx(single, abs=1e-6)
    with_prompt = rewards.ClassifierReward(model, tokenizer, "good", with_prompt=True)
    assert _finish(with_prompt, ["cat"], prompt="a ") == pytest.approx(single[:1], abs=1e-6)
    for label in ("great", 3, None):
        with pytest.raises(UsageError, match="bad"):
            rewards.ClassifierReward(model, tokenizer, label)
    with pytest.raises(UsageError, match="needs a prompt of text or messages"):
        _finish(with_prompt, ["cat"], prompt=[1, 2])


def test_reward_model_gives_its_raw_output(classifier):
    config = transformers.BertConfig(**{**classifier[0].config.to_dict(), "num_labels": 1})
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config).eval()
    reward = rewards.ClassifierReward(model, classifier[1], None)
    with torch.no_grad():
        expected = float(model(**classifier[1](["a cat"], return_tensors="pt")).logits)
    assert _finish(reward, ["a cat"]) == pytest.approx([expected], abs=1e-5)
    assert not reward.monotone and reward.earned([None]) == [-np.inf]


def test_likelihood_equals_the_model_own_logprob(tiny_lm):
    reward = rewards.LikelihoodReward(tiny_lm, batch_size=2)
    result = dts.decode(tiny_lm, "ab", reward=reward, method=Sampling(5), max_new_tokens=6, seed=3)
    for one in result.completions:
        assert one.reward == pytest.approx(one.logprob / len(one.token_ids), abs=1e-4)
    # Of plain text (another model's completion) the same figure, computed without padding.
    texts = ["hello", "a"]
    together = _finish(reward, texts, prompt="ab")
    assert together == pytest.approx([_finish(reward, [text], prompt="ab")[0] for text in texts], abs=1e-5)
    assert max(together) < 0
