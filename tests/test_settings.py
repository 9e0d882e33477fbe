"""What the options of decoding, budgets and methods allow, and what they mean."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from toys import LOG

import dts
from dts.models.table import TableModel
from dts.search import MCTS, METHODS, Beam, BestOfN, ParticleFilter, SelfConsistency
from dts.search.maxent import MaxEnt
from dts.settings import Budget, Decoding


@pytest.mark.parametrize(("rollouts", "size"), [(1, 1), (3, 3), (5, 4), (16, 4), (40, 10), (64, 16), (1000, 16)])
def test_paths_decoded_together(rollouts, size):
    for method in (MaxEnt(rollouts), MCTS(rollouts)):
        assert (method.batch_size(), method.budget()) == (size, Budget(rollouts=rollouts))
    assert (MaxEnt(1).exploring(), MaxEnt(1, search="best").exploring(), MaxEnt(1, explore=0.0).exploring()) == (
        0.35, 0.1, 0.0,
    )  # fmt: skip


def test_the_defaults_are_those_that_the_figures_were_made_with():
    assert MaxEnt(9) == MaxEnt(9, 4.0, "sample", None, None, 8.0, None, None, "auto", None)
    assert Beam(8) == Beam(8, length_penalty=1.0, reward_weight=0.0, groups=1, segment=1, branch=4)
    assert MCTS(9) == MCTS(9, puct=True, bonus=1.25, value="mean")
    assert ParticleFilter(9) == ParticleFilter(9, reward_scale=4.0, ess_threshold=0.5, entropic=False, segment=None)
    assert SelfConsistency(9) == SelfConsistency(9, str.strip, weighted=False)
    assert Decoding() == Decoding(48, 0, 1.0, None, None, (), 0, None, None) and Budget() == Budget(None, None, None)


@pytest.mark.parametrize(("option", "good", "bad"), [
    ("reward_scale", (0.0, 1e6), (-1e-9, math.inf, math.nan)), ("search", ("sample", "best"), ("", None)),
    ("explore", (0.0, 1.0, None), (-0.01, 1.01)), ("widening", (0.01, 1.0, None), (0.0, 1.01)),
    ("sharpness", (0.01,), (0.0, math.inf)), ("bonus", (0.0, 9.0, None), (-0.1, math.inf)),
    ("lookahead", (0, 1, None), (-1, 1.5)), ("rollouts", (1,), (0, True, 2.0)),
])  # fmt: skip
def test_the_allowed_range_of_each_option_of_maxent(option, good, bad):
    for value in good:
        assert getattr(MaxEnt(**{"rollouts": 4, option: value}), option) == value
    for value in bad:
        with pytest.raises(dts.UsageError, match=f"{option}="):
            MaxEnt(**{"rollouts": 4, option: value})


@pytest.mark.parametrize(("option", "good", "bad"), [
    ("max_new_tokens", (1,), (0,)), ("min_new_tokens", (0, 48), (-1, 49)), ("top_k", (1, None), (0,)),
    ("temperature", (0.01,), (0.0, math.inf)), ("top_p", (0.01, 1.0, None), (0.0, 1.01)),
    ("batch_size", (1, None), (0,)), ("stop", ((), ("a", "b")), ("a", ("",), (1,), ("a", ""))),
])  # fmt: skip
def test_the_allowed_range_of_each_decoding_option(option, good, bad):
    for value in good:
        assert getattr(Decoding(**{option: value}), option) == value
    for value in bad:
        with pytest.raises(dts.UsageError, match=f"{option}="):
            Decoding(**{option: value})


def test_the_allowed_range_of_each_budget():
    assert Budget(1, 1, 0.1) == Budget(rollouts=1, tokens=1, seconds=0.1)
    for bad in ({"rollouts": 0}, {"tokens": 0}, {"seconds": 0}):
        with pytest.raises(dts.UsageError, match=next(iter(bad))):
            Budget(**bad)


def test_p_by_hand():
    logits = torch.tensor([[0.0, LOG(2.0), LOG(4.0), LOG(8.0)]])

    def p(forbidden=((), ()), **options):
        found = Decoding(**options).probabilities(logits.clone(), forbidden)
        assert found.dtype == torch.float64
        return [Fraction(value).limit_denominator(1000) for value in found[0].tolist()]

    def over(total, *parts):
        return [Fraction(part, total) for part in parts]

    assert p() == over(15, 1, 2, 4, 8)
    assert p(temperature=0.5) == over(85, 1, 4, 16, 64)
    assert p(top_k=2) == over(12, 0, 0, 4, 8) and p(top_k=4) == p(top_k=9) == p(top_p=1.0) == over(15, 1, 2, 4, 8)
    assert p(top_p=0.5) == over(8, 0, 0, 0, 8) and p(top_p=0.6) == over(12, 0, 0, 4, 8)
    assert p(top_p=0.81) == over(14, 0, 2, 4, 8)
    # The first of two equal tokens holds just as much as is asked for.
    assert Decoding(top_p=0.5).probabilities(torch.zeros(1, 2)).sum(0).sort().values.tolist() == [0.0, 1.0]
    assert p(((0,), (3,))) == over(7, 1, 2, 4, 0) and p(((), (3,))) == p(((0,), ())) == over(15, 1, 2, 4, 8)
    assert p(((0,), (1, 3)), temperature=0.5) == over(17, 1, 0, 16, 0)
    kept = logits.double()
    Decoding().probabilities(kept, ((0,), (3,)))
    assert kept.isfinite().all()  # the caller's logits stay as they were


def test_prompts_that_are_empty_or_too_long():
    lm = TableModel(lambda prefix: np.zeros(3), 3, context_length=5)
    assert dts.decode(lm, (1, 2), method=BestOfN(1), max_new_tokens=3).completions
    with pytest.raises(dts.UsageError, match=r"2 tokens plus max_new_tokens=4 exceeds .* table .5 tokens"):
        dts.decode(lm, (1, 2), method=BestOfN(1), max_new_tokens=4)
    with pytest.raises(dts.UsageError, match="prompt is empty"):
        dts.decode(lm, (), method=BestOfN(1))


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "greedy"])
def test_a_size_is_a_whole_number_of_at_least_one(name, size):
    with pytest.raises(dts.UsageError, match=f"={size!r} is not allowed; give a whole number >= 1"):
        METHODS[name](size, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_name_cannot_be_given(name):
    method = METHODS[name](8, 1.0)
    assert method.name == name
    assert [field.name for field in dataclasses.fields(method) if not field.init] == []


def test_the_smaller_limit_counts():
    lm = TableModel(lambda prefix: np.zeros(3), 3)

    def rollouts(n, budget):
        return len(dts.decode(lm, (1,), method=BestOfN(n), max_new_tokens=2, budget=budget).rollouts)

    assert [rollouts(4, Budget(rollouts=2)), rollouts(2, Budget(rollouts=4)), rollouts(3, Budget(seconds=1e6))] == [
        2,
        2,
        3,
    ]
    assert [rollouts(3, None), rollouts(3, Budget())] == [3, 3]


@pytest.mark.parametrize("value", ["x", "1", None, True, [1], 1j, math.nan])
@pytest.mark.parametrize(("make", "option"), [
    (MaxEnt, "reward_scale"), (MaxEnt, "sharpness"), (MCTS, "bonus"),
    (ParticleFilter, "reward_scale"), (ParticleFilter, "ess_threshold"), (Beam, "length_penalty"), (Beam, "groups"),
    (Beam, "reward_weight"), (SelfConsistency, "extract"),
])  # fmt: skip
def test_an_option_of_the_wrong_type_is_named(make, option, value):
    with pytest.raises(dts.UsageError, match=f"{option}="):
        make(8, **{option: value})
