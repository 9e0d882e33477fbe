"""Readers of the data files. Each checks every row, and each error names the file and the line or row."""

from __future__ import annotations

import csv
import gzip
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError

BASIC_MOTIONS_HZ = 10.0  # one sample every tenth of a second, as the head of the file says
BASIC_MOTIONS_SHAPE = (6, 100)  # channels, samples
M4_SEASON = {"Yearly": 1, "Quarterly": 4, "Monthly": 12, "Weekly": 1, "Daily": 1, "Hourly": 24}
M4_HORIZON = {"Yearly": 6, "Quarterly": 8, "Monthly": 18, "Weekly": 13, "Daily": 14, "Hourly": 48}
_M4_COLUMNS = ("id", "frequency", "seasonal_period", "horizon", "n_train", "train", "test")


@dataclass(frozen=True, slots=True)
class Windows:
    """Labelled windows of a motion sensor."""

    source: str
    signals: np.ndarray  # float64 [windows, samples, channels], in the source's units
    channels: tuple[str, ...]
    labels: tuple[str, ...]  # words, one per window
    classes: tuple[str, ...]  # all label words, in the source's order
    subjects: tuple[str, ...]  # who wore the sensor: the clusters of an interval
    split: tuple[str, ...]  # "train" or "test", one per window
    hz: float  # samples per second


@dataclass(frozen=True, slots=True)
class Series:
    """One time series with the values that followed it."""

    id: str
    frequency: str
    season: int  # m of MASE, in steps
    horizon: int  # steps
    history: np.ndarray  # float64 [n]
    future: np.ndarray  # float64 [horizon], or [0] where the source has none


