"""Tracking: what W&B would upload and what TensorBoard would show, read back from their files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import COLORS, Calls, FakeTask, fake_backend, raise_after
from matplotlib.figure import Figure
from wandb_file import OfflineRun, offline_runs

from dts.errors import UnavailableError, UsageError
from dts.evaluation.cli import main
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.tracking import (
    FINAL_KEYS,
    ROLLOUT_KEYS,
    NullTracker,
    Tracker,
    choose_mode,
    logged_in,
    make_tracker,
)

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


# ---- trackers without a run of the command line ----

HEAD = {"model": "org/red", "dataset": "har", "seed": 3}


def track(tracker: Tracker, head: dict[str, Any] = HEAD, *, complete: bool = True, charts: Path | None = None) -> None:
    """Two samples of maxent (3 rollouts) and greedy (1): rollout k of sample s has reward s + k / 10."""
    config = {"config": {"num_rollouts": 3}, "task": "har", **{k: head[k] for k in ("dataset", "seed") if k in head}}
    run = tracker.start_run(head["model"], "#ff6b6b", METHODS, config)
    for sample in range(SAMPLES):
        for method, count in zip(METHODS, (3, 1), strict=True):
            own = {**head, "sample": sample, "method": method, "id": f"ex-{sample}", "text": "a\nb"}
            for k in range(count):
                reward = sample + k / 10
                run.log_rollout({**own, "rollout_idx": k, "rollout_reward": reward, "best_so_far": reward, "tokens": k,
                                 "output_length": 4, "nodes_explored": 5 * k + 5, "time": k + 0.5,
                                 "start_depth": 0})  # fmt: skip
            run.log_sample({**own, "best_reward": sample + 0.2, "time": 2.0, "nodes": 15,
                            "monotonicity": 1.0 if count > 1 else None})  # fmt: skip
    runs = [summarised(method, seed) for seed in (3, 4) for method in METHODS]  # seed 4 is another tracker run
    run.finish(runs, {"bars": charts} if charts else {}, complete=complete)


def summarised(method: str, seed: int) -> dict[str, Any]:
    return {"model": HEAD["model"], "dataset": "har", "seeds": [seed], "method": method, "metrics": {"accuracy": 0.5},
            "avg_best_reward": float(seed), "avg_monotonicity": 1.0 if method == "maxent" else None,
            "avg_time_per_sample": 2.0, "total_time": 4.0}  # fmt: skip


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return read


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What TensorBoard reads from a run that was cut short, and then resumed and tracked from its start again."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("board")
    chart = folder / "bars.png"
    Figure(figsize=(1, 1)).savefig(chart, dpi=20)
    track(make_tracker("disabled", folder, "exp", kind="tensorboard"), complete=False)
    track(make_tracker("disabled", folder, "exp", kind="tensorboard"), charts=chart)
    return events(folder / "tensorboard" / "exp-org-red-har-seed3")


def test_tensorboard_has_the_keys_with_one_step_per_rollout(board: Any) -> None:
    rewards = board.Scalars("rollout_reward")
    assert [(e.step, pytest.approx(e.value)) for e in rewards] == [
        (0, 0),
        (1, 0.1),
        (2, 0.2),
        (4, 1),
        (5, 1.1),
        (6, 1.2),
    ]
    assert [(e.step, e.value) for e in board.Scalars("greedy/rollout_reward")] == [(3, 0), (7, 1)]
    tags = set(board.Tags()["scalars"])
    assert tags >= {*ROLLOUT_KEYS, "sample_0/best_reward", "sample_1/nodes", "greedy/sample_1/time", *FINAL_KEYS}
    assert "greedy/sample_0/monotonicity" not in tags and "greedy/final/avg_monotonicity" not in tags
    assert [e.value for e in board.Scalars("final/avg_best_reward")] == [3]  # not that of seed 4
    assert [e.value for e in board.Scalars("final/accuracy")] == [0.5]


def test_tensorboard_has_texts_and_charts_and_forgets_what_a_resumed_run_logs_again(board: Any) -> None:
    assert [e.value for e in board.Scalars("partial")] == [0]
    assert board.Tags()["images"] == ["charts/bars"]
    (image,) = board.Images("charts/bars")
    assert (image.width, image.height) == (20, 20)
    text = board.Tensors("sample_1/text/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    a\n    b"  # a literal block of Markdown
    config = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"color": "#ff6b6b"' in config and '"seed": 3' in config


def test_data_sets_and_seeds_are_runs_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tracker = make_tracker("offline", tmp_path, "exp")
    for head in (HEAD, {**HEAD, "seed": 4}, {**HEAD, "dataset": "m4"}, {"model": "org/red"}):
        track(tracker, head)
    first, second, third, whole = offline_runs(tmp_path)
    assert [run.name for run in (first, second, third, whole)] == [
        "exp-org-red-har-seed3", "exp-org-red-har-seed4", "exp-org-red-m4-seed3", "exp-org-red"]  # fmt: skip
    assert {"har", "seed 4", "#ff6b6b"} <= set(second.tags) and "m4" in third.tags
    assert (first.summary["final/avg_best_reward"], second.summary["final/avg_best_reward"]) == (3, 4)
    assert "final/avg_best_reward" not in third.summary  # the summary has none for m4
    assert all(len(run.history) == SAMPLES * 4 for run in (first, second, third, whole))


def test_a_tracker_that_is_missing_or_unknown_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(make_tracker("online", tmp_path, "x", kind="none"), NullTracker)
    with pytest.raises(UsageError, match="choose from wandb, tensorboard, none"):
        make_tracker("online", tmp_path, "x", kind="mlflow")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the package is not installed
    with pytest.raises(UnavailableError, match="pip install tensorboard"):
        make_tracker("online", tmp_path, "x", kind="tensorboard")


def test_names_that_trackers_use_stand_in_one_module() -> None:
    root = Path(__file__).parents[1] / "evaluation"
    files = [path for kind in ("py", "html", "js") for path in root.rglob(f"*.{kind}")]
    named = {path.relative_to(root).as_posix() for path in files if re.search(r"""["'{]final/""", path.read_text())}
    assert named == {"tracking/keys.py"}
