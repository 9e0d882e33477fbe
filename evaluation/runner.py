"""Runs a plan: every rollout on disk when it is finished, every finished job durable, and aggregates from the files.

`run` starts or continues; what is done and what is not is read from the run folder alone. Engines (`engines/`) decide
where jobs are done and hand their records to a `Recorder`.
"""

from __future__ import annotations

import collections
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dts.errors import UsageError
from dts.evaluation.backend import Backend
from dts.evaluation.charts import write_charts
from dts.evaluation.jobs import Outcome
from dts.evaluation.oracle import oracles
from dts.evaluation.plan import Job, Plan, Unit, describe
from dts.evaluation.progress import Progress
from dts.evaluation.report import write_report
from dts.evaluation.results import Record, RunFolder, reported, to_json, write_json, write_text
from dts.evaluation.summary import report, summarise
from dts.evaluation.tracking import NullTracker, RunTracker, Tracker, sample_keys

logger = logging.getLogger(__name__)

Engine = Callable[[Plan, Sequence[Job], Backend, "Recorder"], None]  # does the jobs, in any order


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
            summary = write_outputs(plan, folder, seconds=seconds, draw=not recorder.charts_are_current)
    finally:
        folder.close()
    return summary


def repair(plan: Plan, folder: RunFolder) -> list[Record]:
    """The finished samples of a folder, once what an interrupted process left half done is taken out of its files."""
    samples, rollouts = folder.records("samples"), folder.records("rollouts")
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


def _job_of(record: Record) -> Job:
    try:
        job = Job.of(record)
    except KeyError as error:
        raise UsageError(
            f"a record lacks the key {error}: {json.dumps(record)[:80]}; it is of another version"
        ) from None
    if not all(isinstance(value, str | int) for value in job):
        raise UsageError(f"a record names no job: {json.dumps(record)[:80]}; delete its line")
    return job


class Recorder:
    """Takes records as engines deliver them: to the disk, to the tracker, to the progress display."""

    def __init__(
        self, plan: Plan, folder: RunFolder, tracker: Tracker, progress: Progress, todo: Sequence[Job]
    ) -> None:
        self._plan, self._folder, self._tracker, self._progress = plan, folder, tracker, progress
        self._left = collections.Counter(job.unit for job in todo)  # jobs to do, by tracker run
        self._open: dict[Unit, RunTracker] = {}
        self._drawn = False  # whether charts were drawn since the last sample

    @property
    def charts_are_current(self) -> bool:
        """Whether the charts in the folder show everything there is."""
        return self._drawn and len(self._plan.tasks) == 1

    def replay(self) -> None:
        """Tracker runs that an earlier process did not complete are made anew, from the stored records."""
        tracked = {Unit(**record) for record in self._folder.records("tracked")}
        samples, rollouts = read_sorted(self._plan, self._folder)
        own = collections.defaultdict(list)
        for record in rollouts:
            own[Job.of(record)].append(record)
        for sample in samples:
            job = Job.of(sample)
            if job.unit not in tracked:
                for record in own[job]:
                    self._run_of(job.unit).log_rollout(record)
                self._run_of(job.unit).log_sample(sample)
        for unit in [unit for unit in self._open if not self._left[unit]]:
            self._complete(unit)

    def note(self, text: str) -> None:
        """What happens now, for the display."""
        self._progress.note(text)

    def rollout(self, record: Record) -> None:
        """One rollout of a job under way. Those of one job come together and in order."""
        self._folder.append("rollouts", record)
        self._run_of(Job.of(record).unit).log_rollout(record)
        self._progress.rollout(record)

    def finish(self, outcome: Outcome) -> None:
        """The end of a job, whose rollouts `rollout` has had. When this returns, the job is durable."""
        job, sample = outcome.job, outcome.sample
        if outcome.tree is not None:
            path = tree_path(self._folder.path, job)
            with reported(path.parent):
                path.parent.mkdir(exist_ok=True)
            write_text(path, to_json(outcome.tree) + "\n")
        self._folder.sync("rollouts")
        self._folder.append("samples", sample)
        self._folder.sync("samples")
        self._run_of(job.unit).log_sample(sample)
        self._drawn = False
        self._progress.job()
        logger.info("%s: reward %.3f, %.1f s", " ".join(map(str, job)), sample["best_reward"], sample["time"])
        self._left[job.unit] -= 1
        if not self._left[job.unit]:
            self._complete(job.unit)

    def close(self) -> None:
        """Ends what is open as cut short."""
        for unit, tracked in self._open.items():
            tracked.finish(self._summary(unit), {}, complete=False)
        self._open.clear()

    def _run_of(self, unit: Unit) -> RunTracker:
        if unit not in self._open:
            config = {**describe(self._plan), "dataset": unit.dataset, "seed": unit.seed}
            color = self._plan.colors[unit.model]
            self._open[unit] = self._tracker.start_run(unit.model, color, tuple(self._plan.methods), config)
        return self._open[unit]

    def _complete(self, unit: Unit) -> None:
        charts = {} if isinstance(self._tracker, NullTracker) else self._charts(unit.dataset)
        self._open.pop(unit).finish(self._summary(unit), charts, complete=True)
        self._folder.append("tracked", unit._asdict())
        self._folder.sync("tracked")

    def _summary(self, unit: Unit) -> Record:
        samples, _ = read_sorted(self._plan, self._folder)
        own = [sample for sample in samples if Job.of(sample).unit == unit]
        return {"runs": summarise(own, self._plan.tasks, self._plan.colors, by_seed=True)}

    def _charts(self, dataset: str) -> Mapping[str, Path]:
        """Of one data set, all models so far: what can be compared."""
        self._drawn = True
        samples, rollouts = (_only(dataset, records) for records in read_sorted(self._plan, self._folder))
        return _draw(samples, rollouts, self._plan, self._folder.path)


