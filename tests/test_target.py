"""MaxEnt: when it stops, and how it draws from its estimate."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import dts
from dts.models.table import TableModel, TableSession
from dts.rewards import TerminalReward
from dts.search.maxent import MaxEnt


class Known(TerminalReward):
    """Always 1, and says so from the start."""

    def __init__(self) -> None:
        super().__init__(lambda context, finished: [1.0] * len(finished), "known")

    def earned(self, states):
        return [1.0] * len(states)

    upper = earned


@pytest.mark.parametrize("bonus", [None, 1.0])
def test_what_can_only_be_as_good_is_not_tried(bonus):
    """The second path finds that nothing is worth a token."""
    lm = TableModel(lambda prefix: np.zeros(4), 4)
    method = MaxEnt(9, search="best", bonus=bonus)
    result = dts.decode(lm, (1,), method=method, reward=Known(), max_new_tokens=3, batch_size=1)
    assert (len(result.rollouts), len(result.tree), result.partial) == (1, 4, False)


@pytest.mark.parametrize("search", ["sample", "best"])
def test_draws_keep_to_the_batch(search, monkeypatch):
    lm = TableModel(lambda prefix: np.zeros(6), 6)
    result = dts.decode(lm, (1,), method=MaxEnt(3, search=search), max_new_tokens=4, batch_size=2, seed=1)
    calls, tokens = result.usage.model_calls, result.usage.forwarded_tokens
    widths, extend = [], TableSession.extend
    monkeypatch.setattr(
        TableSession, "extend", lambda self, *given: widths.append(len(given[0])) or extend(self, *given)
    )
    assert len(result.sample(9, seed=3)) == 9
    assert max(widths) == 2 and sum(widths) == result.usage.forwarded_tokens - tokens
    assert len(widths) == result.usage.model_calls - calls


class Alternating:
    """Forbids the token it saw last; keeps count of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, row):
        self.calls += 1
        assert ids.shape[1] == self.calls  # a prompt of one token, then one call for each
        row[:, ids[0, -1]] = -math.inf
        return row


@pytest.mark.parametrize("processor", [Alternating(), Alternating])
def test_draws_from_a_result_keep_stops_and_processors_with_a_state_by_path(processor):
    lm = TableModel(lambda prefix: np.zeros(5), 5)
    method, seeds = MaxEnt(3, explore=1.0), range(6)
    result = dts.decode(lm, (1,), method=method, max_new_tokens=6, stop="3 2 ", logits_processor=processor, seed=2)
    for draw in (draw for seed in seeds for draw in result.sample(8, seed)):
        ids = (1, *draw.token_ids)
        assert all(a != b for a, b in itertools.pairwise(ids))
        stopped = ids[-2:] == (3, 2)
        assert (draw.finished_by == "stop") == stopped and "3 2 " not in draw.text
