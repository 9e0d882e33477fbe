"""Searches on an engine that completes: the same distributions as on a model of steps, whatever the tails are like."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest
import torch
from toys import Paid, UpTo

import dts
from dts.evaluation.studies.exact import PROMPT, instance, total_variation
from dts.lm import Tail
from dts.models.engines.steps import Stepwise
from dts.models.engines.tails import EngineModel, TailSession
from dts.models.table import TableModel, random_logits
from dts.search import MCTS, Beam, BestOfN, Greedy, MaxEnt, ParticleFilter, Sampling
from dts.search.readings import _after_drafts

V, H = 5, 4
CASE = instance(3, vocab_size=4, horizon=3)  # 85 sequences


WHOLE = 1000  # tokens of a tail: more than any text has


def engine(lm=CASE.lm, *, top=2, segment=WHOLE, horizon=H):
    return EngineModel(Stepwise(lm, max_new_tokens=horizon), lm, "engine", top=top, segment=segment)


@pytest.mark.parametrize(("top", "segment"), [(2, WHOLE), (1, 2), (4, 1)])
def test_samples_have_the_models_distribution(top, segment):
    """One sample a search, so each is made of drafts, and of draws among unlisted tokens."""
    lm, draws = engine(top=top, segment=segment), 300
    seen = collections.Counter(
        dts.decode(lm, PROMPT, method=Sampling(1), max_new_tokens=3, seed=seed).best.token_ids for seed in range(draws)
    )
    expected = draws * np.exp(CASE.log_p)
    counts = np.array([seen[sequence] for sequence in CASE.sequences])
    often = expected > 4
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 < often.sum() + 4 * math.sqrt(2 * often.sum())


@pytest.mark.parametrize("top", [1, 3])
def test_samples_that_are_drawn_together_are_independent(top):
    """Paths that wait at the same node each have a tail of their own, also after a token that another has drawn."""
    lm, searches, n = engine(top=top), 80, 5
    seen, pairs = collections.Counter(), 0
    for seed in range(searches):
        result = dts.decode(lm, PROMPT, method=Sampling(n), max_new_tokens=3, seed=seed, batch_size=n)
        own = collections.Counter(rollout.leaf for rollout in result.rollouts)
        seen.update(tuple(result.tree.tokens(rollout.leaf)) for rollout in result.rollouts)
        pairs += sum(count * (count - 1) // 2 for count in own.values())
    p = np.exp(CASE.log_p)
    expected, counts = searches * n * p, np.array([seen[sequence] for sequence in CASE.sequences])
    often = expected > 4
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 < often.sum() + 4 * math.sqrt(2 * often.sum())
    equal, tries = (p**2).sum(), searches * n * (n - 1) / 2
    assert abs(pairs / tries - equal) < 4 * math.sqrt(equal / tries)


def test_samples_that_begin_alike_reach_the_engine_in_one_wave():
    """The likeliest first token has most of the mass, so nearly all paths wait after it."""
    lm = TableModel(lambda prefix: np.array([0.0, 6.0, 0.0, 0.0, 0.0]), 5, eos=None)
    made, sizes = engine(lm, segment=None, horizon=12), []
    complete = made.engine.complete
    made.engine.complete = lambda requests: sizes.append(len(requests)) or complete(requests)
    result = dts.decode(made, [1], method=BestOfN(8), max_new_tokens=12, batch_size=8, seed=0)
    assert sizes == [1, 8] and len(result.rollouts) == 8
    assert result.usage.recomputed_tokens == 0  # this engine computes nothing twice


def test_kept_and_replaced_drafts_together_are_draws_from_the_weights():
    rng = np.random.default_rng(0)
    p = torch.tensor(rng.dirichlet(np.ones(6)))
    weights = p * torch.tensor([1.0, 0.0, 5.0, 0.3, 1.0, 40.0])
    grid = torch.linspace(0, 1, 4001, dtype=torch.double)[:-1, None] + 1 / 8000
    found = torch.zeros(6, dtype=torch.double)
    for draft in range(6):
        tokens = _after_drafts(p.repeat(4000, 1), weights.repeat(4000, 1), grid, torch.full((4000, 1), draft))[:, 0]
        found += p[draft] * torch.bincount(tokens, minlength=6) / 4000
    assert found.numpy() == pytest.approx((weights / weights.sum()).numpy(), abs=1e-3)


@pytest.mark.parametrize("segment", [WHOLE, None, 2])
@pytest.mark.parametrize("top", [1, 3])
def test_the_whole_space_is_finished_once_each_and_leaves_nothing_to_estimate(top, segment):
    lm = engine(top=top, segment=segment)
    result = dts.decode(lm, PROMPT, reward=CASE.reward, method=MaxEnt(10_000, reward_scale=3.0), max_new_tokens=3)
    assert sorted(c.token_ids for c in result.completions) == sorted(CASE.sequences)
    assert total_variation(CASE.distribution(result.values), CASE.target(3.0)) < 1e-6
    assert result.log_z == pytest.approx(3.0 * CASE.value(3.0), abs=1e-6)


def test_the_estimate_of_z_is_unbiased_with_look_ahead():
    """Kept and replaced drafts are the choices that the estimate's weights are made of."""
    lm = TableModel(random_logits(4, 5), 4, eos=0)
    exact = dts.decode(lm, [1], reward=Paid(2), method=MaxEnt(10_000, reward_scale=1.0), max_new_tokens=3).log_z
    estimates = [
        math.exp(dts.decode(
            engine(lm, top=2, segment=2), [1], reward=Paid(2), max_new_tokens=3, seed=seed,
            method=MaxEnt(4, reward_scale=1.0, greedy=False, lookahead=3),
        ).log_z)
        for seed in range(120)
    ]  # fmt: skip
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - math.exp(exact)) < 3.5 * error and error < 0.1 * math.exp(exact)


