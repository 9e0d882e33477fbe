"""Targets of a real model of which every completion is known: three tokens at each step, five steps, 243 texts.

Nothing of the machinery (temperature, top-k, a stop string, a constraint, weights of rows) may be wrong on a real
vocabulary: the enumeration uses `transformers` alone.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import run_with

import dts
from dts.search import MaxEnt

PROMPT, STEPS, WIDTH, TEMPERATURE = "The weather today is", 5, 3, 1.3

pytestmark = pytest.mark.minutes


@pytest.fixture(scope="module")
def texts(smollm):
    """Token ids -> log p, of every completion of the model with top_k=3."""
    prompt = smollm.encode(PROMPT)
    done, open_texts = {}, {(): 0.0}
    for _ in range(STEPS):
        ids = torch.tensor([[*prompt, *prefix] for prefix in open_texts])
        with torch.no_grad():
            logits = smollm.model(ids).logits[:, -1].double() / TEMPERATURE
        top = logits.topk(WIDTH)
        steps = top.values.log_softmax(-1)
        longer = {
            (*prefix, token): log_p + step
            for (prefix, log_p), tokens, row in zip(
                open_texts.items(), top.indices.tolist(), steps.tolist(), strict=True
            )
            for token, step in zip(tokens, row, strict=True)
        }
        done |= {ids: log_p for ids, log_p in longer.items() if ids[-1] in smollm.eos_ids}
        open_texts = {ids: log_p for ids, log_p in longer.items() if ids[-1] not in smollm.eos_ids}
    return done | open_texts


class Letters:
    """A constraint: texts with an even number of the letter e. That is known at the end alone."""

    def __init__(self, lm):
        self._lm = lm

    def start(self, lm):
        return ()

    def advance(self, states, tokens):
        return [(*state, token) for state, token in zip(states, tokens, strict=True)]

    def allowed(self, states):
        return torch.ones(len(states), self._lm.vocab_size, dtype=torch.bool)

    def accepts(self, states):
        return [self._lm.decode(state).count("e") % 2 == 0 for state in states]


def vowels(text):
    return sum(text.count(letter) for letter in "aiou") / 10


@pytest.mark.parametrize(
    ("power", "reward", "constrained"), [(2.0, None, False), (4.0, vowels, True), (0.5, vowels, True)]
)
def test_every_completion_has_its_share(smollm, texts, power, reward, constrained):
    constraint = Letters(smollm) if constrained else None
    options = {"max_new_tokens": STEPS, "top_k": WIDTH, "temperature": TEMPERATURE}
    weights = {
        ids: power * log_p + (4.0 * reward(smollm.decode(ids)) if reward else 0.0)
        for ids, log_p in texts.items()
        if constraint is None or constraint.accepts([tuple(i for i in ids if i not in smollm.eos_ids)])[0]
    }
    log_z = float(np.logaddexp.reduce(list(weights.values())))
    target = {ids: math.exp(log - log_z) for ids, log in weights.items()}

    method = MaxEnt(len(texts) + 50, power=power)
    result = run_with(smollm, PROMPT, method, reward, constraint=constraint, **options)
    assert result.log_z == pytest.approx(log_z, abs=1e-4)
    shares = {result.tree.tokens(leaf): share for leaf, share in result.shares.items()}
    assert shares == pytest.approx(target, abs=1e-4)
    assert all(c.logprob == pytest.approx(texts[c.token_ids], abs=1e-3) for c in result.completions)

    part = run_with(smollm, PROMPT, MaxEnt(60, power=power), reward, constraint=constraint, **options)
    assert part.values.log_value[0] == pytest.approx(log_z, abs=0.3)


def test_the_mode_is_found_with_few_completions(smollm, texts):
    best = max(texts, key=lambda ids: texts[ids] + 4.0 * vowels(smollm.decode(ids)))
    result = dts.decode(
        smollm, PROMPT, reward=vowels, method=MaxEnt(24, search="best", order="target"), max_new_tokens=STEPS,
        top_k=WIDTH, temperature=TEMPERATURE,
    )  # fmt: skip
    assert result.best.token_ids == best
