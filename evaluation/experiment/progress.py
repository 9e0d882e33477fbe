"""What a person at the terminal sees while a run is under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from dts.evaluation.records import Job, RolloutRecord

FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining}{postfix}"


class Progress:
    """One line: jobs finished of all, rollouts, tokens per second of all searches together, best reward of the search
    that spoke last, time left."""

    def __init__(
        self,
        total: int,
        done: int,
        *,
        shown: bool,
        file: TextIO | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`shown=False` writes nothing. The time left is estimated from the jobs of this process, not `done` ones."""
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=done, disable=not shown, file=file, bar_format=FORMAT, dynamic_ncols=True, smoothing=0
        )
        self._now = now
        self._rollouts = self._tokens = 0
        self._started: float | None = None  # at the first rollout: loading a model is no part of the rate
        self._known: dict[Job, int] = {}  # tokens of each search under way at its last rollout

    def note(self, text: str) -> None:
        """What happens now."""
        self._bar.set_description_str(text)

    def rollout(self, record: RolloutRecord) -> None:
        self._rollouts += 1
        self._bar.set_postfix_str(
            f"{self._rollouts} rollouts, {self._rate(record):.0f} tokens/s, best reward {record['best_so_far']:.3f}",
            refresh=False,
        )
        self._bar.update(0)  # redraws when the last drawing is old enough

    def _rate(self, record: RolloutRecord) -> float:
        """Tokens per second since the first rollout, of all searches."""
        job, tokens, now = Job.of(record), record["tokens"], self._now()
        if self._started is None:
            self._started, self._known[job] = now, tokens
        self._tokens += tokens - self._known.get(job, 0)
        self._known[job] = tokens
        return self._tokens / (now - self._started) if now > self._started else 0.0

    def job(self, job: Job) -> None:
        self._known.pop(job, None)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
