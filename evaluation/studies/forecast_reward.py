"""Does the forecast reward rank better forecasts higher? `python -m dts.evaluation.forecast_check --data-dir FOLDER`.

For every series, a pool of forecasts of many kinds is written as a model would write it, and scored by the reward,
which sees the history alone, and by sMAPE, which sees the future. The figure is Spearman's correlation between the
reward and -sMAPE over the pool, averaged over series. The reward was designed on one half of the series (by a checksum
of the id); the other half was looked at once, afterwards.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import DTSError
from dts.evaluation.data.files import table
from dts.evaluation.measures import metrics
from dts.evaluation.report.summary import markdown
from dts.evaluation.tasks import load_task
from dts.evaluation.tasks.base import Example

FREQUENCIES = ("Hourly", "Weekly")
REFERENCES = "m4_reference_forecasts.csv.gz"


def candidates(past: Any, generator: np.random.Generator) -> list[np.ndarray]:
    """Forecasts [steps] of many kinds: what an untrained, a poor and a good forecaster may write."""
    history, steps, season = past.history, past.steps, past.season
    repeated = metrics.seasonal_naive(history, steps, season)
    deviation = float(history[-72:].std())
    mixed = [float(generator.random()) for _ in range(3)]
    earlier = [_earlier(history, steps, season, aligned, generator) for aligned in (True, True, True, False, False)]
    return [
        repeated,
        metrics.naive(history, steps),
        metrics.naive2(history, steps, season),
        np.repeat(history[-72:].mean(), steps),
        history[-1] + (history[-1] - history[0]) / (len(history) - 1) * np.arange(1, steps + 1),
        np.zeros(steps),
        np.roll(repeated, max(season // 4, 1)),
        repeated.mean() + 0.5 * (repeated - repeated.mean()),
        repeated.mean() + 2.0 * (repeated - repeated.mean()),
        repeated + deviation,
        repeated - 0.5 * deviation,
        *(repeated + size * deviation * generator.normal(size=steps) for size in (0.1, 0.1, 0.3, 0.3, 1.0, 1.0)),
        *(history[-1] + np.cumsum(generator.choice(np.diff(history[-200:]), steps)) for _ in range(3)),
        *earlier,
        *(share * repeated + (1 - share) * other for share, other in zip(mixed, earlier, strict=False)),
    ]


def _earlier(history: np.ndarray, steps: int, season: int, aligned: bool, generator: np.random.Generator) -> np.ndarray:
    """Values as they were some time ago, at the same phase of the season or at any."""
    if aligned and season > 1:
        lag = season * int(generator.integers(1, max(2, min(10, (len(history) - steps) // season))))
    else:
        lag = int(generator.integers(min(steps, len(history) - 1), min(len(history), 400)))
    return np.resize(history[-lag:], steps)


def correlation(task: Any, example: Example, forecasts: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of the reward and -sMAPE over forecasts [steps] of one example."""
    from scipy.stats import spearmanr

    reward = task.reward(example)
    texts = [example.inputs.scale.text(forecast) for forecast in forecasts]
    errors = [task.details({example.id: text})[example.id]["smape"] for text in texts]
    return float(spearmanr([reward.score_text(text) for text in texts], np.negative(errors)).statistic)


def half(name: str) -> str:
    """Which half a series belongs to."""
    return "check" if zlib.crc32(name.encode()) % 2 else "design"


def check(data_dir: Path, task_name: str) -> list[list[str]]:
    """Rows of the table: task, frequency, half, series, mean correlation."""
    task: Any = load_task(task_name, data_dir=data_dir)
    references = _references(data_dir / REFERENCES)
    found: dict[tuple[str, str], list[float]] = {}
    for example in task.examples:
        if task.groups[example.id] in FREQUENCIES:
            generator = np.random.default_rng(zlib.crc32(example.id.encode()))
            official = [forecast[: example.inputs.steps] for forecast in references.get(example.id, [])]
            value = correlation(task, example, [*candidates(example.inputs, generator), *official])
            found.setdefault((task.groups[example.id], half(example.id)), []).append(value)
    return [
        [task_name, frequency, part, str(len(values)), f"{np.nanmean(values):.3f}"]
        for (frequency, part), values in sorted(found.items())
    ]


def _references(path: Path) -> Mapping[str, list[np.ndarray]]:
    """The organisers' own forecasts by series, where the file is there."""
    found: dict[str, list[np.ndarray]] = {}
    if path.is_file():
        for _, row in table(path, ("id", "forecast")):
            found.setdefault(row["id"], []).append(np.array(row["forecast"].split(), float))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m dts.evaluation.forecast_check", description=main.__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with m4_subset.csv.gz")
    options = parser.parse_args(arguments)
    try:
        rows = [row for name in ("m4-full", "m4") for row in check(options.data_dir, name)]
    except DTSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(["task", "frequency", "half", "series", "rank correlation"], rows))
    return 0
