"""Series with what followed them: this project's CSV form (M4, M3), the official M4 files, the packaged mini set."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.data.files import locate, numbers, positive, table
from dts.yamlfile import lines

M4_SEASON = {"Yearly": 1, "Quarterly": 4, "Monthly": 12, "Weekly": 1, "Daily": 1, "Hourly": 24}
M4_HORIZON = {"Yearly": 6, "Quarterly": 8, "Monthly": 18, "Weekly": 13, "Daily": 14, "Hourly": 48}
_M4_COLUMNS = ("id", "frequency", "seasonal_period", "horizon", "n_train", "train", "test")


@dataclass(frozen=True, slots=True)
class Series:
    """One time series with the values that followed it."""

    id: str
    frequency: str
    season: int  # m of MASE, in steps
    horizon: int  # steps
    history: np.ndarray  # float64 [n]
    future: np.ndarray  # float64 [horizon], or [0] where the source has none


def read_m4_csv(path: str | Path) -> list[Series]:
    """Series of a CSV (plain or gzip) with columns id, frequency, seasonal_period, horizon, n_train, train, test.

    `train` and `test` hold values separated by a space; `test` may be empty. M3 files have the same form.
    """
    path = Path(path)
    series: list[Series] = []
    seen: set[str] = set()
    for where, row in table(path, _M4_COLUMNS):
        one = _m4_row(row, where)
        if one.id in seen:
            raise UsageError(f"{where}: id {one.id!r} appears twice")
        seen.add(one.id)
        series.append(one)
    if not series:
        raise UsageError(f"{path}: has no rows")
    return series


def _m4_row(row: dict[str, Any], where: str) -> Series:
    history, future = (numbers(row[name].split(), f"{where}, {name}") for name in ("train", "test"))
    season, horizon, n_train = (positive(row, name, where) for name in ("seasonal_period", "horizon", "n_train"))
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
        values: dict[str, list[float]] = {}
        for where, row in table(path, ("id", "date", "value")):
            if not row["id"]:
                raise UsageError(f"{where}: the id is empty")
            values.setdefault(row["id"], []).append(float(numbers([row["value"]], where)[0]))
        for name, points in values.items():
            if len(points) < horizon + 2:
                raise UsageError(f"{path}: series {name!r} has {len(points)} values, needs {horizon + 2} or more")
            history, future = np.array(points[:-horizon]), np.array(points[-horizon:])
            series.append(Series(name, frequency, M4_SEASON[frequency], horizon, history, future))
    return series


def read_m4_official(folder: str | Path) -> list[Series]:
    """The competition's own files: `<Frequency>-train.csv` and `<Frequency>-test.csv`, here or in Train/ and Test/.

    Each row is an id and its values, padded with empty cells. Frequencies without both files are left out.
    """
    folder, series = Path(folder), []
    for frequency, horizon in M4_HORIZON.items():
        train, test = (_official_file(folder, frequency, part) for part in ("Train", "Test"))
        if train is None or test is None:
            continue
        futures = dict(_wide_rows(test))
        for name, history in _wide_rows(train):
            future = futures.get(name, np.empty(0))
            if len(history) < 2 or len(future) not in (0, horizon):
                raise UsageError(f"{train}: series {name!r} has {len(history)} values and {len(future)} test values")
            series.append(Series(name, frequency, M4_SEASON[frequency], horizon, history, future))
    if not series:
        raise UsageError(f"{folder}: holds no pair such as Hourly-train.csv and Hourly-test.csv")
    return series


def _official_file(folder: Path, frequency: str, part: str) -> Path | None:
    name = f"{frequency}-{part.lower()}.csv"
    return next((path for path in (folder / name, folder / part / name) if path.is_file()), None)


def _wide_rows(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    csv.field_size_limit(10**8)
    reader = csv.reader(line for _, line in lines(path))
    try:
        for number, row in enumerate(reader, 1):
            if number > 1 and row:
                values = [cell for cell in row[1:] if cell.strip() not in ("", "NA")]
                yield row[0].strip(), numbers(values, f"{path}, line {number}")
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def load_series(data_dir: str | Path | None = None) -> list[Series]:
    """Series of a folder with `m4_subset.csv.gz` or the official M4 files, of a file of that form, or the packaged."""
    if data_dir is None:
        from dts.fetch import ensure

        return read_m4_mini(ensure("m4-mini"))
    folder = Path(data_dir)
    if any(_official_file(folder, frequency, "Train") for frequency in M4_HORIZON):
        return read_m4_official(folder)
    return read_m4_csv(locate(data_dir, ["m4_subset.csv.gz", "m4_subset.csv"]))
