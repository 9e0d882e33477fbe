"""Sharpened and constrained targets against enumeration: p(x)^power 1[x in L] exp(lambda r(x))."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import Texts, run_with

import dts
from dts.evaluation.studies.instances import PROMPT, instance
from dts.results import Result
from dts.search import MCTS, Beam, BestOfN, Greedy, MaxEnt, ParticleFilter, Sampling, SelfConsistency

CASE = instance(0, vocab_size=4, horizon=4)  # 121 sequences


def without_eos(sequence):
    return sequence[:-1] if sequence[-1] == 0 else sequence


def members(case, mass, seed=1):
    """Whether each sequence is in a random set of about this mass under p."""
    order = np.random.default_rng(seed).permutation(len(case.sequences))
    chosen = np.zeros(len(order), bool)
    chosen[order[: 1 + int(np.searchsorted(np.exp(case.log_p[order]).cumsum(), mass))]] = True
    texts = {without_eos(s) for s, one in zip(case.sequences, chosen, strict=True) if one}
    return np.array([without_eos(s) in texts for s in case.sequences])


def texts_of(case, chosen, **options):
    found = [without_eos(s) for s, one in zip(case.sequences, chosen, strict=True) if one]
    return Texts(found, case.lm.vocab_size, **options)


def decode(case, method, **settings) -> Result:
    return run_with(case.lm, PROMPT, method, case.reward, max_new_tokens=case.horizon, **settings)


def weights(case, power, scale, chosen=None):
    """log of the target times Z, of each sequence."""
    logs = power * case.log_p + scale * case.rewards
    return logs if chosen is None else np.where(chosen, logs, -math.inf)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("mass", [None, 0.3, 0.03])
@pytest.mark.parametrize(("power", "scale"), [(1.0, 4.0), (2.0, 0.0), (2.0, 4.0), (4.0, 4.0), (0.5, 4.0)])
def test_a_tree_that_is_complete_is_exact(power, scale, mass, far):
    chosen = None if mass is None else members(CASE, mass)
    constraint = None if chosen is None else texts_of(CASE, chosen, far=far)
    result = decode(CASE, MaxEnt(500, reward_scale=scale, power=power), constraint=constraint)
    logs = weights(CASE, power, scale, chosen)
    truth = np.logaddexp.reduce(logs)
    assert result.log_z == pytest.approx(truth) and result.log_z_estimate.error == 0.0
    assert result.values.log_value[0] == pytest.approx(truth)
    share = {result.tree.tokens(leaf): share for leaf, share in result.shares.items()}
    target = {s: math.exp(log - truth) for s, log in zip(CASE.sequences, logs, strict=True) if log > -math.inf}
    assert share == pytest.approx(target)
    own = dict(zip(CASE.sequences, CASE.log_p, strict=True))
    assert all(c.logprob == pytest.approx(own[c.token_ids]) for c in result.completions)
    assert {c.token_ids for c in result.completions} == set(target)


@pytest.mark.parametrize("mass", [None, 0.3])
@pytest.mark.parametrize("power", [2.0, 0.5])
def test_z_of_the_particle_filter_is_unbiased(power, mass):
    chosen = None if mass is None else members(CASE, mass)
    constraint = None if chosen is None else texts_of(CASE, chosen, far=True)
    method = ParticleFilter(16, reward_scale=2.0, power=power)
    truth = np.logaddexp.reduce(weights(CASE, power, 2.0, chosen))
    found = np.array(
        [math.exp(decode(CASE, method, constraint=constraint, seed=seed).log_z - truth) for seed in range(80)]
    )
    assert abs(found.mean() - 1) < 3 * found.std() / math.sqrt(len(found)) + 0.01


# -- constraints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("method", [
    Greedy(), Sampling(12), BestOfN(12), Beam(4), Beam(4, reward_weight=2.0, segment=2), MCTS(12), MCTS(12, puct=False),
    SelfConsistency(12), ParticleFilter(12), ParticleFilter(12, segment=2), MaxEnt(12), MaxEnt(12, search="best"),
    MaxEnt(12, search="best", order="target"), MaxEnt(12, search="best", bonus=0.1),
], ids=repr)  # fmt: skip
def test_every_method_keeps_to_a_constraint(method, far):
    chosen = members(CASE, 0.3)
    own = dict(zip(CASE.sequences, CASE.log_p, strict=True))
    result = decode(CASE, method, constraint=texts_of(CASE, chosen, far=far))
    inside = {s for s, one in zip(CASE.sequences, chosen, strict=True) if one}
    assert {c.token_ids for c in result.completions} <= inside
    assert result.completions or far  # without look-ahead, every path of a small search may end nowhere
    assert all(c.logprob == pytest.approx(own[c.token_ids]) for c in result.completions)
    assert len(result.rollouts) <= 16


def test_masks_sample_from_another_distribution():
    chosen = members(CASE, 0.3)
    constraint = texts_of(CASE, chosen)
    exact, masked = (
        decode(CASE, MaxEnt(500), constraint=constraint, constraint_mode=reading) for reading in ("condition", "mask")
    )
    truth = np.exp(weights(CASE, 1.0, 4.0, chosen) - np.logaddexp.reduce(weights(CASE, 1.0, 4.0, chosen)))
    far, near = (
        sum(abs(truth[CASE.sequences.index(r.tree.tokens(leaf))] - share) for leaf, share in r.shares.items()) / 2
        for r in (masked, exact)
    )
    assert near < 1e-9 and far > 0.1
    assert "masked" in str(masked.target) and "masked" not in str(exact.target)
    one, other = ({c.token_ids: c.logprob for c in r.completions} for r in (exact, masked))
    assert one == pytest.approx(other)  # the model's own in both


def test_an_empty_language_is_named():
    with pytest.raises(dts.UsageError, match="allows no token after this prompt"):
        decode(CASE, MaxEnt(5), constraint=Texts([], 4))
    with pytest.raises(dts.UsageError, match="holds for no completion of up to max_new_tokens=4 tokens"):
        decode(CASE, MaxEnt(500), constraint=Texts([(1, 1, 1, 1, 1)], 4, far=True))
    lost = decode(CASE, ParticleFilter(8), constraint=Texts([(1, 1, 1, 1, 1)], 4, far=True))
    assert lost.log_z == -math.inf and lost.completions == []
    with pytest.raises(RuntimeError, match="no completion in the target was found"):
        lost.sample(1)


def test_dead_ends_are_visited_once():
    result = decode(CASE, MaxEnt(1000), constraint=texts_of(CASE, members(CASE, 0.03), far=True))
    paths = [result.tree.tokens(node) for node in range(len(result.tree))]
    assert len(set(paths)) == len(paths)
    inner = {s[:i] for s in CASE.sequences for i in range(1, len(s)) if 0 not in s[:i]}
    assert result.usage.forwarded_tokens == len(PROMPT) + len(inner)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_draws_from_a_result_are_in_the_target(power):
    chosen = members(CASE, 0.3)
    result = decode(CASE, MaxEnt(20, power=power), constraint=texts_of(CASE, chosen, far=True))
    draws = [draw.token_ids for draw in result.sample(60, seed=2)]
    inside = {s for s, one in zip(CASE.sequences, chosen, strict=True) if one}
    assert set(draws) <= inside and set(draws) - {c.token_ids for c in result.completions}
    assert result.sample(60, seed=2) == result.sample(60, seed=2)


@pytest.mark.parametrize(
    "method", [MaxEnt(12, power=2.0), ParticleFilter(6, power=2.0), MaxEnt(9, search="best", order="target")]
)
def test_searches_side_by_side_equal_single_ones(method):
    prompts = [(1,), (2,), (3, 1)]
    options = {"reward": lambda text: text.count("2") / 4, "method": method, "max_new_tokens": 4, "require_eos": True}
    together = list(dts.decode_many(CASE.lm, prompts, width=4, seed=5, **options))
    alone = [dts.decode(CASE.lm, p, batch_size=4, seed=5 + i, **options) for i, p in enumerate(prompts)]
    assert [r.tree.to_dict() for r in together] == [r.tree.to_dict() for r in alone]
    assert [str(r.target) for r in together] == [str(r.target) for r in alone]
