"""The thread that owns the model of a server: one request after another, each stopped when nobody waits for it.

A search fills its batch with paths of its own, so requests wait in line instead of sharing forward calls. Thereby a
request gets the same answer, to the last bit, whether it comes alone or with a hundred others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import dts
from dts.doors.bodies import Asked
from dts.errors import DTSError, UnavailableError, UsageError
from dts.lm import LanguageModel
from dts.results import Result, Rollout
from dts.search import Method, Run, Search
from dts.settings import Budget

log = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Stoppable:
    """A method whose runs are over once `stopped` says so: between two forward calls."""

    def __init__(self, method: Method, stopped: Callable[[], bool]) -> None:
        self._method, self._stopped = method, stopped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def start(self, search: Search) -> _StoppableRun:
        return _StoppableRun(self._method.start(search), self._stopped)


@dataclasses.dataclass(frozen=True, slots=True)
class _StoppableRun:
    run: Run
    stopped: Callable[[], bool]

    def ask(self) -> Sequence[int] | None:
        return None if self.stopped() else self.run.ask()

    def outcome(self) -> Any:
        return self.run.outcome()


class Job:
    """A request under way. `tell` is called on the worker's thread: with each rollout, then with the results (one for
    each prompt) or what went wrong."""

    def __init__(self, asked: Asked, deadline: float, tell: Callable[[Rollout | list[Result] | Exception], None]):
        """deadline: as `time.monotonic` counts."""
        self.asked, self.deadline, self.tell = asked, deadline, tell
        self.stopped = threading.Event()  # nobody waits for it any more
        self.ended = threading.Event()  # the model is free of it


class Worker:
    """A model and the requests that wait for it."""

    def __init__(self, lm: LanguageModel, *, waiting: int, new_tokens: int) -> None:
        """waiting: requests that may wait, besides the one under way. new_tokens: of a completion, where the request
        does not say."""
        self.lm = lm
        self._new_tokens = new_tokens
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._current: Job | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dts-search", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises `Busy` where too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None

    def close(self) -> None:
        """Stop what is under way and end the thread; requests that wait are told."""
        self._closing.set()
        if (current := self._current) is not None:
            current.stopped.set()
        with contextlib.suppress(queue.Full):  # there is something to get, so the thread wakes by itself
            self._jobs.put_nowait(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._current = job
            outcome = self._outcome(job)
            self._current = None
            job.tell(outcome)
            job.ended.set()
            del job, outcome  # nothing is kept while the next request is awaited
            if self._closing.is_set() and self._jobs.empty():
                return

    def _outcome(self, job: Job) -> list[Result] | Exception:
        """Whatever a reward or a model raises, the next request is served."""
        if self._closing.is_set():
            return UnavailableError("the server is shutting down")
        try:
            return self._results(job)
        except (UsageError, Stopped) as error:
            return error
        except BaseException as error:  # SystemExit of a reward, too, must not end this thread
            log.error("a search failed", exc_info=error)
            return error if isinstance(error, Exception) else RuntimeError(type(error).__name__)

    def _results(self, job: Job) -> list[Result]:
        asked, results = job.asked, []
        for index, prompt in enumerate(asked.prompts):
            if job.stopped.is_set():
                raise Stopped
            left = job.deadline - time.monotonic()
            if left <= 0:
                raise UnavailableError("the time limit of this server ended before the search could begin")
            results.append(self._search(job, prompt, asked.seed + index, left))
            if job.stopped.is_set():
                raise Stopped
            if not results[-1].completions:
                raise UnavailableError("no text was finished within the time limit of this server; ask for less")
        return results

    def _search(self, job: Job, prompt: Any, seed: int, seconds: float) -> Result:
        asked = job.asked
        return dts.decode(
            self.lm, prompt, method=Stoppable(asked.method, job.stopped.is_set), reward=asked.reward, seed=seed,
            max_new_tokens=self._length(prompt, asked), budget=Budget(seconds=seconds), on_rollout=job.tell,
            chat_template_kwargs=asked.variables or None, **asked.decoding,
        )  # fmt: skip

    def _length(self, prompt: Any, asked: Asked) -> int:
        """Tokens of a completion: as asked for, else the limit as far as the context leaves room."""
        if asked.new_tokens is not None:
            return asked.new_tokens
        context = self.lm.context_length
        if context is None:
            return self._new_tokens
        room = context - len(self.lm.encode(prompt, asked.variables) if asked.variables else self.lm.encode(prompt))
        return max(1, min(self._new_tokens, room))


def public_error(error: Exception) -> tuple[int, str]:
    """Status and message of what went wrong, for the client: nothing of the operator's code or files."""
    if isinstance(error, UsageError):
        return 400, str(error)
    if isinstance(error, UnavailableError):
        return 503, str(error)
    kind = "reward" if isinstance(error, dts.RewardError) else "model" if isinstance(error, DTSError) else "search"
    return 500, f"the {kind} failed on this request; the server's log says why"
