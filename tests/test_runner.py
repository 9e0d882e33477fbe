"""The runner: records as they happen, aggregates from records, and what is left after an interruption."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import COLORS, Calls, FakeSpec, FakeTask, RecordingTracker, fake_backend, raise_after, reward_failure

from dts.errors import RewardError, UsageError
from dts.evaluation.experiment.backend import Backend, load_model
from dts.evaluation.experiment.config import ExperimentConfig, parse_size
from dts.evaluation.experiment.decode_job import run_job, sample_seed
from dts.evaluation.experiment.engines.local import run_jobs
from dts.evaluation.experiment.outputs import tree_path
from dts.evaluation.experiment.plan import Plan, prepare
from dts.evaluation.experiment.recorder import Recorder
from dts.evaluation.experiment.run import run
from dts.evaluation.records import Job, Record
from dts.evaluation.report.summary import NOT_RECORDED, markdown, report, summarise
from dts.evaluation.run_folder import RunFolder, read_jsonl, to_json
from dts.evaluation.tracking import NullTracker

CONFIG = ExperimentConfig(models=tuple(COLORS), methods=("maxent", "greedy"), num_samples=2, num_rollouts=3)
ROLLOUTS = 2 * 2 * (3 + 1)  # models x samples x (maxent + greedy)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a fake run's time."""
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_report", lambda *_: None)


def run_in(path: Path, backend: Backend, config: ExperimentConfig = CONFIG) -> tuple[RunFolder, Record]:
    folder = RunFolder.create(path, config.name)
    return folder, run(prepare(config, backend), folder, NullTracker(), backend, run_jobs)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_rollout_and_sample_is_on_disk_with_the_inventory_keys(tmp_path: Path) -> None:
    folder, _ = run_in(tmp_path, fake_backend())
    rollouts, samples = folder.records("rollouts"), folder.records("samples")
    assert len(rollouts) == ROLLOUTS and len(samples) == 8
    wanted = {"rollout_reward", "rollout_idx", "output_length", "nodes_explored", "time", "best_so_far", "start_depth"}
    assert all(wanted <= set(r) for r in rollouts)
    wanted = {"best_reward", "monotonicity", "time", "nodes", "forwarded_tokens"}
    assert all(wanted | {"reward_calls", "reward_tokens", "reward_seconds"} <= set(s) for s in samples)
    first = [r for r in rollouts if (r["model"], r["method"], r["sample"]) == ("red", "maxent", 0)]
    sample = samples[0]
    assert [r["rollout_idx"] for r in first] == [0, 1, 2]
    assert sample["best_reward"] == max(r["rollout_reward"] for r in first) == first[-1]["best_so_far"]
    assert sample["tokens_reused"] == pytest.approx(2 / 15)  # of three texts of 5 tokens, two begin like the first
    assert sample["branch_depth"] == pytest.approx(1 / 5)
    assert sample["forwarded_tokens"] == first[-1]["tokens"] == 30


def test_summary_is_the_mean_of_the_records(tmp_path: Path) -> None:
    folder, summary = run_in(tmp_path, fake_backend())
    assert summary["partial"] is False and summary["rollouts"] == ROLLOUTS
    assert [(r["model"], r["method"]) for r in summary["runs"]] == [(m, k) for m in COLORS for k in CONFIG.methods]
    own = [s for s in folder.records("samples") if (s["model"], s["method"]) == ("red", "maxent")]
    figures = summary["runs"][0]
    assert figures["final/avg_best_reward"] == pytest.approx(sum(s["best_reward"] for s in own) / 2)
    assert figures["final/avg_monotonicity"] == pytest.approx(sum(s["monotonicity"] for s in own) / 2)
    assert figures["final/avg_time_per_sample"] == pytest.approx(0.75)  # three rollouts of a quarter second
    assert figures["final/total_time"] == pytest.approx(1.5)
    assert figures["color"] == COLORS["red"] and 0 <= figures["metrics"]["accuracy"] <= 1
    assert summary["baselines"] == {"har": {"majority": {"accuracy": 0.25}}}
    assert load(folder.path / "summary.json") == json.loads(to_json(summary))


