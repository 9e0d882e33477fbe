"""Decodes the jobs of one model, data set and method in one batch.

The records are those of one job after another. Two things need care. A beginning that prompts share goes through the
model once; the records charge it to each search, so that they say what a search costs and not who its neighbours were.
And seconds are shared: each moment is divided equally among the searches under way, so that the times of all add up to
the time that passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dts.errors import RewardError, UsageError
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.decode_job import Described, Outcome, decoding, rollout_record, sample_seed
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.records import Job, RolloutRecord
from dts.many import Request
from dts.results import Result, Rollout, Usage

PATHS = 64  # in flight over all prompts, where --prompts-at-once is not given
ROUNDS = 8  # of all places of a batch, in one block: few enough that all methods advance together


def at_once(plan: Plan, job: Job, backend: Backend) -> int:
    """How many jobs like this one share a batch.

    One where the backend decodes one by one. One also under a bound on memory, unless the user says how many: what a
    search recomputes depends on the memory that it has for itself.
    """
    config = plan.config
    if backend.decode_many is None:
        return 1
    if config.prompts_at_once is not None:
        return config.prompts_at_once
    return 1 if config.max_kv_bytes is not None else max(1, PATHS // _width(plan, job))


def blocks(plan: Plan, jobs: Sequence[Job], backend: Backend) -> Iterator[list[Job]]:
    """Jobs of one model that can share a batch, several batches' worth: each in the order of the plan.

    Methods take turns after every block, so that an interrupted run has about the same samples of all of them.
    """
    by_data: dict[str, dict[tuple[int, int], list[Job]]] = {}
    for job in jobs:
        by_data.setdefault(job.dataset, {}).setdefault((job.seed, job.sample), []).append(job)
    for places in by_data.values():
        waiting = list(places.values())
        most = max(at_once(plan, job, backend) for job in {job.method: job for own in waiting for job in own}.values())
        size = 1 if most == 1 else ROUNDS * most
        for start in range(0, len(waiting), size):
            by_method: dict[str, list[Job]] = {}
            for job in (job for own in waiting[start : start + size] for job in own):
                by_method.setdefault(job.method, []).append(job)
            yield from by_method.values()


def share_a_batch(lm: Any, plan: Plan, block: Sequence[Job], backend: Backend) -> bool:
    """Whether a block has anything to share, and memory for the width that one search alone would have."""
    first = block[0]
    if len(block) == 1 or at_once(plan, first, backend) == 1:
        return False
    if plan.config.rollout_batch is not None:
        return True
    examples = plan.tasks[first.dataset].examples
    longest = max(len(lm.encode(examples[job.sample].prompt)) for job in block)
    room: int = lm.batch_limit(longest, plan.config.max_tokens, plan.config.max_kv_bytes)
    return room >= _width(plan, first)


class SharedClock:
    """Seconds of the searches under way: each moment is divided equally among them."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._share = 0.0  # seconds of a search that was under way all the time
        self._begun: dict[int, float] = {}  # the share when a search began

    def start(self, key: int) -> None:
        self._advance()
        self._begun[key] = self._share

    def read(self, key: int) -> float:
        self._advance()
        return self._share - self._begun[key]

    def stop(self, key: int) -> float:
        seconds = self.read(key)
        del self._begun[key]
        return seconds

    def drop(self, key: int) -> None:
        """A search that failed; it may not have begun."""
        self._advance()
        self._begun.pop(key, None)

    def _advance(self) -> None:
        now = self._now()
        if self._begun:
            self._share += (now - self._last) / len(self._begun)
        self._last = now


@dataclass
class Together:
    """The jobs of a block in one batch: an iterator over their outcomes, in the order in which they finish.

    A job that fails stops the intake: those under way finish, then its error is raised.
    """

    lm: Any
    plan: Plan
    jobs: Sequence[Job]
    backend: Backend
    on_rollout: Callable[[RolloutRecord], None] = lambda record: None
    _searches: dict[int, Described] = field(default_factory=dict)  # under way, by index of the job
    _rollouts: dict[int, list[RolloutRecord]] = field(default_factory=dict)  # of these
    _results: Any = ()
    _error: Exception | None = None
    _clock: SharedClock = field(default_factory=SharedClock)

    def __iter__(self) -> Iterator[Outcome]:
        first = self.jobs[0]
        width, count = _width(self.plan, first), at_once(self.plan, first, self.backend)
        assert self.backend.decode_many is not None
        self._results = self.backend.decode_many(
            self.lm, self._requests(), method=self.plan.methods[first.method], width=width, batch_size=width * count,
            as_completed=True, errors="return", on_rollout=self._take, **decoding(self.plan, first),
        )  # fmt: skip
        try:
            for index, result in self._results:
                if isinstance(result, Exception):
                    self._error = self._error or result
                    self._searches.pop(index)
                    self._clock.drop(index)
                else:
                    yield self._outcome(index, result)
        except UsageError:  # what `decode_many` says of an error of `_requests`
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error

    def left(self) -> tuple[list[Outcome], list[RolloutRecord]]:
        """After an interruption: outcomes that were not handed out, and rollouts of searches that did not finish."""
        waiting = getattr(self._results, "waiting", {})
        finished = [self._outcome(index, one) for index, one in waiting.items() if isinstance(one, Result)]
        return finished, [record for own in self._rollouts.values() for record in own]

    def _requests(self) -> Iterator[Request]:
        for index, job in enumerate(self.jobs):
            if self._error is not None:
                return
            try:
                search = Described.of(self.plan, job)
            except RewardError as error:
                self._error = error
                raise
            self._searches[index], self._rollouts[index] = search, []
            yield Request(
                search.example.prompt, reward=search.reward, seed=sample_seed(job.seed, job.sample),
                name=" ".join(map(str, job)),
            )  # fmt: skip
            if index in self._searches:  # the next one is asked for once this one was let in, or has failed
                self._clock.start(index)

    def _take(self, index: int, rollout: Rollout) -> None:
        seconds = self._clock.read(index)
        self._rollouts[index].append(rollout_record(self._searches[index].head, replace(rollout, seconds=seconds)))
        self.on_rollout(self._rollouts[index][-1])

    def _outcome(self, index: int, result: Result) -> Outcome:
        usage = alone(result.usage, self._clock.stop(index))
        rollouts = self._rollouts.pop(index)
        for record in rollouts:
            record["tokens"] += result.usage.cached_tokens
        search = self._searches.pop(index)
        return search.outcome(replace(result, usage=usage), rollouts, self.lm.decode, self.plan.config.save_trees)


def alone(usage: Usage, seconds: float) -> Usage:
    """What a search would have cost without neighbours: what it found in the batch's cache counts as forwarded."""
    cached = usage.cached_tokens
    return replace(
        usage, cached_tokens=0, forwarded_tokens=usage.forwarded_tokens + cached,
        unique_tokens=usage.unique_tokens + cached, seconds=seconds,
    )  # fmt: skip


def _width(plan: Plan, job: Job) -> int:
    """Paths of one search, where memory allows."""
    width: int = plan.config.rollout_batch or plan.methods[job.method].batch_size()
    return width
