"""Injected faults: what a full disk, a lack of memory, a damaged file, a hanging reward or a broken model leave.

`INJECTED` counts the faults, the last test prints them: python -m pytest tests/test_faults.py -q
"""

from __future__ import annotations

import ast
import collections
import errno
import functools
import gzip
import hashlib
import json
import logging
import os
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import fake_backend
from families import ByteTokenizer, random_model

import dts
from dts import fetch as fetching
from dts.errors import ModelError, RewardError, UnavailableError, UsageError
from dts.evaluation import cli, data, run_folder
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.run_folder import RunFolder, read_jsonl, write_text
from dts.evaluation.studies.instances import PROMPT as TABLE_PROMPT
from dts.evaluation.studies.instances import instance
from dts.memory import is_out_of_memory
from dts.models import rows
from dts.models.huggingface import HFModel
from dts.models.table import TableModel, random_logits
from dts.models.view import ModelView
from dts.search import METHODS, MaxEnt, Sampling

INJECTED: collections.Counter[str] = collections.Counter()
LOST: collections.Counter[str] = collections.Counter()  # results that were finished before a fault and gone after it
PROMPT = [5, 9, 30, 77, 21]
ROOT = Path(__file__).resolve().parent.parent


# The disk -----------------------------------------------------------------------------------------------------------


class Disk:
    """Writes of the results files: the `fails`-th and all after it find no room; `torn` leaves half of a line."""

    def __init__(self, monkeypatch, fails: int, kind: str) -> None:
        self.count, self.fails, self.kind = 0, fails, kind
        self._real, self._fsync = Path.open, os.fsync
        monkeypatch.setattr(Path, "open", lambda path, mode="r", *args, **more: self._open(path, mode, *args, **more))
        monkeypatch.setattr(run_folder.os, "fsync", self._sync)

    def _full(self) -> bool:
        self.count += 1
        return self.count >= self.fails

    def _sync(self, number: int) -> None:
        if self.kind == "fsync" and self._full():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(number)

    def _open(self, path, mode="r", *args, **kwargs):
        stream = self._real(path, mode, *args, **kwargs)
        if self.kind == "fsync" or not set(mode) & set("wax"):
            return stream
        return _Stream(stream, self, unbuffered=kwargs.get("buffering") == 0)


class _Stream:
    def __init__(self, inner, disk, *, unbuffered) -> None:
        self._inner, self._disk, self._unbuffered = inner, disk, unbuffered

    def write(self, content):
        if not self._disk._full():
            return self._inner.write(content)
        if self._disk.kind == "torn":
            written = self._inner.write(content[: len(content) // 2])
            if self._unbuffered:
                return written  # as the system does; a buffered stream writes on and raises
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._inner.close()

    def __getattr__(self, name):
        return getattr(self._inner, name)


def command(folder: Path, *more: str) -> list[str]:
    return ["--models", "red", "--methods", "maxent", "--num-samples", "2", "--num-rollouts", "2",
            "--no-wandb", "--quiet", "--output-dir", str(folder), *more]  # fmt: skip


def without_times(records):
    return [
        {key: value for key, value in record.items() if key not in ("time", "reward_seconds")} for record in records
    ]


@pytest.fixture(autouse=True)
def _quick_and_heard(monkeypatch, caplog):
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_report", lambda *_: None)
    caplog.set_level(logging.WARNING, "dts")


@pytest.mark.parametrize("kind", ["full", "torn", "fsync"])
def test_a_disk_that_is_full_loses_nothing_that_was_finished(tmp_path, monkeypatch, capsys, kind):
    assert cli.main(command(tmp_path / "whole"), fake_backend()) == 0
    (whole,) = (path for path in (tmp_path / "whole").iterdir() if path.is_dir())
    expected = {name: without_times(read_jsonl(whole / f"{name}.jsonl")) for name in ("rollouts", "samples")}
    fails = 0
    while True:  # the disk fails at the first write, then at the second, and so on, until a run gets through
        fails += 1
        parent = tmp_path / f"{kind}-{fails}"
        with monkeypatch.context() as patch:
            disk = Disk(patch, fails, kind)
            code = cli.main(command(parent), fake_backend())
        err = capsys.readouterr().err
        if disk.count < fails:
            assert code == 0
            break
        INJECTED[f"disk: {kind}"] += 1
        assert code == 1 and "error: " in err and "cannot be written" in err and "Traceback" not in err
        assert not list(parent.rglob("*.tmp"))
        (folder,) = (path for path in parent.iterdir() if path.is_dir())
        kept = {name: read_jsonl(path) if (path := folder / f"{name}.jsonl").exists() else [] for name in expected}
        for name, records in kept.items():  # whole records only, and those of the uninterrupted run
            assert without_times(records) == expected[name][: len(records)]
        if not (folder / "config.json").exists():
            continue  # nothing was decoded yet
        assert cli.main(["--resume", str(folder), "--no-wandb", "--quiet"], fake_backend()) == 0
        for name, records in expected.items():
            after = without_times(read_jsonl(folder / f"{name}.jsonl"))
            LOST[kind] += sum(record not in after for record in without_times(kept[name]))
            assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, records))
        capsys.readouterr()
    assert fails > 8