def test_an_interrupted_run_draws_the_rollouts_that_came_after_the_last_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def write_charts(samples: Any, rollouts: Any, *_: Any) -> dict[str, Path]:
        drawn.append(len(rollouts))
        return {}

    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", write_charts)
    backend = fake_backend()
    plan, folder = prepare(CONFIG, backend), RunFolder.create(tmp_path, CONFIG.name)

    def interrupted(plan: Plan, todo: Sequence[Job], backend: Backend, recorder: Recorder) -> None:
        own = [job for job in todo if job.unit == todo[0].unit]
        run_jobs(plan, own, backend, recorder)
        after: Any = {**folder.records("rollouts")[0], **todo[len(own)]._asdict()}
        recorder.rollout(after)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, folder, RecordingTracker(), backend, interrupted)
    assert drawn == [ROLLOUTS // 2, ROLLOUTS // 2 + 1]


def test_records_of_an_earlier_version_have_no_figure_that_it_did_not_count(tmp_path: Path) -> None:
    folder, _ = run_in(tmp_path, fake_backend())
    assert NOT_RECORDED not in (folder.path / "report.md").read_text()
    plan, samples = prepare(CONFIG, fake_backend()), folder.records("samples")
    del samples[0]["tokens_reused"], samples[0]["branch_depth"]  # of the first cell, the one sample of two
    samples[0]["below_root"] = 0.5
    cells = summarise(samples, plan.tasks, plan.colors)
    assert cells[0]["tokens_reused"] is None and cells[0]["branch_depth"] is None
    assert cells[2]["tokens_reused"] == pytest.approx(2 / 15) and cells[0]["avg_time_per_sample"] is not None
    shown = report({**load(folder.path / "summary.json"), "runs": cells})
    assert NOT_RECORDED in shown and shown.count(" 13 % ") == 1


def test_one_file_beside_the_folder_has_everything_in_it(tmp_path: Path) -> None:
    folder, _ = run_in(tmp_path, fake_backend())
    (file,) = tmp_path.glob("wandb_experiments_*.json")
    assert file.stem.removeprefix("wandb_experiments_") == folder.stamp
    first = load(file)["runs"][0]
    for key in ("best_reward", "monotonicity", "time", "nodes"):
        assert f"sample_1/{key}" in first
    assert "final/avg_best_reward" in first


def test_config_names_settings_models_and_versions(tmp_path: Path) -> None:
    folder, _ = run_in(tmp_path, fake_backend())
    config = load(folder.path / "config.json")
    assert config["config"]["num_rollouts"] == 3 and config["datasets"][0]["examples"] == ["ex-0", "ex-1"]
    assert config["models"][1] == {"name": "teal", "source": "nowhere/fake", "color": COLORS["teal"]}
    assert {"python", "torch", "transformers", "dts"} <= set(config["versions"])
    assert str(Path.home()) not in json.dumps(config["versions"])


def test_the_same_seed_gives_the_same_records(tmp_path: Path) -> None:
    first, _ = run_in(tmp_path / "a", fake_backend())
    second, _ = run_in(tmp_path / "b", fake_backend())
    assert first.records("rollouts") == second.records("rollouts")
    assert sample_seed(0, 1) != sample_seed(1, 0) != sample_seed(0, 0)


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (reward_failure(), RewardError)]
)
def test_an_interrupted_run_keeps_what_was_finished(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    backend = fake_backend(FakeTask(fail=raise_after(Calls(), 6, error)))  # in red's second sample, maxent
    with pytest.raises(raised):
        run_in(tmp_path, backend)
    (path,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert len(read_jsonl(path / "rollouts.jsonl")) == 6
    samples = read_jsonl(path / "samples.jsonl")
    assert [(s["method"], s["sample"]) for s in samples] == [("maxent", 0), ("greedy", 0)]
    summary = load(path / "summary.json")
    assert summary["partial"] is True
    assert summary["rollouts_of_unfinished_samples"] == 2
    assert [r["samples"] for r in summary["runs"]] == [1, 1]
    assert "partial" in (path / "report.md").read_text().splitlines()[0]


def test_interrupted_before_anything_was_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, fake_backend(FakeTask(fail=raise_after(Calls(), 0, KeyboardInterrupt()))))
    (summary,) = tmp_path.glob("*/summary.json")
    assert load(summary)["partial"] is True and load(summary)["runs"] == []


def test_models_are_loaded_once_each_in_order(tmp_path: Path) -> None:
    calls = Calls()
    run_in(tmp_path, fake_backend(calls=calls))
    assert calls.loaded == list(COLORS)


def test_names_are_matched_whatever_their_case_and_doubles_dropped() -> None:
    config = ExperimentConfig(models=("red", "red"), datasets=("har",), methods=("MaxEnt", "best_of_n"))
    plan = prepare(config, fake_backend())
    assert list(plan.methods) == ["maxent", "best-of-n"] and len(plan.models) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("num_samples", 0), ("num_rollouts", -1), ("max_tokens", 0), ("max_tokens", 2.5), ("top_k", 0)],
        *[("top_p", 0.0), ("top_p", 1.1), ("temperature", 0.0), ("temperature", math.nan), ("data_seed", -1)],
        *[("reward_scale", -1.0), ("reward_scale", math.inf), ("reward_scale", 10**400), ("rollout_batch", 0)],
        *[("seeds", (0, -1)), ("seeds", ()), ("datasets", ()), ("max_kv_bytes", "2 rabbits"), ("max_kv_bytes", 0)],
        *[("quantization", "3bit"), ("save_trees", -1), ("tracker", "mlflow"), ("device", 3), ("models", (1,))],
        *[("experiment_name", "a/b"), ("wandb_mode", "later"), ("models", ()), ("methods", ())],
    ],
)
def test_config_refuses_values_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match="size" if value == "2 rabbits" else "--" + option.replace("_", "-")):
        ExperimentConfig(**{option: value})


