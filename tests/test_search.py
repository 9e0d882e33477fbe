"""One search: what goes wrong is named, and what is recorded is what happened."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import LOG, chain, table

import dts
from dts.models.table import TableModel
from dts.rewards import Context, TerminalReward
from dts.search import BestOfN, Greedy, Search
from dts.settings import Budget, Decoding
from dts.tree import ROOT


@pytest.mark.parametrize("bad", [[math.nan, 0, 0], [0, 0, math.nan], [0, math.inf, 0], [-math.inf] * 3])
def test_logits_that_are_no_distribution_are_named(bad):
    lm = table({(): [-99.0, -99.0, 0.0], (2,): bad})
    with pytest.raises(dts.ModelError, match=r"broken gave .* at node 1 of the tree, 1 tokens after .* after '1 2 '"):
        dts.decode(lm, (1,), method=BestOfN(3), max_new_tokens=2)


def test_processors_see_the_ids_and_one_row_and_may_write_to_it():
    seen = []

    def forbid(ids, row):
        seen.append(ids.tolist())
        row[:, 0] = -math.inf
        return row

    result = dts.decode(table({}), "1", method=BestOfN(30), max_new_tokens=2, logits_processor=forbid)
    assert all(len(c.token_ids) == 2 and 0 not in c.token_ids for c in result.completions)
    assert result.best.logprob == pytest.approx(2 * LOG(0.5))
    assert sorted({tuple(ids) for (ids,) in seen}) == [(1,), (1, 1), (1, 2)] and len(seen) == 3


class Tight(TableModel):
    """No memory for more than the prompt."""

    def open(self, *arguments, **options):
        raise self.table(())


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), dts.UnavailableError), (MemoryError(), dts.UnavailableError),
    (RuntimeError("not enough memory: you tried"), dts.UnavailableError), (RuntimeError("shape"), RuntimeError),
    (dts.RewardError("out of memory"), dts.RewardError), (ValueError("out of memory"), ValueError),
])  # fmt: skip
def test_only_lack_of_memory_is_called_so(error, expected):
    with pytest.raises(expected) as raised:
        dts.decode(Tight(lambda prefix: error, 3), (1, 2), method=BestOfN(7), max_new_tokens=1, batch_size=5)
    if expected is dts.UnavailableError:
        assert "out of memory with a prompt of 2 tokens and 5 paths" in str(raised.value)
        assert "lower batch_size" in str(raised.value) and "\n" not in str(raised.value)
    else:
        assert raised.value is error


def test_no_uniform_number_draws_what_has_no_probability():
    """Not at 0, where the first tokens have none, and not at the end, where the last ones have none."""
    rows = [-math.inf, 0.0, LOG(3.0), -math.inf]
    lm = TableModel(lambda prefix: np.array(rows), 4)
    context, decoding = Context("", (1,), lm.decode), Decoding(max_new_tokens=2)

    def drawn(*uniforms):
        session = lm.open((1,), batch_size=4, max_new_tokens=2)
        search = Search(
            lm, session, context, TerminalReward(lambda c, f: [0.0] * len(f), "none"), decoding, Budget(), 4
        )
        nodes = search.draw([ROOT] * len(uniforms), uniforms)
        return [search.tree.token[node] for node in nodes], [math.exp(x) for x in search.tree.log_unexplored[:1]]

    assert drawn(0.0) == ([1], [pytest.approx(0.75)])
    assert drawn(0.24, 0.26, 1 - 1e-16) == ([1, 2, 2], [0.0])
    assert drawn(0.9, 0.8) == ([2, 2], [pytest.approx(0.25)])


def test_a_limit_that_is_just_reached_is_kept(monkeypatch):
    """The prompt and two more tokens are forwarded for three tokens."""
    for budget, ended in ((3, False), (2, True)):
        result = dts.decode(chain(1, 2, 3), (1,), method=Greedy(), max_new_tokens=3, budget=Budget(tokens=budget))
        assert (result.partial, len(result.rollouts)) == (ended, 0 if ended else 1)
        assert result.usage.forwarded_tokens == (2 if ended else 3)
    now = [0.0]
    monkeypatch.setattr("dts.search.search.time.perf_counter", lambda: now[0])

    def at_each_token(ids, row):
        now[0] += 0.5
        return row

    for seconds, finished in ((1.0, 0), (1.1, 1), (0.5, 0)):
        now[0] = 7.0
        result = dts.decode(chain(1, 2, 3), (1,), method=Greedy(), max_new_tokens=3, budget=Budget(seconds=seconds),
                            logits_processor=at_each_token)  # fmt: skip
        assert len(result.rollouts) == finished, seconds
    assert now[0] == 7.5 and result.usage.seconds == 0.5


def test_the_earliest_stop_string_ends_the_text():
    def text(*stop):
        result = dts.decode(chain(1, 2, 3, 1, 2), (1,), method=Greedy(), max_new_tokens=5, stop=stop)
        return result.best.text, result.best.finished_by, result.rollouts[0].length

    assert text("3 ", "2 3 ") == text("2 3 ", "3 ") == ("1 ", "stop", 3)
    assert text("3 1 ") == ("1 2 ", "stop", 4) and text("1 2 ") == ("", "stop", 2)
    assert text("9") == ("1 2 3 1 2 ", "length", 5)
    ended = dts.decode(chain(1, 0), (1,), method=Greedy(), max_new_tokens=2).best
    assert (ended.text, ended.token_ids, ended.finished_by) == ("1 ", (1, 0), "eos")


def test_what_a_rollout_records():
    seen = []
    lm = TableModel(lambda prefix: np.array([0.0, 1.0, 2.0]), 3, eos=0)
    result = dts.decode(lm, (1, 2), method=BestOfN(12), reward=lambda text: len(text) % 5, max_new_tokens=4, seed=2,
                        batch_size=3, on_rollout=seen.append)  # fmt: skip
    best = -math.inf
    for index, rollout in enumerate(seen):
        best = max(best, rollout.reward)
        assert (rollout.index, rollout.best_so_far) == (index, best) and rollout.reward == len(rollout.text) % 5
        tokens = result.tree.tokens(rollout.leaf)
        assert rollout.length == len(tokens) and rollout.text == lm.decode(tokens)
    assert seen == result.rollouts and result.best.reward == best
    assert seen[-1].nodes == len(result.tree) and seen[-1].tokens == result.usage.forwarded_tokens
    assert result.usage.generated_tokens == len(result.tree) - 1
