"""MaxEnt against enumeration: on small models pi*, V and Z are known numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

import dts
from dts.evaluation.studies.instances import PROMPT, instance, total_variation
from dts.logspace import logsumexp
from dts.search import BestOfN, MaxEnt
from dts.softvalue import SoftValues


def search(case, rollouts, scale, **options):
    method = MaxEnt(rollouts, reward_scale=scale, **options)
    return dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=case.horizon, seed=3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("structured", [True, False])
def test_sampling_distribution_and_root_value_converge(scale, structured):
    case = instance(0, vocab_size=5, horizon=4, structured=structured)  # 341 sequences
    distance, value_error = [], []
    for rollouts in (30, 110, 341):
        result = search(case, rollouts, scale)
        estimate = case.distribution(result.values)
        assert estimate.sum() == pytest.approx(1.0, abs=1e-9)
        distance.append(total_variation(estimate, case.target(scale)))
        value_error.append(abs(result.values.value() - case.value(scale)))
    # A third of the sequences is close; all of them leave nothing to estimate.
    assert distance[1] < 0.08 and value_error[1] < 0.02
    assert distance[2] < 1e-9 and value_error[2] < 1e-9


def test_zero_reward_scale_gives_p_at_any_budget():
    case = instance(1)
    result = search(case, 20, 0.0)
    assert total_variation(case.distribution(result.values), np.exp(case.log_p)) < 1e-9


def test_far_target_with_a_tenth_of_the_sequences():
    ours, sampled, scale = [], [], 16.0
    for seed in range(5):
        case = instance(seed)  # 3,906 sequences
        target = case.target(scale)
        if total_variation(np.exp(case.log_p), target) < 0.5:
            continue
        rollouts = len(case.sequences) // 10
        result = search(case, rollouts, scale)
        ours.append(total_variation(case.distribution(result.values), target))
        sampled.append(total_variation(_weighted_best_of_n(case, rollouts, scale), target))
    assert len(ours) >= 3
    assert np.mean(ours) < 0.12
    assert all(mine < theirs for mine, theirs in zip(ours, sampled, strict=True))


def _weighted_best_of_n(case, rollouts, scale):
    result = dts.decode(
        case.lm, PROMPT, reward=case.reward, method=BestOfN(rollouts), max_new_tokens=case.horizon, seed=3
    )
    return case.weighted_samples(result, scale)[0]


def test_log_prob_of_one_sequence_equals_its_place_in_the_distribution():
    case = instance(2, vocab_size=4, horizon=3)
    result = search(case, 10, 3.0)
    for sequence, expected in zip(case.sequences, case.distribution(result.values), strict=True):
        steps = [case.ranges[sequence[:i]][2] for i in range(len(sequence) + 1)]
        log_p = [after - before for before, after in itertools.pairwise(steps)]
        assert math.exp(result.values.log_prob(sequence, log_p)) == pytest.approx(expected, rel=1e-9)


def test_draws_follow_the_analytic_distribution():
    case, scale = instance(2, vocab_size=4, horizon=3), 3.0
    result = search(case, 12, scale)
    expected = dict(zip(case.sequences, case.distribution(result.values), strict=True))
    draws = result.sample(4000, seed=5)
    seen = [d.token_ids for d in draws]
    counts = np.array([seen.count(s) for s in case.sequences])
    # 4,000 draws over 85 sequences: the expected total variation of a perfect sampler is about 0.05.
    assert total_variation(counts / 4000, np.array(list(expected.values()))) < 0.08
    assert all(d.reward == case.reward(case.lm.decode(d.token_ids)) for d in draws[:50])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_whole_space_is_finished_once_each(batch_size):
    case = instance(4, vocab_size=4, horizon=4)
    result = dts.decode(
        case.lm, PROMPT, reward=case.reward, method=MaxEnt(10_000), max_new_tokens=4, batch_size=batch_size
    )
    finished = [c.token_ids for c in result.completions]
    assert sorted(finished) == sorted(case.sequences)
    assert len(result.rollouts) == len(case.sequences)
    assert math.fsum(math.exp(c.logprob) for c in result.completions) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_search_finds_the_best_sequence_with_fewer_rollouts(seed):
    case = instance(seed)
    result = search(case, 200, 8.0, search="best")
    best_of_n = dts.decode(case.lm, PROMPT, reward=case.reward, method=BestOfN(200), max_new_tokens=case.horizon)
    assert result.best.reward >= best_of_n.best.reward


def _children_are_everything(self, node):
    seen = [a for a in self.tree.children(node) if self.visits.finished[a]]
    total = logsumexp([self.tree.log_p[a] for a in seen])
    self.log_value[node] = logsumexp([self.tree.log_p[a] - total + self.log_value[a] for a in seen])


def _without_p(self, node):
    self.log_value[node] = logsumexp([self.log_value[a] for a in self.tree.children(node) if self.visits.finished[a]])


@pytest.mark.parametrize("mutation", [None, _children_are_everything, _without_p])
def test_backup_is_nearly_unbiased_and_wrong_backups_are_not(mutation, monkeypatch):
    """8 of 30 tokens, unlikely ones worth more: the mean of exp(lambda V) over 300 searches is near Z, or far."""
    case, scale = instance(0, vocab_size=30, horizon=1, eos=None), 4.0
    ranked = np.empty(30)
    ranked[np.argsort(-case.log_p)] = np.linspace(0, 1, 30)
    case = dataclasses.replace(case, rewards=ranked)
    if mutation is not None:
        update = SoftValues._update

        def mutated(self, node):
            update(self, node)
            mutation(self, node)

        monkeypatch.setattr(SoftValues, "_update", mutated)
    estimates = []
    for seed in range(300):
        method = MaxEnt(8, reward_scale=scale, explore=1.0)
        result = dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=1, seed=seed)
        estimates.append(math.exp(scale * result.values.value()))
    relative_error = np.mean(estimates) / math.exp(scale * case.value(scale)) - 1
    assert (abs(relative_error) < 0.2) if mutation is None else (abs(relative_error) > 0.4), relative_error