def test_run_folders_of_one_second_do_not_meet(tmp_path: Path) -> None:
    now = datetime(2024, 5, 6, 7, 8, 9)
    names = [RunFolder.create(tmp_path, "a_b", now) for _ in range(3)]
    assert [f.path.name for f in names] == ["a_b_20240506_070809", "a_b_20240506_070809-2", "a_b_20240506_070809-3"]
    assert [f.stamp for f in names] == ["20240506_070809", "20240506_070809-2", "20240506_070809-3"]


def test_json_has_no_nan_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("rollouts", {"a": math.nan, "b": [1.5, -math.inf], "c": "é"})
    assert (tmp_path / "rollouts.jsonl").read_text() == '{"a": null, "b": [1.5, null], "c": "é"}\n'
    with (tmp_path / "rollouts.jsonl").open("a") as stream:
        stream.write('{"a": 1')
    assert folder.records("rollouts") == [{"a": None, "b": [1.5, None], "c": "é"}]
    folder.close()


def test_markdown_columns_are_aligned() -> None:
    text = markdown(["a", "long"], [["value", "x"]])
    assert text.splitlines() == ["| a     | long |", "| ----- | ---- |", "| value | x    |"]


GRID = ExperimentConfig(
    models=tuple(COLORS),
    datasets=("HAR", "M4"),
    seeds=(0, 5),
    methods=("maxent", "greedy"),
    num_rollouts=3,
    num_samples=2,
)


