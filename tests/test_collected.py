"""The records of a run in memory: small, in the order of the plan, and read once."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from fakes import FakeTask, fake_backend

from dts.errors import UsageError
from dts.evaluation.collected import EXAMPLES, Collected
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.experiment.engines.local import run_jobs
from dts.evaluation.experiment.plan import prepare
from dts.evaluation.experiment.run import run
from dts.evaluation.measures.statistics import bootstrap, mean
from dts.evaluation.records import Job
from dts.evaluation.report import charts
from dts.evaluation.report.runs import load_runs
from dts.evaluation.run_folder import RunFolder, read_jsonl
from dts.evaluation.tracking import NullTracker


def rollout(job: Job, index: int, **more: Any) -> Any:
    figures = {"rollout_reward": 0.25 * index, "best_so_far": 0.25 * index, "tokens": 10 * index}
    return {**job._asdict(), "id": f"ex-{job.sample}", "rollout_idx": index, "text": "x" * 500, **figures, **more}


def sample(job: Job, **more: Any) -> Any:
    return {**job._asdict(), "id": f"ex-{job.sample}", "reward": "number", "best_reward": 0.5, "time": 1.0,
            "prompt": "p" * 500, "shares": [0.1] * 32, "text": "t", **more}  # fmt: skip


JOBS = [Job(model, "har", seed, s, "maxent") for model in ("red", "teal") for seed in (0, 5) for s in range(2)]


def test_rollouts_come_in_the_order_of_the_plan_whatever_order_they_were_added_in() -> None:
    collected = Collected()
    for job in reversed(JOBS):
        for index in range(3):
            collected.add_rollout(rollout(job, index))
    for job in JOBS[1:]:
        collected.add_sample(sample(job))
    frame = collected.rollouts({job: place for place, job in enumerate(JOBS)})
    wanted = [rollout(job, index) for job in JOBS for index in range(3)]
    assert frame.astype(object).to_dict("records") == [
        {key: record[key] for key in frame.columns} for record in wanted
    ]  # fmt: skip
    assert collected.unfinished == 3 and len(collected) == 24
    assert len(collected.rollouts(finished=True)) == 21
    assert Collected().rollouts().empty


def test_a_rollout_takes_some_forty_bytes_and_long_parts_of_samples_stay_on_the_disk() -> None:
    collected, job = Collected(), Job("red", "har", 0, 0, "maxent")
    tracemalloc.start()
    for index in range(20_000):
        collected.add_rollout(rollout(job, index))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20_000 * 48
    for place in (0, EXAMPLES):
        collected.add_sample(sample(job._replace(sample=place)))
    first, later = collected.samples
    assert "prompt" in first and "prompt" not in later and "shares" not in first and later["text"] == "t"


@pytest.mark.parametrize("change", [{"rollout_idx": None}, {"tokens": "many"}, {"rollout_idx": 2**40}])
def test_a_damaged_rollout_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a rollout is damaged"):
        Collected().add_rollout(rollout(JOBS[0], 1, **change))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("samples", {"model": "red"}, "lacks the key 'dataset'"),
        ("samples", {**JOBS[0]._asdict(), "seed": "0"}, "names no job"),
        ("samples", JOBS[0]._asdict(), "samples.jsonl holds a damaged record of red har 0 0 maxent"),
        ("rollouts", {**JOBS[0]._asdict(), "model": []}, "names no job"),
    ],
)
def test_a_report_of_damaged_records_says_which_is_damaged(
    tmp_path: Path, name: str, damage: dict[str, Any], message: str
) -> None:
    backend = fake_backend(FakeTask())
    folder = RunFolder.create(tmp_path, "x")
    run(prepare(ExperimentConfig(models=("red",), methods=("maxent",)), backend), folder, NullTracker(), backend,
        run_jobs)  # fmt: skip
    folder.append(name, damage)
    folder.close()
    with pytest.raises(UsageError, match=message):
        load_runs([folder.path])


def test_a_run_reads_its_files_once_before_it_starts_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    stream = RunFolder.stream

    def counted(self: RunFolder, name: str) -> Any:
        read.append(name)
        return stream(self, name)

    monkeypatch.setattr(RunFolder, "stream", counted)
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
    backend = fake_backend(FakeTask())
    config = ExperimentConfig(models=("red", "teal"), methods=("maxent",), seeds=(0, 1, 2), num_samples=2)
    folder = RunFolder.create(tmp_path, "x")
    run(prepare(config, backend), folder, NullTracker(), backend, run_jobs)
    assert sorted(read) == ["rollouts", "samples", "tracked"]
    assert len(read_jsonl(folder.path / "samples.jsonl")) == 12 and (folder.path / "report.html").exists()


def test_a_heat_map_of_many_samples_shows_some_and_says_so() -> None:
    count = charts.MOST_ROWS + 50
    frame = pd.DataFrame(
        [{"model": "red", "method": "maxent", "seed": 0, "sample": s, "rollout_idx": k, "rollout_reward": s / count}
         for s in range(count) for k in range(2)]
    )  # fmt: skip
    figure = charts.rollout_heatmap(frame)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape == (charts.MOST_ROWS, 2) and shown[0, 0] == 0 and shown[-1, 0] == pytest.approx(1 - 1 / count)
    assert f"{charts.MOST_ROWS} of {count} samples" in figure.get_suptitle()


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_an_interval_is_that_of_scipy_however_few_numbers_are_held_at_once(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dts.evaluation.measures.statistics.AT_ONCE", 100)
    values = np.random.default_rng(1).exponential(size=30)
    name = {"bca": "BCa"}.get(method, method)
    wanted = scipy.stats.bootstrap((values,), np.mean, n_resamples=500, vectorized=False, method=name,
                                   rng=np.random.default_rng(4))  # fmt: skip
    found = bootstrap(mean, values, method=method, resamples=500, seed=4)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval), rel=1e-9)


def test_clusters_are_drawn_whole() -> None:
    values, clusters = [1.0, 1.0, 5.0, 9.0, 9.0, 9.0], ["a", "a", "b", "c", "c", "c"]
    rows = {"a": [1.0, 1.0], "b": [5.0], "c": [9.0, 9.0, 9.0]}
    drawn = itertools.product("abc", repeat=3)
    means = {round(float(np.mean([value for one in names for value in rows[one]])), 9) for names in drawn}
    seen: set[float] = set()

    def statistic(rows: np.ndarray) -> float:
        seen.add(round(float(rows.mean()), 9))
        return float(rows.mean())

    bootstrap(statistic, values, clusters=clusters, method="percentile", resamples=300)
    assert seen == means | {round(float(np.mean(values)), 9)}
