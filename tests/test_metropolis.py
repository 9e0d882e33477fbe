"""Metropolis-Hastings power sampling: its distribution is the target, by enumeration, and its costs are counted."""

from __future__ import annotations

import numpy as np
import pytest

import dts
from dts.errors import UsageError
from dts.evaluation.studies.exact import distances, main
from dts.evaluation.studies.instances import PROMPT, instance, total_variation
from dts.evaluation.studies.metropolis import MetropolisHastings
from dts.search import Budget

CASE = instance(3, vocab_size=3, horizon=4, spread=1.0)  # 31 sequences of 1 to 4 tokens


def frequencies(case, rollouts=12_000, seed=0, **options):
    settings = {"temperature": options.pop("temperature", 1.0)}
    method = MetropolisHastings(rollouts, chains=200, **options)
    result = dts.decode(
        case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=case.horizon, seed=seed, **settings
    )
    shares = {result.tree.tokens(leaf): share for leaf, share in result.shares.items()}
    return np.array([shares.get(s, 0.0) for s in case.sequences]), result


def target(case, power, scale):
    logs = power * case.log_p + scale * case.rewards
    return np.exp(logs - np.logaddexp.reduce(logs))


@pytest.mark.parametrize(("power", "scale", "temperature", "block"), [
    (2.0, 0.0, 1.0, None), (2.0, 0.0, 0.5, None), (4.0, 0.0, 0.25, 1), (3.0, 0.0, 0.6, 2), (1.0, 3.0, 1.0, None),
    (2.0, 2.0, 0.5, 2), (0.5, 0.0, 1.5, None),
])  # fmt: skip
def test_the_chain_is_at_each_text_as_often_as_the_target_says(power, scale, temperature, block):
    wanted = target(CASE, power, scale)
    found, result = frequencies(CASE, power=power, reward_scale=scale, temperature=temperature, block=block, moves=3)
    assert found.sum() == pytest.approx(1.0)
    assert total_variation(found, wanted) < 0.035
    assert total_variation(np.exp(CASE.log_p), wanted) > 0.1  # so that the line above says something
    assert result.usage.forwarded_tokens == result.usage.unique_tokens


def test_its_distribution_converges():
    wanted = target(CASE, 2.0, 0.0)
    distances = [
        np.mean([total_variation(frequencies(CASE, n, seed, power=2.0, temperature=0.5)[0], wanted)
                 for seed in range(3)])
        for n in (400, 1600, 8000)
    ]  # fmt: skip
    assert distances[0] > distances[1] > distances[2]


def test_low_temperature_alone_is_not_the_power():
    """Token by token, p^2 with each row normalised forgets what the rows sum to."""
    method = dts.search.Sampling(12_000)
    result = dts.decode(CASE.lm, PROMPT, method=method, max_new_tokens=CASE.horizon, temperature=0.5, batch_size=200)
    counts = {}
    for rollout in result.rollouts:
        tokens = result.tree.tokens(rollout.leaf)
        counts[tokens] = counts.get(tokens, 0) + 1
    found = np.array([counts.get(s, 0) for s in CASE.sequences]) / len(result.rollouts)
    assert total_variation(found, target(CASE, 2.0, 0.0)) > 0.08


@pytest.mark.parametrize(("scale", "power"), [(0.0, 2.0), (3.0, 1.0), (2.0, 0.5)])
def test_the_table_has_it_at_the_tokens_of_the_others(scale, power):
    found = distances(CASE, 25, scale, 0, power)
    assert ("low temperature" in found) == (power != 1) and "metropolis-hastings" in found
    budget = found["maxent"][2]
    assert all(0 <= distance <= 1 and tokens <= budget for distance, _, tokens in found.values())
    assert found["maxent"][0] < 0.05  # nearly all of the 31 texts were seen
    assert CASE.target(scale, power) == pytest.approx(target(CASE, power, scale))


def test_the_command_prints_power_sampling(capsys):
    options = ["--instances", "1", "--vocab-size", "3", "--horizon", "3", "--budgets", "8"]
    assert main(["--scale", "0", "--power", "2", *options]) == 0
    printed = capsys.readouterr().out
    assert "power 2" in printed and "low temperature" in printed and "nan" not in printed
    with pytest.raises(SystemExit):
        main(["--scale", "0", *options])
    assert "the target would be p" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [Budget(rollouts=3), Budget(rollouts=37), Budget(tokens=11), Budget(tokens=40)])
@pytest.mark.parametrize("chains", [1, 8])
def test_budgets_are_kept(budget, chains):
    method = MetropolisHastings(500, power=2.0, block=2, chains=chains)
    result = dts.decode(CASE.lm, PROMPT, reward=CASE.reward, method=method, max_new_tokens=4, budget=budget)
    assert budget.tokens is None or result.usage.forwarded_tokens <= budget.tokens
    assert budget.rollouts is None or len(result.rollouts) == budget.rollouts
    assert result.estimate is None or sum(result.shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("option", "value"), [("power", 0), ("reward_scale", -1.0), ("block", 0), ("moves", 0),
                                               ("chains", 0), ("rollouts", 0)])  # fmt: skip
def test_bad_options_are_refused(option, value):
    with pytest.raises(UsageError, match=f"{option}={value}"):
        MetropolisHastings(**{"rollouts": 4, option: value})
