"""Rewards with a time limit."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dts
from dts.models.table import TableModel
from dts.rewards import Finished
from dts.search import METHODS
from dts.settings import Budget
from dts.timeout import with_timeout


class Asked:
    """Says what it was asked; monotone, with a promise."""

    name, monotone = "asked", True

    def start(self, context):
        return ("start", context)

    def extend(self, states, tokens):
        if tokens == [13]:
            raise KeyError("unlucky")
        return [(state, token) for state, token in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [1.0] * len(states)

    def upper(self, states):
        return [3.0] * len(states)

    def promise(self, states):
        return [2.0] * len(states)

    def finish(self, states, finished):
        return [float(len(done.text)) for done in finished]


def test_a_timed_reward_is_the_reward():
    timed = with_timeout(Asked(), 60)
    assert (timed.name, timed.monotone, timed.start("c")) == ("asked", True, ("start", "c"))
    assert timed.extend([0, 1], [5, 6]) == [(0, 5), (1, 6)] and timed.extend([], []) == []
    assert (timed.earned([0]), timed.upper([0, 0]), timed.promise([0])) == ([1.0], [3.0, 3.0], [2.0])
    assert timed.finish([0], [Finished((1,), "abc")]) == [3.0] and timed.finish([], []) == []
    with pytest.raises(KeyError, match="unlucky"):
        timed.extend([0], [13])


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, True, "1", None])
def test_a_timeout_is_a_number_of_seconds(seconds):
    with pytest.raises(dts.UsageError, match="reward timeout"):
        with_timeout(Asked(), seconds)


@pytest.mark.parametrize("name", METHODS)
def test_a_search_that_ran_out_of_time_says_so(name, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dts.search.search.time.perf_counter", lambda: now[0])

    def at_each_call(ids, row):
        now[0] += 0.5
        return row

    def partial(seconds):
        now[0] = 0.0
        lm = TableModel(lambda prefix: np.zeros(4), 4)
        return dts.decode(lm, (1,), method=METHODS[name](4, 1.0), max_new_tokens=3, budget=Budget(seconds=seconds),
                          logits_processor=at_each_call).partial  # fmt: skip

    assert (partial(0.5), partial(1.0), partial(60)) == (True, True, False)