@pytest.mark.parametrize(
    "method",
    [
        MaxEnt(8), MaxEnt(8, search="best"), MaxEnt(8, search="best", bonus=1.0), BestOfN(8), Sampling(8), MCTS(8),
        MCTS(8, puct=False), ParticleFilter(8, segment=2), Beam(4, segment=2, reward_weight=1.0), Greedy(),
    ],
    ids=lambda method: method.name,
)  # fmt: skip
def test_every_method_that_draws_reports_the_models_own_probabilities(method):
    result = dts.decode(engine(segment=2), PROMPT, reward=CASE.reward, method=method, max_new_tokens=3, seed=1)
    exact = dict(zip(CASE.sequences, CASE.log_p, strict=True))
    assert result.completions
    for one in result.completions:
        assert one.logprob == pytest.approx(exact[one.token_ids], abs=1e-9)
        assert one.reward == CASE.reward(CASE.lm.decode(one.token_ids))


def test_greedy_takes_the_likeliest_tokens_though_few_are_listed():
    both = [dts.decode(lm, PROMPT, method=Greedy(), max_new_tokens=3) for lm in (CASE.lm, engine(top=1))]
    assert both[0].best.token_ids == both[1].best.token_ids


def test_a_search_asks_once_for_each_text_that_leaves_the_tree_and_counts_what_the_engine_computed():
    lm = TableModel(random_logits(50, 1), 50, eos=None)
    made = engine(lm, top=50, horizon=8)
    result = dts.decode(made, [1], method=BestOfN(6), max_new_tokens=8, seed=2)
    opened = made.engine._prompts[(1,)].session.usage
    assert result.usage.forwarded_tokens == opened.forwarded_tokens
    assert result.usage.model_calls == 1 + len({r.leaf for r in result.rollouts})
    assert result.usage.recomputed_tokens == 0
    assert result.usage.unique_tokens == result.usage.forwarded_tokens  # no tail was left


def test_a_tail_that_the_search_leaves_is_counted_as_forwarded_only():
    lm = TableModel(random_logits(6, 1), 6, eos=None)
    made = engine(lm, top=6)
    result = dts.decode(made, [1], reward=UpTo(2, 4, 4), method=MaxEnt(6, search="best"), max_new_tokens=4, seed=0)
    assert result.usage.forwarded_tokens == made.engine._prompts[(1,)].session.usage.forwarded_tokens
    assert result.usage.forwarded_tokens > result.usage.unique_tokens
    assert result.best.reward == 1.0


def noted(complete, limits):
    """The same, and the tokens that each request asks for are added to `limits`."""
    return lambda requests: limits.extend(request.limit for request in requests) or complete(requests)


def test_tails_become_as_long_as_searches_walk_on_them():
    lm = TableModel(random_logits(40, 1), 40, eos=None)
    asked = {}
    for method, reward in ((BestOfN(12), None), (MaxEnt(9, search="best"), Paid(2))):
        made = engine(lm, top=40, segment=None, horizon=64)
        made.engine.complete = noted(made.engine.complete, asked.setdefault(method.name, []))
        dts.decode(made, [1], method=method, reward=reward, max_new_tokens=64, batch_size=4, seed=0)
    assert asked["best-of-n"][1] == 63  # whole after the first token
    assert set(asked["maxent-star"][1:]) >= {8, 4} and np.mean(asked["maxent-star"]) < 8


