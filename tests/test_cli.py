"""The command line: every option in both spellings, every bad input in one line, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import COLORS, Calls, FakeTask, fake_backend, raise_after, reward_failure

from dts.errors import UnavailableError, UsageError
from dts.evaluation.cli import build_parser, hyphenated, main
from dts.evaluation.config import ExperimentConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a fake run's time."""
    monkeypatch.setattr("dts.evaluation.runner.write_charts", lambda *_: {})


def command(tmp_path: Path, *more: str) -> list[str]:
    return ["--models", "red", "--num-samples", "2", "--num-rollouts", "3", "--no-wandb", "--output-dir", str(tmp_path),
            *more]  # fmt: skip


def test_a_run_prints_the_table_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--models", *COLORS), fake_backend()) == 0
    out, err = capsys.readouterr()
    assert "best reward" in out and "majority" in out and err == ""
    for model in COLORS:
        for method in ("maxent", "best-of-n", "greedy"):
            assert any(line.startswith("|") and model in line and method in line for line in out.splitlines())
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.json", "rollouts.jsonl", "samples.jsonl", "summary.json", "report.md"}
    assert sum(name.endswith(".png") for name in written) == 5
    assert (folder / "report.md").read_text() in out


def test_every_config_field_is_an_option() -> None:
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert {"--" + f.name.replace("_", "-") for f in fields(ExperimentConfig)} <= options


def test_underscores_and_hyphens_mean_the_same_and_values_are_untouched() -> None:
    spelled = ["--num_samples", "4", "--max_tokens=7", "--experiment_name", "my_name", "--output-dir=a_b/c_d"]
    wanted = ["--num-samples", "4", "--max-tokens=7", "--experiment-name", "my_name", "--output-dir=a_b/c_d"]
    assert hyphenated(spelled) == wanted
    for action in build_parser()._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                assert hyphenated(["--" + option[2:].replace("-", "_")]) == [option]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--models", "rad"], "'rad'"),
        (["--dataset", "HARR"], "did you mean har?"),
        (["--methods", "maxnt"], "did you mean maxent?"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--num_rollouts", "-3"], "--num-rollouts -3"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--experiment-name", "../x"], "--experiment-name"),
        (["--no-such-option"], "--no-such-option"),
        (["--models"], "--models"),
        (["--verbose", "--quiet"], "--verbose"),
    ],
)
@pytest.mark.usefixtures("no_charts")
def test_bad_options_are_one_line_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    calls = Calls()
    assert main(command(tmp_path, *arguments), fake_backend(calls=calls)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert out == "" and calls.loaded == [] and list(tmp_path.iterdir()) == []


def _raises(error: Exception) -> Any:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("load_task", UsageError("--data-dir data: there is no file har_windows.npz in it")),
        ("load_task", UsageError("m4.csv, line 7: 'abc' is not a number")),
        ("check_model", UnavailableError("model 'x' is gated: accept its terms\nand run: hf auth login")),
        ("check_model", UsageError("example 'ex-0': prompt of 9000 tokens exceeds the context")),
    ],
)
def test_bad_data_and_models_are_one_line_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, error: Exception
) -> None:
    calls = Calls()
    backend = replace(fake_backend(calls=calls), **{part: _raises(error)})
    assert main(command(tmp_path), backend) == 2
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    assert calls.loaded == [] and list(tmp_path.iterdir()) == []


def test_output_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls()
    (tmp_path / "file").write_text("in the way")
    for target in ("file", "file/below"):
        assert main(command(tmp_path / target), fake_backend(calls=calls)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: --output-dir") and err.count("\n") == 1
    assert calls.loaded == []


@pytest.mark.usefixtures("no_charts")
def test_ctrl_c_saves_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = FakeTask(fail=raise_after(Calls(), 4, KeyboardInterrupt()))  # in best-of-n of the first sample
    assert main(command(tmp_path), fake_backend(task)) == 130
    out, err = capsys.readouterr()
    assert "partial" in out and "interrupted: partial results are in" in err
    (summary,) = tmp_path.glob("*/summary.json")
    assert json.loads(summary.read_text())["partial"] is True
    assert len((summary.parent / "rollouts.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("no_charts")
def test_a_failing_reward_is_named_and_finished_rollouts_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path), fake_backend(FakeTask(fail=raise_after(Calls(), 2, reward_failure())))) == 1
    err = capsys.readouterr().err
    assert "error: reward 'number' raised ZeroDivisionError" in err and "Traceback" not in err
    (rollouts,) = tmp_path.glob("*/rollouts.jsonl")
    assert len(rollouts.read_text().splitlines()) == 2


@pytest.mark.usefixtures("no_charts")
def test_quiet_prints_the_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--quiet"), fake_backend()) == 0
    (report,) = tmp_path.glob("*/report.md")
    assert capsys.readouterr().out.strip() == report.read_text().strip()


@pytest.mark.parametrize("script", ["run_experiments", "run_experiments_with_wandb"])
def test_front_door_has_the_models_and_parses_nothing_at_import(script: str) -> None:
    code = f"import sys; sys.argv[1:] = ['--no-such-option']; from {script} import MODEL_CONFIGS, main; " \
           "print(MODEL_CONFIGS['llama-7b'].color)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "#FF6B6B"


@pytest.mark.parametrize(("option", "wanted"), [("--list-models", "mistral-7b"), ("--list_methods", "best-of-n")])
def test_lists(option: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert wanted in capsys.readouterr().out


def test_list_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-datasets"]) == 0
    assert {"har", "m4"} <= set(capsys.readouterr().out.split())
