"""The three orders of completions, the searches for the best one in each, and the greedy path among what they see."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import UpTo

import dts
from dts.evaluation import cli
from dts.evaluation.experiment import config
from dts.evaluation.report.summary import _target
from dts.evaluation.studies.instances import PROMPT, instance
from dts.search import Greedy, MaxEnt, ParticleFilter, aimed
from dts.search.maxent.order import ORDERS
from dts.target import LARGEST_POWER

HORIZON = 4


def tables(count, vocab_size=5):
    return [instance(seed, vocab_size=vocab_size, horizon=HORIZON) for seed in range(count)]


def decode(case, method, reward=None, **options):
    return dts.decode(case.lm, PROMPT, reward=reward, method=method, max_new_tokens=case.horizon, **options)


def rewards(case, reward):
    """Of each sequence, by a token-level reward."""
    found = []
    for sequence in case.sequences:
        states = [reward.start(None)]
        for token in sequence:
            states = reward.extend(states, [token])
        found += reward.finish(states, [None])
    return np.array(found)


def key(order, power=1.0, scale=4.0):
    """To be compared: rounded, because a power and its root change the last bits of log p."""
    if order == "target":
        return lambda log_p, reward: round(power * log_p + scale * reward, 9)
    return lambda log_p, reward: (reward, round(log_p, 9))


@pytest.mark.parametrize("order", ["likelihood", "target"])
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_a_search_with_bounds_proves_the_best_completion_of_its_order(order, power):
    rank, spent = key(order, power), 0
    for case in tables(4):
        reward = UpTo(3, 2, HORIZON)
        method = MaxEnt(1000, search="best", order=order, power=power)
        result = decode(case, method, reward, batch_size=1)
        best = max(map(rank, case.log_p.tolist(), rewards(case, reward).tolist()))
        assert rank(result.best.logprob, result.best.reward) == pytest.approx(best)
        assert not result.partial
        spent += len(result.rollouts)
    assert spent < 4 * 341 / 4  # of all sequences


def test_the_order_reward_stops_at_the_highest_reward_and_the_order_likelihood_goes_on():
    likelier = 0
    for case in tables(6):
        reward = UpTo(3, 2, HORIZON)
        first, best = (
            decode(case, MaxEnt(1000, search="best", order=order), reward, batch_size=1)
            for order in ("reward", "likelihood")
        )
        assert first.best.reward == best.best.reward == 1.0
        assert len(first.rollouts) < len(best.rollouts)
        assert best.best.logprob >= first.best.logprob
        likelier += best.best.logprob > first.best.logprob + 0.1
    assert likelier >= 3


@pytest.mark.parametrize("search", ["sample", "best"])
@pytest.mark.parametrize("order", ["reward", "likelihood", "target"])
def test_completions_are_ranked_by_the_order(order, search):
    case = tables(1)[0]
    result = decode(case, MaxEnt(20, search=search, order=order), lambda text: text.count("3") / 4, batch_size=4)
    keys = [key(order)(c.logprob, c.reward) for c in result.completions]
    assert keys == sorted(keys, reverse=True) and len(set(keys)) > 3


def test_without_a_reward_the_mode_is_the_likeliest_text():
    for case in tables(4):
        result = decode(case, MaxEnt(1000, search="best", order="target"))
        assert result.best.logprob == pytest.approx(case.log_p.max())
        assert len(result.rollouts) < 100 and result.best.reward == 0.0


# -- never worse than greedy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [
    MaxEnt(1, search="best"), MaxEnt(3, search="best", order="target"), MaxEnt(2, search="best", order="likelihood"),
    MaxEnt(3, search="best", power=2.0), MaxEnt(2), MaxEnt(5, power=0.5),
])  # fmt: skip
def test_a_search_returns_nothing_worse_than_greedy_decoding(method):
    rank = key(method.order, method.power)
    for case in tables(10):
        greedy = decode(case, Greedy(), case.reward).best
        result = decode(case, method, case.reward, batch_size=4)
        assert len(result.rollouts) <= method.rollouts
        assert greedy.token_ids in {c.token_ids for c in result.completions}
        assert rank(result.best.logprob, result.best.reward) >= rank(greedy.logprob, greedy.reward)


def test_the_greedy_path_costs_its_tokens_and_is_finished_once():
    case = instance(4, vocab_size=4, horizon=4)
    greedy = decode(case, Greedy())
    assert decode(case, MaxEnt(1, search="best")).usage.forwarded_tokens == greedy.usage.forwarded_tokens
    for seed in range(5):
        result = decode(case, MaxEnt(1000), case.reward, batch_size=8, seed=seed)
        assert len(result.rollouts) == len(result.completions) == len(case.sequences)


def test_one_rollout_that_samples_is_a_draw():
    case = tables(1)[0]
    seen = {decode(case, MaxEnt(1), seed=seed).best.token_ids for seed in range(30)}
    assert len(seen) > 5


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_z_stays_unbiased_with_a_path_that_is_no_draw(power, batch_size):
    """The greedy path is 1 of 4: taken for a draw, it would put Z far off."""
    case, scale = instance(3, vocab_size=3, horizon=3), 3.0
    truth = np.logaddexp.reduce(power * case.log_p + scale * case.rewards)
    method = MaxEnt(4, reward_scale=scale, power=power)
    found = np.array([
        math.exp(decode(case, method, case.reward, batch_size=batch_size, seed=seed).log_z - truth)
        for seed in range(150)
    ])  # fmt: skip
    assert abs(found.mean() - 1) < 3 * found.std() / math.sqrt(len(found))
    assert found.std() < 1


# -- texts that the length limit cuts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [MaxEnt(500), MaxEnt(500, power=2.0), ParticleFilter(400), ParticleFilter(400, power=2.0)]
)
def test_texts_that_were_cut_are_not_in_the_target_and_rank_last(method):
    case = instance(2, vocab_size=4, horizon=3)
    result = decode(case, method, case.reward, require_eos=True)
    complete = np.array([s[-1] == 0 for s in case.sequences])
    logs = np.where(complete, method.power * case.log_p + 4.0 * case.rewards, -math.inf)
    truth = np.logaddexp.reduce(logs)
    share = {result.tree.tokens(leaf): share for leaf, share in result.shares.items()}
    assert all(sequence[-1] == 0 for sequence in share) and math.fsum(share.values()) == pytest.approx(1)
    exact = isinstance(method, MaxEnt)
    assert result.log_z == pytest.approx(truth, abs=1e-9 if exact else 0.3)
    for sequence, log in zip(case.sequences, logs, strict=True):
        assert share.get(sequence, 0.0) == pytest.approx(math.exp(log - truth), abs=1e-9 if exact else 0.1)
    ended = [c.finished_by for c in result.completions]
    assert ended == sorted(ended) and set(ended) == {"eos", "length"}  # "eos" comes first
    assert "EOS" in str(result.target)
    assert all(draw.finished_by == "eos" for draw in result.sample(20, seed=1))


def test_a_draw_that_leaves_the_tree_and_is_cut_is_drawn_again():
    case = instance(2, vocab_size=4, horizon=4)
    result = decode(case, MaxEnt(12), case.reward, require_eos=True)
    draws = result.sample(40, seed=3)
    assert len(draws) == 40 and all(draw.finished_by == "eos" for draw in draws)
    assert len({draw.token_ids for draw in draws} - {c.token_ids for c in result.completions}) > 1


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MaxEnt(3, power=0.0), "power=0.0 is not allowed"),
    (lambda: MaxEnt(3, power=math.nan), "power=nan is not allowed"),
    (lambda: MaxEnt(3, power="2"), "power='2' is not allowed"),
    (lambda: MaxEnt(3, power=True, order="target"), "power=True is not allowed"),
    (lambda: ParticleFilter(3, power=-1.0), "power=-1.0 is not allowed"),
    (lambda: ParticleFilter(3, power=1000.0), "power=1000.0 is not allowed"),
    (lambda: MaxEnt(3, order="best"), "order='best' is not known"),
    (lambda: MaxEnt(3, greedy=1), "greedy=1 is not allowed"),
    (lambda: decode(tables(1)[0], MaxEnt(3), require_eos="yes"), "require_eos='yes' is not allowed"),
])  # fmt: skip
def test_what_is_no_target_is_refused(make, message):
    with pytest.raises(dts.UsageError, match=message):
        make()


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands_pass_power_and_order_to_the_methods_that_have_them():
    assert aimed(MaxEnt(3), 2.0, "target") == MaxEnt(3, power=2.0, order="target")
    assert aimed(ParticleFilter(3), 2.0, "target") == ParticleFilter(3, power=2.0)
    assert aimed(Greedy(), 2.0, "target") == Greedy()
    assert (config.ORDERS, config.LARGEST_POWER) == (ORDERS, LARGEST_POWER)
    given = cli.settings(vars(cli.build_parser().parse_args(["--power", "2", "--order", "target", "--require-eos"])))
    made = config.ExperimentConfig(**given)
    assert (made.power, made.order, made.require_eos) == (2.0, "target", True)
    assert _target(made.as_dict()) == (
        ", power 2 of p, completions by target, only completions that EOS or a stop string ended"
    )
    assert _target(config.ExperimentConfig().as_dict()) == ""


@pytest.mark.parametrize(("options", "message"), [
    ({"power": 0}, "--power 0 is not allowed"), ({"order": "best"}, "--order 'best' is not allowed"),
    ({"require_eos": "yes"}, "--require-eos 'yes' is not allowed"),
])  # fmt: skip
def test_commands_refuse_what_is_no_target(options, message):
    with pytest.raises(dts.UsageError, match=message):
        config.ExperimentConfig(**options)
