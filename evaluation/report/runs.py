"""What a report is made of: the files of finished or interrupted runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dts.errors import UsageError
from dts.evaluation.records import Job, Record, RolloutRecord, RunSummary, SampleRecord
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.tracking.keys import read_cell


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. With several, methods carry the run's letter: `maxent [B]`."""

    name: str
    letter: str  # "" where there is one run only
    summary: RunSummary
    samples: list[SampleRecord]
    rollouts: list[RolloutRecord]
    trees: list[Record]

    @property
    def colors(self) -> dict[str, str]:
        return {run["model"]: run["color"] for run in self.summary["runs"]}


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises `UsageError` where a folder holds no run."""
    letters = [""] if len(folders) == 1 else [_letter(i) for i in range(len(folders))]
    return [_load(folder, letter) for folder, letter in zip(folders, letters, strict=True)]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _load(folder: Path, letter: str) -> Run:
    folder = folder.resolve()
    if not (folder / "summary.json").is_file():
        raise UsageError(f"{folder} holds no summary.json: give the folder of a run that finished a sample")
    written = _read(folder / "summary.json")
    summary = cast("RunSummary", {**written, "runs": list(map(read_cell, written["runs"]))})
    samples, rollouts = ([], []) if not summary["runs"] else _lines(folder)
    trees = [_read(path) for path in sorted((folder / "trees").glob("*.json"))]
    cells = [(run["dataset"], run["model"], run["method"]) for run in summary["runs"]]
    trees = [t for t in trees if (t["dataset"], t["model"], t["method"]) in cells]
    trees.sort(key=lambda t: (t["sample"], t["seed"], cells.index((t["dataset"], t["model"], t["method"]))))
    labelled: list[Any] = [*summary["runs"], *samples, *rollouts, *trees]
    for record in labelled:
        record["method"] += f" [{letter}]" if letter else ""
    return Run(folder.name, letter, summary, samples, rollouts, trees)


def _lines(folder: Path) -> tuple[list[SampleRecord], list[RolloutRecord]]:
    """Finished samples, and the rollouts of those."""
    samples = cast("list[SampleRecord]", read_jsonl(folder / "samples.jsonl"))
    rollouts = cast("list[RolloutRecord]", read_jsonl(folder / "rollouts.jsonl"))
    finished = {Job.of(sample) for sample in samples}
    return samples, [rollout for rollout in rollouts if Job.of(rollout) in finished]


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore the file, or delete it") from None
    return record
