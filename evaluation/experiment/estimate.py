"""What a plan would cost, before a model is loaded: `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dts.duration import duration
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.records import Job, SampleRecord
from dts.evaluation.report.summary import markdown

HEADER = ["model", "data", "method", "jobs", "prompt tokens", "generated, at most", "forwarded, at most", "time"]


def estimate(plan: Plan, done: Sequence[SampleRecord], tokens_per_second: float | None) -> str:
    """The work left in a plan, as Markdown. `done` are the samples that are finished already.

    Token figures are bounds: every completion at full length, nothing shared between rollouts. Time is those tokens at
    the stated rate, or, without one, the jobs left times the mean of the finished ones.
    """
    finished = {Job.of(sample) for sample in done}
    left: dict[tuple[str, str, str], list[Job]] = {}
    for job in plan.jobs():
        left.setdefault((job.model, job.dataset, job.method), []).extend([] if job in finished else [job])
    rows, totals = [], np.zeros(3)
    times: list[float | None] = []
    for (model, dataset, method), jobs in left.items():
        prompts = plan.prompt_tokens[model][dataset]
        generated = len(jobs) * _rollouts(plan, method) * plan.config.max_tokens
        forwarded = None if prompts is None else generated + sum(prompts[job.sample] for job in jobs)
        times.append(_seconds((model, dataset, method), len(jobs), forwarded, done, tokens_per_second))
        shown = "unknown" if prompts is None else f"{np.mean(prompts):.0f} (up to {max(prompts)})"
        rows.append([model, dataset, method, str(len(jobs)), shown, f"{generated:,}", _count(forwarded),
                     duration(times[-1])])  # fmt: skip
        totals += [len(jobs), generated, np.nan if forwarded is None else forwarded]
    whole = None if any(time is None for time in times) else sum(time for time in times if time is not None)
    generated, forwarded = totals[1], None if np.isnan(totals[2]) else totals[2]
    rows.append(["all", "", "", f"{totals[0]:.0f}", "", f"{generated:,.0f}", _count(forwarded), duration(whole)])
    return "\n".join([*_head(plan, len(finished)), "", markdown(HEADER, rows), "", _legend(done, tokens_per_second)])


def _head(plan: Plan, finished: int) -> list[str]:
    models = ", ".join(f"{spec.name} ({spec.source}, {spec.color})" for spec in plan.models.values())
    data = ", ".join(f"{name} ({len(task.examples)} samples)" for name, task in plan.tasks.items())
    config = plan.config
    return [
        f"# Plan of {config.name}" + (f": {finished} jobs are finished" if finished else ""),
        "",
        f"Models: {models}.",
        f"Data: {data}; seeds {' '.join(map(str, config.seeds))}; {config.num_rollouts} rollouts of at most "
        f"{config.max_tokens} new tokens.",
    ]


def _rollouts(plan: Plan, method: str) -> int:
    return plan.methods[method].budget().rollouts or plan.config.num_rollouts


def _seconds(
    cell: tuple[str, str, str], jobs: int, forwarded: int | None, done: Sequence[SampleRecord], rate: float | None
) -> float | None:
    if not jobs:
        return 0.0
    if rate is not None:
        return None if forwarded is None else forwarded / rate
    own = [sample["time"] for sample in done if (sample["model"], sample["dataset"], sample["method"]) == cell]
    return jobs * float(np.mean(own)) if own else None


def _legend(done: Sequence[SampleRecord], rate: float | None) -> str:
    bounds = "Tokens: bounds, with every completion at full length and nothing shared between rollouts."
    if rate is not None:
        return f"{bounds} Time: the forwarded tokens at {rate:g} tokens per second."
    if done:
        return f"{bounds} Time: jobs left times the mean of the finished ones of their row ({len(done)} in all)."
    return (f"{bounds} Time: unknown until a first sample is measured; run with --num-samples 1, or state a rate with "
            "--tokens-per-second.")  # fmt: skip


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"
