"""`dts.decode` over a real forward pass: what is counted is what entered the model."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import dts
from dts.evaluation.studies.instances import PROMPT, instance
from dts.search import (
    MCTS,
    METHODS,
    Beam,
    BestOfN,
    Budget,
    Greedy,
    MaxEnt,
    ParticleFilter,
    Sampling,
    SelfConsistency,
)

ALL = [
    pytest.param(MaxEnt(24, reward_scale=3.0), id="maxent"),
    pytest.param(MaxEnt(24, reward_scale=3.0, search="best"), id="maxent-star"),
    pytest.param(BestOfN(24), id="best-of-n"),
    pytest.param(Sampling(24), id="sampling"),
    pytest.param(Greedy(), id="greedy"),
    pytest.param(Beam(6), id="beam"),
    pytest.param(Beam(6, reward_weight=3.0), id="beam-guided"),
    pytest.param(Beam(8, reward_weight=3.0, segment=3, groups=2), id="beam-steps"),
    pytest.param(Beam(8, reward_weight=3.0, segment="e"), id="beam-strings"),
    pytest.param(MCTS(24), id="mcts"),
    pytest.param(MCTS(24, puct=False), id="uct"),
    pytest.param(ParticleFilter(24, reward_scale=3.0), id="particle-filter"),
    pytest.param(ParticleFilter(24, reward_scale=3.0, segment=2, entropic=True), id="entropic-particle-filter"),
    pytest.param(ParticleFilter(24, reward_scale=3.0, segment=2, ess_threshold=1.0, moves=1), id="particles-moved"),
    pytest.param(SelfConsistency(24), id="self-consistency"),
    pytest.param(SelfConsistency(24, weighted=True), id="weighted-best-of-n"),
    pytest.param(SelfConsistency(24, confidence="tail"), id="confidence-vote"),
]
PRUNES = (Beam, ParticleFilter)  # may extend a path and never finish it


def vowels(text: str) -> float:
    return sum(text.count(v) for v in "aeiou") / 10


def test_the_contract_covers_every_exported_method():
    assert {p.values[0].name for p in ALL} == {make(8, 1.0).name for make in METHODS.values()}


@pytest.mark.parametrize("method", ALL)
def test_each_token_enters_the_model_exactly_once(method, tiny_lm):
    entered = []
    hook = tiny_lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    tiny_lm.open([5, 6], batch_size=1, max_new_tokens=1)  # the architecture's self-check is not part of a search
    entered.clear()
    try:
        result = dts.decode(tiny_lm, "Time flies", reward=vowels, method=method, max_new_tokens=12, top_k=3, seed=1)
    finally:
        hook.remove()
    usage = result.usage
    # A trie rebuilt from the completions: every proper prefix was extended, so every one was forwarded, once.
    prefixes = {c.token_ids[:i] for c in result.completions for i in range(1, len(c.token_ids))}
    if isinstance(method, PRUNES):
        extended = {result.tree.tokens(n) for n in range(1, len(result.tree)) if result.tree.slot[n] >= 0}
        assert prefixes <= extended
        prefixes = extended
    assert usage.forwarded_tokens == usage.unique_tokens == sum(entered) == usage.prompt_tokens + len(prefixes)
    assert usage.model_calls == len(entered)
    assert usage.recomputed_tokens == 0


@pytest.mark.parametrize("method", ALL)
def test_completions_carry_the_models_own_log_probability(method, tiny_lm):
    result = dts.decode(tiny_lm, "Time flies", reward=vowels, method=method, max_new_tokens=6, temperature=0.7, seed=2)
    prompt = tiny_lm.encode("Time flies")
    for completion in result.completions[:5]:
        logits = tiny_lm.model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0].double() / 0.7
        steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = sum(steps[i, t].item() for i, t in enumerate(completion.token_ids))
        assert completion.logprob == pytest.approx(expected, abs=1e-4)
        assert completion.reward == vowels(completion.text)
        assert 0 not in completion.token_ids[:-1]
        assert completion.finished_by == ("eos" if completion.token_ids[-1] == 0 else "length")


@pytest.mark.parametrize("method", ALL)
def test_same_seed_same_result(method, tiny_lm):
    first, second = (
        dts.decode(tiny_lm, "Once", reward=vowels, method=method, max_new_tokens=8, seed=7) for _ in range(2)
    )
    assert first.completions == second.completions
    assert [r.reward for r in first.rollouts] == [r.reward for r in second.rollouts]


@pytest.mark.parametrize("method", ALL)
def test_rollouts_are_recorded_as_they_happen(method, tiny_lm):
    seen = []
    result = dts.decode(
        tiny_lm, "Once", reward=vowels, method=method, max_new_tokens=8, seed=7,
        on_rollout=lambda r: seen.append((r, len(seen))),
    )  # fmt: skip
    assert [r for r, _ in seen] == result.rollouts
    assert [r.index for r in result.rollouts] == list(range(len(result.rollouts)))
    assert len(result.rollouts) == (method.budget().rollouts or len(result.completions))
    best = -math.inf
    for rollout in result.rollouts:
        best = max(best, rollout.reward)
        assert rollout.best_so_far == best and 0 <= rollout.start_depth <= rollout.length
    assert result.best.reward == best or isinstance(method, SelfConsistency)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("case", ["one token", "equal rewards", "huge", "negative", "one word"])
def test_edges(method, case):
    problem = instance(1, vocab_size=1 if case == "one word" else 3, horizon=3, eos=None if case == "one word" else 0)
    rewards = {
        "one token": problem.reward,
        "one word": lambda text: 1.0,
        "equal rewards": lambda text: 0.5,
        "huge": lambda text: 1e6 * problem.reward(text),
        "negative": lambda text: -1e6 * problem.reward(text),
    }
    tokens = 1 if case == "one token" else 3
    reward = (lambda text: float(len(text))) if case == "one token" else rewards[case]
    result = dts.decode(problem.lm, PROMPT, reward=reward, method=method, max_new_tokens=tokens)
    assert math.isfinite(result.best.reward) and result.best.token_ids
    if isinstance(method, MaxEnt):
        everything = {1: 3, 3: 15}[tokens] if case != "one word" else 1
        assert len(result.completions) == min(24, everything)
        assert len({c.token_ids for c in result.completions}) == len(result.rollouts)
        assert math.isfinite(result.values.value())


@pytest.mark.parametrize("batch_size", [1, 2, 7, 32])
def test_independent_samples_follow_p_at_any_batch_size(batch_size):
    problem = instance(1, vocab_size=4, horizon=4)
    counts = {}
    for seed in range(40):
        result = dts.decode(problem.lm, PROMPT, method=Sampling(50), max_new_tokens=4, batch_size=batch_size, seed=seed)
        assert len(result.rollouts) == 50
        for rollout in result.rollouts:
            counts[rollout.text] = counts.get(rollout.text, 0) + 1
    total = 0.0
    for sequence, log_p in zip(problem.sequences, problem.log_p, strict=True):
        total += abs(counts.get(problem.lm.decode(sequence), 0) / 2000 - math.exp(log_p)) / 2
    assert total < 0.1  # a perfect sampler is at about 0.07 with 2,000 draws over these 121 sequences


def test_budgets_are_never_exceeded():
    problem = instance(0)
    for budget in (Budget(tokens=20), Budget(rollouts=5), Budget(tokens=200, rollouts=40)):
        for method in (MaxEnt(100), BestOfN(100)):
            result = dts.decode(
                problem.lm, PROMPT, reward=problem.reward, method=method, max_new_tokens=5, budget=budget
            )
            assert budget.tokens is None or result.usage.forwarded_tokens <= budget.tokens
            assert result.partial == (len(result.rollouts) < min(100, budget.rollouts or 100))
            assert budget.rollouts is None or len(result.rollouts) <= budget.rollouts


def test_p_is_what_temperature_and_truncation_make_it():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from dts.settings import Decoding

    torch.manual_seed(0)
    logits = torch.randn(5, 40) * 3
    ours = Decoding(temperature=0.8, top_k=20, top_p=0.9).probabilities(logits)
    theirs = TemperatureLogitsWarper(0.8)(None, logits)
    theirs = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(20)(None, theirs)).softmax(-1)
    assert torch.allclose(ours.float(), theirs, atol=1e-6)
    assert (ours > 0).sum() < 5 * 20


def test_truncated_search_stays_in_the_support(tiny_lm):
    result = dts.decode(tiny_lm, "Once", reward=vowels, method=MaxEnt(40), max_new_tokens=3, top_k=2, seed=0)
    assert len(result.completions) <= 2**3
    assert math.fsum(math.exp(c.logprob) for c in result.completions) == pytest.approx(1.0, abs=1e-6)


def test_min_new_tokens_and_stop_strings(tiny_lm):
    result = dts.decode(tiny_lm, "Once", method=Sampling(20), max_new_tokens=30, min_new_tokens=30)
    assert all(len(c.token_ids) == 30 and 0 not in c.token_ids for c in result.completions)
    result = dts.decode(tiny_lm, "Once", method=Sampling(40), max_new_tokens=30, stop="e")
    stopped = [c for c in result.completions if c.finished_by == "stop"]
    assert stopped and all("e" not in c.text for c in result.completions)
    assert all(chr(c.token_ids[-1] - 4) == "e" for c in stopped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0.*Greedy"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_new_tokens": 99}, "min_new_tokens=99"),
        ({"max_new_tokens": 10_000}, "exceeds the context of tiny"),
        ({"prompt": ""}, "prompt is empty"),
        ({"reward": 3}, "reward=3"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4'"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": None}, "max_new_tokens=None"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": 10**400}, "temperature=10000"),
        ({"top_k": True}, "top_k=True"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"seed": None}, "seed=None"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"batch_size": 10**20}, "batch_size=1000"),
        ({"max_kv_bytes": 0}, "max_kv_bytes=0"),
        ({"max_kv_bytes": "2 GiB"}, "max_kv_bytes='2 GiB'"),
        ({"budget": 5}, r"budget=5 is not allowed; give dts\.Budget"),
        ({"method": "greedy"}, "method='greedy' is not a method"),
        ({"method": Greedy}, "method=<class .*Greedy'> is not a method"),
        ({"on_rollout": 3}, "on_rollout=3"),
        ({"lm": "smollm2-135m"}, r"lm='smollm2-135m' is not a language model; give what dts\.load"),
    ],
)
def test_bad_settings_name_the_option_and_the_value(options, message, tiny_lm):
    arguments = {"lm": tiny_lm, "prompt": "Once", "method": Greedy(), **options}
    with pytest.raises(dts.UsageError, match=message):
        dts.decode(**arguments)


@pytest.mark.parametrize("options", [{"rollouts": "5"}, {"tokens": 2.5}, {"tokens": True}, {"seconds": "1"},
                                     {"seconds": math.nan}, {"rollouts": 0}])  # fmt: skip
def test_a_budget_of_another_type_is_refused(options):
    with pytest.raises(dts.UsageError, match=next(iter(options))):
        Budget(**options)


def test_numbers_of_other_kinds_are_numbers(tiny_lm):
    usual = dts.decode(tiny_lm, "Once", method=Sampling(3), max_new_tokens=4, top_k=20, temperature=0.5, seed=3)
    options = {"max_new_tokens": np.int64(4), "top_k": np.int32(20), "temperature": Fraction(1, 2), "seed": np.uint8(3)}
    assert dts.decode(tiny_lm, "Once", method=Sampling(3), **options).completions == usual.completions


def test_a_temperature_near_zero_takes_the_most_likely_tokens(tiny_lm):
    greedy = dts.decode(tiny_lm, "Once", method=Greedy(), max_new_tokens=6).best
    cold = dts.decode(tiny_lm, "Once", method=Sampling(3), max_new_tokens=6, temperature=1e-310)
    assert [c.token_ids for c in cold.completions] == [greedy.token_ids] and cold.best.logprob == 0.0


def test_a_builtin_may_be_a_reward(tiny_lm):
    number = dts.decode(tiny_lm, "Once", method=Greedy(), max_new_tokens=2, reward=len).best
    assert number.reward == len(number.text)
    with pytest.raises(dts.RewardError, match="int"):
        dts.decode(tiny_lm, "Once", method=Greedy(), max_new_tokens=2, reward=int)


@pytest.mark.parametrize("make", [lambda: MaxEnt(0), lambda: BestOfN(-1), lambda: MaxEnt(4, reward_scale=-1.0),
                                  lambda: MaxEnt(4, search="fast"), lambda: Sampling(2.5)])  # fmt: skip
def test_bad_methods_are_refused(make):
    with pytest.raises(dts.UsageError):
        make()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "high", ValueError("boom")])
def test_a_failing_reward_is_named_and_finished_rollouts_were_delivered(bad, tiny_lm):
    seen = []

    def grumpy(text):
        if len(seen) >= 3:
            if isinstance(bad, Exception):
                raise bad
            return bad
        return 1.0

    with pytest.raises(dts.RewardError, match="grumpy"):
        dts.decode(tiny_lm, "Once", reward=grumpy, method=BestOfN(9), max_new_tokens=4, batch_size=1,
                   on_rollout=seen.append)  # fmt: skip
    assert len(seen) == 3


def test_sample_needs_an_estimate(tiny_lm):
    with pytest.raises(RuntimeError, match="use MaxEnt"):
        dts.decode(tiny_lm, "Once", method=BestOfN(2), max_new_tokens=2).sample(1)


def test_sampled_continuations_are_counted_and_forwarded_once(tiny_lm):
    result = dts.decode(tiny_lm, "Once", reward=vowels, method=MaxEnt(6, reward_scale=1.0), max_new_tokens=10, seed=3)
    before = result.usage.forwarded_tokens
    draws = result.sample(12, seed=1)
    assert len(draws) == 12 and len(result.rollouts) == 6
    assert result.usage.forwarded_tokens == result.usage.unique_tokens > before
    assert [d.token_ids for d in draws] != [d.token_ids for d in result.sample(12, seed=2)]


def test_tree_round_trip(tiny_lm):
    result = dts.decode(tiny_lm, "Once", reward=vowels, method=MaxEnt(10), max_new_tokens=5, seed=3)
    exported = result.tree.to_dict()
    assert len(exported["parent"]) == len(result.tree) and exported["parent"][0] == -1
    walked = {result.tree.tokens(leaf): result.tree.reward[leaf] for leaf in result.tree.leaves()}
    assert walked == {c.token_ids: c.reward for c in result.completions}
    shape = result.tree.statistics()
    inner = len(set(exported["parent"])) - 1  # distinct parents, without the root's own
    assert (shape["nodes"], shape["leaves"]) == (len(result.tree), len(walked))
    assert shape["depth"] == max(map(len, walked))
    assert shape["branching"] == pytest.approx((len(result.tree) - 1) / inner)
