"""Forecasting: a series as numbers in, its next steps as numbers out."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.data import Series, load_series
from dts.evaluation.measures import metrics
from dts.evaluation.measures.forecasting import expect, weighted_median
from dts.evaluation.rewards import ForecastReward
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.digits import Digits, Scale
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Past:
    """What a reward may look at: the history, never the future."""

    history: np.ndarray  # float64 [n]
    season: int  # steps
    steps: int  # to forecast
    scale: Scale


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML file."""

    width: int
    low: int
    high: int
    history_points: int
    shot_points: int
    horizon_cap: int | None
    spaced: bool = False
    cuts: int = 8  # training rows per series
    validation: bool = False  # forecast the last training values and never see the test values: to choose settings


def load(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> ForecastTask:
    """Forecasts of the series in `data_dir`, or of the packaged ones."""
    return ForecastTask(file, load_series(data_dir), num_samples, seed)


class ForecastTask(Task):
    """Forecast a series. Futures stay in `_references`, which only scoring reads."""

    def __init__(self, file: TaskFile, series: Sequence[Series], num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        self._file, self._seed = file, seed
        self._options = options = Options(**file.options)
        self._digits = Digits(options.width, options.low, options.high, options.spaced)
        if options.validation:
            series = [self._held_back(one) for one in series]
        scored = [one for one in series if len(one.future)]
        if len(scored) < len(series):
            log.info("%d of %d series have no values to score against and are left out",
                     len(series) - len(scored), len(series))  # fmt: skip
        if not scored:
            raise UsageError(f"task {self.name!r}: no series in the data has values to score against")
        chosen = [scored[i] for i in choose([one.frequency for one in scored], num_samples, seed, self.name)]
        self._training = [(one.id, one.history, self._steps(one)) for one in series]
        self.examples: Sequence[Example] = [self._example(one) for one in chosen]
        self._pasts: dict[str, Past] = {example.id: example.inputs for example in self.examples}
        self._references = {one.id: one.future[: self._steps(one)] for one in chosen}
        self.clusters: Mapping[str, Hashable] = {one.id: one.id for one in chosen}
        self.groups = {one.id: one.frequency for one in chosen}

    def _steps(self, one: Series) -> int:
        return min(one.horizon, self._options.horizon_cap or one.horizon)

    def _held_back(self, one: Series) -> Series:
        """The series before its last steps, which are its future now; no future where two seasons would not be left."""
        steps = self._steps(one)
        if len(one.history) < steps + 2 * one.season + 2:
            return dataclasses.replace(one, future=one.history[:0])
        return dataclasses.replace(one, history=one.history[:-steps], future=one.history[-steps:])

    def _example(self, one: Series) -> Example:
        steps = self._steps(one)
        messages, scale = self._prompt(one.history, steps)
        return Example(one.id, messages, Past(one.history, one.season, steps, scale))

    def _prompt(self, history: np.ndarray, steps: int) -> tuple[list[dict[str, str]], Scale]:
        """Messages that ask for the `steps` after a history [n], and the scale its end was written with."""
        file, shot = self._file, self._options.shot_points
        shown = history[-self._options.history_points :]
        scale = self._digits.fit(shown)
        messages = [{"role": "system", "content": file.system.format(count=steps)}]
        if shot and len(history) >= shot + 2 * steps:
            past, after = history[-shot - steps : -steps], history[-steps:]
            user = file.prompt.format(numbers=scale.text(past), count=steps)
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": scale.text(after)}]
        user = file.prompt.format(numbers=scale.text(shown), count=steps)
        return [*messages, {"role": "user", "content": user}], scale

    def training_rows(self) -> Iterator[dict[str, Any]]:
        """Chat rows for fine-tuning: the prompt of the task, and the steps that really followed.

        Prompt and answer both lie within a series' TRAINING values: the series is cut at points drawn by the seed,
        at least `steps` before its end. No test value is read.
        """
        for name, history, steps in self._training:
            generator = random.Random(f"cuts-{self._seed}-{name}")
            last = len(history) - steps
            # A prompt shows as much as at test time, or half of a short series, and its worked example if it has one.
            shot = self._options.shot_points + 2 * steps if self._options.shot_points else 0
            first = max(2, min(self._options.history_points, len(history) // 2), shot)
            cuts = range(min(first, last), last + 1)
            for cut in sorted(generator.sample(cuts, min(self._options.cuts, len(cuts)))):
                messages, scale = self._prompt(history[:cut], steps)
                answer = scale.text(history[cut : cut + steps])
                yield {"messages": [*messages, {"role": "assistant", "content": answer}]}

    def reward(self, example: Example) -> ForecastReward:
        """Plausibility, from the history alone."""
        past: Past = example.inputs
        written = self._digits.low + (past.history - past.scale.bottom) / past.scale.unit
        return ForecastReward(self._digits.parser(past.steps), written, past.season)

    def answer(self, text: str, example_id: str) -> np.ndarray:
        """The forecast [steps] in the series' units; NaN for steps that the text does not give."""
        past = self._pasts[example_id]
        return np.asarray(past.scale.values(self._numbers(text, past.steps)))

    def _numbers(self, text: str, steps: int) -> np.ndarray:
        """[steps] numbers as written; NaN where there is none."""
        found = self._digits.parser(steps).find(text)
        return np.array([*found, *[np.nan] * (steps - len(found))], float)

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> str:
        """The weighted median of each step, written as an answer; it ends at the first step that no text gives."""
        past: Past = example.inputs
        if not texts:
            return ""
        middle = weighted_median(np.array([self._numbers(text, past.steps) for text in texts]), weights)
        missing = np.flatnonzero(np.isnan(middle))
        return past.scale.text(past.scale.values(middle[: missing[0] if len(missing) else None]))

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: forecast, smape, mase and those of Naive2, the number of missing steps, and whether it repeats
        the last season."""
        check_ids(texts, self._references, self.name)
        return {name: self._row(name, self.answer(text, name)) for name, text in texts.items()}

    def _row(self, name: str, forecast: np.ndarray) -> Row:
        past, actual = self._pasts[name], self._references[name]
        naive2 = metrics.naive2(past.history, past.steps, past.season)
        repeated = past.scale.written(metrics.seasonal_naive(past.history, past.steps, past.season))
        missing = int(np.isnan(forecast).sum())
        return {
            "answer": [None if np.isnan(value) else float(value) for value in forecast],
            "smape": metrics.smape(actual, forecast),
            "mase": metrics.mase(actual, forecast, past.history, past.season),
            "naive2_smape": metrics.smape(actual, naive2),
            "naive2_mase": metrics.mase(actual, naive2, past.history, past.season),
            "missing_steps": missing,
            "is_seasonal_naive": missing == 0 and bool((past.scale.written(forecast) == repeated).all()),
        }

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Errors averaged over series; OWA against Naive2 on the same ones; shares of missing and of repeated steps."""
        smape, mase, naive2_smape, naive2_mase = (
            float(np.mean([row[key] for row in rows])) for key in ("smape", "mase", "naive2_smape", "naive2_mase")
        )
        values = {
            "smape": smape,
            "mase": mase,
            "owa": metrics.owa(smape, mase, naive2_smape, naive2_mase),
            "parse_failures": float(np.mean([row["missing_steps"] == len(row["answer"]) for row in rows])),
            "missing_steps": sum(row["missing_steps"] for row in rows) / sum(len(row["answer"]) for row in rows),
            "seasonal_naive_share": float(np.mean([row["is_seasonal_naive"] for row in rows])),
        }
        return {name: values[name] for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """Naive, seasonal naive, Naive2, and the forecast at which the reward itself is centred."""
        forecasts = {
            "naive": lambda past: metrics.naive(past.history, past.steps),
            "seasonal naive": lambda past: metrics.seasonal_naive(past.history, past.steps, past.season),
            "naive2": lambda past: metrics.naive2(past.history, past.steps, past.season),
            "reward alone": lambda past: expect(past.history, past.season, past.steps).centre,
        }
        return {
            method: {name: self._row(name, forecast(past)) for name, past in self._pasts.items()}
            for method, forecast in forecasts.items()
        }
