"""Runs a plan: every rollout on disk when it is finished, every finished job durable, and aggregates from the files.

`run` starts or continues; what is done and what is not is read from the run folder alone. Engines (`engines/`) decide
where jobs are done and hand their records to a `Recorder`.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from typing import Any, cast

from dts.errors import UsageError
from dts.evaluation.collected import Collected, check_figures, job_of
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.outputs import write_outputs
from dts.evaluation.experiment.plan import Plan, describe
from dts.evaluation.experiment.progress import Progress
from dts.evaluation.experiment.recorder import Engine, Recorder
from dts.evaluation.records import Job, Record
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
        collected = repair(plan, folder)
        before = sum(sample["time"] for sample in collected.samples)
        finished = {Job.of(sample) for sample in collected.samples}
        todo = [job for job in plan.jobs() if job not in finished]
        bar = Progress(len(todo) + len(finished), len(finished), shown=progress)
        recorder = Recorder(plan, folder, tracker, bar, todo, collected)
        try:
            recorder.replay()
            engine(plan, todo, backend, recorder)
        finally:
            bar.close()
            recorder.close()
            seconds = before + time.perf_counter() - started
            summary = write_outputs(plan, folder, collected, seconds=seconds, charts=not recorder.charts_are_current)
    finally:
        folder.close()
    return summary


def repair(plan: Plan, folder: RunFolder) -> Collected:
    """What a folder holds, once what an interrupted process left half done is taken out of its files."""
    collected = Collected()
    known, finished = set(plan.jobs()), collections.Counter[Job]()
    for sample in folder.samples():
        job = job_of(sample)
        finished[job] += 1
        if finished[job] > 1 or job not in known:
            what = "a sample 2 times" if finished[job] > 1 else "a sample that its config.json does not name"
            raise UsageError(
                f"{folder.path / 'samples.jsonl'} holds {what}: {' '.join(map(str, job))}; delete the extra line"
            )
        collected.add_sample(cast("Mapping[str, Any]", sample))
    there, dropped = collections.Counter[Job](), 0
    for rollout in folder.rollouts():
        job = job_of(rollout)
        if job in finished:
            there[job] += 1
            collected.add_rollout(rollout)
        else:
            dropped += 1
    _check_complete(folder, collected, there)
    for name in ("samples", "rollouts", "tracked"):
        folder.trim(name)
    if dropped:
        folder.keep("rollouts", lambda record: Job.of(record) in finished)
    return collected


def _check_complete(folder: RunFolder, collected: Collected, there: Mapping[Job, int]) -> None:
    """Every sample has its figures, and its rollouts: `there` counts them."""
    for sample in collected.samples:
        job = Job.of(sample)
        check_figures(cast("Mapping[str, Any]", sample), folder.path / "samples.jsonl")
        if there[job] != sample["rollouts"]:
            raise UsageError(
                f"{folder.path / 'rollouts.jsonl'} holds {there[job]} of the {sample['rollouts']} rollouts of "
                f"{' '.join(map(str, job))}; delete the line of that sample in samples.jsonl to decode it again"
            )
