"""`model.generate(custom_generate=dts.generate)` and logits processors inside the search."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

import dts
from dts.search import Greedy, MaxEnt, Sampling


def vowels(text: str) -> float:
    return sum(text.count(v) for v in "aeiou") / 10


def run(lm, inputs, **options):
    return lm.model.generate(inputs, custom_generate=dts.generate, lm=lm, max_new_tokens=8, pad_token_id=0, **options)


def test_greedy_equals_plain_generate(tiny_lm):
    inputs = torch.tensor([tiny_lm.encode("Time flies")])
    plain = tiny_lm.model.generate(inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(run(tiny_lm, inputs, method=Greedy(), do_sample=False), plain)


def test_padded_batches_and_several_sequences_per_prompt(tiny_lm):
    short, long = tiny_lm.encode("Once"), tiny_lm.encode("Time flies")
    width = len(long)
    inputs = torch.tensor([[0] * (width - len(short)) + short, long])
    mask = torch.tensor([[0] * (width - len(short)) + [1] * len(short), [1] * width])
    out = run(
        tiny_lm, inputs, attention_mask=mask, method=MaxEnt(12), reward=vowels, do_sample=True, top_k=40,
        num_return_sequences=2,
    )  # fmt: skip
    assert out.shape[0] == 4 and torch.equal(out[:, :width], inputs.repeat_interleave(2, 0))
    for row, prompt in ((0, "Once"), (2, "Time flies")):
        direct = dts.decode(tiny_lm, prompt, method=MaxEnt(12), reward=vowels, max_new_tokens=8, top_k=40)
        for k in range(2):
            expected = direct.completions[k].token_ids
            assert tuple(out[row + k, width : width + len(expected)].tolist()) == expected


def test_processors_are_part_of_p(tiny_lm):
    banned = [token for token in range(4, 260) if token % 2]
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(banned)])
    result = dts.decode(
        tiny_lm, "Once", method=Sampling(20), max_new_tokens=6, logits_processor=processors, temperature=0.8
    )
    assert all(token % 2 == 0 or token < 4 for c in result.completions for token in c.token_ids)
    completion = result.completions[0]
    ids = torch.tensor([[*tiny_lm.encode("Once"), *completion.token_ids]])
    logits = tiny_lm.model(ids).logits[0, -len(completion.token_ids) - 1 : -1].double()
    logits[:, banned] = -torch.inf
    steps = (logits / 0.8).log_softmax(-1)
    expected = sum(steps[i, token].item() for i, token in enumerate(completion.token_ids))
    assert completion.logprob == pytest.approx(expected, abs=1e-4)


def test_unknown_stopping_criteria_are_refused(tiny_lm):
    with pytest.raises(dts.UsageError, match="MaxTimeCriteria"):
        run(tiny_lm, torch.tensor([[5, 6]]), method=Greedy(), max_time=5.0)
