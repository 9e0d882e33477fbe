"""Ids that the head has and the tokenizer has not are no part of p, unless asked for."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, ByteTokenizer, random_model

import dts
from dts.lm import PROMPT_SLOT
from dts.models.huggingface import HFModel
from dts.models.sessions import full_logits
from dts.models.vocabulary import unknown_ids
from dts.search import MaxEnt, Sampling

PROMPT = [13, 5, 7, 11]
KNOWN = {0, *range(4, 60), *range(70, 200)}  # the rest: specials never added, a hole, and a padded head


class Padded(ByteTokenizer):
    """Knows some ids; counts how often it is asked for them."""

    def __init__(self, known=KNOWN):
        self.known, self.asked = known, 0

    def get_vocab(self):
        self.asked += 1
        return {f"<{token}>": token for token in self.known}

    def decode(self, ids, **options):
        return super().decode([token for token in ids if token in self.known], **options)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_unknown_ids_have_probability_0_and_the_others_share_it(family):
    lm = dts.load((random_model(family), Padded()))
    logits = lm.open(PROMPT, batch_size=1, max_new_tokens=2).logits([PROMPT_SLOT])[0]
    direct = full_logits(lm, PROMPT)[0]
    known = torch.tensor(sorted(KNOWN))
    assert torch.isneginf(logits).sum() == VOCAB - len(KNOWN)
    assert torch.allclose(logits[known].log_softmax(-1), direct[known].log_softmax(-1), atol=1e-4)
    assert torch.allclose(logits.log_softmax(-1)[known].exp().sum(), torch.tensor(1.0))


def drawn(lm, method):
    result = dts.decode(lm, PROMPT, reward=lambda text: float(len(text)), method=method, max_new_tokens=12, seed=0)
    return {token for completion in result.completions for token in completion.token_ids}


@pytest.mark.parametrize("method", [Sampling(16), MaxEnt(16), MaxEnt(16, search="best")])
def test_no_drawn_id_is_unknown_unless_asked_for(method):
    model = random_model("llama")
    assert drawn(dts.load((model, Padded())), method) <= KNOWN
    assert drawn(dts.load((model, Padded()), allow_unknown_ids=True), method) - KNOWN


def test_the_tokenizer_is_asked_once_and_nothing_is_masked_where_it_knows_all():
    model = random_model("llama")
    some, every, silent = Padded(), Padded(range(VOCAB)), ByteTokenizer()
    for tokenizer in (some, every, silent):
        lm = HFModel(model, tokenizer)
        logits = [lm.open(PROMPT, batch_size=1, max_new_tokens=2).logits([PROMPT_SLOT]) for _ in range(3)]
        assert torch.isfinite(logits[-1]).all() == (tokenizer is not some)
        assert getattr(tokenizer, "asked", 1) == 1


def test_eos_stays_possible_although_the_tokenizer_does_not_list_it():
    lm = HFModel(random_model("llama"), Padded(KNOWN - {0}))
    assert torch.isfinite(lm.open(PROMPT, batch_size=1, max_new_tokens=2).logits([PROMPT_SLOT])[0, 0])


def test_an_id_that_shares_its_text_with_another_one_is_known():
    class Twins(Padded):
        def get_vocab(self):
            return {"a": 4, "b": 5}  # 6 decodes to "b" as well

        def decode(self, ids, **options):
            if 7 in ids:
                raise IndexError("piece id is out of range")
            return "".join({4: "a", 5: "b", 6: "b", 8: "<unk>"}.get(token, "") for token in ids)

        unk_token = "<unk>"

    assert unknown_ids(Twins(), 10) == [0, 1, 2, 3, 7, 8, 9]
