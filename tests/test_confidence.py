"""Confidence: a mean log-probability as a reward, as the weight of a vote, and as a reason to stop early."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import LOG

import dts
from dts.models.table import TableModel, random_logits
from dts.rewards import Finished
from dts.search import BestOfN, Budget, EarlyEnd, MaxEnt, Sampling, SelfConsistency

GROUPS = ("lowest", "bottom", "tail", "mean")


# The measure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "lowest", "bottom", "tail"), [
    (2, -4.0, -4.0, -1.5),  # groups -1.5, -3.5, -4, -1.5
    (4, -2.75, -2.75, -2.5),  # groups -2.75, -2.5
    (1, -5.0, -5.0, 0.0), (5, -2.2, -2.2, -2.2), (99, -2.2, -2.2, -2.2),
])  # fmt: skip
def test_groups_of_five_tokens(window, lowest, bottom, tail):
    log_probs = (-1.0, -2.0, -5.0, -3.0, 0.0)
    found = [dts.Confidence(group, window)(log_probs) for group in GROUPS]
    assert found == pytest.approx([lowest, bottom, tail, -2.2])


def test_the_bottom_is_a_tenth_of_the_groups():
    log_probs = [-float(i) for i in (3, 9, 1, 8, 2, 2, 2, 2, 2, 2, 2)]
    assert dts.Confidence("bottom", 1)(log_probs) == -8.5  # 2 of 11 groups
    assert dts.Confidence("bottom", 1)(log_probs[:10]) == -9.0  # 1 of 10


def test_what_is_not_said_is_the_lowest_of_sixteen_tokens():
    confidence = dts.Confidence()
    assert (confidence.name, confidence.window) == ("confidence-lowest", 16) and EarlyEnd() == EarlyEnd(16, 0.9, 16)


@pytest.mark.parametrize(("options", "message"), [
    ({"group": "highest"}, "group='highest' is not known; give 'lowest'"), ({"window": 0}, "window=0 is not allowed"),
    ({"window": True}, "window=True"), ({"window": 2.0}, "window=2.0"),
])  # fmt: skip
def test_groups_that_do_not_exist_are_refused(options, message):
    with pytest.raises(dts.UsageError, match=message):
        dts.Confidence(**options)


# As a reward --------------------------------------------------------------------------------------------------------


LM = TableModel(random_logits(5, seed=3), 5, eos=0)


@pytest.mark.parametrize("method", [BestOfN(20), MaxEnt(20), MaxEnt(20, search="best", values="online")])
@pytest.mark.parametrize("group", GROUPS)
def test_a_search_for_confidence_is_given_the_log_probabilities(method, group):
    reward = dts.Confidence(group, window=2)
    result = dts.decode(LM, (1, 2), method=method, reward=reward, max_new_tokens=4, stop="3 3 ", temperature=0.7)
    assert len(result.completions) > 5 and set(result.tree.upper) == {0.0}
    for completion in result.completions:
        assert completion.reward == reward(completion.token_logprobs) <= 0
        assert math.fsum(completion.token_logprobs) == pytest.approx(completion.logprob)


def test_a_reward_sees_the_log_probability_of_a_token_that_is_only_tried():
    seen = {}

    class Watching(dts.Reward):
        name = "watching"

        def finish(self, states, finished):
            seen.update({done.token_ids: done.token_logprobs for done in finished})
            return [0.0] * len(finished)

    method = MaxEnt(6, values="online", lookahead=5)
    result = dts.decode(LM, (1, 2), method=method, reward=Watching(), max_new_tokens=4, top_k=3)
    assert len(seen) > len(result.tree) - 1  # tokens that were tried and not drawn, too
    for tokens, log_probs in seen.items():
        for depth, (token, log_p) in enumerate(zip(tokens, log_probs, strict=True)):
            logits = LM.table((1, 2, *tokens[:depth]))
            kept = np.sort(logits)[-3:]
            assert log_p == pytest.approx(logits[token] - LOG(np.exp(kept).sum()), abs=1e-6)


def test_a_confidence_outside_a_search_is_an_error_and_inside_other_rewards_it_works():
    reward = dts.Confidence("mean")
    with pytest.raises(dts.RewardError, match="'confidence-mean' needs the log-probabilities"):
        reward.finish([None], [Finished((1,), "1 ")])
    both = dts.weighted_sum([(reward, 2.0), (lambda text: 1.0, 1.0)])
    best = dts.decode(LM, (1, 2), method=BestOfN(9), reward=both, max_new_tokens=4).best
    assert best.reward == pytest.approx(2 * best.logprob / len(best.token_ids) + 1)


# As a vote ----------------------------------------------------------------------------------------------------------


def by_prefix(rows):
    """p by the tokens after the prompt, four tokens."""
    return TableModel(lambda prefix: np.array([LOG(p) if p else -math.inf for p in rows(prefix[1:])]), 4)


def first_word(text):
    return text.split()[0]


def unsure_majority(prefix):
    """1 in 55 of 100 texts, followed by anything; 2 in 45, followed by 2 for sure."""
    if not prefix:
        return 0, 0.55, 0.45, 0
    return (0.25,) * 4 if prefix[0] == 1 else (0, 0, 1, 0)


def test_a_vote_counts_the_geometric_mean_of_p():
    lm = by_prefix(unsure_majority)
    options = {"max_new_tokens": 2, "seed": 1}
    plain = dts.decode(lm, (1,), method=SelfConsistency(60, first_word), **options)
    ones = sum(first_word(r.text) == "1" for r in plain.rollouts)
    assert ones > 30 and first_word(plain.best.text) == "1"
    weights = {  # of a vote for 1 and for 2, by hand
        "lowest": (0.25, 0.45), "bottom": (0.25, 0.45), "tail": (0.25, 1.0),
        "mean": (math.sqrt(0.55 * 0.25), math.sqrt(0.45)),
    }  # fmt: skip
    for group, (one, two) in weights.items():
        method = SelfConsistency(60, first_word, confidence=dts.Confidence(group, 1))
        assert method._weights(_Searched(plain)) == pytest.approx(
            [one if first_word(r.text) == "1" else two for r in plain.rollouts]
        )
        found = dts.decode(lm, (1,), method=method, **options)
        assert [r.text for r in found.rollouts] == [r.text for r in plain.rollouts]  # the same draws
        assert first_word(found.best.text) == ("2" if two * (60 - ones) > one * ones else "1")
    assert 0.45 * (60 - ones) > 0.25 * ones  # so that the lines above say something
    assert SelfConsistency(3, confidence="tail").name == "confidence-vote"


class _Searched:
    """What the weights of votes are computed from."""

    def __init__(self, result):
        self.tree, self.rollouts = result.tree, result.rollouts


@pytest.mark.parametrize(("options", "message"), [
    ({"confidence": "median"}, "group='median' is not known"), ({"confidence": 1}, "group=1 is not known"),
    ({"confidence": ""}, "group='' is not known"), ({"confidence": "tail", "weighted": True}, "give one of them"),
    ({"early_end": 3}, "early_end=3 is not allowed"),
])  # fmt: skip
def test_votes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(dts.UsageError, match=message):
        SelfConsistency(9, **options)


# As a reason to stop ------------------------------------------------------------------------------------------------


def sure_or_not(prefix):
    """1 1 1 ... for sure, or 2 and then anything."""
    if not prefix:
        return 0, 0.5, 0.5, 0
    return (0, 1, 0, 0) if prefix[0] == 1 else (0.25,) * 4


SURE, UNSURE = LOG(0.5) / 2, LOG(0.25)  # the least confident two tokens in a row of either text
AT_TWO = (LOG(0.5) + LOG(0.25)) / 2  # the first two tokens of an unsure one
OPTIONS = {"max_new_tokens": 6, "seed": 12, "batch_size": 1}


def kinds(rollouts):
    return [first_word(r.text) for r in rollouts]


@pytest.mark.parametrize(("keep", "depth"), [
    (1.0, None),  # the threshold is the least confident of the first four
    (0.607, 3),  # -1.2: not yet below after two tokens
    (0.5, 2),  # halfway between the second and the third of the four
    (0.0, 2),  # the most confident: the sure ones are as confident, so they stay
])  # fmt: skip
@pytest.mark.parametrize("method", [Sampling, BestOfN, SelfConsistency])
def test_a_sample_ends_where_it_is_less_confident_than_the_first_ones(method, keep, depth):
    lm = by_prefix(sure_or_not)
    plain = dts.decode(lm, (1,), method=method(20), **OPTIONS)
    assert sorted(kinds(plain.rollouts[:4])) == ["1", "1", "2", "2"]
    threshold = {1.0: UNSURE, 0.607: UNSURE + 0.179 * (SURE - UNSURE), 0.5: (SURE + UNSURE) / 2, 0.0: SURE}[keep]
    assert (threshold > AT_TWO) == (depth == 2) and (threshold > UNSURE) == (depth is not None)
    ended = dts.decode(lm, (1,), method=method(20, early_end=EarlyEnd(4, keep, window=2)), **OPTIONS)
    if depth is None:
        assert ended.completions == plain.completions and ended.cut == ()
        assert [r.text for r in ended.rollouts] == [r.text for r in plain.rollouts]
        return
    kept = [r for i, r in enumerate(plain.rollouts) if i < 4 or first_word(r.text) == "1"]
    assert [r.text for r in ended.rollouts] == [r.text for r in kept] and len(kept) < 20
    assert len(ended.cut) == 20 - len(kept) and not ended.partial  # all n samples were begun
    assert [ended.tree.depth[node] for node in ended.cut] == [depth] * len(ended.cut)
    whole = [plain.tree.tokens(r.leaf)[:depth] for r in plain.rollouts[4:] if first_word(r.text) == "2"]
    assert [ended.tree.tokens(node) for node in ended.cut] == whole  # the same draws up to there
    assert set(ended.tree.leaves()) == {r.leaf for r in ended.rollouts} and plain.cut == ()
    # Every prefix that was extended, once, and nothing after an early end.
    texts = [ended.tree.tokens(r.leaf) for r in ended.rollouts] + whole
    assert ended.usage.forwarded_tokens == 1 + len({text[:i] for text in texts for i in range(1, len(text))})


def test_a_batch_that_is_finished_before_the_threshold_is_known_is_kept():
    lm = by_prefix(sure_or_not)
    method = BestOfN(20, early_end=EarlyEnd(4, 0.0, window=2))
    wide = dts.decode(lm, (1,), method=method, **OPTIONS | {"batch_size": 20})
    assert len(wide.rollouts) == 20 and wide.cut == ()
    never = dts.decode(lm, (1,), method=BestOfN(20, early_end=EarlyEnd(21, 0.0)), **OPTIONS)
    assert len(never.rollouts) == 20 and never.cut == ()


def test_samples_that_end_early_do_not_vote():
    lm = by_prefix(sure_or_not)
    early = EarlyEnd(4, 0.0, window=2)
    answer = {"1": "sure", "2": "unsure"}
    plain = dts.decode(lm, (1,), method=SelfConsistency(40, lambda t: answer[first_word(t)]), **OPTIONS)
    method = SelfConsistency(40, lambda t: answer[first_word(t)], early_end=early)
    ended = dts.decode(lm, (1,), method=method, **OPTIONS)
    assert kinds(plain.rollouts).count("2") > 20 and first_word(plain.best.text) == "2"
    assert kinds(ended.rollouts).count("2") <= 4 and first_word(ended.best.text) == "1"


def test_early_ends_go_with_budgets_and_with_many_prompts(tiny_lm):
    method = BestOfN(12, early_end=EarlyEnd(3, 0.5, window=2))
    whole = dts.decode(by_prefix(sure_or_not), (1,), method=method, **OPTIONS)
    less = Budget(tokens=whole.usage.forwarded_tokens - 1)
    short = dts.decode(by_prefix(sure_or_not), (1,), method=method, budget=less, **OPTIONS)
    assert short.partial and short.usage.forwarded_tokens <= less.tokens and whole.cut and not whole.partial
    assert short.cut == whole.cut[: len(short.cut)]
    prompts = ["Once", "The", "A b c"]
    options = {"method": method, "max_new_tokens": 8}
    many = list(dts.decode_many(tiny_lm, prompts, batch_size=4, width=2, **options))
    for seed, (prompt, one) in enumerate(zip(prompts, many, strict=True)):
        alone = dts.decode(tiny_lm, prompt, batch_size=2, seed=seed, **options)
        assert [r.text for r in one.rollouts] == [r.text for r in alone.rollouts] and one.cut == alone.cut
        assert len(one.rollouts) + len(one.cut) == 12
    assert sum(len(one.cut) for one in many) > 0


@pytest.mark.parametrize("options", [{"after": 0}, {"after": 1.5}, {"keep": -0.1}, {"keep": 1.1}, {"window": 0}])
def test_early_ends_that_make_no_sense_are_refused(options):
    with pytest.raises(dts.UsageError, match=f"{next(iter(options))}="):
        EarlyEnd(**options)
