"""The command line: every option in both spellings, every bad input in one line, exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import COLORS, Calls, FakeTask, fake_backend, raise_after, reward_failure

from dts.errors import UnavailableError, UsageError
from dts.evaluation.cli import build_parser, hyphenated, main
from dts.evaluation.experiment.config import ExperimentConfig, read_config_file
from dts.evaluation.experiment.plan import known_method
from dts.evaluation.experiment.progress import Progress
from dts.evaluation.records import Job
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.tracking.keys import TIME_KEYS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a fake run's time."""
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_report", lambda *_: None)


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
    written = {path.name for path in folder.rglob("*") if path.is_file()}
    assert written >= {"config.json", "rollouts.jsonl", "samples.jsonl", "summary.json", "report.md", "report.html"}
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
        (["--seeds", "0", "-1"], "--seeds 0 -1"),
        (["--datasets", "HAR", "har"], "names one of them twice"),
        (["--max-kv-bytes", "2 rabbits"], "'2 rabbits'"),
        (["--quantization", "3bit"], "--quantization '3bit'"),
        (["--tracker", "mlflow"], "--tracker 'mlflow'"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--dry-run", "--tokens-per-second", "0"], "--tokens-per-second 0"),
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
    code = f"import sys; sys.argv[1:] = ['--no-such-option']; sys.path.append('compat')\n" \
           f"from {script} import MODEL_CONFIGS, main; print(MODEL_CONFIGS['llama-7b'].color)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "#FF6B6B"


@pytest.mark.parametrize(("option", "wanted"), [("--list-models", "mistral-7b"), ("--list_methods", "best-of-n")])
def test_lists(option: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    assert wanted in capsys.readouterr().out


def test_list_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-datasets"]) == 0
    assert {"har", "m4"} <= set(capsys.readouterr().out.split())


# Settings from files, and what they set.


def test_shipped_configs_name_methods_and_data_that_exist() -> None:
    from dts.evaluation.tasks.registry import canonical
    from dts.models.registry import resolve
    from dts.search import METHODS

    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert {file.stem for file in files} >= {"main", "smoke", "har", "m4", "two_models"}
    for file in files:
        config = ExperimentConfig(**read_config_file(file))
        assert all(resolve(name) and canonical(data) for name in config.models for data in config.datasets)
        assert {known_method(name, METHODS) for name in config.methods} <= set(METHODS)


@pytest.mark.usefixtures("no_charts")
def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: red\nnum-samples: 3\nnum_rollouts: 3\nseed: 7\nmethods: [greedy]\ntop_k: null\n")
    arguments = ["--config", str(file), "--num-samples", "2", "--no-wandb", "--output-dir", str(tmp_path / "out")]
    assert main(arguments, fake_backend()) == 0
    (written,) = (tmp_path / "out").glob("*/config.json")
    config = json.loads(written.read_text())["config"]
    wanted = {"models": ["red"], "num_samples": 2, "num_rollouts": 3, "seeds": [7], "methods": ["greedy"]}
    assert config == ExperimentConfig().as_dict() | wanted | {
        "output_dir": str(tmp_path / "out"),
        "wandb_mode": "disabled",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("num_smaples: 3", "unknown key 'num_smaples'"),
        ("resume: somewhere", "unknown key 'resume'"),
        ("seed: 1\nseeds: [2]", "sets seeds a second time"),
        ("num_samples: [1, 2]", "'num_samples' holds [1, 2]"),
        ("num_samples: many", "--num-samples 'many'"),
        ("temperature: warm", "--temperature 'warm'"),
        ("models: [1]", "--models 1"),
        ("- a list", "holds no settings"),
        ("a: [", "is not valid YAML"),
        ("x: !!python/object/apply:os.system [echo]", "is not valid YAML"),
    ],
)
def test_bad_config_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["--config", str(file), "--output-dir", str(tmp_path / "out")], fake_backend()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err and not (tmp_path / "out").exists()
    assert str(file) in err or named.startswith("--")


def test_dry_run_counts_tokens_and_loads_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls()
    arguments = command(
        tmp_path, "--dry-run", "--methods", "maxent", "greedy", "--seeds", "0", "1", "--max-tokens", "8"
    )
    assert main([*arguments, "--tokens-per-second", "4"], fake_backend(calls=calls)) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_lines(capsys.readouterr().out)]
    # 2 samples x 2 seeds, 10 prompt tokens each; maxent 3 rollouts of 8 tokens, greedy 1
    assert rows[2:] == [
        ["red", "har", "maxent", "4", "10 (up to 10)", "96", "136", "34 s"],
        ["red", "har", "greedy", "4", "10 (up to 10)", "32", "72", "18 s"],
        ["all", "", "", "8", "", "128", "208", "52 s"],
    ]
    assert calls.loaded == [] and list(tmp_path.iterdir()) == []


