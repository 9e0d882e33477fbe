"""Sharpened and constrained targets against enumeration: p(x)^power 1[x in L] exp(lambda r(x))."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import Texts, run_with

from dts.evaluation.studies.exact import PROMPT, instance
from dts.results import Result
from dts.search import MaxEnt, ParticleFilter

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
