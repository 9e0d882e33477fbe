"""Takes the records of engines: to the disk, to the tracker, to the progress display."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dts.evaluation.collected import Collected
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.decode_job import Outcome
from dts.evaluation.experiment.outputs import draw, order_of, tree_path
from dts.evaluation.experiment.plan import Plan, describe
from dts.evaluation.experiment.progress import Progress
from dts.evaluation.records import Cell, Job, RolloutRecord, Unit
from dts.evaluation.report.summary import summarise
from dts.evaluation.run_folder import RunFolder, reported, to_json, write_text
from dts.evaluation.tracking import NullTracker, RunTracker, Tracker

logger = logging.getLogger(__name__)

Engine = Callable[[Plan, Sequence[Job], Backend, "Recorder"], None]  # does the jobs, in any order


class Recorder:
    """Takes records as engines deliver them: to the disk, to the tracker, to the progress display."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        tracker: Tracker,
        progress: Progress,
        todo: Sequence[Job],
        collected: Collected,
    ) -> None:
        """collected: what the folder holds; it grows by what comes."""
        self._plan, self._folder, self._tracker, self._progress = plan, folder, tracker, progress
        self._collected = collected
        self._left = collections.Counter(job.unit for job in todo)  # jobs to do, by tracker run
        self._open: dict[Unit, RunTracker] = {}
        self._order = order_of(plan)
        self._drawn = False  # whether charts were drawn since the last record

    @property
    def charts_are_current(self) -> bool:
        """Whether the charts in the folder show everything there is."""
        return self._drawn and len(self._plan.tasks) == 1

    def replay(self) -> None:
        """Tracker runs that an earlier process did not complete are made anew, from the stored records."""
        tracked = {Unit(**record) for record in self._folder.stream("tracked")}
        units = dict.fromkeys(Job.of(sample).unit for sample in self._collected.samples)
        for unit in units:
            if unit not in tracked:
                self._run_of(unit)
        if self._open and not isinstance(self._tracker, NullTracker):
            self._log_stored()
        for unit in [unit for unit in self._open if not self._left[unit]]:
            self._complete(unit)

    def _log_stored(self) -> None:
        """The stored records of the runs that are open, a sample after its rollouts."""
        samples = {job: s for s in self._folder.samples() if (job := Job.of(s)).unit in self._open}
        own = (r for r in self._folder.rollouts() if Job.of(r).unit in self._open)
        for job, rollouts in itertools.groupby(own, key=Job.of):
            for record in rollouts:
                self._open[job.unit].log_rollout(record)
            if job in samples:
                self._open[job.unit].log_sample(samples.pop(job))

    def note(self, text: str) -> None:
        """What happens now, for the display."""
        self._progress.note(text)

    def show(self, record: RolloutRecord) -> None:
        """A rollout has finished: for the display."""
        self._progress.rollout(record)

    def rollout(self, record: RolloutRecord) -> None:
        """To the disk and to the tracker. Those of one job come together and in order."""
        self._folder.append("rollouts", record)
        self._collected.add_rollout(record)
        self._drawn = False
        self._run_of(Job.of(record).unit).log_rollout(record)

    def take(self, outcome: Outcome) -> None:
        """A job that was finished as a whole."""
        for record in outcome.rollouts:
            self.rollout(record)
        self.finish(outcome)

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
        self._collected.add_sample(cast("Mapping[str, Any]", sample))
        self._run_of(job.unit).log_sample(sample)
        self._drawn = False
        self._progress.job(job)
        logger.info("%s: reward %.3f, %.1f s", " ".join(map(str, job)), sample["best_reward"], sample["time"])
        self._left[job.unit] -= 1
        if not self._left[job.unit]:
            self._complete(job.unit)

    def close(self) -> None:
        """Ends what is open as cut short."""
        for unit, tracked in self._open.items():
            tracked.finish(self._cells(unit), {}, complete=False)
        self._open.clear()

    def _run_of(self, unit: Unit) -> RunTracker:
        if unit not in self._open:
            config = {**describe(self._plan), "dataset": unit.dataset, "seed": unit.seed}
            color = self._plan.colors[unit.model]
            self._open[unit] = self._tracker.start_run(unit.model, color, tuple(self._plan.methods), config)
        return self._open[unit]

    def _complete(self, unit: Unit) -> None:
        charts = {} if isinstance(self._tracker, NullTracker) else self._charts(unit.dataset)
        self._open.pop(unit).finish(self._cells(unit), charts, complete=True)
        self._folder.append("tracked", unit._asdict())
        self._folder.sync("tracked")

    def _cells(self, unit: Unit) -> list[Cell]:
        own = [sample for sample in self._collected.samples if Job.of(sample).unit == unit]
        own.sort(key=lambda sample: self._order[Job.of(sample)])
        return summarise(own, self._plan.tasks, self._plan.colors, by_seed=True)

    def _charts(self, dataset: str) -> Mapping[str, Path]:
        """Of one data set, all models so far: what can be compared."""
        self._drawn = True
        return draw(self._collected, self._plan, self._folder.path, self._order, dataset)
