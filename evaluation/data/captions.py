"""Series with captions: weather reports, and M4 captions in the form of OpenTSLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.data.files import locate, numbers, table
from dts.evaluation.data.series import M4_HORIZON, M4_SEASON, Series, load_series
from dts.yamlfile import lines, parse_json

WEATHER_CHANNELS = ("temperature_c", "humidity_pct", "pressure_mbar", "wind_kmh")


@dataclass(frozen=True, slots=True)
class Weather:
    """Some hours of weather readings and a caption."""

    id: str  # when it starts
    readings: dict[str, np.ndarray]  # by channel name, float64 [n], one length for all
    caption: str  # the reference; only scoring and training read it


def read_weather(path: str | Path) -> list[Weather]:
    """JSON lines (plain or gzip) with `start`, the four channels (lists of one length) and `caption` (sentences)."""
    path = Path(path)
    rows: list[Weather] = []
    seen: set[str] = set()
    for number, line in lines(path):
        if not line.strip():
            continue
        one = _weather(_json(line, f"{path}, line {number}"), f"{path}, line {number}")
        if one.id in seen:
            raise UsageError(f"{path}, line {number}: start {one.id!r} appears twice")
        seen.add(one.id)
        rows.append(one)
    if not rows:
        raise UsageError(f"{path}: has no rows")
    return rows


def _weather(row: Any, where: str) -> Weather:
    missing = [name for name in ("start", "caption", *WEATHER_CHANNELS) if not isinstance(row, dict) or name not in row]
    if missing:
        raise UsageError(f"{where}: lacks {', '.join(missing)}")
    readings = {name: _list(row[name], f"{where}, {name}") for name in WEATHER_CHANNELS}
    if len({len(values) for values in readings.values()}) > 1 or not len(readings["wind_kmh"]):
        raise UsageError(f"{where}: the channels have {[len(v) for v in readings.values()]} readings; expected as many")
    caption = " ".join(row["caption"]) if _are_texts(row["caption"]) else row["caption"]
    if not isinstance(caption, str):
        raise UsageError(f"{where}: caption is {str(caption)[:40]!r}; give text or a list of sentences")
    return Weather(str(row["start"]), readings, caption)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _json(line: str, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from error


def _list(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, list):
        raise UsageError(f"{where}: expected a list of numbers, got {str(value)[:40]!r}")
    return numbers([str(item) for item in value], where)


def load_weather(data_dir: str | Path | None) -> list[Weather]:
    """`weather_captions.jsonl.gz` of a folder, or a file of that form. No package ships this set."""
    if data_dir is None:
        raise UsageError(
            "dataset weather-caption needs --data-dir: a folder with weather_captions.jsonl.gz, or such a file"
        )
    return read_weather(locate(data_dir, ["weather_captions.jsonl.gz", "weather_captions.jsonl"]))


def read_m4_captions(folder: str | Path) -> tuple[list[Series], dict[str, str]]:
    """Captioned M4 series as OpenTSLM publishes them, and the captions by id.

    Files `m4_series_<Frequency>.csv` (columns id, series; a series is a JSON list) and `m4_captions_<Frequency>.csv`
    (id, caption). Only ids in both count. The series have no future.
    """
    folder, series, captions = Path(folder), [], {}
    for frequency in M4_HORIZON:
        paths = [folder / f"m4_{kind}_{frequency}.csv" for kind in ("series", "captions")]
        if not all(path.is_file() for path in paths):
            continue
        texts = {row["id"].strip(): row["caption"].strip() for _, row in table(paths[1], ("id", "caption"))}
        for where, row in table(paths[0], ("id", "series")):
            name = row["id"].strip()
            if name in texts:
                values = _list(_json(row["series"], where), where)
                if len(values) < 2:
                    raise UsageError(f"{where}: series {name!r} has {len(values)} values, needs 2 or more")
                one = Series(name, frequency, M4_SEASON[frequency], M4_HORIZON[frequency], values, np.empty(0))
                series.append(one)
                captions[name] = texts[name]
    if not series:
        raise UsageError(f"{folder}: holds no pair such as m4_series_Hourly.csv and m4_captions_Hourly.csv with ids")
    return series, captions


def load_captions(data_dir: str | Path | None) -> tuple[list[Series], dict[str, str]]:
    """Series with their captions by id. Sources without captions give none: `load_series`, futures cut off."""
    folder = Path(data_dir) if data_dir is not None else None
    if folder is not None and any((folder / f"m4_captions_{name}.csv").is_file() for name in M4_HORIZON):
        return read_m4_captions(folder)
    return [replace(one, future=np.empty(0)) for one in load_series(data_dir)], {}
