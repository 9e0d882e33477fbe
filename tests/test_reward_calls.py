"""Slow functions as rewards: threads, processes and async functions change how long it takes, nothing else."""

from __future__ import annotations

import asyncio
import functools
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from test_costs import LM, Asked, decode
from test_rewards import finish

import dts
from dts.search import BestOfN, MaxEnt

TEXTS = tuple("abcdefgh")


class Reversed:
    """Values come in the reverse order of the texts: each waits for the one of the text after it."""

    def __init__(self):
        self.done = [threading.Event() for _ in range(len(TEXTS) + 1)]
        self.done[-1].set()
        self.order = []

    def __call__(self, text: str) -> float:
        place = TEXTS.index(text)
        assert self.done[place + 1].wait(60)
        self.order.append(text)
        self.done[place].set()
        return float(place)


def place(text: str) -> float:
    return float(TEXTS.index(text))


@pytest.mark.parametrize("workers", [8, 20, ThreadPoolExecutor(8)])
def test_values_keep_the_order_of_the_texts_whatever_ends_first(workers):
    reward = Reversed()
    assert finish(dts.as_reward(reward, workers=workers), *TEXTS) == [float(i) for i in range(8)]
    assert reward.order == list(reversed(TEXTS))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_so_many_texts_are_scored_at_a_time_and_no_more(workers):
    together, lock, under_way, most = threading.Barrier(workers), threading.Lock(), set(), []

    def reward(text: str) -> float:
        with lock:
            under_way.add(text)
            most.append(len(under_way))
        together.wait(60)  # passes only with so many at once
        with lock:
            under_way.remove(text)
        together.wait(60)
        return 0.0

    assert finish(dts.as_reward(reward, workers=workers), *TEXTS[:6]) == [0.0] * 6
    assert max(most) == workers


def test_processes_score_texts():
    with ProcessPoolExecutor(1) as pool:
        assert finish(dts.as_reward(place, workers=pool), *TEXTS) == [float(i) for i in range(8)]
        with pytest.raises(dts.RewardError, match=r"reward 'place' raised ValueError.* on completion 'z'"):
            finish(dts.as_reward(place, workers=pool), "a", "z", "y")


class AsyncReversed:
    """The same for async functions."""

    def __init__(self):
        self.done, self.order = {}, []

    async def __call__(self, text: str) -> float:
        events = self.done
        here, after = (events.setdefault(i, asyncio.Event()) for i in (TEXTS.index(text), TEXTS.index(text) + 1))
        if text != TEXTS[-1]:
            await asyncio.wait_for(after.wait(), 60)
        self.order.append(text)
        here.set()
        return float(TEXTS.index(text))


def test_an_async_function_is_called_for_all_texts_at_once():
    reward = AsyncReversed()
    assert finish(dts.as_reward(reward), *TEXTS) == [float(i) for i in range(8)]
    assert reward.order == list(reversed(TEXTS))


@pytest.mark.parametrize("workers", [1, 3, None])
def test_an_async_function_is_called_for_so_many_texts_at_a_time(workers):
    under_way, most, full = set(), [], asyncio.Event()

    async def reward(text):
        under_way.add(text)
        most.append(len(under_way))
        if len(under_way) == (workers or len(TEXTS)):
            full.set()
        await asyncio.wait_for(full.wait(), 60)
        under_way.remove(text)
        return 1.0

    assert finish(dts.as_reward(reward, workers=workers), *TEXTS) == [1.0] * 8
    assert max(most) == (workers or len(TEXTS))


def test_an_async_function_scores_inside_a_running_event_loop():
    """As in a notebook."""

    async def cell():
        return finish(dts.as_reward(AsyncReversed()), *TEXTS)

    assert asyncio.run(cell()) == [float(i) for i in range(8)]


def test_an_async_function_keeps_one_event_loop():
    """Clients of async libraries keep connections that belong to the loop they were made in."""
    loops = set()

    async def reward(text):
        loops.add(asyncio.get_running_loop())
        return 0.0

    finish(dts.as_reward(reward), "a", "b")
    finish(dts.as_reward(reward, workers=1), "a", "b")
    assert len(loops) == 1


