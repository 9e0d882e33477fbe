"""The thread that owns the model of a server: the requests that wait share a batch, and each is stopped when nobody
waits for it.

New requests join the batch as places become free. What a request gets depends on its seed and not on its neighbours,
up to rounding in the order of additions.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import dts
from dts.doors.bodies import Asked
from dts.doors.contained import Contained
from dts.errors import DTSError, UnavailableError, UsageError
from dts.lm import LanguageModel
from dts.many import LATER
from dts.results import Result, Rollout
from dts.search import Greedy

log = logging.getLogger(__name__)

CLOSING = "the server is shutting down"
TOO_LATE = "the time limit of this server ended before the search could begin"
NOTHING = "no text was finished within the time limit of this server; ask for less"
WIDTH = 16  # paths of one search at most, as in `dts.decode`


class Busy(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """A request under way. `tell` is called on the worker's thread: with each rollout, then with the results (one for
    each prompt) or what went wrong."""

    def __init__(self, asked: Asked, deadline: float, tell: Callable[[Rollout | list[Result] | Exception], None]):
        """deadline: as `time.monotonic` counts."""
        self.asked, self.deadline, self.tell = asked, deadline, tell
        self.stopped = threading.Event()  # nobody waits for it any more
        self.ended = threading.Event()  # the model is free of it
        self.begun = 0  # prompts whose search was begun
        self.running = 0  # searches under way
        self.results: dict[int, Result] = {}  # by prompt
        self.failure: Exception | None = None

    def begin(self) -> int:
        """The next prompt."""
        self.begun, self.running = self.begun + 1, self.running + 1
        return self.begun - 1

    def end(self, prompt: int, outcome: Result | Exception) -> None:
        """What became of a prompt. One that fails ends the others."""
        self.running -= 1
        if isinstance(outcome, Result):
            self.results[prompt] = outcome
        else:
            self.failure = self.failure or outcome

    @property
    def over(self) -> bool:
        """Whether another step would give nothing that anybody waits for."""
        return self.stopped.is_set() or self.failure is not None

    def outcome(self) -> list[Result] | Exception:
        """For `tell`, in the end."""
        if self.failure is not None:
            return self.failure
        return Stopped() if self.stopped.is_set() else [self.results[index] for index in range(self.begun)]


class Worker:
    """A model and the requests that wait for it."""

    def __init__(
        self,
        lm: LanguageModel,
        *,
        waiting: int,
        new_tokens: int,
        together: int = 8,
        reward_seconds: float | None = None,
    ) -> None:
        """waiting: requests that may wait, besides those under way. new_tokens: of a completion at most, and where the
        request does not say. together: prompts that are searched at the same time; with 1 nothing depends on others,
        to the last bit. reward_seconds: that a reward may take for each text."""
        self.lm, self._reward_seconds = lm, reward_seconds
        self._new_tokens, self._most, self._together = new_tokens, waiting, together
        self._width = min(WIDTH, lm.batch_limit(new_tokens, new_tokens, None))
        self._waiting: deque[Job] = deque()  # the first one may have begun, if it has several prompts
        self._changed = threading.Condition()  # guards what waits, and jobs' numbers
        self._under_way: dict[int, tuple[Job, int]] = {}  # job and prompt, by their number in the batch
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dts-search", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises `Busy` where too many wait."""
        with self._changed:
            if len(self._waiting) >= self._most:
                raise Busy
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue at once, and its searches end before their next step."""
        job.stopped.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                if not job.running:
                    job.ended.set()

    def close(self) -> None:
        """Stop what is under way and end the thread; requests that wait are told."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._awaited():
            try:
                self._search()
            except BaseException as error:  # of the whole batch: this thread must not end
                log.error("searches failed", exc_info=error)
                failed = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
                for number in list(self._under_way):
                    self._end(number, failed)

    def _awaited(self) -> bool:
        """Wait for a request; False where the worker is closing, and all are told."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            return bool(self._waiting) or not self._closing.is_set()

    def _search(self) -> None:
        """Search until nothing waits and nothing is under way, or for one prompt alone."""
        requests = self._requests()
        if (first := next(requests, None)) is None:  # nothing that could be begun
            return
        others = requests if self._together > 1 else ()  # alone means without the keys of the prompt before, too
        results: Any = dts.decode_many(
            self.lm, itertools.chain([first], others), method=Greedy(), width=self._width,
            batch_size=self._width * self._together, max_new_tokens=self._new_tokens, as_completed=True,
            errors="return", on_rollout=self._told,
        )  # fmt: skip
        try:
            for number, outcome in results:
                self._end(number, outcome)
        finally:
            results.close()

    def _requests(self) -> Iterator[Any]:
        """What the batch searches for. It asks whenever there is a place."""
        number = 0
        while (part := self._next()) is not None or self._under_way:
            if part is None:
                yield LATER
                continue
            job, prompt = part
            self._under_way[number] = part
            try:
                request = self._request(job, prompt)
            except Exception as error:
                self._end(number, error)
                continue
            number += 1
            yield request

    def _next(self) -> tuple[Job, int] | None:
        """The next prompt that waits, and its job; None where none does, or there is no place."""
        with self._changed:
            if not self._waiting or len(self._under_way) >= self._together:
                return None
            job = self._waiting[0]
            prompt = job.begin()
            if job.begun == len(job.asked.prompts):
                self._waiting.popleft()
            return job, prompt

    def _request(self, job: Job, prompt: int) -> dts.Request:
        """Raises `UnavailableError` where it is too late for it."""
        asked = job.asked
        if self._closing.is_set():
            raise UnavailableError(CLOSING)
        if time.monotonic() > job.deadline:
            raise UnavailableError(TOO_LATE)
        settings = {
            **asked.decoding, "max_new_tokens": self._length(asked.prompts[prompt], asked),
            "batch_size": min(self._width, asked.method.batch_size()), "chat_template_kwargs": asked.variables or None,
        }  # fmt: skip
        reward = None if asked.reward is None else Contained(asked.reward, self._reward_seconds)
        return dts.Request(
            asked.prompts[prompt], reward, asked.seed + prompt, method=asked.method, settings=settings,
            stopped=lambda: job.over or self._closing.is_set() or time.monotonic() > job.deadline,
        )  # fmt: skip

    def _told(self, number: int, rollout: Rollout) -> None:
        job, _ = self._under_way[number]
        job.tell(rollout)

    def _end(self, number: int, outcome: Result | Exception) -> None:
        """Take what became of a prompt, and tell the client once it was the last one."""
        job, prompt = self._under_way.pop(number)
        if isinstance(outcome, Result) and not outcome.completions:
            outcome = UnavailableError(CLOSING if self._closing.is_set() else NOTHING)
        with self._changed:
            job.end(prompt, _own(outcome) if isinstance(outcome, Exception) else outcome)
            if job.over and job in self._waiting:
                self._waiting.remove(job)
            if job.running or job in self._waiting:
                return
        if job.failure is not None and not isinstance(job.failure, UsageError):
            log.error("a search failed", exc_info=job.failure)
        job.tell(job.outcome())
        job.ended.set()

    def _length(self, prompt: Any, asked: Asked) -> int:
        """Tokens of a completion: as asked for, else the limit as far as the context leaves room."""
        if asked.new_tokens is not None:
            return asked.new_tokens
        context = self.lm.context_length
        if context is None:
            return self._new_tokens
        room = context - len(self.lm.encode(prompt, asked.variables) if asked.variables else self.lm.encode(prompt))
        return max(1, min(self._new_tokens, room))


def _own(error: Exception) -> Exception:
    """Without the number of the prompt in the batch, which `decode_many` puts before a message."""
    return error.__cause__ if isinstance(error, DTSError) and isinstance(error.__cause__, DTSError) else error


def public_error(error: Exception) -> tuple[int, str]:
    """Status and message of what went wrong, for the client: nothing of the operator's code or files."""
    if isinstance(error, UsageError):
        return 400, str(error)
    if isinstance(error, UnavailableError):
        return 503, str(error)
    kind = "reward" if isinstance(error, dts.RewardError) else "model" if isinstance(error, DTSError) else "search"
    return 500, f"the {kind} failed on this request; the server's log says why"
