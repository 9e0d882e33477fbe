"""Malformed input: every loader, every command and every call answers with one line, and leaves no partial file.

A few hundred inputs by default. The thorough run, which docs/hardening.md reports:

    FUZZ_REFUSED=10000 python -m pytest tests/test_fuzz.py -q

tries inputs until that many were refused, and prints how many of what.
"""

from __future__ import annotations

import collections
import gzip
import importlib.util
import io
import json
import math
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fakes import FakeTask, fake_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, TemperatureLogitsWarper

import dts
import dts.__main__ as dts_cli
from dts import fetch
from dts.errors import UnavailableError, UsageError
from dts.evaluation import cli, data
from dts.evaluation.experiment.config import ExperimentConfig, read_config_file
from dts.evaluation.experiment.engines.local import run_jobs
from dts.evaluation.report import __main__ as report_cli
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.studies import equal_tokens as study
from dts.evaluation.tasks import load_task
from dts.evaluation.tracking import NullTracker
from dts.models.registry import read_models_file
from dts.models.table import TableModel
from dts.search import Beam, Greedy, MaxEnt, Sampling
from dts.training import cli as training_cli
from dts.training.config import assignment, from_mapping
from dts.training.data import read_rows

WANTED = int(os.environ.get("FUZZ_REFUSED", 0))

EXAMPLES = max(120, WANTED // 3)
TRIED: collections.Counter[str] = collections.Counter()
REFUSED: collections.Counter[str] = collections.Counter()
relaxed = settings(max_examples=EXAMPLES, deadline=None, derandomize=not WANTED, database=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip


def attempt(kind: str, call: Callable[[], Any], *names: str) -> None:
    """The call accepts the input, or refuses it in one line that holds one of `names`; nothing else."""
    TRIED[kind] += 1
    try:
        call()
    except (UsageError, UnavailableError) as error:
        REFUSED[kind] += 1
        assert "\n" not in str(error)
        assert any(name in str(error) for name in names), str(error)


# Files --------------------------------------------------------------------------------------------------------------


M4 = """id,frequency,seasonal_period,horizon,n_train,train,test
H1,Hourly,24,3,6,1 2 3 4 5 6.5,7 8 9
H2,Hourly,24,3,4,1 2 3 4,
"""
WEATHER = {"start": "2014-01-01", "temperature_c": [1, 2.5], "humidity_pct": [50, 60], "pressure_mbar": [1000, 1001],
           "wind_kmh": [5, 6], "caption": ["Cold.", "Windy."]}  # fmt: skip
COT = 'x_axis,y_axis,z_axis,label,rationale\n"[1, 2]","[3, 4]","[5, 6]",walking,it moves\n'
TS = "@problemName x\n@classLabel true walking standing\n@data\n" + ":".join(["1," * 99 + "1"] * 6) + ":walking\n"
MINI = "id,date,value\n" + "".join(f"Y1,2000-01-{day:02},{day}\n" for day in range(1, 12))
ROWS = (
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "engagement": 2}\n'
    '{"prompt": "hi", "response": "ho", "group": "a"}\n'
    '{"source_text": "a", "post_text": "b", "reply_text": "c", "reply_likes": 3, "thread": 7}\n'
)
TASK_FILE = Path(str(cli.__file__)).with_name("tasks").joinpath("keyword.yaml").read_text()
TRAINING = "method: sft\nmodel: x/y\ndata: [a.jsonl]\nlora: {r: 4}\nlearning_rate: 2e-4\n"
RECORDS = '{"model": "red", "dataset": "har", "seed": 0, "sample": 0, "method": "greedy", "time": 0.5}\n' * 2


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, acc=np.ones((4, 5, 3)), label=np.array(["a", "b"] * 2), subject=np.array([1, 2, 3, 4]),
             split=np.array(["train", "test"] * 2), sampling_hz=np.array(50.0))  # fmt: skip
    return stream.getvalue()


