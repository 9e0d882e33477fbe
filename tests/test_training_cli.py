"""Settings and commands of training: what is refused before any long work, and the configs in the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dts
from dts.training import cli
from dts.training.config import SMOKE, TrainConfig, assignment, from_mapping
from dts.training.health import Meter, findings

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "method": "sft", "model": "smollm2-135m", "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out"),
    }))  # fmt: skip
    return tmp_path


@pytest.fixture
def nothing_runs(monkeypatch):
    """The runs that the command would have made."""
    from dts.training import run

    made: list[TrainConfig] = []
    monkeypatch.setattr(run, "train", lambda config, **options: made.append(config) or Path(config.folder))
    monkeypatch.setattr(cli, "_show", lambda folder: None)
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "epoch=2"], r"unknown config key epoch; did you mean epochs\?"),
        (["--set", "lora.rank=2"], r"unknown config key lora\.rank; known keys are r, alpha"),
        (["--set", "lora=2"], "lora is 2; give keys and values"),
        (["--set", "lora.r"], "is no assignment; write key=value"),
        (["--set", "completion_only_loss=no way"], r"completion_only_loss='no way' is not allowed; give true or false"),
        (["--set", "learning_rate=-1"], r"learning_rate=-1\.0 is not allowed; give a finite number > 0"),
        (["--set", "batch_size=2.5"], r"batch_size=2\.5 is not allowed; give a whole number"),
        (["--set", "method=dpo"], "method='dpo' is not allowed; give sft, polychromic, grpo"),
        (["--set", "method=polychromic", "polychromic.n_samples=2"], r"n_samples=2 is not allowed; .* >= 3"),
        (["--set", "method=polychromic", "polychromic.gate=no"], "polychromic.gate=False is not allowed; give text"),
        (["--set", "method=grpo", "grpo.reward=math:nothing"], "cannot be imported"),
        (["--set", "method=grpo", "grpo.groups=all"], r"grpo\.groups='all' is not allowed; give sample, search"),
        (["--set", "checkpoint_path=nowhere"], r"checkpoint_path='nowhere' holds no adapter_model\.safetensors"),
        (["--data", "empty.jsonl"], "empty.jsonl: the file has no rows"),
        (["--data", "bare.jsonl"], "bare.jsonl:1: the row has no prompt"),
        (["--data", "none.jsonl"], "there is no such file"),
        (["--resume-from-checkpoint", "checkpoint-7"], "checkpoint-7: there is no whole checkpoint"),
        (["--seeds", "-1"], "seed=-1 is not allowed"),
        (["--colour"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, monkeypatch, capsys, options, message):
    monkeypatch.chdir(files)
    (files / "empty.jsonl").write_text("")
    (files / "bare.jsonl").write_text('{"response": "b"}\n')
    assert cli.main(["train", "--config", "run.yaml", *options]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "holds no settings"), ("a: [", "is not valid YAML"), ("{}", "the config has no method")],
)
def test_bad_config_files(files, capsys, text, message):
    (files / "bad.yaml").write_text(text)
    assert cli.main(["train", "--config", str(files / "bad.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["train", "--config", str(files / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_later_layers_win_and_seeds_make_runs(files, nothing_runs):
    argv = ["train", "--config", str(files / "run.yaml"), "--smoke", "--data", str(files / "rows.jsonl")]
    assert (
        cli.main([*argv, "--seeds", "1", "2", "3", "--set", "lora.r=2", "learning_rate=1e-3", "--set", "epochs=1"]) == 0
    )
    assert [config.seed for config in nothing_runs] == [1, 2, 3]
    config = nothing_runs[0]
    assert (config.lora.r, config.lora.alpha, config.learning_rate, config.epochs) == (2, 8, 1e-3, 1.0)
    assert config.max_steps == SMOKE["max_steps"]
    assert config.folder == str(files / "out" / "run" / "seed_1")
    nothing_runs.clear()
    assert (
        cli.main(["train_variants", "--configs", str(ROOT / "configs/experiments"), *argv[3:], "--output", str(files)])
        == 0
    )
    assert [config.name for config in nothing_runs] == list(cli.VARIANTS)


def test_nothing_starts_while_one_of_the_runs_has_bad_input(files, nothing_runs):
    (files / "out" / "run" / "seed_3").mkdir(parents=True)
    (files / "out" / "run" / "seed_3" / "adapter_model.safetensors").touch()
    assert cli.main(["train", "--config", str(files / "run.yaml"), "--seeds", "1", "2", "3"]) == 2
    assert nothing_runs == []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_configs_of_the_repository(file, nothing_runs):
    config = from_mapping(cli.read_config(file))
    small = file.stem.startswith("adapter_") or "_keywords" in file.stem
    model = "smollm2-135m" if small else "Qwen/Qwen3-8B"
    assert (config.name, config.seed, config.model) == (file.stem, 42, model)
    if file.stem.startswith("grpo_from_"):
        grpo = config.grpo
        assert (grpo.kl_coeff, grpo.temperature, grpo.n_generations, config.learning_rate) == (0.1, 0.8, 4, 1e-5)
        assert config.warm_start == f"output/experiments/{file.stem.removeprefix('grpo_from_')}_warmstart/seed_42"
    smoke = from_mapping(cli.read_config(file), SMOKE)
    assert (smoke.model, smoke.max_steps, smoke.warm_start) == ("smollm2-135m", 4, None)
    assert smoke.folder.startswith("output/experiments/")


def test_all_names_of_the_inventory_are_there(monkeypatch):
    names = {file.stem for file in CONFIGS}
    assert names >= {
        "baseline", "polychromic_0.3", "polychromic_1.0_moderate", "polychromic_2.0_aggressive", "baseline_warmstart",
        "polychromic_warmstart", "grpo_from_baseline", "grpo_from_polychromic", "sft_control",
    }  # fmt: skip
    weights = {f.stem: from_mapping(cli.read_config(f)).polychromic.weight for f in CONFIGS if "polychromic_" in f.stem}
    assert weights["polychromic_0.3"] == 0.3
    assert weights["polychromic_2.0_aggressive"] == 2.0
    monkeypatch.chdir(ROOT)
    assert cli.read_config("config/experiments/baseline.yaml") == cli.read_config("configs/experiments/baseline.yaml")
    rows = [json.loads(line) for line in (ROOT / SMOKE["data"][0]).read_text().splitlines()]
    assert len(rows) == 48


def test_a_missing_extra_is_named_with_its_fix(files, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else real(name, *a))
    assert cli.main(["train", "--config", str(files / "run.yaml")]) == 2
    assert capsys.readouterr().err == "error: training needs trl; run: pip install 'maxent-decoding[train]'\n"


def test_importing_the_library_and_the_settings_imports_no_trainer():
    code = "import sys, dts, dts.training.cli, dts.training.data; print({'trl', 'peft', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_assignments():
    assert assignment("a.b=1e-3") == {"a": {"b": "1e-3"}}  # YAML takes this for text; the field makes it a number
    assert assignment("data=[x, y]") == {"data": ["x", "y"]}
    with pytest.raises(dts.UsageError, match="quote it"):
        assignment("a=[")


# Health -----------------------------------------------------------------------------------------------------------


def kinds(*history):
    return set(findings(history))


def test_findings():
    calm = [{"kl_penalty": 0.5, "frac_reward_zero_std": 0.2}] * 6
    assert kinds(*calm) == set()
    assert kinds(*calm, {"kl_penalty": 6.0}) == {"kl"}  # ten times the median, and above 5 nats
    assert kinds(*[{"kl_penalty": 0.01}] * 6, {"kl_penalty": 0.9}) == set()
    assert kinds({"kl_penalty": 51.0}) == {"kl"}
    assert kinds(*[{"frac_reward_zero_std": 1.0}] * 4) == set()
    assert kinds(*[{"frac_reward_zero_std": 1.0}] * 5) == {"flat"}
    assert kinds({"diversity_score": 0.01, "quality_loss": 1.0, "combined_loss": 0.99}) == {"diversity"}
    assert kinds({"diversity_score": 0.5, "quality_loss": 1.0, "combined_loss": 1.1}) == {"combined"}
    assert kinds() == set()


def test_meter_sums_shares_and_averages_values():
    meter = Meter()
    for value in (1.0, 2.0):
        meter.add("loss", value)
        meter.observe("reward", value)
    assert meter.take() == {"loss": 3.0, "reward": 1.5}
    assert meter.take() == {}


def test_a_dry_run_prints_an_estimate_and_trains_nothing(files, nothing_runs, monkeypatch, capsys):
    monkeypatch.setattr("dts.training.estimate.estimate", lambda config, rows: f"{config.seed}: {len(rows)} rows")
    assert cli.command_main(["--config", str(files / "run.yaml"), "--seeds", "1", "2", "--dry_run"]) == 0
    assert capsys.readouterr().out == "1: 1 rows\n2: 1 rows\n"
    assert not nothing_runs
