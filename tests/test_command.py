"""The console command: its subcommands, what it says to wrong input, and a prompt decoded from a terminal."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toys import Worded

import dts
from dts.__main__ import COMMANDS, main
from dts.evaluation import decode
from dts.evaluation.rewards.prompted import prompt_keywords
from dts.models.table import TableModel, random_logits

ROOT = Path(__file__).parents[1]


def test_help_lists_every_command_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert list(COMMANDS) == ["run", "decode", "fetch", "study", "train", "evaluate", "report", "serve", "lm-eval"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["decod"], "unknown command 'decod': did you mean decode? choose from run, decode, "),
        (["evalute", "--x"], "did you mean evaluate?"),
        (["zzz"], "unknown command 'zzz': choose from"),
    ],
)
def test_an_unknown_command_names_the_nearest(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_options_are_handed_over_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (target, _) in COMMANDS.items():
        module, _, function = target.partition(":")
        given: list[Any] = []
        monkeypatch.setattr(importlib.import_module(module), function, lambda argv, to=given: to.append(argv) or 7)
        assert main([name, "--num_samples", "3"]) == 7 and given == [["--num_samples", "3"]]


@pytest.mark.parametrize(
    "words", [["--config", "none.yaml"], ["train", "--config", "none.yaml"], ["split", "--input", "none.jsonl"]]
)
def test_train_takes_its_commands_or_the_options_of_train(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--output-dir", "none"] if words[0] == "split" else []
    assert main(["train", *words, *more]) == 2
    assert words[-1] in capsys.readouterr().err


def test_the_command_itself_imports_nothing_heavy() -> None:
    code = "import sys, dts.__main__ as m; m.main(['--help']); print({'torch', 'numpy', 'argparse'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    "module",
    [
        "evaluation.study",
        "evaluation.exact",
        "evaluation.scores",
        "evaluation.forecast_check",
        "training",
        "evaluation.comprehensive",
        "evaluation.report",
        "evaluation.tasks.sft",
    ],
)
def test_documented_module_commands_keep_working(module: str) -> None:
    command = ["-m", f"dts.{module}", "--help"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_the_scripts_of_earlier_systems_run_in_a_checkout(tmp_path: Path) -> None:
    scripts = sorted(path for path in (ROOT / "compat").glob("*.py") if not path.name.startswith("_"))
    assert len(scripts) == 7
    names = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    for script in scripts:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, env=clean, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
        assert script.stem in names, f"docs/names.md does not explain {script.name}"
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["run_experiments.py"]


# ---- dts decode ----


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tiny_lm: Any) -> list[str]:
    """The names of the models that were loaded; all are the tiny one."""
    names: list[str] = []
    monkeypatch.setattr(dts, "load", lambda name: names.append(name) or tiny_lm)
    return names


needs_llguidance = pytest.mark.skipif(find_spec("llguidance") is None, reason="needs the extra `constraints`")
SMALL = ["--rollouts", "3", "--max-new-tokens", "6"]


def test_the_best_text_its_reward_and_the_usage_are_printed(
    loaded: list[str], tmp_path: Path, tiny_lm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def length(text: str) -> float:\n    return len(text)\n")
    options = ["--reward", f"{tmp_path / 'mine.py'}:length", "--model", "some-model", "--seed", "5", *SMALL]
    assert main(["decode", "Once", *options, "--method", "best_of_n"]) == 0
    wanted = dts.decode(tiny_lm, "Once", reward=len, method=dts.search.BestOfN(3), max_new_tokens=6, seed=5)
    text, reward, usage = capsys.readouterr().out.rsplit("\n", 3)[:3]
    assert text.rstrip("\n") == wanted.best.text.rstrip("\n") and reward == f"reward {wanted.best.reward:g}"
    assert usage.startswith(f"best-of-n: 3 rollouts, {wanted.usage.generated_tokens} tokens generated, ")
    assert usage.endswith(f" s for {wanted.usage.reward_calls} rewards") and wanted.usage.reward_calls == 3
    assert loaded == ["some-model"]


def test_json_has_the_same_and_the_prompt_may_be_piped(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch, tiny_lm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\n"))
    assert main(["decode", "--json", "--reward-scale", "2", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    method = dts.search.MaxEnt(3, reward_scale=2.0)
    wanted = dts.decode(tiny_lm, "Once upon", method=method, max_new_tokens=6, seed=0)
    assert (found["text"], found["logprob"], found["reward"]) == (wanted.best.text, wanted.best.logprob, 0.0)
    assert found["usage"]["forwarded_tokens"] == wanted.usage.forwarded_tokens and found["method"] == "maxent"
    assert found["usage"]["reward_calls"] == found["usage"]["reward_tokens"] == 0  # there is no reward
    assert loaded == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["x", "--reward", "prose-"],
            "--reward prose- is not known: did you mean prose? give prompt-keywords, prose or",
        ),
        (["x", "--reward", "none.py:f"], "cannot be imported (FileNotFoundError: there is no file none.py)"),
        (["x", "--reward", "math:nothing"], "cannot be imported (AttributeError"),
        (["x", "--reward", "math:pi"], "is float; give a function of the text"),
        (["x", "--method", "maxnet"], "--method maxnet is not known: did you mean maxent?"),
        (["x", "--rollouts", "0"], "rollouts"),
        (
            ["x", "--method", "best-of-n", "--reward-scale", "8"],
            "--reward-scale 8.0 has no effect with --method best-of-n; leave it out, or use maxent",
        ),
        (["x", "--method", "mcts", "--power", "2"], "--power 2.0 has no effect with --method mcts"),
        (["x", "--json-schema", "none.json"], "--json-schema none.json cannot be read"),
        pytest.param(["x", "--regex", "a("], "unclosed group", marks=needs_llguidance),
        (["  "], "the prompt is empty"),
        (["a\udce9"], "the prompt is not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line_before_any_model(
    options: list[str], said: str, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["decode", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1 and loaded == []


@needs_llguidance
def test_a_schema_and_an_expression_become_constraints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bit.json").write_text('{"enum": [0, 1]}')
    words = (b"0", b"1", b"2", b"x")
    lm = Worded(TableModel(random_logits(5, 0), 5, eos=0), words)
    lm.encode = lambda prompt, chat_template_kwargs=None: [1]
    monkeypatch.setattr(dts, "load", lambda name: lm)
    for options, texts in ((["--json-schema", str(tmp_path / "bit.json")], "01"), (["--regex", "x|2"], "2x")):
        assert main(["decode", "a bit", "--json", *options, *SMALL]) == 0
        assert json.loads(capsys.readouterr().out)["text"] in texts


def test_named_rewards_are_the_librarys() -> None:
    assert decode.find_reward("prompt-keywords") is prompt_keywords
    assert all(callable(decode.find_reward(name)) or name == "prompt-keywords" for name in decode.NAMES)


def test_a_prompt_that_the_reward_cannot_use_is_one_line(loaded: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "hello", "--reward", "prompt-keywords", *SMALL]) == 2
    assert "asks for no words" in capsys.readouterr().err