def read_har_npz(path: str | Path) -> Windows:
    """Windows of an npz file with `acc` or `signal` [n, t, c], `label`, `subject`, `sampling_hz`; no pickled objects.

    Without a `split` in the file, every third subject (in sorted order) is a test subject.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not a readable npz file without pickled objects ({error})") from error
    name = "acc" if "acc" in arrays else "signal"
    missing = [key for key in (name, "label", "subject", "sampling_hz") if key not in arrays]
    if missing:
        raise UsageError(f"{path}: lacks {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    signals, labels, subjects = arrays[name], arrays["label"].astype(str), arrays["subject"].astype(str)
    if signals.ndim != 3 or signals.dtype.kind not in "fiu":
        raise UsageError(f"{path}: {name} must be numbers [windows, samples, channels], got {signals.shape}")
    split = arrays["split"].astype(str) if "split" in arrays else _split_by_subject(subjects)
    _check_windows(path, signals, labels, subjects, split)
    hz = float(arrays["sampling_hz"])
    if not 0 < hz < math.inf:
        raise UsageError(f"{path}: sampling_hz must be above 0, got {hz}")
    channels = arrays.get("channels", np.array([f"{name}_{axis}" for axis in "xyz"[: signals.shape[2]]]))
    if len(channels) != signals.shape[2]:
        raise UsageError(f"{path}: {len(channels)} channel names for {signals.shape[2]} channels")
    return Windows(
        source=path.name,
        signals=signals.astype(np.float64),
        channels=tuple(map(str, channels)),
        labels=tuple(labels.tolist()),
        classes=tuple(sorted(set(labels.tolist()))),
        subjects=tuple(subjects.tolist()),
        split=tuple(split.tolist()),
        hz=hz,
    )


def _split_by_subject(subjects: np.ndarray) -> np.ndarray:
    """[n] "train"/"test". Sorted by length first, so that numbers sort as numbers."""
    tests = sorted(set(subjects.tolist()), key=lambda s: (len(s), s))[2::3]
    return np.where(np.isin(subjects, tests), "test", "train")


def _check_windows(path: Path, signals: np.ndarray, *columns: np.ndarray) -> None:
    for column, name in zip(columns, ("label", "subject", "split"), strict=True):
        if column.shape != (len(signals),):
            raise UsageError(f"{path}: {name} has shape {column.shape}, expected ({len(signals)},)")
    for row, (values, label, _, split) in enumerate(zip(signals, *columns, strict=True)):
        if not np.isfinite(values).all():
            raise UsageError(f"{path}, row {row}: the window holds NaN or infinite values")
        if not label.strip():
            raise UsageError(f"{path}, row {row}: the label is empty")
        if split not in ("train", "test"):
            raise UsageError(f"{path}, row {row}: split must be train or test, got {split!r}")
    if set(columns[2].tolist()) != {"train", "test"}:
        raise UsageError(f"{path}: needs windows of both splits, train and test")


def read_basic_motions(folder: str | Path) -> Windows:
    """BasicMotions (UEA archive): a wrist-worn sensor, 4 activities, 40 train and 40 test windows of 10 s.

    The files name no subjects, so each window is its own cluster. Accelerometer first, then gyroscope; the source
    states no units.
    """
    folder = Path(folder)
    rows: list[tuple[np.ndarray, str]] = []
    split: list[str] = []
    classes: tuple[str, ...] = ()
    for part in ("TRAIN", "TEST"):
        path = folder / f"BasicMotions_{part}.ts"
        part_classes, part_rows = _read_ts(path)
        if classes and classes != part_classes:
            raise UsageError(f"{path}: its classes {part_classes} differ from those of the train file, {classes}")
        classes = part_classes
        rows += part_rows
        split += [part.lower()] * len(part_rows)
    return Windows(
        source="BasicMotions",
        signals=np.stack([values for values, _ in rows]),
        channels=("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"),
        labels=tuple(label for _, label in rows),
        classes=classes,
        subjects=tuple(str(index) for index in range(len(rows))),
        split=tuple(split),
        hz=BASIC_MOTIONS_HZ,
    )


def _read_ts(path: Path) -> tuple[tuple[str, ...], list[tuple[np.ndarray, str]]]:
    """Classes, and per line the signal [samples, channels] with its label."""
    classes: tuple[str, ...] = ()
    rows = []
    in_data = False
    for number, line in _lines(path):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not in_data:
            if text.lower().startswith("@classlabel"):
                classes = tuple(text.split()[2:])
            in_data = text.lower() == "@data"
            continue
        *channels, label = text.split(":")
        if label not in classes:
            raise UsageError(f"{path}, line {number}: label {label!r} is none of {', '.join(classes) or 'no classes'}")
        values = [_numbers(channel.split(","), f"{path}, line {number}") for channel in channels]
        shape = (len(values), len(values[0]) if values else 0)
        if any(len(channel) != shape[1] for channel in values) or shape != BASIC_MOTIONS_SHAPE:
            expected = "{} channels of {} samples".format(*BASIC_MOTIONS_SHAPE)
            raise UsageError(f"{path}, line {number}: expected {expected}, got {[len(c) for c in values]}")
        rows.append((np.stack(values, axis=1), label))
    if not rows:
        raise UsageError(f"{path}: has no rows after @data")
    return classes, rows


def read_m4_csv(path: str | Path) -> list[Series]:
    """Series of a CSV (plain or gzip) with columns id, frequency, seasonal_period, horizon, n_train, train, test.

    `train` and `test` hold values separated by a space; `test` may be empty. M3 files have the same form.
    """
    path = Path(path)
    reader = csv.DictReader(line for _, line in _lines(path))
    missing = [name for name in _M4_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UsageError(f"{path}, line 1: lacks the columns {', '.join(missing)}")
    series: list[Series] = []
    seen: set[str] = set()
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        one = _m4_row(row, where)
        if one.id in seen:
            raise UsageError(f"{where}: id {one.id!r} appears twice")
        seen.add(one.id)
        series.append(one)
    if not series:
        raise UsageError(f"{path}: has no rows")
    return series


def _m4_row(row: dict[str, Any], where: str) -> Series:
    if None in row or any(row[name] is None for name in _M4_COLUMNS):
        raise UsageError(f"{where}: expected one value per column")
    history, future = (_numbers(row[name].split(), f"{where}, {name}") for name in ("train", "test"))
    season, horizon, n_train = (_positive(row, name, where) for name in ("seasonal_period", "horizon", "n_train"))
    if not row["id"].strip():
        raise UsageError(f"{where}: the id is empty")
    if len(history) != n_train or len(history) < 2:
        raise UsageError(f"{where}: train has {len(history)} values, n_train says {n_train}; at least 2 are needed")
    if len(future) not in (0, horizon):
        raise UsageError(f"{where}: test has {len(future)} values, horizon says {horizon}")
    return Series(row["id"].strip(), row["frequency"], season, horizon, history, future)


def read_m4_mini(folder: str | Path) -> list[Series]:
    """The 24 M4 series of the `m4_<frequency>.csv` files (columns id, date, value; rows in time order).

    These files hold training values only, so the published horizon (Y 6, Q 8, M 18, W 13, D 14, H 48) is held out
    from the end of each series: a hold-out, not the competition's official test.
    """
    series: list[Series] = []
    for frequency, horizon in M4_HORIZON.items():
        path = Path(folder) / f"m4_{frequency.lower()}.csv"
        reader = csv.DictReader(line for _, line in _lines(path))
        if not {"id", "date", "value"} <= set(reader.fieldnames or ()):
            raise UsageError(f"{path}, line 1: expected the columns id, date, value")
        values: dict[str, list[float]] = {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row["id"]:
                raise UsageError(f"{where}: the id is empty")
            values.setdefault(row["id"], []).append(float(_numbers([row["value"] or ""], where)[0]))
        for name, points in values.items():
            if len(points) < horizon + 2:
                raise UsageError(f"{path}: series {name!r} has {len(points)} values, needs {horizon + 2} or more")
            history, future = np.array(points[:-horizon]), np.array(points[-horizon:])
            series.append(Series(name, frequency, M4_SEASON[frequency], horizon, history, future))
    return series


def locate(data_dir: str | Path, names: Sequence[str], option: str = "--data-dir") -> Path:
    """The first of `names` in the folder; a path to a file is taken as it is."""
    path = Path(data_dir)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{option} {path}: no such folder; give the folder that holds {' or '.join(names)}")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UsageError(
        f"{option} {path}: holds no {' or '.join(names)}; put the file there, or leave the option out for the "
        "data that `python -m dts fetch` provides"
    )


def load_windows(data_dir: str | Path | None = None) -> Windows:
    """`har_windows.npz` of a folder (or a file of that format), or else the packaged BasicMotions set."""
    if data_dir is not None:
        return read_har_npz(locate(data_dir, ["har_windows.npz"]))
    from dts.fetch import ensure

    return read_basic_motions(ensure("basic-motions"))


def load_series(data_dir: str | Path | None = None) -> list[Series]:
    """`m4_subset.csv.gz` of a folder (or a file of that format), or else the 24 packaged series."""
    if data_dir is not None:
        return read_m4_csv(locate(data_dir, ["m4_subset.csv.gz", "m4_subset.csv"]))
    from dts.fetch import ensure

    return read_m4_mini(ensure("m4-mini"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, plain or gzip."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error


def _numbers(words: Sequence[str], where: str) -> np.ndarray:
    """Float64 [len(words)], all finite."""
    for position, word in enumerate(words):
        try:
            finite = math.isfinite(float(word))
        except ValueError:
            finite = False
        if not finite:
            raise UsageError(f"{where}: value {position + 1} is {word.strip()!r}, not a finite number")
    return np.array([float(word) for word in words], dtype=np.float64)


def _positive(row: dict[str, Any], name: str, where: str) -> int:
    text = row[name].strip()
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{where}: {name} must be a whole number above 0, got {text!r}")
    return int(text)
