"""What a search returns, and what it says that it does not know."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import LOG

import dts
from dts.evaluation.studies.plain_dts import PlainDTS
from dts.models.table import TableModel
from dts.results import Completion, Estimate, LogZ, Result, Rollout, Usage
from dts.rewards import Context, Finished
from dts.search import METHODS, MaxEnt
from dts.search.particles import weighted
from dts.settings import Budget, Decoding
from dts.tree import Tree


def a_result(**parts) -> Result:
    return Result(**{"completions": [], "rollouts": [], "usage": Usage(), "tree": Tree(),
                     "method": "nothing", **parts})  # fmt: skip


def test_a_result_of_weighted_samples():
    estimate = weighted(None, {4: LOG(0.3), 7: LOG(0.1)})  # no search is needed where nothing is drawn
    result = a_result(estimate=estimate)
    assert result.log_z == pytest.approx(LOG(0.4)) and result.log_z_estimate is None  # its error is not known
    assert result.shares == pytest.approx({4: 0.75, 7: 0.25})
    assert result.effective_sample_size == pytest.approx(1 / (0.75**2 + 0.25**2))
    known = LogZ(1.5, 0.1, (1.0, 2.0))
    assert a_result(estimate=Estimate(known)).log_z_estimate == known
    with pytest.raises(RuntimeError, match="use MaxEnt"):  # Z alone gives no sequence a weight
        _ = a_result(estimate=Estimate(known)).shares


def test_a_result_says_what_it_does_not_know():
    result = a_result()
    for wanted, message in (("best", "no rollout finished"), ("log_z", "nothing estimates no Z"),
                            ("shares", "use MaxEnt"), ("effective_sample_size", "use MaxEnt")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            getattr(result, wanted)
    with pytest.raises(RuntimeError, match="use MaxEnt"):
        result.sample(1)
    assert not result.partial
    assert result.usage.as_dict() == dict.fromkeys(Usage.__slots__, 0)


def test_a_result_draws_with_the_seed_it_is_given():
    asked = []
    result = a_result(estimate=Estimate(sample=lambda k, seed: asked.append((k, seed)) or []))
    assert result.sample(3) == result.sample(2, seed=5) == [] and asked == [(3, 0), (2, 5)]


def test_records_do_not_change():
    for record in (Completion("", (), 0.0, 0.0, "eos"), LogZ(0.0, 0.0, (0.0, 0.0)), Context("", (), str),
                   Finished((), ""), Decoding(), Budget(), Rollout(0, 0.0, 0.0, 0, 0.0, 0, 0, 0, 0, "")):  # fmt: skip
        with pytest.raises(AttributeError):
            setattr(record, type(record).__slots__[0], None)


def test_of_equal_rewards_the_likeliest_comes_first():
    """Whatever was finished first; for every method that does not rank by something else first."""
    lm = TableModel(lambda prefix: np.array([0.0, 1.0, 2.0, 3.0]), 4)
    for name, make in METHODS.items():
        result = dts.decode(lm, (1,), method=make(30, 1.0), reward=lambda text: float("3" in text), max_new_tokens=2,
                            seed=3)  # fmt: skip
        keys = [(c.reward, c.logprob) for c in result.completions]
        if name not in ("beam", "beam-guided", "self-consistency", "weighted-best-of-n", "confidence-vote"):
            assert keys == sorted(keys, reverse=True), name
        assert result.best.logprob == max(c.logprob for c in result.completions if c.reward == result.best.reward), name


def test_every_token_of_a_completion_has_its_log_probability():
    lm = TableModel(lambda prefix: np.array([0.0, 1.0, 2.0]), 3, eos=0)
    for completion in dts.decode(lm, (1,), method=MaxEnt(8), max_new_tokens=3).completions:
        p = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
        assert completion.token_logprobs == pytest.approx([math.log(p[token]) for token in completion.token_ids])
        assert completion.logprob == pytest.approx(sum(completion.token_logprobs))


def test_plain_dts_weighs_no_sequence_and_no_leaf_of_its_own_making():
    lm = TableModel(lambda prefix: np.zeros(3), 3)
    result = dts.decode(
        lm, (1,), method=PlainDTS(9, reward_scale=2.0), reward=lambda text: text.count("1"), max_new_tokens=2
    )
    assert math.isfinite(result.log_z) and result.log_weights is None and result.values is None
    with pytest.raises(RuntimeError, match="plain-dts keeps no estimate"):
        _ = result.shares


def test_one_draw_gives_an_estimate_of_z_whose_error_is_infinite():
    lm = TableModel(lambda prefix: np.zeros(4), 4)
    result = dts.decode(lm, (1,), method=MaxEnt(1), reward=len, max_new_tokens=3)
    assert result.log_z_estimate is not None and result.log_z_estimate.error == math.inf