def test_every_model_data_set_and_seed_in_one_order(tmp_path: Path) -> None:
    folder, summary = run_in(tmp_path, fake_backend(), GRID)
    samples = folder.records("samples")
    wanted = itertools.product(COLORS, ("har", "m4"), (0, 5), range(2), ("maxent", "greedy"))
    assert [tuple(Job.of(s)) for s in samples] == list(wanted)
    assert [tuple(Job.of(s)) for s in samples] == [tuple(job) for job in prepare(GRID, fake_backend()).jobs()]
    assert len(folder.records("rollouts")) == 2 * 2 * 2 * 2 * (3 + 1)
    assert [(r["model"], r["dataset"], r["method"]) for r in summary["runs"]] == list(
        itertools.product(COLORS, ("har", "m4"), ("maxent", "greedy"))
    )
    assert all(r["seeds"] == [0, 5] and r["samples"] == 4 for r in summary["runs"])
    assert set(summary["baselines"]) == {"har", "m4"}


def test_seeds_decode_the_same_examples_differently(tmp_path: Path) -> None:
    asked: list[int] = []
    backend = fake_backend()

    def load_task(name: str, *, seed: int, **options: Any) -> Any:
        asked.append(seed)
        return backend.load_task(name, **options)

    folder, _ = run_in(tmp_path, replace(backend, load_task=load_task), GRID)
    first, second = ([s for s in folder.records("samples") if s["seed"] == seed] for seed in (0, 5))
    assert asked == [0, 0]  # one per data set, by the data seed alone
    assert [s["id"] for s in first] == [s["id"] for s in second]
    assert all(a["text"] != b["text"] for a, b in zip(first, second, strict=True))


def test_metrics_are_means_over_seeds_and_the_file_beside_has_every_seed(tmp_path: Path) -> None:
    folder, summary = run_in(tmp_path, fake_backend(), GRID)
    own = [s for s in folder.records("samples") if (s["model"], s["dataset"], s["method"]) == ("red", "har", "maxent")]
    assert summary["runs"][0]["metrics"]["accuracy"] == sum(float(s["text"]) > 0.5 for s in own) / 4
    (file,) = tmp_path.glob("wandb_experiments_*.json")
    runs = load(file)["runs"]
    assert [r["seeds"] for r in runs] == [[0], [0], [5], [5]] * 4
    later = next(
        r for r in runs if (r["model"], r["dataset"], r["seeds"], r["method"]) == ("red", "har", [5], "maxent")
    )
    assert [later[f"sample_{i}/best_reward"] for i in (0, 1)] == [s["best_reward"] for s in own if s["seed"] == 5]


def test_the_order_of_lines_does_not_change_the_outputs(tmp_path: Path) -> None:
    """Engines may finish jobs in any order."""
    backend, plan = fake_backend(), prepare(GRID, fake_backend())

    def shuffled(plan: Plan, jobs: Sequence[Job], backend: Backend, recorder: Recorder) -> None:
        for job in random.Random(0).sample(jobs, len(jobs)):
            outcome = run_job(backend.load(plan.models[job.model], plan.config), plan, job, backend)
            for record in outcome.rollouts:
                recorder.rollout(record)
            recorder.finish(outcome)

    summaries = []
    for engine in (run_jobs, shuffled):
        folder = RunFolder.create(tmp_path, "x")
        run(plan, folder, NullTracker(), backend, engine)
        summaries.append((folder.path / "summary.json").read_text())
    first, second = (re.sub('"seconds": .*', "", text) for text in summaries)
    assert first == second


def test_one_tracker_run_per_model_data_set_and_seed(tmp_path: Path) -> None:
    tracker = RecordingTracker()
    folder = RunFolder.create(tmp_path, "x")
    run(prepare(GRID, fake_backend()), folder, tracker, fake_backend(), run_jobs)
    assert [r.unit for r in tracker.runs] == list(itertools.product(COLORS, ("har", "m4"), (0, 5)))
    for tracked in tracker.runs:
        own = [r for r in folder.records("rollouts") if (r["model"], r["dataset"], r["seed"]) == tracked.unit]
        assert tracked.rollouts == own and len(tracked.samples) == 4 and tracked.complete is True
        assert [run["seeds"] for run in tracked.summary["runs"]] == [[tracked.unit[2]]] * 2