def _folder(names: dict[str, str], other: str, reader: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader of a folder whose file `other` is the malformed one."""

    def read(path: Path) -> Any:
        for name, text in names.items():
            (path.parent / name).write_text(text)
        path.rename(path.parent / other)
        return reader(path.parent)

    return read


# kind: file name, a valid content, reader
LOADERS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "csv m4": ("m4_subset.csv", M4.encode(), data.read_m4_csv),
    "csv.gz m4": ("m4_subset.csv.gz", gzip.compress(M4.encode(), mtime=0), data.read_m4_csv),
    "csv m4 mini": ("m4_yearly.csv", MINI.encode(), _folder(
        {f"m4_{name}.csv": "id,date,value\n" for name in ("quarterly", "monthly", "weekly", "daily", "hourly")},
        "m4_yearly.csv", data.read_m4_mini)),
    "csv m4 official": ("Daily-train.csv", b'"V1","V2","V3","V4"\n"D1","1","2.5",""\n', _folder(
        {"Daily-test.csv": "V1\nD1," + ",".join(["1"] * 14) + "\n"}, "Daily-train.csv", data.read_m4_official)),
    "csv har-cot": ("har_cot_train_cot.csv", COT.encode(), _folder(
        {"har_cot_test_cot.csv": COT}, "har_cot_train_cot.csv", data.read_har_cot)),
    "csv m4 captions": ("m4_series_Daily.csv", b'id,series\nD1,"[1, 2, 3]"\n', _folder(
        {"m4_captions_Daily.csv": "id,caption\nD1,flat\n"}, "m4_series_Daily.csv", data.read_m4_captions)),
    "ts basic motions": ("BasicMotions_TRAIN.ts", TS.encode(), _folder(
        {"BasicMotions_TEST.ts": TS}, "BasicMotions_TRAIN.ts", data.read_basic_motions)),
    "npz har": ("har_windows.npz", npz(), data.read_har_npz),
    "json weather": ("weather_captions.jsonl", (json.dumps(WEATHER) + "\n").encode(), data.read_weather),
    "json rows": ("train.jsonl", ROWS.encode(), read_rows),
    "json records": ("samples.jsonl", RECORDS.encode(), read_jsonl),
    "yaml config": ("run.yaml", b"models: [smollm2-135m]\nnum_samples: 3\ntop_p: 0.5\n",
                    lambda path: ExperimentConfig(**read_config_file(path))),
    "yaml models": ("models.yaml", b'llama-7b: {path: ./x, color: "#FF6B6B"}\nmine: {hub: a/b}\n', read_models_file),
    "yaml task": ("task.yaml", TASK_FILE.encode(), lambda path: load_task(str(path))),
    "yaml training": ("train.yaml", TRAINING.encode(), lambda path: from_mapping(training_cli.read_config(path))),
}  # fmt: skip
NASTY = [
    *(b"\xff\xfe", b"\x00", b'"', b"'", b",", b"\n", b"\r", b"[" * 3000, b"{", b"}", b": ", b"nan", b"inf", b"-1"),
    *(b"1e999", b"9" * 5000, b"\xef\xbb\xbf", b"\xed\xa0\x80", "ü€😀\u2028".encode(), b"\\ud800", b"null", b"true"),
    *(b"!!python/object:os.system ls", b"&a [*a]", b"2024-13-45", b"0x", b"<<: 3", b"- ", b"\t", b"%", b"@", b"? "),
]


@st.composite
def mangled(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with some bytes changed, cut, repeated, or something nasty put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 12))
        change = draw(st.sampled_from(["cut", "drop", "put", "swap", "repeat", "flip"]))
        if change == "cut":
            del content[at:]
        elif change == "drop":
            del content[at : at + length]
        elif change == "repeat":
            content[at:at] = content[at : at + 40]
        elif change == "flip":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        else:
            content[at : at + (length if change == "swap" else 0)] = draw(st.sampled_from(NASTY))
    return bytes(content)


plain = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def retyped(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid YAML or JSON Lines file in which one key has another value, or is gone, or is new."""
    lines = valid.decode().splitlines() if valid.startswith(b"{") else [valid.decode()]
    record = yaml.safe_load(lines[0])
    key = draw(st.sampled_from([*record, "surprise"]))
    if draw(st.booleans()):
        record[key] = draw(nested)
    else:
        record.pop(key, None)
    if valid.startswith(b"{"):
        return "\n".join([json.dumps(record), *lines[1:], ""]).encode()
    return yaml.safe_dump(record).encode()


def contents(kind: str) -> st.SearchStrategy[bytes]:
    valid = LOADERS[kind][1]
    typed = [retyped(valid)] if kind.startswith(("yaml", "json")) else []
    return st.one_of(mangled(valid), st.binary(max_size=60), *typed)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_valid_file_loads(kind, tmp_path):
    name, valid, reader = LOADERS[kind]
    (tmp_path / name).write_bytes(valid)
    reader(tmp_path / name)


def test_malformed_files_are_named(tmp_path):
    counter = iter(range(10**9))

    @relaxed
    @given(st.sampled_from(sorted(LOADERS)).flatmap(lambda kind: st.tuples(st.just(kind), contents(kind))))
    def run(case):
        kind, content = case
        name, _, reader = LOADERS[kind]
        folder = tmp_path / str(next(counter))
        folder.mkdir()
        (folder / name).write_bytes(content)
        # Settings are checked after reading; the commands put the file's name before what is said here.
        more = ("",) if kind in ("yaml config", "yaml training") else ()
        attempt(f"file: {kind}", lambda: reader(folder / name), str(folder), name, *more)
        shutil.rmtree(folder)

    run()


def test_malformed_assignments_are_named():
    @relaxed
    @given(st.text(max_size=20) | st.tuples(st.sampled_from(["lora.r", "seed", "grpo.x", "data", "name"]),
                                            st.text(max_size=10) | nested.map(json.dumps)).map("=".join))  # fmt: skip
    def run(text):
        base = yaml.safe_load(TRAINING) | {"name": "x"}
        attempt("--set", lambda: from_mapping(base, assignment(text)), "--set", "not allowed", "config")

    run()


def test_a_text_that_is_not_utf_8_is_named_by_line_and_byte(tmp_path):
    path = tmp_path / "m4.csv"
    path.write_bytes(M4.replace("H2", "H\xe4").encode("latin-1"))
    with pytest.raises(UsageError, match=r"m4.csv, line 3: byte 0xe4 at offset 1: not UTF-8"):
        data.read_m4_csv(path)
    path.write_bytes(b"\xef\xbb\xbf" + M4.encode())
    assert [one.id for one in data.read_m4_csv(path)] == ["H1", "H2"]  # the mark that some editors put first
    (tmp_path / "run.yaml").write_bytes(b"models: x\n# caf\xe9\n")
    with pytest.raises(UsageError, match=r"run.yaml is not valid YAML: line 2, byte 0xe9 at offset 15"):
        read_config_file(tmp_path / "run.yaml")


# Command lines ------------------------------------------------------------------------------------------------------

# No slash and no "..": a random folder of the machine must not be written to.
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="/\\~\x00", exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(["0", "-1", "1", "3", "1e9", "nan", "inf", "-inf", "0x10", "1.5", "999999999999999999999", "", " ",
                     "red", "teal", "HAR", "m4", "har-zero", "maxent", "maxent,greedy", "auto", "cuda:7", "None",
                     "%s", "{}", "-", "--", "keyword.yaml", "a=b", "lora.r=0", "no-such.jsonl", "2 GiB"]),
)  # fmt: skip


