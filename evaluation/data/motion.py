"""Windows of motion sensors: this project's npz form, UCI HAR, HAR-CoT of OpenTSLM, BasicMotions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dts.errors import UsageError
from dts.evaluation.data.files import locate, numbers, table
from dts.yamlfile import lines

BASIC_MOTIONS_HZ = 10.0  # one sample every tenth of a second, as the head of the file says
BASIC_MOTIONS_SHAPE = (6, 100)  # channels, samples


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
    rationales: tuple[str, ...] = ()  # one per window, where the source has them; for training only


def read_har_npz(path: str | Path) -> Windows:
    """Windows of an npz file with `acc` or `signal` [n, t, c], `label`, `subject`, `sampling_hz`; no pickled objects.

    Without a `split` in the file, every third subject (in sorted order) is a test subject.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # damaged archives and headers fail in as many ways as numpy and zipfile have steps
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
    for number, line in lines(path):
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
        values = [numbers(channel.split(","), f"{path}, line {number}") for channel in channels]
        shape = (len(values), len(values[0]) if values else 0)
        if any(len(channel) != shape[1] for channel in values) or shape != BASIC_MOTIONS_SHAPE:
            expected = "{} channels of {} samples".format(*BASIC_MOTIONS_SHAPE)
            raise UsageError(f"{path}, line {number}: expected {expected}, got {[len(c) for c in values]}")
        rows.append((np.stack(values, axis=1), label))
    if not rows:
        raise UsageError(f"{path}: has no rows after @data")
    return classes, rows


def read_uci_har(folder: str | Path) -> Windows:
    """UCI HAR (Anguita et al. 2013) as it is unpacked: `train/Inertial Signals/total_acc_x_train.txt` and so on.

    Total acceleration in g and angular velocity in rad/s, 128 samples at 50 Hz, with the set's own split by subjects.
    """
    folder = Path(folder)
    names = dict(line.split() for _, line in lines(folder / "activity_labels.txt") if line.strip())
    signals, labels, subjects, split = [], [], [], []
    for part in ("train", "test"):
        inertial = folder / part / "Inertial Signals"
        signals.append(np.stack([_table(inertial / f"{name}_{part}.txt") for name in _UCI_SIGNALS], axis=2))
        ids = [line.strip() for _, line in lines(folder / part / f"y_{part}.txt")]
        unknown = sorted(set(ids) - set(names))
        if unknown or len(ids) != len(signals[-1]):
            raise UsageError(f"{folder}/{part}: {len(ids)} labels for {len(signals[-1])} windows, unknown: {unknown}")
        labels += [names[label].lower() for label in ids]
        subjects += [line.strip() for _, line in lines(folder / part / f"subject_{part}.txt")]
        split += [part] * len(ids)
    values = np.concatenate(signals)
    _check_windows(folder, values, np.array(labels), np.array(subjects), np.array(split))
    return Windows(
        source="UCI HAR",
        signals=values,
        channels=("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"),
        labels=tuple(labels),
        classes=tuple(name.lower() for name in names.values()),
        subjects=tuple(subjects),
        split=tuple(split),
        hz=50.0,
    )


_UCI_SIGNALS = [f"{kind}_{axis}" for kind in ("total_acc", "body_gyro") for axis in "xyz"]


def _table(path: Path) -> np.ndarray:
    """Float64 [rows, columns] of a text file."""
    rows = [numbers(line.split(), f"{path}, line {number}") for number, line in lines(path)]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise UsageError(f"{path}: expected rows of one length")
    return np.stack(rows)


def read_har_cot(folder: str | Path) -> Windows:
    """HAR-CoT as OpenTSLM publishes it: `har_cot_{train,val,test}_cot.csv` with the columns x_axis, y_axis, z_axis
    (each a list written as text), label and rationale.

    The validation windows are left out. The files name no subjects, so each window is its own cluster. The reader
    there states no sampling rate; windows of 2.56 s (50 Hz for 128 samples) are assumed.
    """
    folder = Path(folder)
    signals: list[np.ndarray] = []
    labels, split, rationales = [], [], []
    for part in ("train", "test"):
        for where, row in table(folder / f"har_cot_{part}_cot.csv", ("x_axis", "y_axis", "z_axis", "label")):
            if row["x_axis"] == "x_axis":
                continue  # the published files repeat their head
            axes = [numbers(row[name].strip("[] ").split(","), f"{where}, {name}") for name in _COT_AXES]
            if len({len(axis) for axis in axes}) > 1 or (signals and len(axes[0]) != len(signals[0])):
                raise UsageError(f"{where}: the axes have {[len(axis) for axis in axes]} samples; expected one length")
            signals.append(np.stack(axes, axis=1))
            labels.append(row["label"].strip())
            split.append(part)
            rationales.append((row.get("rationale") or "").strip())
    if not signals:
        raise UsageError(f"{folder}: the HAR-CoT files hold no windows")
    values = np.stack(signals)
    subjects = [str(number) for number in range(len(values))]
    _check_windows(folder, values, np.array(labels), np.array(subjects), np.array(split))
    return Windows(
        source="HAR-CoT",
        signals=values,
        channels=("acc_x", "acc_y", "acc_z"),
        labels=tuple(labels),
        classes=tuple(sorted(set(labels))),
        subjects=tuple(subjects),
        split=tuple(split),
        hz=values.shape[1] / 2.56,
        rationales=tuple(rationales),
    )


_COT_AXES = ("x_axis", "y_axis", "z_axis")


def load_windows(data_dir: str | Path | None = None) -> Windows:
    """Windows of a folder with `har_windows.npz`, UCI HAR or HAR-CoT, of an npz file, or else the packaged set."""
    if data_dir is None:
        from dts.fetch import ensure

        return read_basic_motions(ensure("basic-motions"))
    folder = Path(data_dir)
    for home in (folder, folder / "UCI HAR Dataset"):
        if (home / "train" / "Inertial Signals").is_dir():
            return read_uci_har(home)
    if (folder / "har_cot_train_cot.csv").is_file():
        return read_har_cot(folder)
    return read_har_npz(locate(data_dir, ["har_windows.npz"]))