def test_trees_of_the_first_samples_are_saved(tmp_path: Path) -> None:
    config = replace(GRID, save_trees=1, seeds=(0,), datasets=("HAR",))
    folder, _ = run_in(tmp_path, fake_backend(), config)
    names = sorted(path.name for path in (folder.path / "trees").iterdir())
    assert names == sorted(f"har_{model}_0_0_{method}.json" for model in COLORS for method in ("maxent", "greedy"))
    tree = load(folder.path / "trees" / "har_red_0_0_maxent.json")
    assert tree["id"] == "ex-0" and tree["method"] == "maxent" and len(tree["rollouts"]) == 3
    folder, _ = run_in(tmp_path, fake_backend(), replace(config, save_trees=0))
    assert not (folder.path / "trees").exists()


@pytest.mark.parametrize(
    "model",
    ["owner/name", "owner-name", "../up/a b", "/data/Llama:7b", "é", "x" * 300, "y" + "x" * 300],
)
def test_tree_files_have_names_that_every_system_takes(model: str) -> None:
    path = tree_path(Path("run"), Job(model, "har", 1, 2, "maxent"))
    assert path.parent == Path("run/trees") and re.fullmatch(r"har_[\w.-]{1,69}_1_2_maxent.json", path.name, re.ASCII)


def test_tree_files_of_different_models_differ() -> None:
    names = ["owner/name", "owner-name", "owner_name", "é", "è", "x" * 300, "y" + "x" * 300]
    assert len({tree_path(Path(), Job(name, "har", 1, 2, "maxent")) for name in names}) == len(names)
    assert tree_path(Path(), Job("smollm2-135m", "har", 0, 1, "maxent")).name == "har_smollm2-135m_0_1_maxent.json"


def test_one_model_or_data_set_under_two_names_is_refused() -> None:
    with pytest.raises(UsageError, match="--datasets HAR har"):
        prepare(replace(GRID, datasets=("HAR", "har")), fake_backend())


def test_the_tightest_reading_of_sizes() -> None:
    sizes = {"1000": 1000, "2GiB": 2 * 1024**3, "1.5 kb": 1500, "512MiB": 512 * 1024**2, "3T": 3 * 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    assert ExperimentConfig(max_kv_bytes="1KiB").max_kv_bytes == 1024


def test_settings_of_loading_and_memory_reach_the_model(tmp_path: Path) -> None:
    seen: list[Any] = []
    backend = fake_backend()

    def decode(lm: Any, prompt: Any, **options: Any) -> Any:
        seen.append(options["max_kv_bytes"])
        return backend.decode(lm, prompt, **options)

    config = replace(CONFIG, models=("red",), max_kv_bytes="2MiB", quantization="4bit", device_map="auto")
    run_in(tmp_path, replace(backend, decode=decode), config)
    assert set(seen) == {2 * 1024**2}


def test_loading_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dts.load", lambda spec, **options: options, raising=False)
    config = ExperimentConfig(device="cpu", dtype="bfloat16", quantization="8bit", device_map="auto")
    wanted = {"device": "cpu", "dtype": "bfloat16", "quantization": "8bit", "device_map": "auto"}
    assert load_model(FakeSpec("red", "#FF6B6B"), config) == wanted


def test_the_default_name_is_fit_for_a_folder() -> None:
    assert ExperimentConfig(datasets=("HAR",)).name == "HAR"
    assert ExperimentConfig(datasets=("HAR", "tasks/my own.yaml")).name == "HAR-my-own"
    assert ExperimentConfig(datasets=("a/b.yaml",), experiment_name="x").name == "x"
