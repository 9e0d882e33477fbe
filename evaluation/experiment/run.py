"""Runs a plan: every rollout on disk when it is finished, every finished job durable, and aggregates from the files.

`run` starts or continues; what is done and what is not is read from the run folder alone. Engines (`engines/`) decide
where jobs are done and hand their records to a `Recorder`.
"""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Mapping
from typing import Any

from dts.errors import UsageError
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.outputs import write_outputs
from dts.evaluation.experiment.plan import Plan, describe
from dts.evaluation.experiment.progress import Progress
from dts.evaluation.experiment.recorder import Engine, Recorder
from dts.evaluation.records import Job, Record, SampleRecord
from dts.evaluation.run_folder import RunFolder, write_json
from dts.evaluation.tracking import Tracker


def run(
    plan: Plan, folder: RunFolder, tracker: Tracker, backend: Backend, engine: Engine, *, progress: bool = False
) -> Record:
    """Do what the folder lacks and return the summary. On any exception, Ctrl-C included, what was finished is
    summed up first. The folder is closed at the end."""
    started = time.perf_counter()
    try:
        if not (folder.path / "config.json").exists():
            write_json(folder.path / "config.json", describe(plan))
        done = repair(plan, folder)
        before = sum(sample["time"] for sample in done)
        finished = {Job.of(sample) for sample in done}
        todo = [job for job in plan.jobs() if job not in finished]
        bar = Progress(len(todo) + len(done), len(done), shown=progress)
        recorder = Recorder(plan, folder, tracker, bar, todo)
        try:
            recorder.replay()
            engine(plan, todo, backend, recorder)
        finally:
            bar.close()
            recorder.close()
            seconds = before + time.perf_counter() - started
            summary = write_outputs(plan, folder, seconds=seconds, charts=not recorder.charts_are_current)
    finally:
        folder.close()
    return summary


def repair(plan: Plan, folder: RunFolder) -> list[SampleRecord]:
    """The finished samples of a folder, once what an interrupted process left half done is taken out of its files."""
    samples, rollouts = folder.samples(), folder.rollouts()
    known, finished = set(plan.jobs()), collections.Counter(map(_job_of, samples))
    for job, times in finished.items():
        if times > 1 or job not in known:
            what = f"holds a sample {times} times" if times > 1 else "holds a sample that its config.json does not name"
            raise UsageError(
                f"{folder.path / 'samples.jsonl'} {what}: {' '.join(map(str, job))}; delete the extra line"
            )
    kept = [record for record in rollouts if _job_of(record) in finished]
    there = collections.Counter(map(_job_of, kept))
    for sample in samples:
        job = _job_of(sample)
        if not all(isinstance(sample.get(key), int | float) for key in ("rollouts", "time", "best_reward")):
            raise UsageError(
                f"{folder.path / 'samples.jsonl'} holds a damaged record of {' '.join(map(str, job))}; delete its line"
            )
        if there[job] != sample["rollouts"]:
            raise UsageError(
                f"{folder.path / 'rollouts.jsonl'} holds {there[job]} of the {sample['rollouts']} rollouts of "
                f"{' '.join(map(str, job))}; delete the line of that sample in samples.jsonl to decode it again"
            )
    folder.keep("samples", samples)
    folder.keep("rollouts", kept)
    folder.keep("tracked", folder.records("tracked"))
    return samples


def _job_of(record: Mapping[str, Any]) -> Job:
    try:
        job = Job.of(record)
    except KeyError as error:
        raise UsageError(
            f"a record lacks the key {error}: {json.dumps(record)[:80]}; it is of another version"
        ) from None
    if not all(isinstance(value, str | int) for value in job):
        raise UsageError(f"a record names no job: {json.dumps(record)[:80]}; delete its line")
    return job
