"""DTS* of ten rollouts never returns less than greedy decoding does: a real model on 20 prompts of each data set."""

from __future__ import annotations

import pytest

import dts
from dts.evaluation.tasks import load_task
from dts.search import Greedy, MaxEnt

pytestmark = pytest.mark.minutes


@pytest.mark.parametrize("dataset", ["keyword", "har", "m4"])
@pytest.mark.parametrize("order", ["reward", "target"])
def test_nothing_less_than_greedy_is_returned(smollm, dataset, order):
    task = load_task(dataset, num_samples=20)
    requests = [dts.Request(example.prompt, task.reward(example)) for example in task.examples]
    assert len(requests) == 20
    options = {"max_new_tokens": 32, "stop": task.stop, "width": 1}
    greedy = list(dts.decode_many(smollm, requests, method=Greedy(), **options))
    method = MaxEnt(10, search="best", reward_scale=16.0, order=order)
    for low, found in zip(greedy, dts.decode_many(smollm, requests, method=method, **options), strict=True):
        if order == "reward":
            assert found.best.reward >= low.best.reward
        else:
            score = [16.0 * one.reward + one.logprob for one in (found.best, low.best)]
            assert score[0] >= score[1] - 1e-3