async def of_list(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


async def of_trl(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def of_one(text, add=0.0):
    return len(text) + add


@pytest.mark.parametrize(("reward", "added"), [
    (of_list, 0.0), (of_trl, 0.0), (of_one, 0.0), (functools.partial(of_one, add=1.0), 1.0),
])  # fmt: skip
def test_async_functions_of_every_kind_are_rewards(reward, added):
    assert finish(dts.as_reward(reward, "async"), "ab", "c") == [2.0 + added, 1.0 + added]


async def async_place(text):
    return place(text)


async def late_places(text):
    """The first to fail is not the first text to fail."""
    if text == "z":
        await asyncio.sleep(0)
    return place(text)


@pytest.mark.parametrize("reward", [
    dts.as_reward(place, "it"), dts.as_reward(place, "it", workers=1), dts.as_reward(place, "it", workers=8),
    dts.as_reward(async_place, "it"), dts.as_reward(late_places, "it"), dts.as_reward(late_places, "it", workers=1),
])  # fmt: skip
def test_an_error_names_the_first_text_that_fails(reward):
    with pytest.raises(dts.RewardError, match=r"reward 'it' raised ValueError.* on completion 'z'"):
        finish(reward, "a", "b", "z", "c", "y")


def test_where_one_text_fails_those_that_have_not_begun_are_left_out():
    asked, failed = [], threading.Event()

    def reward(text: str) -> float:
        asked.append(text)
        if text == "a":
            raise ValueError("no")
        assert failed.wait(60)  # whoever has a text is busy until the error is out
        return 0.0

    with pytest.raises(dts.RewardError, match="'a'"):
        finish(dts.as_reward(reward, workers=2), *TEXTS)
    failed.set()
    for thread in threading.enumerate():
        if thread.name == "reward":
            thread.join(60)
    assert set(asked) <= set("abc")


@pytest.mark.parametrize("method", [BestOfN(20), MaxEnt(20, values="online", lookahead=4)])
def test_a_search_is_the_same_with_one_worker_and_with_eight_and_with_async(method):
    async def later(text):
        await asyncio.sleep(0)
        return Asked()(text)

    rewards = [dts.as_reward(Asked()), *(dts.as_reward(Asked(), workers=n) for n in (1, 8)), dts.as_reward(later)]
    first, *others = [decode(method, reward) for reward in rewards]
    assert len(first.completions) > 5
    for other in others:
        assert other.completions == first.completions
        assert [(r.leaf, r.reward, r.tokens) for r in other.rollouts] == [
            (r.leaf, r.reward, r.tokens) for r in first.rollouts
        ]
        assert other.usage.reward_calls == first.usage.reward_calls


def test_a_timeout_ends_the_wait_for_workers_that_hang():
    hang = threading.Event()

    def reward(text: str) -> float:
        hang.wait(60)
        return 0.0

    with pytest.raises(dts.RewardError, match="took longer"):
        finish(dts.with_timeout(dts.as_reward(reward, workers=2), 0.01), "a", "b")
    hang.set()


@pytest.mark.parametrize(("reward", "options", "message"), [
    (place, {"workers": 0}, "workers=0 is not allowed"), (place, {"workers": True}, "workers=True is not allowed"),
    (place, {"workers": "4"}, "workers='4' is not allowed"), (of_list, {"workers": 2}, "'of_list' takes a list"),
    (place, {"workers": 2, "batched": True}, "'place' takes a list"), (of_trl, {"workers": 2}, "'of_trl' takes a list"),
    (of_one, {"workers": ThreadPoolExecutor(1)}, "cannot run the async function 'of_one'"),
    (dts.as_reward(place), {"workers": 2}, "is a reward object"),
])  # fmt: skip
def test_workers_that_cannot_be_used_are_refused(reward, options, message):
    with pytest.raises(dts.UsageError, match=message):
        dts.as_reward(reward, **options)


def test_many_prompts_share_a_reward_with_workers():
    options = {"method": BestOfN(6), "max_new_tokens": 4, "batch_size": 8, "width": 2}
    plain, slow = (
        [r.completions for r in dts.decode_many(LM, [(1,), (2,), (3,)], reward=reward, **options)]
        for reward in (Asked(), dts.as_reward(Asked(), workers=4))
    )
    assert plain == slow
