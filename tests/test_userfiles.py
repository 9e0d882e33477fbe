"""Files that users write: what is wrong is named by file, line and reason before any model; a BOM is no fault."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Calls, fake_backend
from task_data import write_m4, write_weather

import dts
from dts.errors import UsageError
from dts.evaluation import cli
from dts.evaluation.data import load_weather
from dts.evaluation.experiment.config import read_config_file
from dts.evaluation.finetuned import cli as comprehensive
from dts.evaluation.tasks import load_task
from dts.evaluation.tasks.registry import read_task_file
from dts.models.registry import resolve
from dts.training.cli import main as train_main
from dts.training.data import read_rows
from dts.yamlfile import parse_json, parse_yaml

BOM = b"\xef\xbb\xbf"
ROW = json.dumps({"prompt": "a", "response": "b"})
BAD = {
    "cp1252": ('{"prompt": "caf\u00e9", "response": "b"}'.encode("cp1252"), "byte 0xe9 at offset 15: not UTF-8 text"),
    "surrogate": (b'{"prompt": "a \\ud83d b", "response": "b"}', r"it holds \\ud83d, half of a surrogate pair"),
    "utf-16": (ROW.encode("utf-16"), "byte 0xff at offset 0: not UTF-8 text"),
    "nested": (b"[" * 100_000, "nested too deeply"),
}


def rows(path: Path, *lines: bytes) -> Path:
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(dts, "load", loads)
    monkeypatch.setattr("dts.training.run.load_for_training", loads)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_of_training_data_is_named_with_its_reason(tmp_path: Path, kind: str, suffix: str) -> None:
    content, reason = BAD[kind]
    file = rows(tmp_path / f"rows{suffix}", ROW.encode(), content)
    with pytest.raises(UsageError, match=reason) as raised:
        read_rows(file)
    assert str(raised.value).startswith((f"{file}:2: ", f"{file}, line 2"))


@pytest.mark.parametrize("kind", BAD)
def test_training_says_so_before_any_model(
    tmp_path: Path, kind: str, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    file = rows(tmp_path / "rows.jsonl", ROW.encode(), BAD[kind][0])
    (tmp_path / "config.yaml").write_text("method: sft\n")
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), "--smoke", "--output", str(tmp_path / "out")]
    assert train_main([*arguments, "--data", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}") and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", BAD)
def test_a_comparison_says_so_before_any_model(
    tmp_path: Path, kind: str, no_model: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dts.models.loading.check_available", lambda source: None)
    file = rows(tmp_path / "rows.jsonl", ROW.encode(), BAD[kind][0])
    models = ["--baseline-lora", "a", "--grpo-lora", "b"]
    assert comprehensive.run_script([*models, "--test-data", str(file), "--output", str(tmp_path / "out")]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_byte_order_mark_is_accepted_everywhere(tmp_path: Path) -> None:
    assert len(read_rows(rows(tmp_path / "rows.jsonl", BOM + ROW.encode(), BOM + ROW.encode()))) == 2
    assert len(read_rows(rows(tmp_path / "rows.jsonl.gz", BOM + ROW.encode()))) == 1
    (tmp_path / "config.yaml").write_bytes(BOM + b"num_samples: 3\n")
    assert read_config_file(tmp_path / "config.yaml") == {"num_samples": 3}
    packed = write_weather(tmp_path / "weather") / "weather_captions.jsonl.gz"
    packed.write_bytes(gzip.compress(BOM + gzip.decompress(packed.read_bytes())))
    assert len(load_weather(packed)) == 6
    table = write_m4(tmp_path / "m4") / "m4_subset.csv.gz"
    table.write_bytes(gzip.compress(BOM + gzip.decompress(table.read_bytes())))
    assert len(load_task("m4", data_dir=table).examples) == 4
    (tmp_path / "models.yaml").write_bytes(BOM + b"mine: {hub: org/name}\n")
    assert resolve("mine", str(tmp_path / "models.yaml")).source == "org/name"


def broken_config(path: Path, content: bytes) -> None:
    path.write_bytes(b"num_samples: 3\nexperiment_name: " + content + b"\n")


READERS: dict[str, Callable[[Path], Any]] = {
    "experiment": read_config_file,
    "task": lambda path: read_task_file(str(path)),
    "models": lambda path: resolve("mine", str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_yaml_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, reader: str) -> None:
    file = tmp_path / "file.yaml"
    broken_config(file, "caf\u00e9".encode("cp1252"))
    with pytest.raises(UsageError, match=r"line 2, byte 0xe9.*save it as UTF-8") as raised:
        READERS[reader](file)
    assert str(file) in str(raised.value)
    broken_config(file, b'"a\\uD83D"')
    with pytest.raises(UsageError, match="half of a surrogate pair") as raised:
        READERS[reader](file)
    assert str(file) in str(raised.value)


def test_csv_data_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    table = write_m4(tmp_path / "m4") / "m4_subset.csv.gz"
    content = gzip.decompress(table.read_bytes()).replace(b"Q2", "Q\u00e9".encode("cp1252"))
    table.write_bytes(gzip.compress(content))
    with pytest.raises(
        UsageError, match=r"m4_subset.csv.gz, line 4, byte 0xe9 at offset 1|line 4: byte 0xe9 at offset 1"
    ):
        load_task("m4", data_dir=table)


def test_the_runner_reads_its_config_before_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, calls = tmp_path / "file.yaml", Calls()
    broken_config(file, b"caf\xe9")
    assert cli.main(["--config", str(file), "--no-wandb"], fake_backend(calls=calls)) == 2
    assert "line 2, byte 0xe9" in capsys.readouterr().err and calls.loaded == []


def test_whole_pairs_and_plain_escapes_are_fine() -> None:
    assert parse_json(r'{"a": "\\ud83d\\ude00 \\u00e9"}'.replace("\\\\", "\\")) == {"a": "\U0001f600 \u00e9"}
    assert parse_yaml("a: b\n1: [2]\n") == {"a": "b", 1: [2]}
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        parse_json('{"\\udc00": 1}')