def test_a_picture_that_finds_no_room_is_not_left_half_drawn(tmp_path, monkeypatch, capsys):
    def draw(samples, rollouts, colors, folder):
        (folder / "monotonicity.png").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", draw)
    INJECTED["disk: pictures"] += 1
    assert cli.main(command(tmp_path), fake_backend()) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.rglob("*.png"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    write_text(path, "old")
    for kind in ("full", "torn", "fsync"):
        with monkeypatch.context() as patch:
            Disk(patch, 1, kind)
            INJECTED[f"disk: {kind}"] += 1
            with pytest.raises(UnavailableError, match=r"report\.md cannot be written .*--resume"):
                write_text(path, "new")
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_folders_that_cannot_be_written_are_named_before_any_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    loaded = []
    backend = fake_backend()
    for option, value in (("--output-dir", tmp_path / "file"), ("--output-dir", tmp_path / "file" / "below")):
        INJECTED["folder: a file is in the way"] += 1
        assert cli.main([*command(tmp_path / "x"), option, str(value)], backend) == 2
        assert str(value) in capsys.readouterr().err and loaded == []

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    for function in ("mkdir", "open"):  # permissions mean nothing to root, so the refusal is injected
        with monkeypatch.context() as patch:
            patch.setattr(Path, function, refuse)
            INJECTED["folder: no permission"] += 1
            code = cli.main(command(tmp_path / "y"), fake_backend())
        err = capsys.readouterr().err
        assert code in (1, 2) and "Permission denied" in err and "Traceback" not in err
        with pytest.raises(UnavailableError, match="DTS_CACHE"), monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            fetching.fetch(["m4-mini"], cache=tmp_path / "cache")


def test_a_truncated_file_gives_back_every_whole_record(tmp_path, capsys):
    assert cli.main(command(tmp_path), fake_backend()) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    wholes = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("rollouts", "samples", "tracked")}
    expected = {name: without_times(read_jsonl(folder / f"{name}.jsonl")) for name in wholes}
    for name, whole in wholes.items():
        ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
        for cut in sorted({0, 1, *ends, *(end - 2 for end in ends), *(end + 3 for end in ends[:-1])}):
            INJECTED["truncated results"] += 1
            for other, content in wholes.items():
                (folder / f"{other}.jsonl").write_bytes(content[:cut] if other == name else content)
            assert len(read_jsonl(folder / f"{name}.jsonl")) == sum(end <= cut for end in ends)
            code = cli.main(["--resume", str(folder), "--no-wandb", "--quiet"], fake_backend())
            if name == "rollouts" and cut < len(whole):  # samples that are finished lack rollouts: said, not guessed
                err = capsys.readouterr().err
                assert code == 2 and "rollouts of" in err and "Traceback" not in err
                continue
            assert code == 0
            for other in ("rollouts", "samples"):
                after = without_times(read_jsonl(folder / f"{other}.jsonl"))
                assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, expected[other]))


