"""Every config's `--smoke` runs, and data that a reward cannot use is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

from training_models import tiny_pair

import dts
from dts.fetch import cached
from dts.models.huggingface import HFModel
from dts.training import cli
from dts.training.config import SMOKE, smoke_layer
from dts.training.data import read_rows
from dts.training.rewards import check_prompts
from dts.training.run import read_history

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
EXPERT = [file for file in CONFIGS if "expert" in file.stem]
COMMANDS = [("train", file) for file in CONFIGS] + [("expert-iteration", file) for file in EXPERT]
each_config = pytest.mark.parametrize(("command", "file"), COMMANDS, ids=[f"{c} {f.stem}" for c, f in COMMANDS])


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the data of the configs are


def smoke(command: str, file: Path, output: Path) -> list[list[dict[str, Any]]]:
    """The histories of the runs that the command makes."""
    options = ["--rounds", "1"] if command == "expert-iteration" else []
    assert cli.main([command, "--config", str(file), "--smoke", "--output", str(output), "--quiet", *options]) == 0
    return [read_history(state.parent) for state in sorted(output.glob("*/seed_42/trainer_state.json"))]


@each_config
def test_smoke_runs_on_a_tiny_model(
    command: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, its model apart: a random one of a few thousand weights, with longer prompts allowed."""
    monkeypatch.setitem(SMOKE, "max_length", 512)  # a token is a character
    monkeypatch.setattr("dts.training.adapters.load_pretrained", lambda name: tiny_pair())
    monkeypatch.setattr("dts.training.run.check_available", lambda name: None)
    monkeypatch.setattr(dts, "load", lambda name: HFModel(*tiny_pair(), name="tiny"))
    (history,) = smoke(command, file, tmp_path)
    assert len(history) == SMOKE["max_steps"]
    assert f"{SMOKE['max_steps']} steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.minutes  # make smoke
@each_config
def test_smoke_runs_on_the_embedded_model(command: str, file: Path, tmp_path: Path, request: Any) -> None:
    try:
        cached("smollm2-135m")
    except dts.UnavailableError as error:
        pytest.skip(str(error))
    (history,) = smoke(command, file, tmp_path)
    assert len(history) == SMOKE["max_steps"]


# ---- data that a reward cannot use ----


def useless(prompts: list[Any], completions: list[Any]) -> list[float]:
    raise dts.UsageError("no prompt is good enough")


def divides(prompts: list[Any], completions: list[str]) -> list[float]:
    return [1 / len(text) for text in completions]


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("dts.evaluation.rewards.prompted:prompt_keywords", "asks for no words"),
        ("dts.training.coding.task:public_tests", "is no coding problem"),
        ("test_smoke:useless", "no prompt is good enough"),
    ],
)
@pytest.mark.parametrize("command", ["train", "expert-iteration"])
def test_a_row_that_a_reward_cannot_use_is_named_before_any_model(
    command: str, reward: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dts.training.run.load_for_training", loads)
    monkeypatch.setattr(dts, "load", loads)
    data, config = tmp_path / "rows.jsonl", tmp_path / "grpo.yaml"
    data.write_text('{"prompt": "hello"}\n' * 8)
    config.write_text(f"method: grpo\nmodel: smollm2-135m\ndata: {data}\ngrpo: {{reward: '{reward}'}}\n")
    assert cli.main([command, "--config", str(config), "--smoke", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data}:1: grpo.reward={reward} cannot use this row: ") and reason in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_function_that_fails_on_an_empty_completion_is_no_fault_of_the_data(tmp_path: Path) -> None:

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    check_prompts(divides, read_rows(tmp_path / "rows.jsonl", need=["prompt"]), "grpo.reward=x")


def test_the_smoke_data_of_a_config_are_its_own_where_its_reward_needs_them() -> None:

    own = {"method": "grpo", "data": ["mine.jsonl"], "grpo": {"reward": "my.module:reward"}}
    assert smoke_layer(own, rewarded=True)["data"] == ["mine.jsonl"]
    assert smoke_layer(own, {"grpo": {"reward": "heuristic"}}, rewarded=True)["data"] == SMOKE["data"]
    assert smoke_layer(own, rewarded=False)["data"] == SMOKE["data"]