def options_of(parser: Any) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def command_lines(options: list[str], first: list[list[str]]) -> st.SearchStrategy[list[str]]:
    part = st.tuples(st.sampled_from([*options, "--no-such-option"]), st.lists(WORDS, max_size=2)).map(
        lambda p: [p[0], *p[1]]
    )
    joined = st.tuples(st.sampled_from([o for o in options if o.startswith("--")]), WORDS).map(lambda p: ["=".join(p)])
    parts = st.lists(part | joined | WORDS.map(lambda word: [word]), max_size=4)
    return st.tuples(st.sampled_from(first), parts).map(lambda pair: [*pair[0], *(word for p in pair[1] for word in p)])


def answer(kind: str, call: Callable[[list[str]], int], argv: list[str], capsys: Any) -> None:
    """Exit code 2 with one error line and nothing written, or a code of success or help."""
    TRIED[kind] += 1
    try:
        code = call(argv)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    written = sorted(path.name for path in Path().rglob("*") if path.is_file() or "run_experiments" in kind)
    for path in Path().iterdir():  # of a command that was right by chance
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, err = capsys.readouterr()
    assert code in (0, 2), (code, err)
    if code == 2:
        REFUSED[kind] += 1
        assert err.count("error: ") == 1 and "Traceback" not in err, err
        assert written == [], (written, err)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "make_tracker", lambda *_: NullTracker())
    monkeypatch.setattr(cli, "find_engine", lambda *_: run_jobs)
    monkeypatch.setattr("dts.evaluation.experiment.run.run", lambda *_, **__: {"verdicts": []})
    monkeypatch.setattr(study, "run", lambda *_, **__: None)
    monkeypatch.setattr(study, "write_report", lambda _: "")
    return tmp_path


