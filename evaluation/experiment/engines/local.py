"""Does the jobs one after another in this process. Another engine is another function of the same arguments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.decode_job import run_job
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.experiment.recorder import Recorder
from dts.evaluation.records import Job


def run_jobs(plan: Plan, jobs: Sequence[Job], backend: Backend, recorder: Recorder) -> None:
    """Hands every rollout to the recorder as it happens, and every job when it is finished."""
    for model, own in itertools.groupby(jobs, key=lambda job: job.model):
        recorder.note(f"loading {model}")
        lm = backend.load(plan.models[model], plan.config)
        for job in own:
            recorder.note(f"{job.model} {job.dataset} {job.method}")
            recorder.finish(run_job(lm, plan, job, backend, recorder.rollout))
        del lm  # its memory is for the next one