def test_damaged_records_are_named_by_file_and_line(tmp_path, capsys):
    assert cli.main(command(tmp_path), fake_backend()) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    no_job = b'{"model": {}, "dataset": 1, "seed": [], "sample": 0, "method": 0}\n'
    for name, damage in (
        ("samples", b"\x00" * 20 + b"\n"),
        ("rollouts", b'{"a": 1\n'),
        ("samples", b"[1]\n"),
        ("rollouts", b"\xff\xfe\n"),
        ("samples", b'{"model": "red"}\n'),
        ("samples", b"{}\n"),
        ("samples", no_job),
    ):
        path = folder / f"{name}.jsonl"
        before = path.read_bytes()
        path.write_bytes(before + damage)
        INJECTED["damaged results"] += 1
        assert cli.main(["--resume", str(folder), "--no-wandb", "--quiet"], fake_backend()) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err and err.count("\n") == 1 and (str(path) in err or "record" in err)
        assert path.read_bytes() == before + damage  # nothing is repaired by guessing
        path.write_bytes(before)


# Memory -------------------------------------------------------------------------------------------------------------


class Cramped:
    """A model whose forward calls of more than `rows` rows find no memory; `says` is the error."""

    def __init__(self, lm: HFModel, rows: int, says: BaseException) -> None:
        self.calls, self.failures, self.rows, self.says = [], 0, rows, says
        self.lm = HFModel(lm.model, lm.tokenizer, name="cramped")
        self.lm._checked = True
        self.lm.view = self._view

    def _view(self):
        view = ModelView(self.lm.model)
        view.decoder = functools.partial(self.forward, view.decoder)
        return view

    def forward(self, decoder, **arguments):
        size = arguments["input_ids"].shape[1]
        if arguments["position_ids"].min() > 0:  # not the prompt
            self.calls.append(size)
            if size > self.rows:
                self.failures += 1
                raise self.says
        return decoder(**arguments)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def lm():
    return HFModel(random_model("llama"), ByteTokenizer(), name="tiny")


def searched(lm, name, rollouts=12, batch_size=8, **more):
    return dts.decode(lm, PROMPT, reward=lambda text: len(set(text)) / 10, method=METHODS[name](rollouts, 4.0),
                      batch_size=batch_size, max_new_tokens=6, seed=3, **more)  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_out_of_memory_halves_the_batch_and_changes_no_result(name, lm, caplog):
    expected = searched(lm, name)
    cramped = Cramped(lm, 2, OUT_OF_MEMORY[0])
    INJECTED["device out of memory"] += 1
    with caplog.at_level(logging.WARNING, "dts"):
        found = searched(cramped.lm, name)
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in expected.completions]
    assert [c.logprob for c in found.completions] == pytest.approx([c.logprob for c in expected.completions], abs=1e-5)
    assert [r.reward for r in found.rollouts] == [r.reward for r in expected.rollouts]
    assert list(found.tree.token) == list(expected.tree.token)
    counts = ("forwarded_tokens", "unique_tokens", "recomputed_tokens", "generated_tokens")
    assert [getattr(found.usage, c) for c in counts] == [getattr(expected.usage, c) for c in counts]
    if max(cramped.calls) > 2:
        assert cramped.failures <= 2  # 8 rows, 4, then it stays at 2
        assert [m for m in caplog.messages if "out of memory" in m and "continuing with" in m]
        assert max(cramped.calls[-3:]) <= 2