def _few(name: str, *, num_samples: int, **_: Any) -> FakeTask:
    if name.upper() not in ("HAR", "M4"):
        raise UsageError(f"unknown dataset {name!r}: did you mean har?")
    if num_samples > 50:
        raise UsageError(f"num_samples={num_samples}: har has only 50 test examples")
    return FakeTask(num_samples, name=name.lower())


def test_malformed_command_lines_of_the_runner(here, capsys):
    import dataclasses

    backend = dataclasses.replace(fake_backend(), load_task=_few)
    valid = ["--models", "red", "--no-wandb", "--output-dir", "out", "--quiet"]

    @relaxed
    @given(command_lines(options_of(cli.build_parser()), [valid, valid, ["--models", "red"], []]))
    def run(argv):
        answer("command: run_experiments.py", lambda words: cli.main(words, backend), argv, capsys)

    run()


def test_malformed_command_lines_of_the_other_commands(here, capsys, monkeypatch):
    def unreachable(*_: Any) -> Path:
        raise UnavailableError("pip could not download it")

    monkeypatch.setattr(fetch, "pip_download", unreachable)
    monkeypatch.setenv("DTS_CACHE", str(here.parent / "cache-of-fuzz"))
    if importlib.util.find_spec("trl") is not None:  # imported now, it does not keep the replacement for later tests
        importlib.import_module("dts.training.expert")
    monkeypatch.setattr("dts.training.run.train", lambda *_, **__: Path("nowhere"))
    monkeypatch.setattr(training_cli, "_show", lambda _: None)
    config = here.parent / "sft.yaml"
    config.write_text(TRAINING)
    training = [["train", "--config", str(config)], ["train", "--config"], ["train-variants"], ["reward-model"], [],
                ["expert-iteration", "--config", str(config)], ["split", "--input", "a.jsonl"],
                ["split-training-phases"], ["coding", "--output", "o.jsonl", "--split"]]  # fmt: skip
    more = ["--config", "--data", "--seeds", "--smoke", "--set", "--output", "--overwrite", "--rounds", "--split-ratio",
            "--report-to", "--resume-from-checkpoint", "--quiet", "--input", "--output-dir", "-h"]  # fmt: skip
    commands: dict[str, tuple[Callable[[list[str]], int], Any]] = {
        "command: python -m dts": (dts_cli.main, command_lines(["--cache", "-h"], [["fetch"], ["fetch", "m5"], []])),
        "command: evaluation.study": (study.main, command_lines(options_of(study.build_parser()),
                                                                [[], ["--output", "out"], ["--report"]])),
        "command: evaluation.report": (report_cli.main, command_lines(["-o", "--output", "-h"], [[], ["no-run"]])),
        "command: training": (training_cli.main, command_lines(more, training)),
    }  # fmt: skip

    @relaxed
    @given(st.sampled_from(sorted(commands)).flatmap(lambda kind: st.tuples(st.just(kind), commands[kind][1])))
    def run(case):
        kind, argv = case
        answer(kind, commands[kind][0], argv, capsys)

    run()


# Archives -----------------------------------------------------------------------------------------------------------


def test_malformed_archives_leave_nothing(tmp_path, monkeypatch):
    names = ["a.csv", "a/b.csv", "../up.csv", "/abs.csv", "a/../../up.csv", "C:\\x.csv", "..\\up.csv", "inner.zip", "."]

    def zipped(files: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return stream.getvalue()

    archives = st.dictionaries(st.sampled_from(names), st.binary(max_size=20), max_size=4).map(zipped)
    home = tmp_path / "deep" / "home"

    @relaxed
    @given(archives | archives.flatmap(mangled) | archives.map(lambda inner: zipped({"inner.zip": inner})))
    def run(content):
        monkeypatch.setattr(data.sources.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
        attempt("archive", lambda: data.download("har-cot", home), "har-cot", "polybox")
        outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(home / "har-cot")]
        assert outside == []
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)

    run()


# Calls of the library ------------------------------------------------------------------------------------------------

CALLS = 10_000


