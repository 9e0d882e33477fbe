"""What a report is made of: the files of finished or interrupted runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dts.errors import UsageError
from dts.evaluation.collected import Collected, check_figures, job_of
from dts.evaluation.records import Cell, Job, Record, RolloutRecord, RunSummary, SampleRecord
from dts.evaluation.run_folder import read_jsonl, stream_jsonl
from dts.evaluation.tracking.keys import read_cell

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. With several, methods carry the run's letter: `maxent [B]`."""

    name: str
    letter: str  # "" where there is one run only
    folder: Path
    summary: RunSummary
    samples: list[SampleRecord]  # finished ones, as in `Collected`
    rollouts: pd.DataFrame  # of these samples; `Collected.rollouts`
    trees: list[Record]

    @property
    def colors(self) -> dict[str, str]:
        return {run["model"]: run["color"] for run in self.summary["runs"]}


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises `UsageError` where a folder holds no run."""
    letters = [""] if len(folders) == 1 else [_letter(i) for i in range(len(folders))]
    return [load_run(folder, letter) for folder, letter in zip(folders, letters, strict=True)]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def load_run(folder: Path, letter: str = "", collected: Collected | None = None) -> Run:
    """collected: the records of the folder, where they are in memory already."""
    folder = folder.resolve()
    if not (folder / "summary.json").is_file():
        raise UsageError(f"{folder} holds no summary.json: give the folder of a run that finished a sample")
    written = _read(folder / "summary.json")
    summary = cast("RunSummary", {**written, "runs": list(map(read_cell, written["runs"]))})
    if collected is None:
        collected = _collect(folder) if summary["runs"] else Collected()
    place = _places(summary["runs"])
    samples = sorted(collected.samples, key=lambda sample: place(Job.of(sample)))
    order = {job: i for i, job in enumerate(sorted(collected.jobs, key=place))}
    rollouts = collected.rollouts(order, finished=True)
    trees = [_read(path) for path in sorted((folder / "trees").glob("*.json"))]
    cells = [(run["dataset"], run["model"], run["method"]) for run in summary["runs"]]
    trees = [t for t in trees if (t["dataset"], t["model"], t["method"]) in cells]
    trees.sort(key=lambda t: (t["sample"], t["seed"], cells.index((t["dataset"], t["model"], t["method"]))))
    won = summary.get("verdicts", [])
    labelled: list[Any] = [
        *summary["runs"],
        *samples,
        *trees,
        *won,
        *(one for verdict in won for one in verdict["others"]),
    ]
    for record in labelled:
        record["method"] = _labelled(record["method"], letter)
    rollouts["method"] = rollouts["method"].cat.rename_categories(lambda name: _labelled(name, letter))
    return Run(folder.name, letter, folder, summary, samples, rollouts, trees)


def _labelled(method: str, letter: str) -> str:
    return sys.intern(f"{method} [{letter}]" if letter else method)


def _places(cells: Sequence[Cell]) -> Callable[[Job], tuple[int, ...]]:
    """The order of jobs in a plan, from the aggregates of its run: engines may finish jobs in any order."""
    models, datasets, methods = (
        {name: i for i, name in enumerate(dict.fromkeys(names))}
        for names in ([c["model"] for c in cells], [c["dataset"] for c in cells], [c["method"] for c in cells])
    )

    def place(job: Job) -> tuple[int, ...]:
        last = len(cells)  # of a job that is not among them: none of its kind is finished
        return (models.get(job.model, last), datasets.get(job.dataset, last), job.seed, job.sample,
                methods.get(job.method, last))  # fmt: skip

    return place


def _collect(folder: Path) -> Collected:
    """Finished samples and all rollouts. Raises `UsageError` for a record that is damaged."""
    collected = Collected()
    for sample in stream_jsonl(folder / "samples.jsonl"):
        job_of(sample)
        check_figures(sample, folder / "samples.jsonl")
        collected.add_sample(sample)
    for rollout in stream_jsonl(folder / "rollouts.jsonl"):
        job_of(rollout)
        collected.add_rollout(cast("RolloutRecord", rollout))
    return collected


def complete_records(run: Run) -> tuple[list[SampleRecord], list[RolloutRecord]]:
    """Everything that was recorded of the finished samples: texts, prompts and shares too."""
    samples = cast("list[SampleRecord]", read_jsonl(run.folder / "samples.jsonl"))
    rollouts = cast("Iterator[RolloutRecord]", stream_jsonl(run.folder / "rollouts.jsonl"))
    finished = {Job.of(sample) for sample in samples}
    own = [rollout for rollout in rollouts if Job.of(rollout) in finished]
    for record in (*samples, *own):
        record["method"] = _labelled(record["method"], run.letter)
    return samples, own


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore the file, or delete it") from None
    return record
