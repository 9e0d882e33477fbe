"""What a run folder holds beside its records: summary, report, charts and trees, all made from the records."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dts.evaluation.collected import Collected
from dts.evaluation.experiment.plan import Plan, describe
from dts.evaluation.records import Cell, Job, Record, RunSummary, SampleRecord
from dts.evaluation.report import write_report
from dts.evaluation.report.charts import of_dataset, write_charts
from dts.evaluation.report.summary import report, summarise
from dts.evaluation.report.verdict import verdicts
from dts.evaluation.run_folder import RunFolder, reported, write_json, write_text
from dts.evaluation.tasks.oracle import oracles
from dts.evaluation.tracking.keys import published, sample_keys


def tree_path(folder: Path, job: Job) -> Path:
    """Where a job's tree is saved, whatever characters the names have."""
    parts = (job.dataset, job.model, str(job.seed), str(job.sample), job.method)
    return folder / "trees" / f"{'_'.join(map(_in_file_name, parts))}.json"


def _in_file_name(part: str) -> str:
    """`part` where it can stand in a file's name, otherwise its end made readable and a checksum of it."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", part)[-60:].strip(".-")
    return plain if plain == part else f"{plain}-{zlib.crc32(part.encode()):08x}"


def order_of(plan: Plan) -> dict[Job, int]:
    """The place of each job in the plan, whatever order engines finished them in."""
    return {job: place for place, job in enumerate(plan.jobs())}


def write_outputs(plan: Plan, folder: RunFolder, collected: Collected, *, seconds: float, charts: bool) -> Record:
    """Summary and report, and with `charts` pictures, of what the folder holds so far; the content of summary.json."""
    order = order_of(plan)
    samples = collected.sorted_samples(order)
    cells = summarise(samples, plan.tasks, plan.colors)
    baselines = {name: task.baselines() for name, task in plan.tasks.items()}
    summary: RunSummary = {
        "experiment": plan.config.name,
        **describe(plan),
        "partial": len(samples) < len(order),
        "seconds": seconds,
        "rollouts": len(collected),
        "rollouts_of_unfinished_samples": collected.unfinished,
        "rewards": sorted({sample["reward"] for sample in samples}),
        "oracles": oracles(samples),
        "runs": cells,
        "baselines": baselines,
        "verdicts": verdicts(samples, cells, baselines, plan.tasks, lambda: collected.rollouts(order)),
    }
    written = {**summary, "runs": list(map(published, summary["runs"]))}
    write_json(folder.path / "summary.json", written)
    write_text(folder.path / "report.md", report(summary))
    by_seed = summarise(samples, plan.tasks, plan.colors, by_seed=True)
    everything = {**written, "runs": [{**published(one), **_sample_keys(one, samples)} for one in by_seed]}
    write_json(folder.path.parent / f"wandb_experiments_{folder.stamp}.json", everything)
    if charts:
        _remove_charts(folder.path)
        draw(collected, plan, folder.path, order)
    write_report(folder.path, collected)
    return written


def draw(
    collected: Collected, plan: Plan, folder: Path, order: Mapping[Job, int], dataset: str | None = None
) -> Mapping[str, Path]:
    """The charts of all records, or of one data set, by name: PNG files in the folder."""
    samples = [one for one in collected.sorted_samples(order) if dataset in (None, one["dataset"])]
    rollouts = collected.rollouts(order)
    if dataset is not None:
        rollouts = of_dataset(rollouts, dataset)
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


def _sample_keys(cell: Cell, samples: Sequence[SampleRecord]) -> Record:
    key = (cell["model"], cell["dataset"], cell["method"])
    own = [s for s in samples if (s["model"], s["dataset"], s["method"]) == key and s["seed"] in cell["seeds"]]
    return {key: value for sample in own for key, value in sample_keys(sample).items()}
