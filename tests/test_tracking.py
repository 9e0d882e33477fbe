"""Tracking: what W&B would upload, read back from an offline run's file."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import COLORS, Calls, FakeTask, fake_backend, raise_after
from wandb_file import OfflineRun, offline_runs

from dts.evaluation.cli import main
from dts.evaluation.results import read_jsonl
from dts.evaluation.tracking import NullTracker, choose_mode, logged_in, make_tracker

SAMPLES, ROLLOUTS = 2, 3
METHODS = ("maxent", "greedy")
STEPS = SAMPLES * (ROLLOUTS + 1)  # maxent has ROLLOUTS rollouts, greedy one


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two models and two methods, with nobody logged in."""
    pytest.importorskip("wandb")
    output = tmp_path_factory.mktemp("tracked")
    sizes = ["--num-samples", str(SAMPLES), "--num-rollouts", str(ROLLOUTS)]
    names = ["--models", *COLORS, "--methods", *METHODS, "--wandb-mode", "offline"]
    assert main([*names, *sizes, "--output-dir", str(output), "--quiet"], backend=fake_backend(FakeTask())) == 0
    return next(path for path in output.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[OfflineRun]:
    return offline_runs(folder)


def test_two_models_are_two_runs_with_their_colours(runs: list[OfflineRun]) -> None:
    assert [run.config["model"] for run in runs] == list(COLORS)
    assert [run.config["color"] for run in runs] == list(COLORS.values())
    assert all(run.config["color"] in run.tags and run.config["model"] in run.tags for run in runs)
    assert {run.project for run in runs} == {"maxent-ts-optimized"}
    assert [(run.exit_code, run.summary["partial"]) for run in runs] == [(0, False), (0, False)]


def test_one_step_per_rollout_with_the_records_of_the_search(runs: list[OfflineRun], folder: Path) -> None:
    for run in runs:
        local = [r for r in read_jsonl(folder / "rollouts.jsonl") if r["model"] == run.config["model"]]
        assert len(run.history) == len(local) == STEPS
        for row, record in zip(run.history, local, strict=True):
            prefix = "" if record["method"] == "maxent" else "greedy/"
            for key in ("rollout_reward", "rollout_idx", "output_length", "nodes_explored", "time"):
                assert row[prefix + key] == record[key]


def test_sample_and_final_keys(runs: list[OfflineRun], folder: Path) -> None:
    samples = read_jsonl(folder / "samples.jsonl")
    for run in runs:
        rows = {key: value for row in run.history for key, value in row.items()}
        own = [s for s in samples if s["model"] == run.config["model"] and s["method"] == "maxent"]
        for sample in own:
            for key in ("best_reward", "monotonicity", "time", "nodes"):
                assert rows[f"sample_{sample['sample']}/{key}"] == sample[key]
        assert rows["final/avg_best_reward"] == pytest.approx(sum(s["best_reward"] for s in own) / SAMPLES)
        for key in ("final/avg_monotonicity", "final/avg_time_per_sample", "final/total_time"):
            assert key in rows and key in run.summary
        assert "greedy/final/avg_best_reward" in rows
        assert "greedy/final/avg_monotonicity" not in rows  # one rollout has no order


def test_table_and_charts_are_logged(runs: list[OfflineRun]) -> None:
    for run in runs:
        row = run.history[-1]
        assert row["rollouts"]["_type"] == "table-file" and row["rollouts"]["nrows"] == STEPS
        images = {key for key, value in row.items() if key.startswith("charts/") and value["_type"] == "image-file"}
        charts = {"reward_over_rollouts", "monotonicity", "speed_quality", "rollout_heatmap", "reward_vs_tokens"}
        assert images == {f"charts/{name}" for name in charts}
        drawn = set(run.config["_wandb"]["visualize"])
        assert drawn >= {"reward_over_rollouts", "monotonicity", "speed_quality"}


def test_an_interrupted_run_is_marked(tmp_path: Path) -> None:
    task = FakeTask(fail=raise_after(Calls(), 5, KeyboardInterrupt()))
    arguments = ["--models", *COLORS, "--num-rollouts", "3", "--methods", "maxent", "--wandb-mode", "offline"]
    assert main([*arguments, "--quiet", "--output-dir", str(tmp_path)], backend=fake_backend(task)) == 130
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (run,) = offline_runs(folder)
    assert run.exit_code == 1 and run.summary["partial"] is True and len(run.history) == 5


def test_offline_without_a_login_and_online_with_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_mode(None) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert choose_mode(None) == "online"
    assert choose_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode(None) == "offline"
    assert choose_mode("online") == "online"


def test_login_is_found_in_netrc_for_the_configured_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()


def test_disabled_tracking_writes_nothing(tmp_path: Path) -> None:
    assert isinstance(make_tracker("disabled", tmp_path, "x"), NullTracker)
    assert main(["--models", "red", "--no_wandb", "--output_dir", str(tmp_path), "--quiet"], fake_backend()) == 0
    assert not list(tmp_path.glob("*/wandb"))
