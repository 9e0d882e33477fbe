"""Does the jobs in this process. Another engine is another function of the same arguments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.decode_job import run_job
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.experiment.recorder import Recorder
from dts.evaluation.experiment.together import Together, blocks, share_a_batch
from dts.evaluation.records import Job, RolloutRecord


def run_jobs(plan: Plan, jobs: Sequence[Job], backend: Backend, recorder: Recorder) -> None:
    """Hands every job to the recorder when it is finished; the rollouts of a job that is decoded alone one by one."""
    for model, own in itertools.groupby(jobs, key=lambda job: job.model):
        recorder.note(f"loading {model}")
        lm = backend.load(plan.models[model], plan.config)
        for block in blocks(plan, list(own), backend):
            recorder.note(f"{model} {block[0].dataset} {block[0].method}")
            if share_a_batch(lm, plan, block, backend):
                _do_together(Together(lm, plan, block, backend, recorder.show), recorder)
            else:
                _do_one_by_one(lm, plan, block, backend, recorder)
        del lm  # its memory is for the next one


def _do_together(block: Together, recorder: Recorder) -> None:
    """After Ctrl-C or an error, what is there is recorded too: finished jobs, and rollouts of the others."""
    try:
        for outcome in block:
            recorder.take(outcome)
    except BaseException:
        finished, rollouts = block.left()
        for outcome in finished:
            recorder.take(outcome)
        for record in rollouts:
            recorder.rollout(record)
        raise


def _do_one_by_one(lm: Any, plan: Plan, block: Sequence[Job], backend: Backend, recorder: Recorder) -> None:
    def take(record: RolloutRecord) -> None:
        recorder.rollout(record)
        recorder.show(record)

    for job in block:
        recorder.finish(run_job(lm, plan, job, backend, take))
