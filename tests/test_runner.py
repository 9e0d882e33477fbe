"""The runner: records as they happen, aggregates from records, and what is left after an interruption."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fakes import COLORS, Calls, FakeTask, fake_backend, raise_after, reward_failure

from dts.errors import RewardError, UsageError
from dts.evaluation.backend import Backend
from dts.evaluation.config import ExperimentConfig
from dts.evaluation.results import Record, RunFolder, read_jsonl, to_json
from dts.evaluation.runner import prepare, run, sample_seed
from dts.evaluation.summary import markdown
from dts.evaluation.tracking import NullTracker

CONFIG = ExperimentConfig(models=tuple(COLORS), methods=("maxent", "greedy"), num_samples=2, num_rollouts=3)
ROLLOUTS = 2 * 2 * (3 + 1)  # models x samples x (maxent + greedy)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a fake run's time."""
    monkeypatch.setattr("dts.evaluation.runner.write_charts", lambda *_: {})


def run_in(path: Path, backend: Backend, config: ExperimentConfig = CONFIG) -> tuple[RunFolder, Record]:
    folder = RunFolder.create(path, config.name)
    return folder, run(prepare(config, backend), folder, NullTracker(), backend)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_rollout_and_sample_is_on_disk_with_the_inventory_keys(tmp_path: Path) -> None:
    folder, _ = run_in(tmp_path, fake_backend())
    rollouts, samples = folder.records("rollouts"), folder.records("samples")
    assert len(rollouts) == ROLLOUTS and len(samples) == 8
    wanted = {"rollout_reward", "rollout_idx", "output_length", "nodes_explored", "time", "best_so_far", "start_depth"}
    assert all(wanted <= set(r) for r in rollouts)
    assert all({"best_reward", "monotonicity", "time", "nodes", "forwarded_tokens"} <= set(s) for s in samples)
    first = [r for r in rollouts if (r["model"], r["method"], r["sample"]) == ("red", "maxent", 0)]
    sample = samples[0]
    assert [r["rollout_idx"] for r in first] == [0, 1, 2]
    assert sample["best_reward"] == max(r["rollout_reward"] for r in first) == first[-1]["best_so_far"]
    assert sample["below_root"] == pytest.approx(2 / 3)
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
    assert summary["baselines"] == {"majority": {"accuracy": 0.25}}
    assert load(folder.path / "summary.json") == json.loads(to_json(summary))


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
    assert config["config"]["num_rollouts"] == 3 and config["examples"] == ["ex-0", "ex-1"]
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
    config = ExperimentConfig(models=("red", "red"), dataset="har", methods=("MaxEnt", "best_of_n"))
    plan = prepare(config, fake_backend())
    assert list(plan.methods) == ["maxent", "best-of-n"] and len(plan.models) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("num_samples", 0), ("num_rollouts", -1), ("max_tokens", 0), ("max_tokens", 2.5), ("top_k", 0)],
        *[("top_p", 0.0), ("top_p", 1.1), ("temperature", 0.0), ("temperature", math.nan), ("seed", -1)],
        *[("reward_scale", -1.0), ("reward_scale", math.inf), ("rollout_batch", 0)],
        *[("experiment_name", "a/b"), ("wandb_mode", "later"), ("models", ()), ("methods", ())],
    ],
)
def test_config_refuses_values_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match="--" + option.replace("_", "-")):
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