def _only(dataset: str, records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["dataset"] == dataset]


def tree_path(folder: Path, job: Job) -> Path:
    """Where a job's tree is saved, whatever characters the names have."""
    parts = (job.dataset, job.model, str(job.seed), str(job.sample), job.method)
    return folder / "trees" / f"{'_'.join(map(_in_file_name, parts))}.json"


def _in_file_name(part: str) -> str:
    """`part` where it can stand in a file's name, otherwise its end made readable and a checksum of it."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", part)[-60:].strip(".-")
    return plain if plain == part else f"{plain}-{zlib.crc32(part.encode()):08x}"


def read_sorted(plan: Plan, folder: RunFolder) -> tuple[list[Record], list[Record]]:
    """Samples and rollouts in the order of the plan, whatever order engines finished them in."""
    order = {job: place for place, job in enumerate(plan.jobs())}
    samples = sorted(folder.records("samples"), key=lambda s: order[Job.of(s)])
    rollouts = sorted(folder.records("rollouts"), key=lambda r: (order[Job.of(r)], r["rollout_idx"]))
    return samples, rollouts


def write_outputs(plan: Plan, folder: RunFolder, *, seconds: float, draw: bool) -> Record:
    """Summary and report, and with `draw` charts, of what the folder holds so far."""
    samples, rollouts = read_sorted(plan, folder)
    finished = {Job.of(sample) for sample in samples}
    head = {
        "experiment": plan.config.name,
        **describe(plan),
        "partial": len(finished) < len(plan.jobs()),
        "seconds": seconds,
        "rollouts": len(rollouts),
        "rollouts_of_unfinished_samples": sum(Job.of(rollout) not in finished for rollout in rollouts),
        "rewards": sorted({sample["reward"] for sample in samples}),
        "oracles": oracles(samples),
    }
    baselines = {name: task.baselines() for name, task in plan.tasks.items()}
    summary = {**head, "runs": summarise(samples, plan.tasks, plan.colors), "baselines": baselines}
    write_json(folder.path / "summary.json", summary)
    write_text(folder.path / "report.md", report(summary))
    by_seed = summarise(samples, plan.tasks, plan.colors, by_seed=True)
    everything = {**summary, "runs": [{**one, **_sample_keys(one, samples)} for one in by_seed]}
    write_json(folder.path.parent / f"wandb_experiments_{folder.stamp}.json", everything)
    if draw:
        _remove_charts(folder.path)
        _draw(samples, rollouts, plan, folder.path)
    write_report(folder.path)
    return summary


def _draw(samples: Sequence[Record], rollouts: Sequence[Record], plan: Plan, folder: Path) -> Mapping[str, Path]:
    with reported(folder):
        try:
            return write_charts(samples, rollouts, plan.colors, folder)
        except OSError:
            _remove_charts(folder)  # the last one may be half a picture; all can be drawn again
            raise


def _remove_charts(folder: Path) -> None:
    with reported(folder):
        for path in folder.glob("*.png"):
            path.unlink()


def _sample_keys(run: Record, samples: Sequence[Record]) -> Record:
    names = ("model", "dataset", "method")
    own = [s for s in samples if all(s[n] == run[n] for n in names) and s["seed"] in run["seeds"]]
    return {key: value for sample in own for key, value in sample_keys(sample).items()}