def wild(rng: random.Random) -> Any:
    """A value of any type, most of them wrong wherever they stand."""
    return rng.choice([
        None, True, False, 0, 1, 2, 3, 7, -1, 10**20, -(10**20), 0.0, 0.5, 1.0, 2.7, -0.5, math.nan, math.inf,
        -math.inf, 1e-320, 1e308, "", "3", "x", "e", "a\ud800", "\x00", "😀", "cpu", b"x", bytearray(b"x"),
        memoryview(b"x"), [], [1], ["x"], [[1, 2]], [[]], (), (1,), {}, {"a": 1}, {1}, frozenset(), range(2), object(),
        Ellipsis, Decimal("1"), Fraction(1, 2), 1j, np.int64(3), np.float32(0.5), np.bool_(True), np.array([1, 2]),
        np.array(["x"]), np.array(3), np.zeros((2, 2)), torch.tensor(2), torch.tensor([1.5]), torch.tensor([4, 5]),
        torch.zeros(0), Path("x"), ValueError("x"), int, str, Greedy, dts.Budget, Greedy(), dts.Budget(rollouts=1), len,
        max, lambda: 1, lambda: None, lambda a: a, lambda a, b: b, lambda a, b: None, lambda a, b, c: a, iter([1]),
        random, "a" * 300,
    ])  # fmt: skip


def texts(rng: random.Random) -> str:
    alphabets = ["abc .", "=\n\t\x00\u200d", "éüß€北京😀", "\ud800\udfffa", "<|im_start|></s>0123456789"]
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(12)))


def prompts(rng: random.Random) -> Any:
    ids = [rng.choice([0, 4, 9, 100, 259, 259, 260, -1, 10**9]) if rng.random() < 0.2 else rng.randrange(4, 260)
           for _ in range(rng.randrange(1, 6))]  # fmt: skip
    if rng.random() < 0.5:
        return [4, 9, 30]
    forms: list[Callable[[], Any]] = [
        lambda: ids, lambda: tuple(ids), lambda: np.array(ids), lambda: torch.tensor([ids]), lambda: [ids],
        lambda: {"input_ids": ids, "attention_mask": [rng.randrange(2) for _ in ids]}, lambda: {"input_ids": wild(rng)},
        lambda: [*ids, wild(rng)], lambda: " ".join(map(str, ids)), lambda: texts(rng), lambda: wild(rng),
        lambda: [message(rng) for _ in range(rng.randrange(1, 4))], lambda: [message(rng), wild(rng)],
    ]  # fmt: skip
    return rng.choice(forms)()


def message(rng: random.Random) -> Any:
    content = rng.choice([texts(rng), texts(rng), [{"type": "text", "text": texts(rng)}], [wild(rng)], wild(rng)])
    role = wild(rng) if rng.random() < 0.1 else rng.choice(["user", "assistant", "system"])
    return {"role": role, "content": content}


DECODE = {
    "reward": lambda rng: rng.choice([None, len, lambda text: text.count("e"), lambda texts: [1.0] * len(texts)]),
    "max_new_tokens": lambda rng: rng.randrange(1, 4),
    "min_new_tokens": lambda rng: rng.randrange(3),
    "batch_size": lambda rng: rng.choice([None, 1, 5]),
    "temperature": lambda rng: rng.choice([1.0, 0.1, 1e-320, 1e300, np.float64(0.7), 2]),
    "top_k": lambda rng: rng.choice([None, 1, 50, 10**6]),
    "top_p": lambda rng: rng.choice([None, 1e-300, 0.5, 1]),
    "stop": lambda rng: rng.choice([(), texts(rng), [texts(rng), "e"], {"=" * 16}]),
    "logits_processor": lambda rng: rng.choice([None, [], lambda ids, row: row, TemperatureLogitsWarper(0.5)]),
    "chat_template_kwargs": lambda rng: rng.choice([None, {}, {"enable_thinking": False}]),
    "seed": lambda rng: rng.randrange(2**70),
    "max_kv_bytes": lambda rng: rng.choice([None, 1, 10**6]),
    "budget": lambda rng: rng.choice([None, dts.Budget(rollouts=2), dts.Budget(tokens=9)]),
    "on_rollout": lambda rng: rng.choice([None, lambda rollout: None]),
    "method": lambda rng: rng.choice([Greedy(), Sampling(2), MaxEnt(3), Beam(2), MaxEnt(3, search="best")]),
}  # fmt: skip


