"""The records of a run in memory: what aggregates, charts and the report need of them.

A rollout takes some 30 bytes here, by column, and a thousand as a dictionary. Texts of rollouts, prompts and shares
stay on the disk.
"""

from __future__ import annotations

import json
import math
import sys
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dts.errors import UsageError
from dts.evaluation.records import Job, RolloutRecord, SampleRecord

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 12  # samples of which the report shows prompts
LEFT_OUT = frozenset({
    "shares", "prompt", "logprob", "prompt_tokens", "cached_tokens", "recomputed_tokens", "model_calls", "kv_tokens",
    "kv_bytes",
})  # fmt: skip
NAMES = ("model", "dataset", "method", "reward", "finished_by")  # few values, many records: one object each
FIGURES = ("rollout_reward", "best_so_far", "tokens")  # of a rollout, and columns of `Collected.rollouts`


class Collected:
    """Samples as records without their largest parts, and rollouts as columns."""

    def __init__(self) -> None:
        self.samples: list[SampleRecord] = []
        self._jobs: dict[Job, int] = {}  # number of each job that has a rollout
        self._job, self._index = array("i"), array("i")  # of each rollout: its job's number, its place in the job
        self._figures = {name: array("d") for name in FIGURES}

    def add_sample(self, record: Mapping[str, Any]) -> None:
        self.samples.append(_slim(record))

    def add_rollout(self, record: RolloutRecord) -> None:
        """Raises `UsageError` for a record that is damaged."""
        try:
            self._add_rollout(record)
        except (KeyError, TypeError, OverflowError) as error:
            raise UsageError(f"a rollout is damaged ({error!r}): {str(record)[:80]}; delete its sample") from None

    def _add_rollout(self, record: RolloutRecord) -> None:
        self._job.append(self._jobs.setdefault(Job.of(record), len(self._jobs)))
        self._index.append(record["rollout_idx"])
        for name, column in self._figures.items():
            value = cast("Mapping[str, Any]", record).get(name)
            column.append(math.nan if value is None else value)

    def __len__(self) -> int:
        """Rollouts."""
        return len(self._job)

    @property
    def jobs(self) -> Iterable[Job]:
        """Those that have a rollout."""
        return self._jobs

    @property
    def unfinished(self) -> int:
        """Rollouts of jobs without a sample."""
        finished = {Job.of(sample) for sample in self.samples}
        done = np.array([job in finished for job in self._jobs], bool)
        return len(self) - int(done[self._job].sum()) if len(self) else 0

    def sorted_samples(self, order: Mapping[Job, int]) -> list[SampleRecord]:
        return sorted(self.samples, key=lambda sample: order[Job.of(sample)])

    def rollouts(self, order: Mapping[Job, int] | None = None, *, finished: bool = False) -> pd.DataFrame:
        """One row per rollout: its job, rollout_idx and `FIGURES`; by place of the job where an order is given.
        finished: only of jobs that have a sample."""
        import pandas as pd  # slow to import

        number, index = np.array(self._job, np.int32), np.array(self._index, np.int32)
        rows = np.arange(len(self), dtype=np.int32)
        if finished and len(self):
            with_sample = {Job.of(sample) for sample in self.samples}
            rows = rows[np.array([job in with_sample for job in self._jobs])[number]]
        if order is not None and len(self):
            places = np.array([order[job] for job in self._jobs])
            rows = rows[np.lexsort((index[rows], places[number[rows]]))]
        number = number[rows]
        columns: dict[str, Any] = {}
        for position, name in enumerate(Job._fields):
            values = [job[position] for job in self._jobs]
            if name in ("seed", "sample"):
                columns[name] = np.array(values, np.int64)[number]
            else:
                found: Any = pd.factorize(np.array(values, object))  # codes and categories
                columns[name] = pd.Categorical.from_codes(found[0][number], found[1])
        figures = {name: np.array(column)[rows] for name, column in self._figures.items()}
        return pd.DataFrame({**columns, "rollout_idx": index[rows], **figures})


def job_of(record: Mapping[str, Any]) -> Job:
    """The job of a line that may be damaged. Raises `UsageError` where it names none."""
    try:
        job = Job.of(record)
    except KeyError as error:
        raise UsageError(
            f"a record lacks the key {error}: {json.dumps(record)[:80]}; it is of another version"
        ) from None
    if not all(map(isinstance, job, (str, str, int, int, str))):
        raise UsageError(f"a record names no job: {json.dumps(record)[:80]}; delete its line")
    return job


def check_figures(sample: Mapping[str, Any], file: Path) -> None:
    """Raises `UsageError` for a sample that lacks its figures."""
    if not all(isinstance(sample.get(key), int | float) for key in ("rollouts", "time", "best_reward")):
        what = " ".join(map(str, Job.of(sample)))
        raise UsageError(f"{file} holds a damaged record of {what}; delete its line")


def _slim(record: Mapping[str, Any]) -> SampleRecord:
    """A sample without its largest parts. Keys and names that many records have are one object."""
    left_out = LEFT_OUT - {"prompt"} if record["sample"] < EXAMPLES else LEFT_OUT
    kept = {sys.intern(key): value for key, value in record.items() if key not in left_out}
    for name in NAMES:
        if isinstance(kept.get(name), str):
            kept[name] = sys.intern(kept[name])
    return cast("SampleRecord", kept)