def test_dry_run_without_a_rate_says_that_the_time_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = replace(fake_backend(), check_model=lambda *_: None)
    assert main(command(tmp_path, "--dry-run"), backend) == 0
    out = capsys.readouterr().out
    assert "unknown until a first sample is measured" in out
    assert all(row.rstrip("| ").endswith("unknown") for row in table_lines(out)[2:])


@pytest.mark.usefixtures("no_charts")
def test_dry_run_of_a_resumed_run_measures_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = FakeTask(fail=raise_after(Calls(), 5, KeyboardInterrupt()))
    assert main(command(tmp_path, "--methods", "maxent", "greedy"), fake_backend(task)) == 130
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["--resume", str(folder), "--dry-run"], fake_backend()) == 0
    out = capsys.readouterr().out
    assert "2 jobs are finished" in out
    assert [line.split("|")[-2].strip() for line in table_lines(out)[2:]] == ["1 s", "0 s", "1 s"]  # 0.75 s, 0.25 s
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_charts")
def test_a_terminated_run_sums_up_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls, before = Calls(), signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        calls.scored += 1
        if calls.scored == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    assert main(command(tmp_path, "--methods", "maxent", "greedy"), fake_backend(FakeTask(fail=terminate))) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert json.loads((folder / "summary.json").read_bytes())["runs"]
    assert "continue with --resume" in capsys.readouterr().err


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_progress_shows_what_is_done_and_nothing_off_the_terminal() -> None:
    job = Job("red", "har", 0, 0, "maxent")
    head, other = job._asdict(), job._replace(sample=1)._asdict()
    seen = [{**head, "tokens": 500}, {**other, "tokens": 30}, {**head, "tokens": 590}]  # two searches by turns
    shown, hidden = io.StringIO(), io.StringIO()
    for file, visible in ((shown, True), (hidden, False)):
        bar = Progress(4, 1, shown=visible, file=file, now=iter([10.0, 11.0, 12.0]).__next__)
        bar.note("red har maxent")
        for record in seen:
            bar.rollout({**record, "best_so_far": 0.75})
        bar.job(job)
        bar.close()
    last = shown.getvalue().replace("\n", "\r").split("\r")[-2]
    assert last.startswith("red har maxent: 2/4 ")
    assert "3 rollouts, 60 tokens/s, best reward 0.750" in last and "<" in last
    assert hidden.getvalue() == ""


@pytest.mark.usefixtures("no_charts")
def test_progress_is_drawn_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(tmp_path), fake_backend()) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(command(tmp_path), fake_backend()) == 0
    assert "6/6" in capsys.readouterr().err
    assert main(command(tmp_path, "--quiet"), fake_backend()) == 0
    assert capsys.readouterr().err == ""