def decode_call(rng: random.Random, lms: list[Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    options = {name: DECODE[name](rng) for name in rng.sample(sorted(DECODE), 4)} | {"method": DECODE["method"](rng)}
    options.setdefault("max_new_tokens", 2)
    for name in rng.sample(sorted(DECODE), rng.choice([0, 0, 1, 1, 2])):
        value = wild(rng)
        # What the caller's own function raises is the caller's.
        options[name] = value if name != "on_rollout" or not callable(value) else None
    lm = wild(rng) if rng.random() < 0.02 else rng.choice(lms)
    return dts.decode, (lm, prompts(rng)), options


def generate_call(rng: random.Random, lm: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    config = GenerationConfig(num_return_sequences=1, max_length=8)
    fields = [name for name in vars(config) if not name.startswith("_")]
    for name in rng.sample(fields, rng.choice([0, 1, 1, 2])):
        setattr(config, name, wild(rng))
    options: dict[str, Any] = {"lm": lm, "method": rng.choice([Greedy(), Sampling(2)]), "generation_config": config}
    names = [*options, "reward", "seed", "stop", "logits_processor", "stopping_criteria", "attention_mask",
             "position_ids", "past_key_values", "inputs_embeds", "use_cache", "surprise"]  # fmt: skip
    for name in rng.sample(names, rng.choice([0, 0, 1, 2])):
        options[name] = wild(rng)
    inputs = torch.tensor([[5, 6, rng.choice([7, 259, 260, -3])]] * rng.choice([1, 2]))
    return dts.generate, (lm.model, inputs if rng.random() < 0.9 else wild(rng)), options


def load_call(rng: random.Random, lm: Any, folder: Path) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    pair = (lm.model, lm.tokenizer)
    names = ["device", "dtype", "device_map", "models_file", "trust_remote_code", "quantization"]
    options = {name: wild(rng) for name in rng.sample(names, rng.choice([0, 1, 1, 2, 3]))}
    model = rng.choice([pair, pair[::-1], pair[:1], (*pair, 3), (wild(rng), pair[1]), (pair[0], wild(rng)), wild(rng),
                        wild(rng), texts(rng), str(folder), folder, "smollm", "no/such/model"])  # fmt: skip
    return dts.load, (model,), options


def test_random_calls_end_in_a_result_or_an_error_of_the_library(tiny_lm, tmp_path, monkeypatch):
    """10,000 calls of decode, generate and load, the same in each run. FUZZ_SEED=n tries others."""
    monkeypatch.setattr("dts.models.loading._reach_hub", offline)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(int(os.environ.get("FUZZ_SEED", 0)))
    table = TableModel(lambda prefix: np.zeros(5), 5, eos=0, context_length=16)
    makers = [lambda: decode_call(rng, [table, table, tiny_lm]), lambda: generate_call(rng, tiny_lm),
              lambda: load_call(rng, tiny_lm, tmp_path)]  # fmt: skip
    for _ in range(CALLS):
        function, given, options = rng.choices(makers, [6, 2, 2])[0]()
        kind = f"call: {function.__name__}"
        TRIED[kind] += 1
        try:
            function(*given, **options)
        except dts.DTSError as error:
            REFUSED[kind] += 1
            if "\n" in str(error):
                pytest.fail(f"{kind}: more than one line: {error} for {arguments(given, options)}")
        except Exception as error:
            raise AssertionError(f"{kind}: {arguments(given, options)}") from error
    assert all(0.3 < REFUSED[kind] / TRIED[kind] < 1 for kind in TRIED if kind.startswith("call: "))


def arguments(given: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a call was given; configurations that hold nonsense cannot show themselves."""
    config = options.get("generation_config")
    fields = {key: value for key, value in vars(config).items() if value is not None} if config else None
    return repr(
        ([part for part in given if not isinstance(part, torch.nn.Module)], options | {"generation_config": fields})
    )


def offline(spec: Any) -> None:
    raise UnavailableError(f"model {spec.name!r} cannot be had: there is no network")


# The count ----------------------------------------------------------------------------------------------------------


def test_enough_was_refused(capsys):
    """The last test of this file: what the others tried."""
    with capsys.disabled():
        sys.stdout.write(f"\n{sum(TRIED.values())} inputs tried, {sum(REFUSED.values())} refused in one line\n")
        sys.stdout.writelines(f"  {kind}: {TRIED[kind]} tried, {REFUSED[kind]} refused\n" for kind in sorted(TRIED))
    assert sum(REFUSED.values()) >= WANTED
