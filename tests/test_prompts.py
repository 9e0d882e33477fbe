"""Prompts: what becomes of text, chat messages and ids, and what is refused by name."""

from __future__ import annotations

import logging
from array import array

import numpy as np
import pytest
import torch
from families import random_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import dts
from dts.models.huggingface import HFModel
from dts.search import Greedy

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[ {{ m.role }} ] {{ m.content }} ; {% endfor %}"
    "{% if add_generation_prompt %}[ assistant ]{% if enable_thinking is defined and not enable_thinking %} hush"
    "{% endif %}{% endif %}"
)
WORDS = ["<s>", "</s>", "<unk>", "[", "]", ";", "user", "assistant", "system", "hush", "hello", "there", "ho", "<x>"]
BOS, EOS = 0, 1


def words_tokenizer(around: str = "<s> $A </s>", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One id a word; `around` is what its post-processor adds to a text."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>", "<x>"])
    specials = [(word, WORDS.index(word)) for word in ("<s>", "</s>", "<x>")]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="<x>")  # fmt: skip
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


def loaded(model, **options) -> HFModel:
    return HFModel(model, words_tokenizer(**options), name="words")


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_text_gets_a_bos_and_no_eos(model):
    assert loaded(model).encode("hello there") == ids("<s> hello there")
    assert loaded(model, around="$A </s>").encode("hello there") == ids("hello there")
    assert loaded(model, around="$A").encode("hello there") == ids("hello there")
    assert loaded(model, around="<s> <x> $A").encode("hello") == ids("<s> <x> hello")
    assert loaded(model).encode("") == [BOS]


def test_an_eos_that_the_user_wrote_stays(model):
    assert loaded(model).encode("hello </s>") == ids("<s> hello </s>")


def test_text_that_begins_with_the_bos_gets_no_second_one(model):
    lm = loaded(model)
    messages = [{"role": "user", "content": "hello"}]
    rendered = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    assert lm.encode(rendered) == lm.encode(messages) == ids("<s> [ user ] hello ; [ assistant ]")
    assert loaded(model, around="<s> <x> $A").encode("<s> <x> hello") == ids("<s> <x> hello")


def test_a_last_message_of_the_assistant_is_continued(model):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ho"}]
    assert loaded(model).encode(messages) == ids("<s> [ user ] hello ; [ assistant ] ho")
    assert messages[-1]["content"] == "ho"
    opened = [messages[0], {"role": "assistant", "content": ""}]
    assert loaded(model).encode(opened) == loaded(model).encode(messages[:1])


def test_without_a_chat_template_too(tiny_lm):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert tiny_lm.decode(tiny_lm.encode(messages)) == "user: hi\nassistant: ho"
    assert tiny_lm.decode(tiny_lm.encode(messages[:1])) == "user: hi\nassistant:"


def test_chat_template_variables_reach_the_template(model, caplog):
    lm, messages = loaded(model), [{"role": "user", "content": "hello"}]
    hush = ids("<s> [ user ] hello ; [ assistant ] hush")
    assert lm.encode(messages, {"enable_thinking": False}) == hush
    kept = lm.prefix(messages, {"enable_thinking": False})
    options = {"method": Greedy(), "max_new_tokens": 2, "chat_template_kwargs": {"enable_thinking": False}}
    result = dts.decode(lm, messages, **options)
    assert result.usage.prompt_tokens == result.usage.cached_tokens == len(hush) == len(kept)
    with caplog.at_level(logging.WARNING, logger="dts.models.prompts"):  # a command may have set the level of "dts"
        lm.encode(messages, {"enable_thought": True})
    assert "enable_thought" in caplog.text


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ("hello", {"enable_thinking": False}, "chat_template_kwargs.*no list of chat messages"),
    ([{"role": "user", "content": "a"}], {"tokenize": False}, "'tokenize' cannot be set"),
    ([{"role": "user", "content": "a"}], {"add_generation_prompt": False}, "'add_generation_prompt' cannot be set"),
    ([{"role": "user", "content": "a"}], [("x", 1)], "chat_template_kwargs=.*a dict"),
])  # fmt: skip
def test_chat_template_variables_without_effect_are_refused(model, prompt, options, message):
    with pytest.raises(dts.UsageError, match=message):
        dts.decode(loaded(model), prompt, method=Greedy(), max_new_tokens=2, chat_template_kwargs=options)


