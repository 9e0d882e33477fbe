"""Value models: what the score of an unfinished text says, and that it decides speed and nothing else."""

from __future__ import annotations

import dataclasses
import math
from zlib import crc32

import numpy as np
import pytest
from test_exactness import PROMPT, instance, total_variation

import dts
from dts.models.table import TableModel
from dts.search import BestOfN, MaxEnt
from dts.search.maxent.lookahead import ENOUGH_TEXTS, Skill
from dts.search.maxent.valuemodel import OnlineValues, ScoreSoFar


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


MODELS = {"none": lambda: None, "online": lambda: "online", "score": ScoreSoFar, "constant": Constant, "random": Random,
          "adverse": Adverse}  # fmt: skip


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


@pytest.mark.parametrize(("unit", "zero"), [(1e-6, 0.0), (1e-6, 100.0), (1e9, 0.0), (1.0, -1e6)])
def test_what_is_learnt_does_not_depend_on_the_unit_of_the_rewards_nor_on_their_zero(unit, zero):
    rng = np.random.default_rng(5)
    plain, other = OnlineValues(), OnlineValues()
    for score in rng.normal(size=30):
        path, reward = [(0.3, score), (0.3, score + 0.1 * rng.normal())], 1.5 * score + 0.1 * rng.normal()
        plain.observe(path, reward)
        other.observe([(share, unit * one + zero) for share, one in path], unit * reward + zero)
    found = (other.predict(0.3, 2.0 * unit + zero) - zero) / unit
    assert found == pytest.approx(plain.predict(0.3, 2.0), abs=1e-5)
    assert plain.predict(0.3, 2.0) - plain.predict(0.3, 0.0) > 2.0  # a slope far from the prior's, 0.3


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


# Who is asked -------------------------------------------------------------------------------------------------------


class Asked:
    """A reward of text that notes what it was asked, and fails on texts where `fails` says so."""

    def __init__(self, fails=lambda text: False, value=lambda text: len(text) / 10):
        self.texts, self._fails, self._value = [], fails, value

    def __call__(self, text):
        self.texts.append(text)
        if self._fails(text):
            raise ValueError("half a text")
        return self._value(text)


def decoded(reward, method, **options):
    """Every text has four tokens, eight characters."""
    case = instance(1, vocab_size=4, horizon=4, eos=None)
    return dts.decode(case.lm, PROMPT, reward=reward, method=method, max_new_tokens=4, seed=0, **options)


@pytest.mark.parametrize(("method", "options", "unfinished"), [
    (MaxEnt(8, search="best"), {}, True),
    (MaxEnt(8, search="best", values=None), {}, False),
    (MaxEnt(8, search="best"), {"partial": False}, False),
    (MaxEnt(8, search="best", values="online"), {"partial": False}, True),
    (MaxEnt(8), {}, False),
])  # fmt: skip
def test_by_default_the_best_text_is_looked_for_with_scores_of_unfinished_ones(method, options, unfinished):
    asked = Asked()
    result = decoded(dts.as_reward(lambda text: asked(text), **options), method)
    assert (set(asked.texts) > {c.text for c in result.completions}) == unfinished


def test_whoever_limits_what_the_reward_costs_has_it_asked_about_finished_texts_only():
    asked = Asked()
    result = decoded(asked, MaxEnt(8, search="best"), budget=dts.Budget(reward_calls=8))
    assert set(asked.texts) == {c.text for c in result.completions}


def test_a_reward_that_fails_on_unfinished_texts_guides_by_the_others():
    fails = Asked(lambda text: text.endswith("2 ") and len(text) < 8)
    result = decoded(fails, MaxEnt(12, search="best"))
    assert len(result.rollouts) == 12 and any(text.endswith("2 ") for text in fails.texts)
    with pytest.raises(dts.RewardError, match="half a text"):
        decoded(Asked(lambda text: len(text) == 8), MaxEnt(12, search="best"))


@pytest.mark.parametrize("value", [
    lambda text: 1.0 if len(text) == 8 and text.count("3") > 1 else 0.0,  # says nothing before the end
    lambda text: (crc32(text.encode()) % 97) * (1 if len(text) == 8 else -1),  # says something else
])  # fmt: skip
def test_scores_that_say_nothing_are_not_asked_for_any_more(value):
    asked = Asked(value=value)
    decoded(asked, MaxEnt(60, search="best"))
    finished = [index for index, text in enumerate(asked.texts) if len(text) == 8]
    after = asked.texts[finished[min(2 * ENOUGH_TEXTS, len(finished) - 1)] :]
    assert after and all(len(text) == 8 for text in after)


def test_skill_compares_predictions_with_the_mean_of_the_rewards_before():
    good, bad, flat = Skill(), Skill(), Skill()
    for index in range(ENOUGH_TEXTS):
        reward = float(index % 2)
        assert not (good.none or bad.none or flat.none)  # too early to say
        good.add([reward, 0.5], [reward, 0.5], reward)
        bad.add([1 - reward, 1 - reward], [reward, 0.5], reward)
        flat.add([0.5, 0.5], [0.0, 0.0], reward)
    assert not good.none and bad.none and flat.none


def test_a_reward_that_runs_a_model_is_asked_about_nodes_but_not_about_tokens_that_are_only_tried():
    class Modelled(dts.Reward):
        name, tokens, asked = "modelled", 0, 0

        def finish(self, states, finished):
            self.asked += len(finished)
            return [len(one.token_ids) / 10 for one in finished]

    plain, tried = Modelled(), Modelled()
    result = decoded(plain, MaxEnt(8, search="best"))
    assert plain.asked == len(result.tree) - 1  # every node, once
    decoded(tried, MaxEnt(8, search="best", lookahead=4))
    assert tried.asked > plain.asked
    assert decoded(dts.weighted_sum([(Modelled(), 2.0)]), MaxEnt(8, search="best")).best.text == result.best.text


def test_a_reward_that_fails_on_every_unfinished_text_is_not_asked_about_them_any_more():
    fails = Asked(lambda text: len(text) < 8)
    decoded(fails, MaxEnt(60, search="best"))
    assert any(len(text) < 8 for text in fails.texts) and all(len(text) == 8 for text in fails.texts[-20:])


def test_a_value_model_that_predicts_no_number_is_named():
    class Broken(Constant):
        def predict(self, share, score):
            return math.nan

    with pytest.raises(dts.UsageError, match="predicted nan; return a finite number"):
        decoded(Asked(), MaxEnt(8, search="best", values=Broken()))


def test_a_function_may_say_itself_that_half_a_text_means_nothing():
    asked = Asked()
    asked.partial = False
    result = decoded(asked, MaxEnt(8, search="best"))
    assert set(asked.texts) == {c.text for c in result.completions}
