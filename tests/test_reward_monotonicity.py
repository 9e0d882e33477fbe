"""Monotonicity of rollouts, of best-so-far and of earned rewards: three different things."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dts
from dts.evaluation.measures.metrics import independent_monotonicity, monotonicity, shuffled_monotonicity
from dts.evaluation.rewards import Keywords, Length, Repetition
from dts.evaluation.studies.instances import PROMPT, instance
from dts.rewards import Context, Finished
from dts.search import BestOfN, MaxEnt


def test_the_figure_that_circulates_is_eight_of_nine_transitions():
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.6, 0.7, 0.8]
    assert monotonicity(rewards) == pytest.approx(8 / 9)
    assert round(100 * monotonicity(rewards), 1) == 88.9


def test_independent_sampling_improves_half_the_time():
    case = instance(0, structured=False)
    shares = []
    for seed in range(30):
        result = dts.decode(
            case.lm, PROMPT, reward=case.reward, method=BestOfN(20), max_new_tokens=5, seed=seed, batch_size=1
        )
        shares.append(monotonicity([r.reward for r in result.rollouts]))
    expected, deviation = independent_monotonicity(20)
    assert expected == 0.5
    # Repeated sequences tie, so a little above one half; 30 means of 20 rollouts each.
    assert expected - 3 * deviation / 30**0.5 < sum(shares) / 30 < 0.65


@pytest.mark.parametrize("method", [MaxEnt(25), MaxEnt(25, search="best"), BestOfN(25)], ids=lambda m: m.name)
def test_best_so_far_never_falls(method):
    case = instance(3)
    result = dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=5)
    best = [r.best_so_far for r in result.rollouts]
    assert best == sorted(best) and best[-1] == result.best.reward


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_shuffled_reference_is_one_exactly_when_all_rewards_are_equal(rewards):
    assert (shuffled_monotonicity(rewards).mean == pytest.approx(1.0)) == (len(set(rewards)) == 1)


@given(st.lists(st.integers(97, 122), max_size=30), st.sampled_from(["keywords", "length", "repetition"]))
def test_built_in_rewards_keep_their_promise(tokens, which):
    reward = {"keywords": Keywords(["ab", "cat"]), "length": Length(10), "repetition": Repetition()}[which]
    checked = dts.CheckMonotone(reward)
    context = Context("p", (1,), lambda ids: "".join(map(chr, ids)))
    state = checked.start(context)
    for token in tokens:
        (state,) = checked.extend([state], [token])
    text = "".join(map(chr, tokens))
    (value,) = checked.finish([state], [Finished(tuple(tokens), text)])
    assert 0 <= value <= 1