@pytest.mark.parametrize("says", OUT_OF_MEMORY, ids=["cuda", "mps", "cpu", "python"])
def test_every_device_has_its_words_for_it(says, lm):
    assert is_out_of_memory(says)
    cramped = Cramped(lm, 1, says)
    INJECTED["device out of memory"] += 1
    found, expected = searched(cramped.lm, "maxent"), searched(lm, "maxent")
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in expected.completions]
    assert cramped.failures >= 2 and cramped.calls[-1] == 1


def test_under_a_tight_bound_nothing_is_lost_either(lm):
    prefix = lm.prefix(PROMPT)
    token = sum(t.shape[0] * t.shape[2] * t.element_size() for t in (*prefix.keys, *prefix.values))
    bound = token * (len(PROMPT) + 4 * 5 + 3)
    del prefix  # else the prompt is not counted
    cramped = Cramped(lm, 1, OUT_OF_MEMORY[0])
    INJECTED["device out of memory"] += 1
    expected = searched(lm, "maxent", 40, 4)
    found = searched(cramped.lm, "maxent", 40, 4, max_kv_bytes=bound)
    assert cramped.failures and found.usage.recomputed_tokens > 0
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in expected.completions]
    usage = found.usage
    assert usage.forwarded_tokens == usage.unique_tokens + usage.recomputed_tokens
    assert usage.unique_tokens == expected.usage.unique_tokens


