"""ASAp on a language that a mask cannot see the end of: its draws become those of p(x | x in L), the mask's do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dts
from dts.evaluation.studies.asap import ASAp
from dts.evaluation.studies.instances import PROMPT, instance, total_variation

CASE = instance(0, vocab_size=4, horizon=3, spread=1.0)  # token 0 ends a text


class Has:
    """Texts that have a token somewhere, no 1 at the start, and after each 3 a 2. The state: last token, whether the
    token was seen."""

    def __init__(self, token=2, size=4):
        self.token, self.size = token, size

    def start(self, lm):
        return None, False

    def advance(self, states, tokens):
        return [(token, seen or token == self.token) for (_, seen), token in zip(states, tokens, strict=True)]

    def allowed(self, states):
        mask = torch.ones(len(states), self.size, dtype=torch.bool)
        mask[[last is None for last, _ in states], 1] = False
        mask[[last == 3 for last, _ in states]] = torch.arange(self.size) == 2
        return mask

    def accepts(self, states):
        return [seen and last != 3 for last, seen in states]

    def holds(self, sequence):
        after = zip(sequence, (*sequence[1:], None), strict=True)
        return self.token in sequence and sequence[0] != 1 and all(b == 2 for a, b in after if a == 3)


def late_draws(method, seed=0):
    """Frequencies among the members of the last two thirds of the draws, and the result."""
    result = dts.decode(CASE.lm, PROMPT, reward=CASE.reward, method=method, max_new_tokens=3, seed=seed)
    place, language = {s: i for i, s in enumerate(CASE.sequences)}, Has()
    counts = np.zeros(len(CASE.sequences))
    for rollout in result.rollouts[len(result.rollouts) // 3 :]:
        tokens = result.tree.tokens(rollout.leaf)
        counts[place[tokens]] += language.holds(tokens)
    return counts / counts.sum(), result


def target():
    inside = np.array([Has().holds(s) for s in CASE.sequences])
    p = np.where(inside, np.exp(CASE.log_p), 0.0)
    return p / p.sum()


def test_its_draws_are_p_among_the_members_and_those_of_the_mask_are_not():
    found, result = late_draws(ASAp(4500, Has()))
    masked, of_mask = late_draws(ASAp(4500, Has(), learn=False))
    assert total_variation(found, target()) < 0.05 < 0.4 < total_variation(masked, target())
    for one in (result, of_mask):
        assert all(Has().holds(c.token_ids) for c in one.completions)
        assert one.usage.forwarded_tokens == one.usage.unique_tokens
        assert sum(one.shares.values()) == pytest.approx(1.0)
    late = [result.tree.tokens(r.leaf) for r in result.rollouts[1500:]]
    assert all(map(Has().holds, late))  # what leads nowhere is learnt, and not repeated
    assert len(of_mask.rollouts) == 4500 and not all(Has().holds(of_mask.tree.tokens(r.leaf)) for r in of_mask.rollouts)


def test_an_empty_language_ends():
    result = dts.decode(CASE.lm, PROMPT, method=ASAp(500, Has(token=9)), max_new_tokens=3)
    assert result.completions == [] and 0 < len(result.rollouts) < 500
