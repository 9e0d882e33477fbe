"""The reward interface: adapters, combinators, checks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch

import dts
from dts.rewards import Context, Finished, TerminalReward, checked_finish, promised

CONTEXT = Context("prompt", (1, 2), lambda ids: "".join(chr(i) for i in ids))


def finish(reward, *texts):
    done = [Finished(tuple(map(ord, text)), text) for text in texts]
    state = reward.start(CONTEXT)
    return checked_finish(reward, [state] * len(done), done)


class Count:
    """+1 for each 'a', at most 3: monotone, with both bounds. The state is the number of them."""

    name, monotone = "count", True

    def start(self, context):
        return 0

    def extend(self, states, tokens):
        return [state + (token == ord("a")) for state, token in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [float(min(state, 3)) for state in states]

    def upper(self, states):
        return [3.0] * len(states)

    def finish(self, states, finished):
        return self.earned(states)


class Falling(Count):
    def earned(self, states):
        return [float(-state) for state in states]


def walk(reward, text):
    state, earned, upper = reward.start(CONTEXT), [], []
    for token in map(ord, text):
        (state,) = reward.extend([state], [token])
        earned += reward.earned([state])
        upper += reward.upper([state])
    return earned, upper, reward.finish([state], [Finished(tuple(map(ord, text)), text)])[0]


def test_text_functions_single_and_batched():
    assert finish(dts.as_reward(lambda text: len(text)), "ab", "c") == [2.0, 1.0]
    assert finish(dts.as_reward(lambda texts: [len(t) for t in texts]), "ab", "c") == [2.0, 1.0]
    assert finish(dts.as_reward(lambda texts: np.array([len(t) for t in texts])), "ab") == [2.0]

    def annotated(texts: list[str]) -> list[float]:
        assert isinstance(texts, list)
        return [float(len(t)) for t in texts]

    reward = dts.as_reward(annotated)
    assert reward.name == "annotated" and finish(reward, "abc") == [3.0]


def of_iterable(texts: Iterable[str]):
    return (float(len(text)) for text in strings_in_a_list(texts))


def of_tuple(texts: tuple[str, ...]):
    return [len(text) for text in strings_in_a_list(texts)]


def of_list(texts: list[str]):
    return torch.tensor([len(text) for text in strings_in_a_list(texts)])


def of_anything(texts):
    return [float(len(text)) for text in strings_in_a_list(texts)]


def of_anything_as_array(texts):
    return np.array([len(text) for text in texts])


def strings_in_a_list(texts):
    assert isinstance(texts, list)
    return texts


@pytest.mark.parametrize("score", [of_iterable, of_tuple, of_list, of_anything, of_anything_as_array])
@pytest.mark.parametrize("texts", [("abc",), ("a", "bcdef"), ("",)])
def test_a_function_of_several_texts_is_recognised_with_and_without_annotations(score, texts):
    assert finish(dts.as_reward(score), *texts) == [float(len(text)) for text in texts]


@pytest.mark.parametrize("wrap", [float, np.float32, torch.tensor, lambda x: torch.tensor([float(x)]),
                                  lambda x: np.array([[float(x)]])])  # fmt: skip
def test_a_number_for_one_text_may_come_as_a_scalar_or_in_an_array_of_one(wrap):
    assert finish(dts.as_reward(lambda text: wrap(text.count("a"))), "aaaaa", "ab") == [5.0, 1.0]
    assert finish(dts.as_reward(lambda text: wrap(text.count("a"))), "a") == [1.0]


def test_who_says_so_need_not_be_found_out():
    calls = []

    def score(texts):
        calls.append(texts)
        return [1.0] * len(texts)

    assert finish(dts.as_reward(score, batched=True), "a", "b") == [1.0, 1.0] and calls == [["a", "b"]]
    counting = dts.as_reward(lambda text: calls.append(text) or 2.0)
    assert finish(counting, "c", "d") == [2.0, 2.0] and calls[1:] == ["c", "d"]  # no text is scored twice


async def later(text):
    return 1.0


@pytest.mark.parametrize(("score", "message"), [
    (lambda text: later(text), "returned a coroutine"), (lambda text: None, "returned None, not a number"),
    (lambda text: 10**400, "not a number that fits a float"), (lambda text: 1j, "not a number"),
    (lambda text: {"a": 1.0}, "not a number"), (lambda text: [text], "not a number"),
])  # fmt: skip
def test_what_is_no_number_is_named(score, message):
    with pytest.raises(dts.RewardError, match=message):
        finish(dts.as_reward(score), "some text")


def test_an_error_of_the_function_itself_is_the_one_that_is_shown():
    with pytest.raises(dts.RewardError, match="KeyError: 'some text'"):
        finish(dts.as_reward(lambda text: {}[text]), "some text")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("batched", [False, True])
def test_an_async_function_that_would_end_the_process_fails_and_later_calls_are_answered(error, batched):
    async def leaves(given):
        raise error("x")

    with pytest.raises(dts.RewardError, match=f"{error.__name__}: x"):
        finish(dts.as_reward(leaves, batched=batched), "some text")
    assert finish(dts.as_reward(later), "a") == [1.0]


def test_a_class_is_no_reward():
    with pytest.raises(dts.UsageError, match=r"reward=Count is a class; give an instance of it: Count\(\.\.\.\)"):
        dts.as_reward(Count)


def test_a_subclass_knows_nothing_before_the_end_unless_it_says_so():
    class Fixed(dts.Reward):
        name = "fixed"

        def finish(self, states, finished):
            return [3.0] * len(finished)

    reward = Fixed()
    assert dts.as_reward(reward) is reward and walk(reward, "ab") == ([-math.inf] * 2, [math.inf] * 2, 3.0)
    assert promised(reward, [None]) == [0.0]


def test_trl_functions_get_what_they_name():
    seen = {}

    def scorer(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions, **kwargs)
        return [1.0] * len(prompts)

    assert finish(dts.as_reward(scorer), "hi", "yo") == [1.0, 1.0]
    ids = [[104, 105], [121, 111]]
    assert seen == {"prompts": ["prompt"] * 2, "completions": ["hi", "yo"], "completion_ids": ids}
    assert finish(dts.as_reward(lambda completions: [len(c) for c in completions]), "hi") == [2.0]
    chat = Context([{"role": "user", "content": "q"}], (1,), CONTEXT.decode)
    reward = dts.as_reward(scorer)
    reward.finish([reward.start(chat)], [Finished((5,), "a")])
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}]]


def test_reward_objects_pass_through_and_anything_else_is_refused():
    count = Count()
    assert dts.as_reward(count) is count
    with pytest.raises(dts.UsageError, match="'text'"):
        dts.as_reward("text")


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0, 2.0], "2 values for 1"), ([float("nan")], "nan"), (["x"], "'x', not a number"), ([None], "None")],
)
def test_wrong_answers_name_the_reward_and_the_completion(returned, message):
    reward = TerminalReward(lambda context, finished: returned, "wrong")
    with pytest.raises(dts.RewardError, match=message) as error:
        finish(reward, "some text")
    assert "'wrong'" in str(error.value) and "some text" in str(error.value)


def test_combinators():
    length = dts.as_reward(lambda text: float(len(text)), name="length")
    assert finish(dts.weighted_sum([(length, 2.0), (lambda text: 1.0, 0.5)]), "abc") == [6.5]
    assert finish(dts.minimum(length, lambda text: 2.0), "abc", "a") == [2.0, 1.0]
    assert finish(dts.clip(length, 0.0, 2.0), "abc", "a") == [2.0, 1.0]
    assert finish(dts.gate(length, by=lambda text: 0.5), "ab") == [1.0]
    assert dts.weighted_sum([(length, 2.0)]).name == "sum(length)"
    with pytest.raises(dts.UsageError, match="negate"):
        dts.weighted_sum([(length, -1.0)])
    with pytest.raises(dts.RewardError, match="gate needs"):
        finish(dts.gate(length, by=lambda text: 2.0), "ab")


def test_bounds_of_combinations_hold_on_every_prefix():
    combined = dts.weighted_sum([(Count(), 0.5), (dts.clip(lambda text: len(text) / 10, 0.0, 1.0), 2.0)])
    earned, upper, final = walk(combined, "banana")
    assert earned == [0.0, 0.5, 0.5, 1.0, 1.0, 1.5] and upper == [3.5] * 6
    assert final == pytest.approx(1.5 + 1.2)
    assert combined.monotone is False and dts.minimum(Count(), Count()).monotone is True
    earned, upper, final = walk(dts.gate(Count(), by=lambda text: 0.5), "aab")
    assert earned == [0.0] * 3 and upper == [3.0] * 3 and final == 1.0


def test_check_monotone_raises_where_the_promise_breaks():
    assert walk(dts.CheckMonotone(Count()), "banana") == walk(Count(), "banana")
    with pytest.raises(dts.RewardError, match="not monotone"):
        walk(dts.CheckMonotone(Falling()), "ba")

    class Stingy(Count):
        def finish(self, states, finished):
            return [0.0] * len(states)

    with pytest.raises(dts.RewardError, match="outside its own bounds"):
        walk(dts.CheckMonotone(Stingy()), "aa")


def test_what_a_prefix_is_promised():
    class Promising(Count):
        def promise(self, states):
            return [state + 0.5 for state in states]

    states = [0, 2]
    assert promised(Promising(), states) == [0.5, 2.5] and promised(Count(), states) == [0.0, 2.0]
    assert promised(dts.CheckMonotone(Promising()), states) == [0.5, 2.5]
    both = dts.weighted_sum({Promising(): 2.0, Count(): 1.0})
    assert both.monotone and promised(both, [(0, 0), (2, 1)]) == [1.0, 6.0]
    assert promised(dts.as_reward(lambda text: 1.0), [None]) == [0.0] and promised(Count(), []) == []

    class Unknown(Count):
        def earned(self, states):
            return [-math.inf] * len(states)

    assert promised(Unknown(), [1]) == [0.0]


def test_combinations_that_make_no_sense_are_refused():
    with pytest.raises(dts.UsageError, match="at least one part"):
        dts.minimum()
    for low, high in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(dts.UsageError, match=f"low={low}, high={high}"):
            dts.clip(Count(), low, high)
    for weight in (-0.1, math.inf, math.nan):
        with pytest.raises(dts.UsageError, match="finite and >= 0"):
            dts.weighted_sum([(Count(), weight)])
    assert finish(dts.weighted_sum([(Count(), 0.0), (lambda text: 2.0, 1.0)]), "a") == [2.0]


def test_gates_on_unknown_and_on_closed():
    opened, closed = (dts.as_reward(lambda text, by=by: by) for by in (1.0, 0.0))
    gate = dts.gate(Count(), by=opened)
    assert gate.name == "gate(count, <lambda>)" and not gate.monotone
    assert gate.upper([(2, None)]) == [3.0] and gate.earned([(2, None)]) == [0.0]
    assert finish(dts.gate(lambda text: 5.0, by=closed), "a") == [0.0]
    endless = dts.gate(dts.as_reward(lambda text: 1.0), by=closed)
    assert endless.upper([(None, None)]) == [math.inf]

    class Shut(Count):
        def upper(self, states):
            return [0.0] * len(states)

    assert dts.gate(lambda text: 1.0, by=Shut()).upper([(None, 0)]) == [0.0]  # whatever the reward may be
    for value in (-0.1, 1.1):
        with pytest.raises(dts.RewardError, match="gate needs"):
            finish(dts.gate(lambda text: 1.0, by=lambda text, value=value: value), "a")
    with pytest.raises(dts.RewardError, match="gate needs"):
        finish(dts.gate(lambda text: -1.0, by=opened), "a")


def test_terminal_rewards_know_nothing_before_the_end():
    earned, upper, final = walk(dts.as_reward(lambda text: 7.0), "ab")
    assert earned == [-math.inf] * 2 and upper == [math.inf] * 2 and final == 7.0


def test_earned_reward_is_used_at_the_prefix_where_it_was_earned():
    """A prefix that has just earned something is valued by it before any rollout ended below it."""
    from dts.softvalue import SoftValues
    from dts.tree import Tree

    tree = Tree()
    tree.earned[0], tree.upper[0] = 0.0, 3.0
    values = SoftValues(tree, reward_scale=2.0)
    plain, lucky = (tree.add(0, token, math.log(0.25), math.log(rest)) for token, rest in ((1, 0.75), (2, 0.5)))
    tree.earned[plain], tree.earned[lucky] = 0.0, 1.0
    tree.upper[plain] = tree.upper[lucky] = 3.0
    values.grow()
    assert values.value(lucky) - values.value(plain) == pytest.approx(1.0)
