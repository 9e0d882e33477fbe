"""Fetching: pinned wheels into the cache, whole or not at all. No network: the downloads here are fakes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from dts import fetch as fetching
from dts.__main__ import main
from dts.errors import UnavailableError, UsageError
from dts.fetch import ITEMS, Item, cache_dir, cached, ensure, fetch, pip_download

CONTENT = {"pkg/data/a.csv": b"1,2\n", "pkg/LICENSE": b"MIT\n", "pkg/big.bin": b"x" * 1000, "../../evil": b"!"}


class FakeIndex:
    """Serves one wheel and counts how often it was asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.asked = wheel, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked += 1
        copy = folder / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy


@pytest.fixture
def index(tmp_path, monkeypatch):
    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    item = Item("thing", "a test", "pkg==1.0", digest, 1, ("pkg/data/a.csv", "pkg/LICENSE"))
    monkeypatch.setattr(fetching, "ITEMS", {"thing": item})
    return FakeIndex(wheel)


def replaced(monkeypatch, **changes):
    fields = {name: getattr(fetching.ITEMS["thing"], name) for name in Item.__slots__}
    monkeypatch.setattr(fetching, "ITEMS", {"thing": Item(**(fields | changes))})


def test_only_the_named_members_arrive_and_the_second_time_nothing_is_downloaded(index, tmp_path):
    cache = tmp_path / "deep" / "cache"
    assert fetch(cache=cache, download=index) == [cache / "thing-1.0"] == fetch(cache=cache, download=index)
    assert index.asked == 1
    files = {p.relative_to(cache).as_posix(): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    assert set(json.loads(files.pop("thing-1.0/checksums.json"))) == {"a.csv", "LICENSE"}
    assert files == {"thing-1.0/a.csv": b"1,2\n", "thing-1.0/LICENSE": b"MIT\n"}
    assert cached("thing", cache) == ensure("thing", cache) == cache / "thing-1.0"


def test_a_member_path_never_leaves_its_folder(index, tmp_path, monkeypatch):
    replaced(monkeypatch, members=("../../evil",))
    (folder,) = fetch(cache=tmp_path / "cache", download=index)
    assert sorted(p.name for p in folder.iterdir()) == ["checksums.json", "evil"]


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_kept(index, tmp_path, monkeypatch):
    replaced(monkeypatch, sha256="0" * 64)
    with pytest.raises(UnavailableError, match=r"sha256 .* not 0{64}.*pkg==1\.0"):
        fetch(["thing"], cache=tmp_path / "cache", download=index)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fetch_leaves_nothing(index, tmp_path, monkeypatch, stop):
    def finish(folder):
        assert (folder / "a.csv").is_file()
        raise stop

    replaced(monkeypatch, finish=finish)
    with pytest.raises(stop):
        fetch(cache=tmp_path / "cache", download=index)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(UnavailableError, match="python -m dts fetch thing"):
        cached("thing", tmp_path / "cache")


def test_two_fetches_at_once_agree_on_one_whole_copy(index, tmp_path, monkeypatch):
    both_unpacked = threading.Barrier(2, timeout=30)
    replaced(monkeypatch, finish=lambda folder: both_unpacked.wait())
    found: list[list[Path]] = []
    cache = tmp_path / "cache"
    threads = [threading.Thread(target=lambda: found.append(fetch(cache=cache, download=index))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.asked == 2 and found == [[cache / "thing-1.0"]] * 2
    assert [p.name for p in cache.iterdir()] == ["thing-1.0"]
    assert sorted(p.name for p in found[0][0].iterdir()) == ["LICENSE", "a.csv", "checksums.json"]


def test_a_cache_that_cannot_be_written_names_the_fix(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="DTS_CACHE"):
        fetch(cache=tmp_path / "file" / "cache", download=index)


def test_unknown_names_are_refused_before_anything_is_fetched(tmp_path):
    with pytest.raises(UsageError, match=r"'basic-motion'; did you mean basic-motions\?"):
        fetch(["m4-mini", "basic-motion"], cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="there are smollm2-135m, basic-motions, m4-mini"):
        cached("zzz", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DTS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("DTS_CACHE")
    assert cache_dir().name == "maxent-decoding"


def test_every_item_is_pinned():
    for name, item in ITEMS.items():
        assert item.name == name and "==" in item.requirement and len(item.sha256) == 64
        assert any("LICENSE" in member for member in item.members)
        kept = [member.rsplit("/", 1)[-1] for member in item.members]
        assert len(set(kept)) == len(kept)


def failing_pip(monkeypatch, stderr):
    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, None, stderr)

    monkeypatch.setattr(fetching.subprocess, "run", run)


def test_pip_that_fails_or_is_missing_gives_one_line_with_the_fix(tmp_path, monkeypatch):
    failing_pip(monkeypatch, "WARNING: retrying\nERROR: No matching distribution found for pkg==1.0\n")
    with pytest.raises(UnavailableError, match=r"No matching distribution.*PIP_FIND_LINKS") as caught:
        pip_download("pkg==1.0", tmp_path)
    assert "\n" not in str(caught.value)
    failing_pip(monkeypatch, f"{sys.executable}: No module named pip\n")
    with pytest.raises(UnavailableError, match="ensurepip"):
        pip_download("pkg==1.0", tmp_path)


def test_real_pip_takes_a_wheel_from_a_folder_without_a_network(tmp_path, monkeypatch):
    wheels, into = tmp_path / "wheels", tmp_path / "into"
    wheels.mkdir()
    into.mkdir()
    with zipfile.ZipFile(wheels / "dtsfake-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("dtsfake-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: dtsfake\nVersion: 1.0\n")
        archive.writestr(
            "dtsfake-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("dtsfake-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert pip_download("dtsfake==1.0", into) == into / "dtsfake-1.0-py3-none-any.whl"
    with pytest.raises(UnavailableError, match=r"dtsfake==2\.0"):
        pip_download("dtsfake==2.0", into)


def test_the_command_prints_folders_and_turns_errors_into_exit_code_2(tmp_path, monkeypatch, capsys):
    for item in ITEMS.values():
        (tmp_path / item.folder).mkdir()
    assert main(["fetch", "--cache", str(tmp_path), "m4-mini"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / ITEMS['m4-mini'].folder}\n"
    assert main(["fetch", "--cache", str(tmp_path), "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to fetch is called 'nothing'")
    assert main([]) == 2
