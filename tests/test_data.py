"""Readers: every documented format loads, and a broken file is named with its line."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from task_data import SHARED, write_har, write_m4, write_weather

from dts.errors import UnavailableError, UsageError
from dts.evaluation import data
from dts.evaluation.data import sources
from dts.evaluation.tasks import load_task

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


@needs_shared
def test_shared_files_load():
    windows = data.read_har_npz(SHARED / "har_windows.npz")
    assert windows.signals.shape == (720, 128, 3)
    assert Counter(windows.split) == {"train": 360, "test": 360}
    gyro = data.read_har_npz(SHARED / "har_gyro_windows.npz")
    assert gyro.signals.shape == (440, 128, 6)
    both = {s for s, part in zip(gyro.subjects, gyro.split, strict=True) if part == "test"}
    assert not both & {s for s, part in zip(gyro.subjects, gyro.split, strict=True) if part == "train"}
    series = data.read_m4_csv(SHARED / "m4_subset.csv.gz")
    assert Counter(one.frequency for one in series)["Hourly"] == 248
    assert sum(not len(one.future) for one in series) == 3  # the Monthly rows have no test
    assert len(gyro.classes) == 5
    m3 = data.load_series(SHARED / "m3_subset.csv.gz")
    assert Counter(one.frequency for one in m3) == {"Yearly": 240, "Quarterly": 240, "Monthly": 240, "Other": 104}
    weather = data.load_weather(SHARED)
    assert len(weather) == 180
    assert sum(row.id >= "2016" for row in weather) == 114


def test_packaged_data_load(packaged):
    windows = data.read_basic_motions(packaged[0])
    assert windows.signals.shape == (80, 100, 6)
    assert windows.classes == ("Standing", "Running", "Walking", "Badminton")
    assert Counter(zip(windows.split, windows.labels, strict=True))["test", "Walking"] == 10
    assert windows.signals[0, :3, 0].tolist() == [0.079106, 0.079106, -0.903497]
    series = data.read_m4_mini(packaged[1])
    assert Counter(one.frequency for one in series) == dict.fromkeys(data.M4_HORIZON, 4)
    assert all(len(one.future) == one.horizon == data.M4_HORIZON[one.frequency] for one in series)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"train": "1 2 x"}, "line 3, train: value 3 is 'x'"),
        ({"train": "1 2 nan"}, "line 3, train: value 3 is 'nan'"),
        ({"train": "1 2 1_0"}, "line 3, train: value 3 is '1_0'"),
        ({"n_train": "39"}, "line 3: train has 40 values"),
        ({"test": "1 2"}, "line 3: test has 2 values, horizon says 3"),
        ({"horizon": "0"}, "line 3: horizon must be a whole number above 0"),
        ({"id": "Q0"}, "line 3: id 'Q0' appears twice"),
        ({"id": " "}, "line 3: the id is empty"),
    ],
)
def test_malformed_m4_row_is_named(tmp_path, change, where):
    with pytest.raises(UsageError, match="m4_subset.csv.gz, " + where):
        load_task("m4", data_dir=write_m4(tmp_path, **change))


def test_m4_without_its_columns(tmp_path):
    (tmp_path / "m4_subset.csv").write_text("id,train\nY1,1 2\n")
    with pytest.raises(UsageError, match="line 1: lacks the columns frequency"):
        load_task("m4", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"acc": np.full((45, 64, 3), np.nan)}, "row 0: the window holds NaN"),
        ({"label": np.array([""] * 45)}, "row 0: the label is empty"),
        ({"split": np.array(["train"] * 44 + ["dev"])}, "row 44: split must be train or test"),
        ({"split": np.array(["train"] * 45)}, "needs windows of both splits"),
        ({"subject": np.arange(3)}, "subject has shape"),
        ({"label": np.array([{}] * 45, dtype=object)}, "without pickled objects"),
    ],
)
def test_malformed_window_is_named(tmp_path, change, where):
    with pytest.raises(UsageError, match=f"har_windows.npz.*{where}"):
        load_task("har", data_dir=write_har(tmp_path, **change))


def test_malformed_motion_line_is_named(tmp_path):
    head = "@classLabel true Standing Walking\n@data\n"
    good = ":".join([",".join(["1.0"] * 100)] * 6) + ":Standing\n"
    for bad, where in [
        (good.replace("1.0", "one", 1), "line 4: value 1 is 'one'"),
        (good.replace("1.0,", "", 1), "line 4: expected 6 channels of 100 samples"),
        (good.replace("Standing", "Flying"), "line 4: label 'Flying' is none of Standing, Walking"),
    ]:
        (tmp_path / "BasicMotions_TRAIN.ts").write_text(head + good + bad)
        with pytest.raises(UsageError, match=f"BasicMotions_TRAIN.ts, {where}"):
            data.read_basic_motions(tmp_path)


def test_missing_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_task("har", data_dir=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no har_windows.npz.*leave the option out"):
        load_task("har", data_dir=tmp_path)
    (tmp_path / "har_windows.npz").write_text("not a zip file")
    with pytest.raises(UsageError, match=r"har_windows.npz: not a readable npz"):
        load_task("har", data_dir=tmp_path)


# Formats of other publishers ---------------------------------------------------------------------------------------


def test_official_m4_files(tmp_path):
    (tmp_path / "Train").mkdir()
    (tmp_path / "Test").mkdir()
    (tmp_path / "Train" / "Yearly-train.csv").write_text('"V1","V2","V3","V4"\n"Y1","1","2.5",""\n"Y2","4","5","6"\n')
    (tmp_path / "Test" / "Yearly-test.csv").write_text('"V1","V2"\n' + '"Y2",' + ",".join(['"7"'] * 6) + "\n")
    first, second = data.load_series(tmp_path)
    assert (first.id, first.history.tolist(), len(first.future)) == ("Y1", [1, 2.5], 0)
    assert (second.frequency, second.season, second.horizon) == ("Yearly", 1, 6)
    assert second.future.tolist() == [7.0] * 6
    (tmp_path / "Test" / "Yearly-test.csv").write_text('"V1","V2"\n"Y2","7"\n')
    with pytest.raises(UsageError, match="series 'Y2' has 3 values and 1 test values"):
        data.load_series(tmp_path)


def test_uci_har_as_unpacked(tmp_path):
    home = tmp_path / "UCI HAR Dataset"
    for part, count in (("train", 3), ("test", 2)):
        (home / part / "Inertial Signals").mkdir(parents=True)
        for position, name in enumerate(["total_acc_x", "total_acc_y", "total_acc_z"]):
            rows = [" ".join(f" {position + row / 10:.7e}" for _ in range(128)) for row in range(count)]
            (home / part / "Inertial Signals" / f"{name}_{part}.txt").write_text("\n".join(rows) + "\n")
            gyro = name.replace("total_acc", "body_gyro")
            (home / part / "Inertial Signals" / f"{gyro}_{part}.txt").write_text("\n".join(rows) + "\n")
        (home / part / f"y_{part}.txt").write_text("\n".join(["1", "2", "1"][:count]) + "\n")
        (home / part / f"subject_{part}.txt").write_text("\n".join(["7"] * count) + "\n")
    (home / "activity_labels.txt").write_text("1 WALKING\n2 WALKING_UPSTAIRS\n")
    windows = data.load_windows(tmp_path)
    assert windows.signals.shape == (5, 128, 6)
    assert windows.signals[1, 0, :3].tolist() == [0.1, 1.1, 2.1]
    assert windows.labels == ("walking", "walking_upstairs", "walking", "walking", "walking_upstairs")
    assert Counter(windows.split) == {"train": 3, "test": 2}
    (home / "train" / "y_train.txt").write_text("1\n9\n1\n")
    with pytest.raises(UsageError, match="unknown: \\['9'\\]"):
        data.load_windows(tmp_path)


def write_har_cot(folder):
    """The columns that OpenTSLM reads, with the repeated head that its loader filters out."""
    head = "x_axis,y_axis,z_axis,label,rationale\n"
    axis = '"[' + ", ".join(["0.5", "-1.0"] * 64) + ']"'
    for part in ("train", "val", "test"):
        rows = [f'{axis},{axis},{axis},{label},"It moves. Answer: {label}"\n' for label in ("walking", "biking")]
        (folder / f"har_cot_{part}_cot.csv").write_text(head + rows[0] + head + rows[1])
    return folder


def test_har_cot_of_opentslm(tmp_path):
    windows = data.load_windows(write_har_cot(tmp_path))
    assert windows.signals.shape == (4, 128, 3)  # validation windows are left out
    assert windows.classes == ("biking", "walking")
    assert windows.hz == 50
    assert windows.rationales[0] == "It moves. Answer: walking"
    task = load_task("har", data_dir=tmp_path)
    assert next(task.training_rows())["messages"][-1]["content"] == "It moves. Answer: walking"
    path = tmp_path / "har_cot_test_cot.csv"
    path.write_text(path.read_text().replace("0.5", "x", 1))
    with pytest.raises(UsageError, match=r"har_cot_test_cot.csv, line 2, x_axis: value 1 is 'x'"):
        data.load_windows(tmp_path)


def test_m4_captions_of_opentslm(tmp_path):
    series = 'id,series\nW1,"[' + ", ".join(map(str, range(60))) + ']"\nW2,"[1, 2]"\n'
    (tmp_path / "m4_series_Weekly.csv").write_text(series)
    (tmp_path / "m4_captions_Weekly.csv").write_text('id,caption\nW1,"It is rising, smoothly."\nW3,other\n')
    loaded, captions = data.load_captions(tmp_path)
    assert [one.id for one in loaded] == ["W1"] and captions == {"W1": "It is rising, smoothly."}
    task = load_task("m4-caption", data_dir=tmp_path)
    assert task.score({"W1": "It is rising, smoothly."})["rouge_l"] == 1.0
    assert task.baselines()["references"]["rouge_l"] == 1.0
    (tmp_path / "m4_series_Weekly.csv").write_text('id,series\nW1,"[1, oops]"\n')
    with pytest.raises(UsageError, match=r"m4_series_Weekly.csv, line 2: not JSON"):
        data.load_captions(tmp_path)


def test_malformed_weather_is_named(tmp_path):
    write_weather(tmp_path)
    path = tmp_path / "weather_captions.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    for change, where in [
        ({"wind_kmh": [1]}, "line 2: the channels have"),
        ({"wind_kmh": ["x"] * 4}, "line 2, wind_kmh: value 1 is 'x'"),
        ({"start": rows[0]["start"]}, "line 2: start '2014-01-01T06:00:00' appears twice"),
    ]:
        broken = [rows[0], {**rows[1], **change}]
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, broken)).encode()))
        with pytest.raises(UsageError, match=f"weather_captions.jsonl.gz, {where}"):
            data.load_weather(tmp_path)
    path.write_bytes(gzip.compress(b'{"start": 1}\n'))
    with pytest.raises(UsageError, match="line 1: lacks caption, temperature_c"):
        data.load_weather(tmp_path)
    with pytest.raises(UsageError, match="needs --data-dir"):
        load_task("weather-caption")


# Downloads ---------------------------------------------------------------------------------------------------------


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    return buffer.getvalue()


def serve(monkeypatch, content: bytes):
    asked = []

    def answer(request, timeout):
        asked.append(request.full_url)
        return io.BytesIO(content)

    monkeypatch.setattr(sources.urllib.request, "urlopen", answer)
    return asked


def test_download_unpacks_without_the_shared_folder(tmp_path, monkeypatch):
    inner = archive({"UCI HAR Dataset/train/y_train.txt": "1"})
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as made:
        made.writestr("UCI HAR Dataset.zip", inner)
        made.writestr("UCI HAR Dataset.names", "about")
    asked = serve(monkeypatch, outer.getvalue())
    folder = data.download("uci-har", tmp_path)
    assert sorted(p.name for p in folder.rglob("*.txt")) == ["y_train.txt"]
    assert data.download("uci-har", tmp_path) == folder and len(asked) == 1  # what is there is not fetched again


def test_download_keeps_files_as_they_are(tmp_path, monkeypatch):
    asked = serve(monkeypatch, b"V1,V2\n")
    names = {path.name for path in data.download("m4", tmp_path).iterdir()}
    assert len(asked) == 12 and {"Hourly-train.csv", "Hourly-test.csv", "Yearly-test.csv"} <= names


def test_a_hostile_archive_writes_nothing_outside(tmp_path, monkeypatch):
    serve(monkeypatch, archive({"a/../../escaped.txt": "x", "a/b.txt": "y"}))
    with pytest.raises(UnavailableError, match="nothing was kept"):
        data.download("har-cot", tmp_path / "here")
    assert not list(tmp_path.rglob("*.txt"))


def test_download_without_a_network_says_so(tmp_path, monkeypatch):
    def refuse(request, timeout):
        raise OSError("no route")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    with pytest.raises(UnavailableError, match=r"cannot fetch https://.* \(no route\); connect to a network"):
        data.download("m4", tmp_path)
    assert not list(tmp_path.iterdir())  # whole or not at all
    with pytest.raises(UsageError, match="no source is called 'm5'; there are m4"):
        data.download("m5", tmp_path)