def test_what_a_template_raises_is_the_users_error(model):
    lm = loaded(model, template="{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(dts.UsageError, match=r"chat template refuses.*Roles must alternate"):
        lm.encode([{"role": "user", "content": "hello"}])


def test_text_parts_of_a_message_are_joined(model):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    plain = loaded(model).encode([{"role": "user", "content": "hello there"}])
    assert loaded(model).encode([{"role": "user", "content": parts}]) == plain


@pytest.mark.parametrize("as_given", [
    list, tuple, np.array, torch.tensor, lambda x: np.array([x], dtype=np.int32), lambda x: torch.tensor([x]),
    lambda x: [x], lambda x: array("q", x), lambda x: [np.int64(i) for i in x], lambda x: list(torch.tensor(x)),
    lambda x: {"input_ids": x, "attention_mask": [1] * len(x)},
    lambda x: {"input_ids": [[1, 1, *x]], "attention_mask": [[0, 0] + [1] * len(x)]},
    lambda x: words_tokenizer().pad([{"input_ids": x}], return_tensors="pt"),
])  # fmt: skip
def test_ids_are_taken_in_every_form_that_is_clear(model, as_given):
    given = as_given([5, 9, 11])
    assert loaded(model).encode(given) == [5, 9, 11]
    result = dts.decode(loaded(model), given, method=Greedy(), max_new_tokens=2)
    assert result.best == dts.decode(loaded(model), [5, 9, 11], method=Greedy(), max_new_tokens=2).best


@pytest.mark.parametrize(("prompt", "message"), [
    ([5, 2.7], r"prompt\[1\]=2.7 is not a token id"),
    (["7"], r"prompt\[0\]='7' is not a token id"),
    ([5, True], r"prompt\[1\]=True is not a token id"),
    ([5, None], r"prompt\[1\]=None"),
    (np.array([1.0, 2.0]), r"prompt\[0\]=1.0"),
    (np.array([True, False]), r"prompt\[0\]=True"),
    (torch.tensor([True]), r"prompt\[0\]=True"),
    ([torch.tensor(True)], r"prompt\[0\]=tensor\(True\)"),
    ([5, 260], r"prompt\[1\]=260 is outside the vocabulary \(0 to 259\)"),
    ([5, -1], r"prompt\[1\]=-1 is outside the vocabulary"),
    ([10**30], "outside the vocabulary"),
    ([[1, 2], [3, 4]], "prompt holds 2 rows"),
    (torch.ones(2, 3, dtype=torch.long), "prompt holds 2 rows"),
    (torch.ones(1, 1, 3, dtype=torch.long), r"prompt\[0\]=\[1, 1, 1\]"),
    (torch.tensor(3), r"prompt=3 \(int\)"),
    (5, r"prompt=5 \(int\)"), (None, "prompt=None"), (b"hello", r"\(bytes\)"), (bytearray(b"a"), r"\(bytearray\)"),
    (memoryview(b"abc"), r"\(memoryview\)"), ({5, 6}, r"\(set\)"), (object, "prompt=<class 'object'>"),
    (iter([1]), "list_iterator"), ({"role": "user", "content": "a"}, "has to be in a list of messages"),
    ({"input_ids": [1, 2], "attention_mask": [1]}, "2 input_ids and an attention_mask of 1"),
    ("a\ud800b", r"prompt holds '\\ud800' at position 1"),
    ([{"role": "user", "content": "a\udfff"}], r"prompt\[0\]\['content'\] holds '\\udfff' at position 1"),
    ([{"role": "user", "content": "a"}, 5], r"prompt\[1\]=5 is not a chat message"),
    ([{"role": "user"}], r"prompt\[0\]: content=None"),
    ([{"role": 3, "content": "a"}], r"prompt\[0\]: role=3"),
    ([{"content": "a"}], r"prompt\[0\]: role=None"),
    ([{"role": "user", "content": 3}], r"prompt\[0\]: content=3"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"prompt\[0\]\['content'\]\[0\]=.*not text"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"\['content'\]\[0\]"),
    ([], "prompt is empty"), (np.zeros(0, dtype=int), "prompt is empty"), ([[]], "prompt is empty"),
])  # fmt: skip
def test_what_cannot_be_a_prompt_is_refused_by_position(model, prompt, message):
    for lm in (loaded(model), loaded(model, template=None)):
        with pytest.raises(dts.UsageError, match=message) as error:
            dts.decode(lm, prompt, method=Greedy(), max_new_tokens=2)
        assert "\n" not in str(error.value)
