"""Value models: what the score of an unfinished text says, and that it decides speed and nothing else."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from test_exactness import PROMPT, instance, total_variation

import dts
from dts.models.table import TableModel
from dts.search import BestOfN, MaxEnt
from dts.search.maxent.valuemodel import OnlineValues


class Constant:
    def predict(self, share, score):
        return 0.5

    def observe(self, path, reward):
        pass


class Random(Constant):
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def predict(self, share, score):
        return self.rng.normal()


class Adverse(Constant):
    """The opposite of what the score says, as strongly as it says it."""

    def predict(self, share, score):
        return -score


MODELS = {"none": lambda: None, "online": lambda: "online", "constant": Constant, "random": Random, "adverse": Adverse}


def search(case, rollouts, values, scale=6.0, seed=0, **options):
    method = MaxEnt(rollouts, reward_scale=scale, values=values, **options)
    return dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=case.horizon, seed=seed)


@pytest.mark.parametrize("model", MODELS)
def test_whatever_the_value_model_says_the_complete_tree_is_the_target(model):
    case = instance(0, vocab_size=4, horizon=3)
    result = search(case, 10_000, MODELS[model]())
    assert sorted(c.token_ids for c in result.completions) == sorted(case.sequences)
    assert total_variation(case.distribution(result.values), case.target(6.0)) < 1e-9
    assert result.log_z == pytest.approx(float(np.logaddexp.reduce(case.log_p + 6.0 * case.rewards)), abs=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_whatever_the_value_model_says_the_estimate_of_z_is_unbiased(model):
    case = instance(1, vocab_size=4, horizon=3)
    z = float(np.exp(case.log_p) @ np.exp(4.0 * case.rewards))
    found = np.array([math.exp(search(case, 12, MODELS[model](), 4.0, seed).log_z) / z for seed in range(300)])
    assert abs(found.mean() - 1) < 3 * found.std() / math.sqrt(300)
    assert found.std() > 0.01  # so that the line above says something


@pytest.mark.parametrize("model", MODELS)
def test_whatever_the_value_model_says_the_best_sequence_is_found_in_the_end(model):
    case = instance(2, vocab_size=4, horizon=3)
    result = search(case, 10_000, MODELS[model](), search="best")
    assert result.best.reward == case.rewards.max()


def letters():
    """Twelve letters; text is what they spell."""
    lm = TableModel(lambda prefix: np.zeros(12), 12)
    return dataclasses.replace(lm)


def share_of_threes(text):
    """Judges a text of any length; says nothing of itself."""
    tokens = text.split()
    return tokens.count("3") / 8 if tokens else 0.0


def tokens_to(goal, method, seed):
    """Tokens forwarded when a rollout reaches the goal."""
    result = dts.decode(
        letters(), (1,), reward=share_of_threes, method=method, max_new_tokens=8, seed=seed, batch_size=4
    )
    reached = [rollout.tokens for rollout in result.rollouts if rollout.reward >= goal]
    return reached[0] if reached else math.inf


def test_a_score_of_unfinished_texts_that_says_something_is_worth_many_samples():
    ratios = []
    for seed in range(5):
        samples = dts.decode(letters(), (1,), reward=share_of_threes, method=BestOfN(64), max_new_tokens=8, seed=seed)
        goal = samples.best.reward
        guided = tokens_to(goal, MaxEnt(64, reward_scale=16.0, search="best", values="online"), seed)
        ratios.append(samples.usage.forwarded_tokens / guided)
    assert min(ratios) > 5


def test_the_reward_is_asked_about_unfinished_texts_only_where_that_is_wanted():
    asked = []

    def reward(text):
        asked.append(len(text.split()))
        return 0.0

    for values, longest in ((None, {8}), ("online", set(range(1, 9)))):
        asked.clear()
        dts.decode(letters(), (1,), reward=reward, method=MaxEnt(2, values=values), max_new_tokens=8)
        assert set(asked) == longest


def test_the_fit_is_ridge_regression_towards_the_share_that_is_written():
    rng = np.random.default_rng(3)
    model, share = OnlineValues(), 0.3
    assert model.predict(share, 2.0) == pytest.approx(0.6)  # nothing seen: slope 0.3
    scores = rng.normal(size=40)
    rewards = 0.8 * scores + 0.1 * rng.normal(size=40) + 2.0
    for score, reward in zip(scores, rewards, strict=True):
        model.observe([(share, score)], reward)
    prior = 6.0 * scores.var()
    slope = (len(scores) * np.cov(scores, rewards, bias=True)[0, 1] + share * prior) / (
        len(scores) * scores.var() + prior
    )
    expected = rewards.mean() + slope * (1.5 - scores.mean())
    assert model.predict(share, 1.5) == pytest.approx(expected)
    assert model.predict(0.9, 1.0) == pytest.approx(0.9)  # other parts of the text: not seen yet


def test_scores_that_mean_nothing_lose_their_slope_and_no_slope_is_negative():
    rng = np.random.default_rng(4)
    noise, against = OnlineValues(), OnlineValues()
    for score in rng.normal(size=2000):
        noise.observe([(0.95, score)], rng.normal())
        against.observe([(0.95, score)], -score)
    assert abs(noise.predict(0.95, 1.0) - noise.predict(0.95, 0.0)) < 0.1
    assert against.predict(0.95, 1.0) == pytest.approx(against.predict(0.95, -1.0))


def test_a_value_model_that_is_given_learns_over_several_searches():
    model = OnlineValues()
    before = model.predict(0.5, 1.0)
    for seed in range(2):
        dts.decode(letters(), (1,), reward=share_of_threes, method=MaxEnt(8, values=model), max_new_tokens=8, seed=seed)
    assert model.predict(0.5, 1.0) != before


def test_a_finished_text_is_scored_once_and_without_its_stop():
    scored = []

    def reward(text):
        scored.append(text)
        return share_of_threes(text)

    method = MaxEnt(12, values="online", lookahead=0)  # every text that is asked about is a node
    result = dts.decode(letters(), (1,), reward=reward, method=method, max_new_tokens=4, stop="7 ", seed=2)
    assert any(c.finished_by == "stop" for c in result.completions)
    tree = result.tree
    texts = {letters().decode(tree.tokens(node)) for node in range(1, len(tree)) if not tree.terminal[node]}
    assert len(scored) == len(set(scored)) and set(scored) == texts | {c.text for c in result.completions}
    for leaf in result.tree.leaves():
        assert result.tree.promise[leaf] == result.tree.reward[leaf]


@pytest.mark.parametrize("values", ["offline", 1, OnlineValues, object()])
def test_what_is_no_value_model_is_refused(values):
    with pytest.raises(dts.UsageError, match="values="):
        MaxEnt(4, values=values)
