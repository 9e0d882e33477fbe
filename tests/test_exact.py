"""The table of distances to an enumerated target, among the members of a language: against slow references."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import dts
from dts.evaluation.studies import instances
from dts.evaluation.studies.automata import Automaton, random_automaton
from dts.evaluation.studies.exact import coverage, distances, main
from dts.evaluation.studies.instances import PROMPT, instance, total_variation
from dts.search import MaxEnt, Sampling

CASE = instance(0, vocab_size=4, horizon=4)  # 121 sequences


def is_member(automaton: Automaton, sequence: tuple[int, ...]) -> bool:
    state = automaton.start(None)
    for token in sequence:
        if token != CASE.lm.eos:
            state = automaton.advance([state], [token])[0]
    return automaton.accepts([state])[0]


@pytest.mark.parametrize("seed", range(8))
def test_members_are_what_the_automaton_accepts_and_its_mask_keeps_every_one(seed):
    automaton = random_automaton(np.random.default_rng(seed), 4)
    case = dataclasses.replace(CASE, language=automaton)
    assert case.inside.tolist() == [is_member(automaton, s) for s in case.sequences]
    for sequence, inside in zip(case.sequences, case.inside, strict=True):
        state = automaton.start(None)
        for token in sequence[:-1] if sequence[-1] == 0 else sequence:
            assert automaton.allowed([state])[0, token] or not inside
            state = automaton.advance([state], [token])[0]
    assert automaton.advance([], []) == [] and automaton.accepts([]) == []


@pytest.mark.parametrize("mass", [0.3, 0.03])
def test_a_language_has_the_mass_that_was_asked_for(mass):
    case = CASE.among(mass, seed=1)
    truth = sum(math.exp(p) for s, p in zip(case.sequences, case.log_p, strict=True) if is_member(case.language, s))
    assert case.mass == pytest.approx(truth) and mass / 1.25 <= truth <= mass * 1.25
    assert case.target(4.0)[~case.inside].sum() == 0 and case.target(4.0).sum() == pytest.approx(1)


def test_what_masks_sample_from():
    """By a complete tree whose rows are masked; and by many masked samples."""
    case = CASE.among(0.3, seed=3)
    log_q = case.masked
    options = {"reward": case.reward, "max_new_tokens": 4, "constraint": case.language}
    tree = dts.decode(case.lm, PROMPT, method=MaxEnt(500, reward_scale=0.0), constraint_mode="mask", **options)
    shares = {tree.tree.tokens(leaf): share for leaf, share in tree.shares.items()}
    q = np.exp(log_q - np.logaddexp.reduce(log_q))
    assert [shares.get(s, 0.0) for s in case.sequences] == pytest.approx(q.tolist())
    drawn = dts.decode(case.lm, PROMPT, method=Sampling(3000), batch_size=100, **options)
    counts = dict.fromkeys(case.sequences, 0)
    for rollout in drawn.rollouts:
        counts[drawn.tree.tokens(rollout.leaf)] += 1
    members = np.array([counts[s] for s in case.sequences]) * case.inside
    assert total_variation(members / members.sum(), q) < 0.05 < total_variation(q, case.target(0.0))


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_the_tree_comes_to_the_target_and_masks_do_not(scale):
    case = CASE.among(0.3, seed=3)
    few, many = (distances(case, rollouts, scale, seed=0) for rollouts in (8, 130))
    assert set(many) == {"maxent", "particle filter", "weighted samples", "asap", "mask"}
    assert many["maxent"][0] < 1e-9 < few["maxent"][0] and abs(many["maxent"][1]) < 1e-9
    assert many["mask"][0] == few["mask"][0] > 0.05
    assert many["asap"][0] < 0.05
    assert all(0 <= found[0] <= 1 and found[2] <= few["maxent"][2] for found in few.values())


def test_rejection_that_found_no_member_says_so_and_knows_what_it_ruled_out():
    case = CASE.among(0.03, seed=1)
    result = dts.decode(case.lm, PROMPT, reward=case.reward, method=Sampling(1), max_new_tokens=4, seed=4)
    distribution, log_z = case.weighted_samples(result, 4.0)
    seen = np.array([s == result.tree.tokens(result.rollouts[0].leaf) for s in case.sequences])
    left = np.where(seen, 0.0, np.exp(case.masked))
    assert log_z == -math.inf and distribution == pytest.approx(left / left.sum())


def test_coverage_counts_intervals_of_these_seeds():
    case = CASE.among(0.3, seed=3)
    assert coverage(case, 300, 0.0, range(3)) == (3, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_the_command_prints_a_language(capsys, monkeypatch):
    options = ["--instances", "1", "--vocab-size", "4", "--horizon", "4", "--budgets", "8"]
    assert main(["--scale", "0", "--mass", "0.3", *options]) == 0
    printed = capsys.readouterr().out
    assert "share of p, members: 0." in printed and "asap" in printed and "mask" in printed
    with pytest.raises(SystemExit):
        main(["--mass", "1.5", *options])
    assert "--mass 1.5 must be above 0" in capsys.readouterr().err
    monkeypatch.setattr(instances, "TRIES", 3)
    with pytest.raises(SystemExit):
        main(["--mass", "1e-9", *options])
    assert "mass=1e-09: none of 3 random languages" in capsys.readouterr().err