def test_no_room_for_one_path_is_one_line(lm):
    cramped = Cramped(lm, 0, OUT_OF_MEMORY[0])
    INJECTED["device out of memory"] += 1
    with pytest.raises(UnavailableError, match=r"out of memory with one path at a time .*lower batch_size"):
        searched(cramped.lm, "maxent")

    def prompt_does_not_fit(*_, **__):
        raise OUT_OF_MEMORY[1]

    INJECTED["device out of memory"] += 1
    cramped.forward = prompt_does_not_fit
    with pytest.raises(UnavailableError, match="out of memory with a prompt of 5 tokens and 8 paths"):
        searched(cramped.lm, "maxent")


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory(lm):
    cramped = Cramped(lm, 0, RuntimeError("expected scalar type Half but found Float"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        searched(cramped.lm, "maxent")
    assert cramped.failures == 1


def test_an_archive_that_cannot_grow_gives_branches_up(lm, monkeypatch, caplog):
    def grow(self, rows):
        raise OUT_OF_MEMORY[0]

    expected = searched(lm, "maxent", 40, 4)
    monkeypatch.setattr(rows.Rows, "_grow", grow)
    INJECTED["device out of memory"] += 1
    found = searched(lm, "maxent", 40, 4)
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in expected.completions]
    assert found.usage.recomputed_tokens > 0 and "no memory to keep more idle branches" in caplog.text


# Caches and data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("pkg/a.csv", "id,value\n" * 100)
        made.writestr("pkg/big.bin", os.urandom(5000))
        made.writestr("pkg/LICENSE", "MIT")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    item = fetching.Item("thing", "a test", "pkg==1.0", digest, 1, ("pkg/a.csv", "pkg/big.bin", "pkg/LICENSE"))
    monkeypatch.setattr(fetching, "ITEMS", {"thing": item})
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        return Path(folder, wheel.name).write_bytes(wheel.read_bytes()) and Path(folder, wheel.name)

    monkeypatch.setattr(fetching, "pip_download", download)
    (folder,) = fetching.fetch(cache=tmp_path / "cache")
    return folder, asked


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": lambda folder: _flip(folder / "a.csv"),
    "a cut": lambda folder: (folder / "big.bin").write_bytes((folder / "big.bin").read_bytes()[:-1]),
    "emptied": lambda folder: (folder / "a.csv").write_bytes(b""),
    "a missing file": lambda folder: (folder / "LICENSE").unlink(),
    "the checksums": lambda folder: (folder / "checksums.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_noticed_and_fetched_again(cache, damage, caplog):
    folder, asked = cache
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGES[damage](folder)
    INJECTED["damaged cache"] += 1
    with pytest.raises(UnavailableError, match=r"thing is damaged in the cache .*python -m dts fetch thing"):
        fetching.cached("thing", folder.parent)
    assert fetching.ensure("thing", folder.parent) == folder
    assert len(asked) == 2 and "is damaged: it is fetched again" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["thing-1.0"]
    assert fetching.ensure("thing", folder.parent) == folder and len(asked) == 2


def test_large_files_are_hashed_by_the_fetch_command_only(cache, monkeypatch):
    folder, asked = cache
    monkeypatch.setattr(fetching, "HASHED_AT_LOAD", 4000)
    _flip(folder / "big.bin")
    INJECTED["damaged cache"] += 1
    fetching.ensure("thing", folder.parent)
    assert len(asked) == 1  # the size is right, and hashing weights at each load takes longer than loading them
    fetching.fetch(cache=folder.parent)
    assert len(asked) == 2


def test_a_damaged_cache_without_a_network_stays_and_is_named(cache, monkeypatch, caplog):
    def unreachable(*_):
        raise UnavailableError("pip could not download pkg==1.0")

    folder, _ = cache
    _flip(folder / "a.csv")
    monkeypatch.setattr(fetching, "pip_download", unreachable)
    INJECTED["damaged cache"] += 1
    with pytest.raises(UnavailableError, match="pip could not download"):
        fetching.ensure("thing", folder.parent)
    assert "a.csv is damaged" in caplog.text and (folder / "big.bin").exists()


def test_caches_of_earlier_versions_have_no_checksums_and_are_taken(cache):
    folder, asked = cache
    (folder / "checksums.json").unlink()
    assert fetching.ensure("thing", folder.parent) == folder and len(asked) == 1


@pytest.mark.parametrize("name", ["m4_subset.csv", "m4_subset.csv.gz"])
def test_damaged_data_are_named(tmp_path, name):
    text = "id,frequency,seasonal_period,horizon,n_train,train,test\n" + "H1,Hourly,24,3,3,1 2 3,\n"
    path = tmp_path / name
    whole = gzip.compress(text.encode() * 1, mtime=0) if name.endswith("gz") else text.encode()
    for place in range(len(whole)):
        for content in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
            path.write_bytes(content)
            INJECTED["damaged data"] += 1
            try:
                data.read_m4_csv(path)
            except UsageError as error:
                assert str(path) in str(error)


# Rewards and models -------------------------------------------------------------------------------------------------


def test_a_reward_that_hangs_is_named_and_what_was_finished_is_kept(lm):
    release, scored, kept = threading.Event(), [], []

    def patient(text: str) -> float:
        if len(scored) == 3:
            release.wait(60)
        scored.append(text)
        return 0.5

    INJECTED["reward hangs"] += 1
    reward = dts.with_timeout(patient, 0.2)
    with pytest.raises(RewardError, match=r"reward 'patient' took longer than 0\.2 s scoring 1 completions"):
        dts.decode(
            lm, PROMPT, reward=reward, method=Sampling(8), batch_size=1, max_new_tokens=3, on_rollout=kept.append
        )
    release.set()
    assert len(kept) == 3 and [rollout.reward for rollout in kept] == [0.5] * 3


def test_the_runner_has_the_timeout_and_goes_on_with_another(tmp_path, capsys):
    from fakes import FakeTask

    release = threading.Event()
    hangs = [True]

    def fail():
        if hangs[0]:
            release.wait(60)

    INJECTED["reward hangs"] += 1
    assert cli.main(command(tmp_path, "--reward-timeout", "0.2"), fake_backend(FakeTask(fail=fail))) == 1
    err = capsys.readouterr().err
    assert "reward 'number' took longer than 0.2 s" in err and "--resume" in err
    release.set()
    hangs[0] = False
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    resumed = ["--resume", str(folder), "--no-wandb", "--quiet", "--reward-timeout", "60"]
    assert cli.main(resumed, fake_backend(FakeTask(fail=fail))) == 0
    assert len(read_jsonl(folder / "samples.jsonl")) == 2
    with pytest.raises(UsageError, match="--reward-timeout 0 is not allowed"):
        ExperimentConfig(reward_timeout=0)
    with pytest.raises(UsageError, match="reward timeout nan"):
        dts.with_timeout(len, float("nan"))


def test_a_timed_reward_raises_what_it_raises(lm):
    def broken(text: str) -> float:
        raise ZeroDivisionError("division by zero")

    INJECTED["reward raises"] += 1
    with pytest.raises(RewardError, match="reward 'broken' raised ZeroDivisionError"):
        dts.decode(lm, PROMPT, reward=dts.with_timeout(broken, 60), method=Sampling(2), max_new_tokens=3)


BROKEN = {"nan": [np.nan], "inf": [np.inf], "all minus inf": [-np.inf] * 5}


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("broken", BROKEN)
def test_logits_that_are_no_distribution_are_named_with_their_prefix(name, broken):
    table = random_logits(5, seed=1)

    def logits(prefix):
        values = table(prefix)
        if len(prefix) >= 3:  # one token after the prompt
            values[: len(BROKEN[broken])] = BROKEN[broken]
        return values

    INJECTED["model gives no distribution"] += 1
    with pytest.raises(ModelError, match=r"table gave logits with NaN .* 1 tokens after the prompt, after '1 2 \d '"):
        dts.decode(
            TableModel(logits, 5), (1, 2), reward=lambda text: 1.0, method=METHODS[name](4, 2.0), max_new_tokens=3
        )


def test_weights_of_nan_are_noticed_at_the_first_token():
    model = random_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    INJECTED["model gives no distribution"] += 1
    with pytest.raises(ModelError, match="0 tokens after the prompt"):
        lm = HFModel(model, ByteTokenizer(), name="nan")
        lm._checked = True
        dts.decode(lm, PROMPT, method=MaxEnt(4), max_new_tokens=3)


# The clock ----------------------------------------------------------------------------------------------------------


def test_no_duration_is_taken_from_a_clock_that_can_go_back():
    """`time.time` follows the wall clock; only file names, reports and a server's answers may know the date."""
    wrong = []
    for path in (
        p for folder in ("dts", "models", "search", "training", "evaluation") for p in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = f"{node.value.id}.{node.attr}"
                if found in ("time.time", "time.time_ns", "datetime.utcnow") or (
                    found == "datetime.now" and path.name not in ("run_folder.py", "answers.py")
                ):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {found}")
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                wrong += [f"{path}:{node.lineno}" for alias in node.names if alias.name.startswith("time")]
    assert wrong == []


def test_a_wall_clock_that_goes_back_changes_no_search_and_no_folder(tmp_path, monkeypatch):
    case = instance(1, vocab_size=4, horizon=3)
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    INJECTED["clock goes back"] += 1
    result = dts.decode(case.lm, TABLE_PROMPT, reward=case.reward, method=MaxEnt(8), max_new_tokens=3)
    seconds = [rollout.seconds for rollout in result.rollouts]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and result.usage.seconds >= seconds[-1]
    from datetime import datetime

    folders = []
    for hour in (12, 11, 12):  # the same name a second time gets a number
        folder = RunFolder.create(tmp_path, "x", datetime(2030, 1, 1, hour))
        folders.append(folder.path.name)
        folder.close()
    assert folders == ["x_20300101_120000", "x_20300101_110000", "x_20300101_120000-2"]


def test_what_was_injected(capsys):
    """The last test of this file."""
    with capsys.disabled():
        sys.stdout.write(f"\n{sum(INJECTED.values())} faults injected, results lost: {sum(LOST.values())}\n")
        sys.stdout.writelines(f"  {kind}: {INJECTED[kind]}\n" for kind in sorted(INJECTED))
    assert sum(LOST.values()) == 0
