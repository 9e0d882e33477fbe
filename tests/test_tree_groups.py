"""Groups that share beginnings: the estimator by enumeration, the draws, and real runs."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import dts
from dts.models.table import TableModel, random_logits

pytest.importorskip("trl")
pytest.importorskip("peft")

from training_models import Interrupt, adapter, same, saved_pair, share_of_a, tiny_config, tiny_pair

from dts.training.branches import Branch, Branching, drawn_tokens, packed_draws
from dts.training.config import GRPOSettings
from dts.training.packed import tree_logits
from dts.training.run import read_history, train
from dts.training.treegroups import TreeGroups

HORIZON = 4  # bits
STATES = [s for depth in range(HORIZON) for s in itertools.product((0, 1), repeat=depth)]
INDEX = {state: index for index, state in enumerate(STATES)}
RNG = np.random.default_rng(0)
UP = {state: 1 / (1 + math.exp(-RNG.normal())) for state in STATES}  # p(1 | state)
REWARD = {x: float(RNG.normal() + sum(x)) for x in itertools.product((0, 1), repeat=HORIZON)}


def probability(tokens, before=()) -> float:
    p = 1.0
    for token in tokens:
        p *= UP[before] if token else 1 - UP[before]
        before += (token,)
    return p


def score(before, token) -> np.ndarray:
    """grad log p(token | before) by the logit of 1 at each state."""
    found = np.zeros(len(STATES))
    found[INDEX[before]] = token - UP[before]
    return found


def estimate(siblings) -> np.ndarray:
    return sum(draw.weight * draw.advantage * score(draw.before, draw.token) for draw in drawn_tokens(siblings))


def exact() -> np.ndarray:
    return sum(probability(x) * r * sum(score(x[:t], x[t]) for t in range(HORIZON)) for x, r in REWARD.items())


def outcomes(split: int | None):
    """Every branch of a root with its probability: split in two after so many tokens, or not."""
    for tokens in itertools.product((0, 1), repeat=split or HORIZON):
        p = probability(tokens)
        if split is None:
            yield p, Branch(tokens, REWARD[tokens])
            continue
        ends = [(probability(end, tokens), Branch(end, REWARD[tokens + end]))
                for end in itertools.product((0, 1), repeat=HORIZON - split)]  # fmt: skip
        for (q, one), (r, other) in itertools.product(ends, repeat=2):
            yield p * q * r, Branch(tokens, None, (one, other))


def moments(split: int | None, roots: int) -> tuple[np.ndarray, float]:
    """Mean and total variance of the estimator. Over roots it is a U-statistic of pairs (Hoeffding 1948), so that all
    pairs say all."""
    p, branches = zip(*outcomes(split), strict=True)
    p = np.array(p)
    pairs = np.array([[estimate((one, other)) for other in branches] for one in branches])  # [n, n, states]
    mean = np.einsum("i,j,ijs->s", p, p, pairs)
    first = p @ ((np.einsum("j,ijs->is", p, pairs) - mean) ** 2).sum(-1)
    second = np.einsum("i,j,ij->", p, p, ((pairs - mean) ** 2).sum(-1))
    return mean, 2 / (roots * (roots - 1)) * (2 * (roots - 2) * first + second)


def test_the_estimator_has_no_bias():
    for split in (None, 1, 2, 3):
        mean, _ = moments(split, 2)
        np.testing.assert_allclose(mean, exact(), atol=1e-12)


def test_what_all_pairs_say_of_the_variance_is_right():
    p, branches = zip(*outcomes(None), strict=True)
    mean, square = np.zeros(len(STATES)), 0.0
    for chosen in itertools.combinations_with_replacement(range(len(p)), 3):
        counts = [chosen.count(i) for i in set(chosen)]
        share = math.prod(p[i] for i in chosen) * math.factorial(3) / math.prod(map(math.factorial, counts))
        found = estimate([branches[i] for i in chosen])
        mean, square = mean + share * found, square + share * float(found @ found)
    assert square - float(mean @ mean) == pytest.approx(moments(None, 3)[1], rel=1e-9)


def test_a_group_that_shares_beginnings_has_less_variance_for_its_tokens_than_a_plain_one():
    tokens = {(None, 8): 8 * HORIZON, (None, 6): 6 * HORIZON, (2, 4): 4 * (2 + 2 * 2)}
    cost = {key: tokens[key] * moments(*key)[1] for key in tokens}
    assert tokens[2, 4] == tokens[None, 6]
    assert cost[2, 4] < 0.97 * cost[None, 6]
    assert cost[2, 4] < 1.02 * cost[None, 8]
    assert 12 * moments(2, 2)[1] > 1.1 * cost[None, 8]  # two roots are too few


def test_without_splits_it_is_grpo_with_the_mean_of_the_others():
    rewards = [1.0, 0.0, 0.5]
    drawn = list(drawn_tokens([Branch((1, 2), reward) for reward in rewards]))
    assert [draw.advantage for draw in drawn[::2]] == pytest.approx([3 / 2 * (r - 0.5) for r in rewards])
    assert {draw.weight for draw in drawn} == {1 / 3}
    equal = Branch((1,), None, (Branch((2,), 0.3), Branch((1, 1), 0.3)))
    assert all(draw.advantage == 0 for draw in drawn_tokens([equal, equal, Branch((0,), 0.3)]))


# Draws -----------------------------------------------------------------------------------------------------------


def test_paths_split_where_they_should_and_are_independent_draws():
    lm = TableModel(random_logits(3, 3), 3, eos=0)
    method = Branching(roots=2, segment=1, splits=2)
    pairs, ends = Counter(), 0
    for seed in range(400):
        result = dts.decode(lm, "1", reward=share_of_a, method=method, max_new_tokens=4, seed=seed)
        ids = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
        branches = method.branches([(row, 0.0) for row in ids])
        assert len(branches) == 2
        count = 0
        for branch in branches:
            pairs[branch.tokens[0]] += 1
            split = branch.tokens[0] != 0
            assert len(branch.tokens) == (1 if split else len(branch.tokens)) and len(branch.children) == 2 * split
            count += sum(2 if child.children else 1 for child in branch.children) if split else 1
            ends += not split
        assert count == len(ids)
        states = {row[:t] for row in ids for t in range(len(row))}
        assert result.usage.forwarded_tokens == 1 + len(states - {()})  # the prompt and each beginning once
        packed, rows = packed_draws([1], list(drawn_tokens(branches)))
        assert packed.rows == len(states) and max(rows) == packed.rows - 1
    assert ends > 50
    p = np.exp(lm.table((1,))) / np.exp(lm.table((1,))).sum()
    for token in range(3):
        assert pairs[token] / 800 == pytest.approx(p[token], abs=5 * math.sqrt(p[token] * (1 - p[token]) / 800))


def test_the_loss_has_the_gradient_of_plain_passes():
    """One packed pass with every token once, against log-probabilities of whole sequences."""
    from dts.training.polychromic import sequence_log_probs

    model, tokenizer = tiny_pair()
    lm = dts.load((model, tokenizer))
    settings = GRPOSettings(groups="tree", n_generations=4, tree_roots=2, tree_segment=2, max_completion_length=6,
                            loss_type="dr_grpo", scale_rewards="none", temperature=0.9)  # fmt: skip
    method = TreeGroups(settings, dts.as_reward(share_of_a)).method
    result = dts.decode(lm, "say ab", reward=share_of_a, method=method, max_new_tokens=6, temperature=0.9)
    ids = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
    siblings = method.branches([(row, rollout.reward) for row, rollout in zip(ids, result.rollouts, strict=True)])
    drawn = list(drawn_tokens(siblings))
    packed, rows = packed_draws(lm.encode("say ab"), drawn)
    logits = tree_logits(model, packed) / 0.9
    policy, kl, _ = TreeGroups(settings, dts.as_reward(share_of_a))._parts(logits, logits.detach(), drawn, rows)
    plain = 0.0
    for draw in drawn:
        both = sequence_log_probs(model, lm.encode("say ab"), [(*draw.before, draw.token)], 0.9)[0]
        less = sequence_log_probs(model, lm.encode("say ab"), [draw.before], 0.9)[0] if draw.before else 0.0
        plain = plain - draw.weight * draw.advantage * (both - less) / 6
    assert kl.item() == 0
    assert policy.item() == pytest.approx(plain.item(), abs=1e-5)
    parameters = list(model.parameters())
    for one, two in zip(torch.autograd.grad(policy, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


# Runs ------------------------------------------------------------------------------------------------------------

TREE = {"grpo": {"groups": "tree", "tree_roots": 2, "tree_segment": 2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved_pair(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base, tmp_path):
    return tiny_config(base, tmp_path)


@pytest.mark.parametrize("warm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(config, warm):
    changes = {**TREE, **({"checkpoint_path": str(train(config("sft", "warm", max_steps=2)))} if warm else {})}
    whole = train(config("grpo", "whole", **changes), reward=share_of_a)
    cut = config("grpo", "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(cut, reward=share_of_a, callbacks=[Interrupt(3)])
    resumed = train(cut, resume="auto", reward=share_of_a)

    def figures(folder: Path) -> list[dict]:
        return [{k: v for k, v in record.items() if "time" not in k} for record in read_history(folder)]

    assert figures(resumed) == figures(whole)
    assert same(adapter(resumed), adapter(whole))
    history = figures(whole)
    assert history[0]["kl_penalty"] == 0 and history[1]["kl_penalty"] > 0
    for record in history:
        assert record["total_loss"] == pytest.approx(record["loss"], abs=1e-4)
        assert record["sampled_tokens"] > 0 and record["avg_reward"] >= 0


def test_equal_rewards_move_nothing_from_a_warm_start_and_after_a_resume(config):
    warm = train(config("sft", "warm", max_steps=2))
    run = config("grpo", checkpoint_path=str(warm), max_steps=4, **TREE)
    with pytest.raises(KeyboardInterrupt):
        train(run, reward=lambda text: 0.5, callbacks=[Interrupt(3)])
    folder = train(run, resume="auto", reward=lambda text: 0.5)
    assert same(adapter(folder), adapter(warm))
    history = read_history(folder)
    assert len(history) == 4 and all(row["frac_reward_zero_std"] == 1 and row["kl_penalty"] == 0 for row in history)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree_roots": 1}, r"tree_roots=1 is not allowed; give a number >= 2 that doubles to n_generations=4"),
        ({"tree_roots": 3}, r"tree_roots=3 is not allowed"),
        ({"tree_segment": 5, "tree_roots": 2}, r"tree_segment=5 splits paths at 5 tokens, and they end at"),
        ({"prompts": "file"}, r"needs grpo\.prompts=distinct"),
    ],
)
def test_trees_that_cannot_be_are_refused(config, changes, message):
    with pytest.raises(dts.UsageError, match=message):
        config("grpo", grpo={"groups": "tree", **changes})