def test_many_prompts_get_what_each_gets_alone():
    lm = TableModel(random_logits(V, 3), V, eos=0)
    prompts = [[1], [2], [3, 1], [4]]
    options = {"reward": Paid(2), "method": MaxEnt(12, search="best"), "max_new_tokens": H}
    together = list(dts.decode_many(engine(lm), prompts, width=3, batch_size=6, seed=5, **options))
    for index, (prompt, one) in enumerate(zip(prompts, together, strict=True)):
        alone = dts.decode(engine(lm), prompt, batch_size=3, seed=5 + index, **options)
        assert [r.text for r in one.rollouts] == [r.text for r in alone.rollouts]
        assert one.usage.forwarded_tokens == alone.usage.forwarded_tokens


def test_many_prompts_reach_the_engine_together():
    lm = TableModel(random_logits(V, 3), V, eos=None)
    made, sizes = engine(lm), []
    complete = made.engine.complete
    made.engine.complete = lambda requests: sizes.append(len(requests)) or complete(requests)
    list(dts.decode_many(made, [[1], [2], [3]], method=Sampling(2), width=2, batch_size=6, max_new_tokens=4))
    assert sizes[0] == 3 and max(sizes[1:]) > 3


def test_draws_from_the_estimate_are_the_same_for_the_same_seed():
    result = dts.decode(engine(segment=2), PROMPT, reward=CASE.reward, method=MaxEnt(4), max_new_tokens=3, seed=1)
    draws = [[c.token_ids for c in result.sample(20, seed=7)] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) > 1


# ---- what an engine cannot do ----


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"top_k": 2}, "top_k=2"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"min_new_tokens": 1}, "min_new_tokens=1"),
        ({"logits_processor": lambda ids, logits: logits}, "logits_processor="),
        ({"method": MaxEnt(4, power=2.0)}, "p(x)^2"),
        ({"method": MaxEnt(4, search="best", order="target")}, "order='target'"),
        ({"method": Beam(2)}, "method=Beam"),
    ],
)
def test_what_needs_all_probabilities_is_refused_before_any_request(options, named):
    made = engine()
    made.engine.complete = None
    for call in (dts.decode, lambda lm, prompt, **rest: list(dts.decode_many(lm, [prompt], **rest))):
        with pytest.raises(dts.UsageError) as caught:
            call(made, PROMPT, **{"method": BestOfN(2), "max_new_tokens": 3, **options})
        assert named in str(caught.value) and "load the model itself" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_same_settings_are_allowed_on_a_model_of_steps():
    assert dts.decode(CASE.lm, PROMPT, method=Beam(2), max_new_tokens=3).completions


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (Tail((9,), ({9: -0.1},), 1), "beyond the 4"),
        (Tail((1,), ({2: -0.1},), 1), "lack the drawn id 1"),
        (Tail((1,), ({1: 0.5},), 1), "sum to"),
        (Tail((1,), ({1: math.nan},), 1), "sum to nan"),
        (Tail((1, 2), ({1: -1.0}, {2: -1.0}), 1), "2 tokens"),
        (Tail((), (), 1), "0 tokens"),
        (Tail((1,), (), 1), "0 rows"),
    ],
)
def test_an_answer_that_cannot_be_right_names_what_is_wrong(tail, said):
    made = engine()
    made.engine.complete = lambda requests: [tail] * len(requests)
    with pytest.raises(dts.ModelError, match=said):
        dts.decode(made, PROMPT, method=BestOfN(2), max_new_tokens=3)


@pytest.mark.parametrize(
    ("tokens", "said"), [((1,), "ended after token 1"), ((0, 1), "continues after an EOS"), ((2, 1), "had barred")]
)
def test_a_tail_that_ends_in_the_wrong_place_or_draws_what_was_barred_is_refused(tokens, said):
    from dts.lm import TailRequest

    made = engine()
    made.engine.complete = lambda requests: [Tail(tokens, tuple({token: -0.5} for token in tokens), 1)]
    with pytest.raises(dts.ModelError, match=said):
        made.complete([TailRequest((1,), (), 2, 0, 2, barred=(2,))])


@pytest.mark.parametrize("before", [True, False])
def test_log_p_of_an_unlisted_token_is_the_models_whether_the_engine_reports_it_before_or_after_the_bar(before):
    log_p = np.log([0.5, 0.3, 0.15, 0.05])
    opened = Tail((0,), ({0: log_p[0], 1: log_p[1]},), 1)
    row = dict(enumerate(log_p)) if before else {2: math.log(0.75), 3: math.log(0.25)}
    made = engine()
    made.engine.complete = lambda requests: [Tail((2,), (row,), 1)]
    session = TailSession(made, (1,), opened, 3)
    assert session.logits([0])[0].exp().numpy() == pytest.approx([0.5, 0.3, 0, 0, 0.2])
    assert session.others([0]) == [2]
    assert session.logits([0])[0].exp().numpy() == pytest.approx([0.5, 0.3, 0.15, 0, 0.05])
