"""What every reader needs: rows of a table, checked numbers, and the file that a folder holds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.yamlfile import lines


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


def table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file (plain or gzip), each with "file, line n" for messages. Raises where a column is missing."""
    csv.field_size_limit(10**8)  # a series is one field
    reader = csv.DictReader(line for _, line in lines(path))
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(f"{path}, line 1: lacks the columns {', '.join(missing)}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or any(row[name] is None for name in columns):
                raise UsageError(f"{where}: expected one value per column")
            yield where, row
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def numbers(words: Sequence[str], where: str) -> np.ndarray:
    """Float64 [len(words)], all finite."""
    for position, word in enumerate(words):
        try:
            finite = math.isfinite(float(word)) and "_" not in word  # Python reads 1_0 as 10
        except ValueError:
            finite = False
        if not finite:
            raise UsageError(f"{where}: value {position + 1} is {word.strip()!r}, not a finite number")
    return np.array([float(word) for word in words], dtype=np.float64)


def positive(row: dict[str, Any], name: str, where: str) -> int:
    text = row[name].strip()
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise UsageError(f"{where}: {name} must be a whole number above 0, got {text!r}")
    return int(text)