# The real thing: tiny random models in folders, synthetic data in files.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny Llama and Mistral models under the registry's names, and a data folder."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("place")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{letter: number for number, letter in enumerate(alphabet, 1)}}
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>")
    sizes = {"vocab_size": len(vocab), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0, "bos_token_id": 0}  # fmt: skip
    for name, kind, context in (("a", "Llama", 8192), ("b", "Mistral", 8192), ("short", "Llama", 64)):
        config = getattr(transformers, kind + "Config")(**sizes, max_position_embeddings=context)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "models.yaml").write_text("llama-7b: {path: a}\nmistral-7b: {path: b}\nshort: {path: short}\n")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    labels = np.array(["walking", "sitting"] * 10)
    signal = rng.normal(size=(20, 128, 3)) * np.where(labels == "walking", 1.0, 0.05)[:, None, None]
    np.savez(folder / "data" / "har_windows.npz", acc=signal.astype(np.float32), label=labels,
             subject=np.arange(20), sampling_hz=50, split=np.array(["train", "test"]).repeat(10))  # fmt: skip
    return folder


def real(place: Path, output: Path, *more: str) -> list[str]:
    return ["--models_file", str(place / "models.yaml"), "--data_dir", str(place / "data"), "--num_samples", "2",
            "--num_rollouts", "4", "--max_tokens", "6", "--device", "cpu", "--no_wandb", "--quiet",
            "--output_dir", str(output), *more]  # fmt: skip


def test_two_architectures_behind_registry_names(place: Path, tmp_path: Path) -> None:
    assert main(real(place, tmp_path, "--models", "llama-7b", "mistral-7b", "--methods", "maxent", "greedy")) == 0
    (file,) = tmp_path.glob("*/summary.json")
    runs = json.loads(file.read_text())["runs"]
    assert [(r["model"], r["color"]) for r in runs[::2]] == [("llama-7b", "#FF6B6B"), ("mistral-7b", "#95E1D3")]
    for run in runs:
        assert run["forwarded_tokens"] == run["unique_tokens"] > 0
        assert set(run["metrics"]) >= {"accuracy", "macro_f1", "kappa"}
    rollouts = read_jsonl(file.parent / "rollouts.jsonl")
    assert len(rollouts) == 2 * 2 * (4 + 1)
    assert all(1 <= r["output_length"] <= 6 and r["time"] > 0 for r in rollouts)


@pytest.mark.usefixtures("no_charts")
def test_equal_seeds_give_equal_results(place: Path, tmp_path: Path) -> None:
    def records(name: str) -> list[dict[str, Any]]:
        assert main(real(place, tmp_path / name, "--models", "llama-7b", "--seed", "3")) == 0
        (file,) = (tmp_path / name).glob("*/rollouts.jsonl")
        return [{k: v for k, v in r.items() if k not in TIME_KEYS} for r in read_jsonl(file)]

    assert records("first") == records("second")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--models", "short"], "exceeds the context of short (64 tokens)"),
        (["--models", "mistral"], "mistral-7b"),
        (["--models", "owner/not-here"], "owner/not-here"),
        (["--models", "llama-7b", "--data-dir", "no-such-folder"], "no-such-folder"),
        (["--models", "llama-7b", "--dataset", "M4"], "m4_subset.csv"),
        (["--models", "llama-7b", "--device", "tpu9"], "tpu9"),
        (["--models", "llama-7b", "--dtype", "float8"], "float8"),
        (["--models", "llama-7b", "--num-samples", "999"], "999"),
        (["--models", "llama-7b", "--quantization", "8bit"], "needs bitsandbytes"),
    ],
)
def test_real_bad_input_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main(real(place, tmp_path, *arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_row_is_named_by_file_and_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "m4_subset.csv"
    values = " ".join(str(100 + i) for i in range(40))
    data.write_text(
        f"id,frequency,seasonal_period,horizon,n_train,train,test\n"
        f"W1,Weekly,1,3,40,{values},1 2 3\nW2,Weekly,1,3,3,1 2 x,1 2 3\n"
    )
    arguments = ["--models", "llama-7b", "--dataset", "M4", "--data-dir", str(tmp_path)]
    assert main(real(place, tmp_path / "out", *arguments)) == 2
    err = capsys.readouterr().err
    assert "m4_subset.csv" in err and "line 3" in err and err.count("\n") == 1
