"""What a reward costs: counted where it is asked, limited by a budget, and paid once for each text."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from test_exactness import PROMPT, instance

import dts
from dts.models.table import TableModel, random_logits
from dts.results import Usage
from dts.rewards import Finished
from dts.search import METHODS, Beam, BestOfN, Budget, Greedy, MaxEnt, ParticleFilter, Sampling
from dts.search.scoring import Scoring

LM = TableModel(random_logits(5, seed=3), 5, eos=0)


class Asked:
    """A function of the text that keeps what it was asked, in order."""

    __name__ = "asked"

    def __init__(self, seconds=lambda: None):
        self.texts, self._seconds = [], seconds

    def __call__(self, text: str) -> float:
        self.texts.append(text)
        self._seconds()
        return (text.count("3") - text.count("1")) / 4


class OfIds(dts.Reward):
    """Looks at the token ids, and counts as tokens of its model what it reads."""

    name = "of-ids"

    def __init__(self):
        self.asked, self.tokens = [], 0

    def finish(self, states, finished):
        self.asked += [done.token_ids for done in finished]
        self.tokens += sum(len(done.token_ids) for done in finished)
        return [float(sum(done.token_ids)) for done in finished]


def decode(method, reward, seed=0, **options):
    return dts.decode(LM, (1, 2), method=method, reward=reward, max_new_tokens=4, seed=seed, **options)


METHOD = {name: make(12, 4.0) for name, make in METHODS.items()} | {
    "maxent-star": MaxEnt(12, search="best", values=None),
    "online": MaxEnt(12, values="online", lookahead=3), "online best": MaxEnt(12, search="best", values="online"),
    "beam of steps": Beam(8, reward_weight=2.0, segment=2), "particles by steps": ParticleFilter(12, segment=2),
    "moved particles": ParticleFilter(12, segment=1, ess_threshold=1.0, moves=2),
}  # fmt: skip
# Those that ask about unfinished texts, too.
UNFINISHED = ("online", "online best", "beam-guided", "beam of steps", "particles by steps", "moved particles")
EVERY = pytest.mark.parametrize("method", METHOD.values(), ids=METHOD)


# The cache and the count --------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("stop", [(), ("3 2 ",)])
def test_every_text_is_scored_once_and_counted_once(method, stop):
    asked = Asked()
    result = decode(method, asked, stop=stop)
    assert max(Counter(asked.texts).values()) == 1
    assert result.usage.reward_calls == len(asked.texts) >= len({c.text for c in result.completions})
    assert all(c.reward == Asked()(c.text) for c in result.completions)
    assert result.usage.reward_tokens == 0


def test_texts_that_differ_in_tokens_only_are_asked_again_where_the_reward_sees_tokens():
    """A text that ends by itself and one that a stop ends may read alike."""
    asked, of_ids = Asked(), OfIds()
    same = decode(BestOfN(60), asked, stop="3 ")
    result = decode(BestOfN(60), of_ids, stop="3 ")
    alike = Counter(c.text for c in result.completions)
    assert max(alike.values()) == 2
    assert result.usage.reward_calls == len(of_ids.asked) == len(set(of_ids.asked)) == len(result.completions)
    assert same.usage.reward_calls == len(alike)


def test_a_reward_that_is_not_deterministic_keeps_its_first_answer():
    numbers = itertools.count()
    result = decode(BestOfN(60), lambda text: float(next(numbers)))
    of_text = {}
    for rollout in result.rollouts:
        assert of_text.setdefault(rollout.text, rollout.reward) == rollout.reward
    assert sorted(of_text.values()) == [float(i) for i in range(result.usage.reward_calls)]


def test_the_scores_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr("dts.search.scoring.REMEMBERED", 2)
    asked, usage = Asked(), Usage()
    scoring = Scoring(dts.as_reward(asked), usage)
    for texts in ("abc", "c", "b", "a", "a"):
        assert scoring.finish([None] * len(texts), [Finished((), text) for text in texts], 9.0) == [0.0] * len(texts)
    assert asked.texts == [*"abc", "a"] and usage.reward_calls == 4


class FailsOnHalf(Asked):
    """Fails on some unfinished texts, as a parser would."""

    def __call__(self, text: str) -> float:
        value = super().__call__(text)
        if text.endswith("2 ") and len(text) < 8:
            raise ValueError("half a text")
        return value


GUIDED = MaxEnt(16, search="best", values="online", lookahead=4)


def test_a_text_that_is_not_finished_is_asked_about_once_although_the_reward_fails_on_some():
    asked = FailsOnHalf()
    result = decode(GUIDED, asked)
    assert max(Counter(asked.texts).values()) == 1 and any(text.endswith("2 ") for text in asked.texts)
    assert result.usage.reward_calls == len(asked.texts)


@pytest.mark.parametrize("workers", [None, 4])
def test_texts_of_a_batch_that_failed_are_asked_about_alone_and_counted_again(workers):
    one, batches = FailsOnHalf(), []

    def of_list(texts: list[str]) -> list[float]:
        batches.append(list(texts))
        return [one(text) for text in texts]

    reward = dts.as_reward(of_list) if workers is None else dts.as_reward(FailsOnHalf(), workers=workers)
    result = decode(GUIDED, reward)
    if workers is None:
        given = Counter(itertools.chain.from_iterable(batches))
        assert result.usage.reward_calls == given.total() and 2 in given.values() and max(given.values()) == 2
    assert result.completions == decode(GUIDED, FailsOnHalf()).completions
    limited = decode(GUIDED, reward, budget=Budget(reward_calls=9))
    assert limited.partial and limited.usage.reward_calls <= 9


def test_a_reward_that_fails_on_every_second_text_is_soon_asked_about_few_together():
    batches, usage = [], Usage()

    def of_list(texts: list[str]) -> list[float]:
        batches.append(len(texts))
        return [1 / int(text) for text in texts]  # fails on "0"

    scoring = Scoring(dts.as_reward(of_list), usage)
    for start in range(0, 64, 16):
        texts = [
            Finished((start, i), f"{(start + i) * (i % 2)}" if i % 2 else "0" * (start + i + 1)) for i in range(16)
        ]
        found = scoring.so_far([None] * 16, texts, 999.0)
        assert found == [pytest.approx(1 / (start + i)) if i % 2 else pytest.approx(math.nan, nan_ok=True)
                         for i in range(16)]  # fmt: skip
    assert usage.reward_calls == sum(batches) < 64 + 16 + 8 + 4 + 2 + 64
    assert max(batches[-16:]) <= 2


@pytest.mark.parametrize("calls", range(1, 40))
def test_whatever_a_budget_ends_a_text_that_was_scored_is_a_rollout(calls):
    method = MaxEnt(12, values="online", lookahead=3)
    result = decode(method, Asked(), batch_size=4, budget=Budget(reward_calls=calls))
    assert set(result.tree.leaves()) == {rollout.leaf for rollout in result.rollouts}
    assert len(result.completions) == len(set(result.tree.leaves()))


def test_no_reward_costs_nothing():
    usage = decode(Sampling(9), None, budget=Budget(reward_calls=1)).usage
    assert (usage.reward_calls, usage.reward_tokens) == (0, 0)


# Tokens and seconds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda reward: reward, lambda reward: dts.with_timeout(reward, 60), lambda reward: dts.clip(reward, 0, 9),
    lambda reward: dts.weighted_sum([(reward, 0.5), (lambda text: 1.0, 1.0), (reward, 0.5)]),
])  # fmt: skip
def test_the_tokens_of_a_rewards_model_are_counted_inside_other_rewards_too(wrap):
    of_ids = OfIds()
    of_ids.tokens = 1000  # of earlier searches
    result = decode(BestOfN(20), wrap(of_ids))
    assert result.usage.reward_tokens == of_ids.tokens - 1000 == sum(map(len, of_ids.asked)) > 0


def test_a_function_may_count_its_models_tokens():
    def reward(text: str) -> float:
        reward.tokens += len(text.split())
        return 0.0

    reward.tokens = 0
    result = decode(BestOfN(20), reward)
    assert result.usage.reward_tokens == sum(len(text.split()) for text in {r.text for r in result.rollouts}) > 0


@pytest.fixture
def clock(monkeypatch):
    now = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_seconds_are_those_inside_the_reward(clock):
    class Slow(dts.Reward):
        name, monotone = "slow", True

        def _takes(self, seconds, states):
            clock[0] += seconds
            return [0.0] * len(states)

        def start(self, context):
            clock[0] += 1000.0

        def extend(self, states, tokens):
            return self._takes(100.0, states)

        def earned(self, states):
            return self._takes(0.0, states)

        def finish(self, states, finished):
            return self._takes(1.0, states)

    def slow_model(ids, row):
        clock[0] += 7.0
        return row

    result = decode(Greedy(), Slow(), logits_processor=slow_model)
    length = result.rollouts[0].length
    assert result.usage.reward_seconds == 1000.0 + 100.0 * length + 1.0
    assert result.usage.seconds == result.usage.reward_seconds + 7.0 * length


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHOD)
@pytest.mark.parametrize("calls", [1, 2, 5, 11])
def test_a_budget_of_calls_is_never_exceeded_and_what_was_found_is_kept(name, calls):
    method = METHOD[name]
    asked, free = Asked(), Asked()
    result, whole = decode(method, asked, budget=Budget(reward_calls=calls)), decode(method, free)
    assert result.usage.reward_calls == len(asked.texts) <= calls
    assert asked.texts == free.texts[: len(asked.texts)]  # the same search until it ends
    assert [r.text for r in result.rollouts] == [r.text for r in whole.rollouts[: len(result.rollouts)]]
    if name in UNFINISHED:
        assert result.partial or len(result.rollouts) == len(whole.rollouts)
    else:
        assert result.partial == (len(result.rollouts) < len(whole.rollouts))
        assert len(asked.texts) == min(calls, len(free.texts))
    assert {r.leaf for r in result.rollouts} <= set(result.tree.leaves())
    if result.estimate is not None and result.rollouts and not result.log_weights:
        assert {r.leaf for r in result.rollouts} <= set(result.shares)


def test_of_paths_that_end_together_those_are_scored_that_the_budget_allows():
    asked = Asked()
    result = decode(BestOfN(30), asked, batch_size=16, budget=Budget(reward_calls=3))
    assert len(asked.texts) == 3 == len({r.text for r in result.rollouts}) and result.partial
    assert result.best.reward == max(map(Asked(), asked.texts))


def test_a_budget_that_is_just_enough_cuts_nothing():
    free = decode(BestOfN(12), Asked())
    result = decode(BestOfN(12), Asked(), budget=Budget(reward_calls=free.usage.reward_calls))
    assert not result.partial and result.completions == free.completions


def test_draws_after_a_search_know_no_limit():
    asked = Asked()
    result = decode(MaxEnt(12), asked, budget=Budget(reward_calls=3))
    assert len(result.sample(20)) == 20 and result.usage.reward_calls == len(asked.texts) > 3


def test_tokens_and_seconds_of_a_reward_end_a_search_after_the_batch_that_reaches_the_limit(clock):
    of_ids = OfIds()
    result = decode(BestOfN(30), of_ids, batch_size=1, budget=Budget(reward_tokens=7))
    spent = list(itertools.accumulate(map(len, of_ids.asked)))
    assert result.partial and spent[-2] < 7 <= spent[-1] == result.usage.reward_tokens

    def half_a_second():
        clock[0] += 0.5

    asked = Asked(half_a_second)
    result = decode(BestOfN(30), asked, batch_size=1, budget=Budget(reward_seconds=1.2))
    assert result.partial and result.usage.reward_seconds == 1.5 and len(asked.texts) == 3


@pytest.mark.parametrize("option", ["reward_calls", "reward_tokens", "reward_seconds"])
@pytest.mark.parametrize("value", [0, -1, "1", True])
def test_limits_on_a_reward_are_numbers_above_0(option, value):
    with pytest.raises(dts.UsageError, match=f"{option}={value!r} is not allowed"):
        Budget(**{option: value})


# Many prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, Budget(reward_calls=4)])
@pytest.mark.parametrize("method", [BestOfN(9), MaxEnt(9, values="online", lookahead=2)])
def test_many_prompts_cost_what_each_costs_alone(method, budget):
    prompts = [(1, 2), (2,), (3, 1, 1), (1, 4)]
    options = {"method": method, "max_new_tokens": 4, "budget": budget}
    together, apart = Asked(), Asked()
    many = list(dts.decode_many(LM, prompts, reward=together, batch_size=8, width=2, **options))
    alone = [dts.decode(LM, prompt, reward=apart, batch_size=2, seed=i, **options) for i, prompt in enumerate(prompts)]
    assert Counter(together.texts) == Counter(apart.texts)
    for one, same in zip(many, alone, strict=True):
        assert one.completions == same.completions and one.partial == same.partial
        assert one.usage.reward_calls == same.usage.reward_calls <= (budget.reward_calls if budget else 99)


def test_a_total_budget_counts_the_calls_of_all_prompts():
    options = {"method": Sampling(4), "max_new_tokens": 3, "batch_size": 8, "width": 4}
    of_ids = OfIds()
    total = Budget(reward_calls=9)
    found = list(dts.decode_many(LM, [(1,)] * 9, reward=of_ids, total_budget=total, **options))
    assert 9 <= sum(r.usage.reward_calls for r in found) == len(of_ids.asked) < 9 + 8 and len(found) < 9


def test_the_costs_of_a_known_case():
    """Three words, at most two of them, without an end: the nine texts, their three beginnings, nothing twice."""
    case = instance(0, vocab_size=3, horizon=2, eos=None)
    asked = Asked()
    result = dts.decode(case.lm, PROMPT, reward=asked, method=MaxEnt(50, values="online"), max_new_tokens=2)
    assert len(result.completions) == 9 and result.usage.reward_calls == len(asked.texts) == 3 + 9
    plain = dts.decode(case.lm, PROMPT, reward=Asked(), method=MaxEnt(50), max_new_tokens=2)
    assert plain.usage.reward_calls == 9
