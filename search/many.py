"""The loop over many searches: each step asks all that are under way and forwards what they ask for in one call.

Runs are asked and told, so no method knows that it has neighbours. A prompt that fails ends alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dts.errors import EngineError
from dts.lm import Batch, LanguageModel, Session
from dts.results import Result, Usage
from dts.search.method import GeneratorRun, Method, Run
from dts.search.readings import answer
from dts.search.run import conclude, next_nodes
from dts.search.search import Search
from dts.settings import Budget

PROMPT_TOKENS = 512  # of new prompts between two steps of the searches under way
LIMITED = ("forwarded_tokens", "reward_calls", "reward_tokens", "reward_seconds")  # fields of `Usage` with a budget

Ended = tuple[int, Result | Exception]  # a prompt's key and what became of it


@dataclass(frozen=True, slots=True)
class Lane:
    """One search under way."""

    search: Search
    method: Method
    run: Run
    stopped: Callable[[], bool]  # asked before each step: whether it ends with what it has found


Begin = Callable[[Session], Lane]  # starts a search once its prompt went through


class Many:
    """Searches under way over many prompts, in one batch."""

    def __init__(self, batch: Batch, total: Budget | None = None) -> None:
        """total: limits on all prompts together."""
        self._batch, self._total = batch, total or Budget()
        self._opening: dict[int, tuple[Begin, int]] = {}  # by key, with prompt tokens
        self._under_way: dict[int, Lane] = {}
        self._past, self._rollouts = Usage(), 0  # of ended searches
        self._started = time.perf_counter()
        self.spent = False  # whether the total budget is used up
        self.ended: list[Ended] = []  # in the step under way: what an interrupted step leaves

    def __len__(self) -> int:
        """Prompts in flight."""
        return len(self._opening) + len(self._under_way)

    def add(self, key: int, prompt_ids: Sequence[int], begin: Begin) -> bool:
        """Take a prompt in; False where it must wait."""
        if self._exceeded(len(prompt_ids)):
            self.spent = True
            return False
        if not self._batch.admit(key, prompt_ids):
            return False
        self._opening[key] = begin, len(prompt_ids)
        return True

    def step(self) -> list[Ended]:
        """Send new prompts as far as they go, ask every search, and forward what they ask for. Returns what ended."""
        ended, asked = self.ended, []
        self._open()
        self._read()
        for key, lane in list(self._under_way.items()):
            try:
                nodes = None if lane.stopped() else next_nodes(lane.search, lane.run)
                if nodes is None:
                    ended.append((key, self._conclude(key)))
                else:
                    asked.append((key, lane.search, nodes))
            except EngineError:
                raise
            except Exception as error:
                ended.append((key, self._drop(key, error)))
        if self._exceeded(sum(len(nodes) for _, _, nodes in asked)):
            ended += self.stop()
            asked = []
        if asked:
            slots = self._batch.extend([(search.session, *search.edges(nodes)) for _, search, nodes in asked])
            for (key, search, nodes), new in zip(asked, slots, strict=True):
                if isinstance(new, Exception):
                    ended.append((key, self._drop(key, new)))
                else:
                    search.place(nodes, new)
        self.ended = []
        return ended

    def stop(self) -> list[Ended]:
        """End every search with what it has found; prompts that have not begun are dropped."""
        self.spent = True
        for key in list(self._opening):
            self._give_up(key)
        return [(key, self._conclude(key)) for key in list(self._under_way)]

    def close(self) -> None:
        """Drop everything."""
        for key in [*self._opening, *self._under_way]:
            self._give_up(key)

    @property
    def tokens(self) -> int:
        """Forwarded by all searches so far."""
        return self._usage().forwarded_tokens

    def _usage(self) -> Usage:
        """What all searches so far have cost, as far as it can be limited."""
        return _sum([self._past, *(lane.search.usage for lane in self._under_way.values())])

    def _read(self) -> None:
        """Answer what the runs have to read before they can ask, all of them together."""
        runs = [lane.run for lane in self._under_way.values() if isinstance(lane.run, GeneratorRun)]
        while readings := [reading for run in runs if (reading := run.reading()) is not None]:
            answer(readings)

    # -- one prompt ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        for key, session in self._batch.advance(PROMPT_TOKENS if self._under_way else sys.maxsize):
            begin, _ = self._opening[key]
            try:
                if isinstance(session, Exception):
                    raise session
                self._under_way[key] = begin(session)
                del self._opening[key]
            except Exception as error:
                self.ended.append((key, self._drop(key, error)))

    def _conclude(self, key: int) -> Result | Exception:
        lane = self._under_way[key]
        try:
            result = conclude(lane.search, lane.run.outcome(), lane.method.name)
        except Exception as error:
            return self._drop(key, error)
        self._give_up(key)
        return result

    def _drop(self, key: int, error: Exception) -> Exception:
        self._give_up(key)
        return error

    def _give_up(self, key: int) -> None:
        self._opening.pop(key, None)
        lane = self._under_way.pop(key, None)
        if lane is not None:
            self._past = _sum([self._past, lane.search.usage])
            self._rollouts += len(lane.search.rollouts)
        self._batch.close(key)

    def _exceeded(self, next_tokens: int) -> bool:
        """Whether the total budget is used up, or would be exceeded by forwarding so many more."""
        rollouts = self._rollouts + sum(len(lane.search.rollouts) for lane in self._under_way.values())
        opening = sum(tokens for _, tokens in self._opening.values())
        seconds = time.perf_counter() - self._started
        return self._total.spent(self._usage(), rollouts, seconds, opening + next_tokens)


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(**{name: sum(getattr(usage, name) for usage in usages) for name in LIMITED})


def _extended(session: Session, parents: Sequence[int], tokens: Sequence[int]) -> list[int] | Exception:
    try:
        return session.extend(parents, tokens)
    except EngineError:
        raise
    except Exception as error:
        return error


class OneByOne:
    """`dts.lm.Batch` of any model: sessions that share nothing, extended one after another."""

    def __init__(self, lm: LanguageModel, *, prompts: int, width: int, max_new_tokens: int, max_kv_bytes: int | None):
        self._lm, self._prompts = lm, prompts
        self._options: dict[str, Any] = {
            "batch_size": width,
            "max_new_tokens": max_new_tokens,
            "max_kv_bytes": None if max_kv_bytes is None else max_kv_bytes // prompts,
        }
        self._waiting: dict[int, Sequence[int]] = {}
        self._open: set[int] = set()

    def admit(self, key: int, prompt_ids: Sequence[int]) -> bool:
        if len(self._waiting) + len(self._open) == self._prompts:
            return False
        self._waiting[key] = prompt_ids
        return True

    def advance(self, tokens: int) -> list[tuple[int, Session | Exception]]:
        through: list[tuple[int, Session | Exception]] = []
        while self._waiting and tokens > 0:
            key, prompt_ids = next(iter(self._waiting.items()))
            tokens -= len(prompt_ids)
            del self._waiting[key]
            self._open.add(key)
            try:
                through.append((key, self._lm.open(prompt_ids, **self._options)))
            except Exception as error:
                through.append((key, error))
        return through

    def extend(
        self, requests: Sequence[tuple[Session, Sequence[int], Sequence[int]]]
    ) -> Sequence[list[int] | Exception]:
        return [_extended(*request) for request in requests]

    def close(self, key: int) -> None:
        self._waiting.pop(key, None)
        self._open.discard(key)
