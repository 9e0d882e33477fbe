"""M4: forecasts as text, and captions judged by the series."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation import metrics
from dts.evaluation.data import Series, load_series
from dts.evaluation.rewards import ClaimReward, ForecastReward, NumberParser
from dts.evaluation.tasks.base import Example
from dts.evaluation.tasks.registry import TaskFile, check_ids, choose

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Digits:
    """How values are written: whole numbers of `width` digits, the history's range mapped to [low, high]."""

    width: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < 10**self.width:
            raise UsageError(f"digits need 0 <= low < high < {10**self.width}, got low={self.low}, high={self.high}")

    def fit(self, history: np.ndarray) -> Scale:
        """The map of one history; a constant history gets a range of 1 % of its level, so that it can be written."""
        bottom, top = float(history.min()), float(history.max())
        if bottom == top:
            margin = max(abs(top) * 0.005, 0.5)
            bottom, top = bottom - margin, top + margin
        return Scale(self, bottom, (top - bottom) / (self.high - self.low))


@dataclass(frozen=True, slots=True)
class Scale:
    """Values <-> written numbers."""

    digits: Digits
    bottom: float  # the value written as `digits.low`
    unit: float  # value per written unit

    def written(self, values: np.ndarray) -> np.ndarray:
        """[n] whole numbers within `width` digits, as floats."""
        raw = self.digits.low + (values - self.bottom) / self.unit
        return np.clip(np.rint(raw), 0, 10**self.digits.width - 1)

    def text(self, values: np.ndarray) -> str:
        return " ".join(f"{int(number):0{self.digits.width}d}" for number in self.written(values))

    def values(self, numbers: Sequence[int]) -> np.ndarray:
        return self.bottom + (np.asarray(numbers, float) - self.digits.low) * self.unit


@dataclass(frozen=True, slots=True)
class Past:
    """What a reward may look at: the history, never the future."""

    history: np.ndarray  # float64 [n]
    season: int  # steps
    steps: int  # to forecast
    scale: Scale


@dataclass(frozen=True, slots=True)
class ForecastOptions:
    """The `options` of m4.yaml."""

    width: int
    low: int
    high: int
    history_points: int
    shot_points: int
    horizon_cap: int | None


@dataclass(frozen=True, slots=True)
class CaptionOptions:
    """The `options` of m4_caption.yaml."""

    width: int
    low: int
    high: int
    history_points: int
    vocabulary: dict[str, dict[str, list[str]]]


def load_forecast(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> ForecastTask:
    """Forecasts of the series in `data_dir`, or of the packaged ones."""
    return ForecastTask(file, load_series(data_dir), num_samples, seed)


def load_caption(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> CaptionTask:
    """Captions of the series in `data_dir`, or of the packaged ones."""
    return CaptionTask(file, load_series(data_dir), num_samples, seed)


class ForecastTask:
    """Forecast a series. Futures stay in `_references`, which only scoring reads."""

    def __init__(self, file: TaskFile, series: Sequence[Series], num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics = dict(file.metrics)
        self._options = options = ForecastOptions(**file.options)
        self._digits = Digits(options.width, options.low, options.high)
        scored = [one for one in series if len(one.future)]
        if len(scored) < len(series):
            log.info("%d of %d series have no test values and are left out", len(series) - len(scored), len(series))
        if not scored:
            raise UsageError(f"task {self.name!r}: no series in the data has test values to score against")
        chosen = [scored[i] for i in choose([one.frequency for one in scored], num_samples, seed, self.name)]
        self.examples: Sequence[Example] = [self._example(file, one) for one in chosen]
        self._pasts: dict[str, Past] = {example.id: example.inputs for example in self.examples}
        self._references = {one.id: one.future[: self._steps(one)] for one in chosen}
        self.clusters = {one.id: one.id for one in chosen}
        self.groups = {one.id: one.frequency for one in chosen}

    def _steps(self, one: Series) -> int:
        return min(one.horizon, self._options.horizon_cap or one.horizon)

    def _example(self, file: TaskFile, one: Series) -> Example:
        steps, shot = self._steps(one), self._options.shot_points
        shown = one.history[-self._options.history_points :]
        scale = self._digits.fit(shown)
        messages = [{"role": "system", "content": file.system.format(count=steps)}]
        if shot and len(one.history) >= shot + 2 * steps:
            past, after = one.history[-shot - steps : -steps], one.history[-steps:]
            user = file.prompt.format(numbers=scale.text(past), count=steps)
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": scale.text(after)}]
        user = file.prompt.format(numbers=scale.text(shown), count=steps)
        messages.append({"role": "user", "content": user})
        return Example(one.id, messages, Past(one.history, one.season, steps, scale))

    def reward(self, example: Example) -> ForecastReward:
        """Plausibility, from the history alone, over the most recent values that the model was shown."""
        past: Past = example.inputs
        recent = past.history[-max(self._options.history_points, 3 * past.season) :]
        written = self._digits.low + (recent - past.scale.bottom) / past.scale.unit
        return ForecastReward(NumberParser(self._digits.width, past.steps), written, past.season)

    def answer(self, text: str, example_id: str) -> np.ndarray:
        """The forecast [steps] in the series' units; NaN for steps that the text does not give."""
        past = self._pasts[example_id]
        numbers = NumberParser(self._digits.width, past.steps).find(text)
        forecast = np.full(past.steps, np.nan)
        forecast[: len(numbers)] = past.scale.values(numbers)
        return forecast

    def details(self, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per example: forecast, smape, mase, the number of missing steps, and whether it repeats the last season."""
        check_ids(texts, self._references, self.name)
        return {name: self._row(name, self.answer(text, name)) for name, text in texts.items()}

    def _row(self, name: str, forecast: np.ndarray) -> dict[str, Any]:
        past, actual = self._pasts[name], self._references[name]
        repeated = past.scale.written(metrics.seasonal_naive(past.history, past.steps, past.season))
        missing = int(np.isnan(forecast).sum())
        return {
            "answer": [None if np.isnan(value) else float(value) for value in forecast],
            "smape": metrics.smape(actual, forecast),
            "mase": metrics.mase(actual, forecast, past.history, past.season),
            "missing_steps": missing,
            "is_seasonal_naive": missing == 0 and bool((past.scale.written(forecast) == repeated).all()),
        }

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        """Metrics over completions by example id: errors averaged over series, OWA against Naive2 on the same ones."""
        return self._score(self.details(texts))

    def _score(self, rows: Mapping[str, dict[str, Any]]) -> dict[str, float]:
        smape, mase = _means(rows)
        base_smape, base_mase = _means(self._baseline_rows("naive2", rows))
        steps = {name: self._pasts[name].steps for name in rows}
        values = {
            "smape": smape,
            "mase": mase,
            "owa": metrics.owa(smape, mase, base_smape, base_mase),
            "parse_failures": float(np.mean([row["missing_steps"] == steps[name] for name, row in rows.items()])),
            "missing_steps": sum(row["missing_steps"] for row in rows.values()) / sum(steps.values()),
        }
        return {name: values[name] for name in self.metrics}

    def _baseline_rows(self, method: str, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        forecasts = {
            "naive": lambda past: metrics.naive(past.history, past.steps),
            "seasonal naive": lambda past: metrics.seasonal_naive(past.history, past.steps, past.season),
            "naive2": lambda past: metrics.naive2(past.history, past.steps, past.season),
        }
        return {name: self._row(name, forecasts[method](self._pasts[name])) for name in names}

    def baselines(self) -> dict[str, dict[str, float]]:
        """Naive, seasonal naive and Naive2 on the same examples and steps."""
        methods = ("naive", "seasonal naive", "naive2")
        return {method: self._score(self._baseline_rows(method, self._pasts)) for method in methods}


def _means(rows: Mapping[str, dict[str, Any]]) -> tuple[float, float]:
    """Mean sMAPE and mean MASE over series."""
    return float(np.mean([row["smape"] for row in rows.values()])), float(
        np.mean([row["mase"] for row in rows.values()])
    )


class CaptionTask:
    """Describe a series in words. There is no reference: the facts come from the shown values."""

    def __init__(self, file: TaskFile, series: Sequence[Series], num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics = dict(file.metrics)
        self._options = options = CaptionOptions(**file.options)
        digits = Digits(options.width, options.low, options.high)
        chosen = [series[i] for i in choose([one.frequency for one in series], num_samples, seed, self.name)]
        self.examples: Sequence[Example] = [self._example(file, one, digits) for one in chosen]
        self._facts = {example.id: facts(example.inputs.history, example.inputs.season) for example in self.examples}
        self.clusters = {one.id: one.id for one in chosen}
        self.groups = {one.id: one.frequency for one in chosen}

    def _example(self, file: TaskFile, one: Series, digits: Digits) -> Example:
        shown = one.history[-self._options.history_points :]
        scale = digits.fit(shown)
        worked = np.linspace(shown.max(), shown.min(), 12)  # a falling line, whatever the series does
        messages = [
            {"role": "system", "content": file.system},
            {"role": "user", "content": file.prompt.format(numbers=scale.text(worked))},
            {"role": "assistant", "content": file.reply.format(caption=_caption(facts(worked, 1)))},
            {"role": "user", "content": file.prompt.format(numbers=scale.text(shown))},
        ]
        return Example(one.id, messages, Past(shown, one.season, 0, scale))

    def reward(self, example: Example) -> ClaimReward:
        """Share of facts that the text states rightly."""
        return ClaimReward(self._options.vocabulary, facts(example.inputs.history, example.inputs.season))

    def details(self, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per example: facts claimed rightly and wrongly, and the faithfulness."""
        check_ids(texts, self._facts, self.name)
        rows = {}
        for name, text in texts.items():
            claimed = ClaimReward(self._options.vocabulary, self._facts[name]).claimed(text)
            right, wrong = sorted(claimed.right), sorted(claimed.wrong)
            rows[name] = {"right": right, "wrong": wrong, "faithfulness": len(right) / len(self._facts[name])}
        return rows

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        """Faithfulness; share of facts claimed at all; distinct bigrams; share of texts that claim nothing."""
        rows = self.details(texts)
        claims = {name: len(row["right"]) + len(row["wrong"]) for name, row in rows.items()}
        values = {
            "faithfulness": float(np.mean([row["faithfulness"] for row in rows.values()])),
            "claims": float(np.mean([count / len(self._facts[name]) for name, count in claims.items()])),
            "distinct_2": metrics.distinct_n(list(texts.values()), 2),
            "parse_failures": float(np.mean([count == 0 for count in claims.values()])),
        }
        return {name: values[name] for name in self.metrics}

    def baselines(self) -> dict[str, dict[str, float]]:
        """A template filled from the same facts: fully faithful without any language model."""
        return {"template": self.score({name: _caption(truth) for name, truth in self._facts.items()})}


def facts(history: np.ndarray, season: int) -> dict[str, str]:
    """Trend, volatility and, for a period above 1, season of the values [n]; thresholds in m4_caption.yaml."""
    import scipy.stats

    span = float(np.ptp(history))
    rank = float(scipy.stats.spearmanr(np.arange(len(history)), history).statistic) if span else 0.0
    step = float(np.median(np.abs(np.diff(history)))) / span if span else 0.0
    found = {
        "trend": "rising" if rank > 0.3 else "falling" if rank < -0.3 else "stable",
        "volatility": "high" if step > 0.1 else "low",
    }
    # The M4 test wants 3 seasons; 2 shown ones are enough to call a caption's claim right or wrong.
    if 1 < season <= len(history) // 2:
        correlation = float(np.corrcoef(history[season:], history[:-season])[0, 1]) if span else 0.0
        found["season"] = "yes" if correlation > 0.3 else "no"
    return found


def _caption(truth: Mapping[str, str]) -> str:
    volatility = "volatile" if truth["volatility"] == "high" else "smooth"
    season = {"yes": " It is seasonal.", "no": " It is aseasonal."}.get(truth.get("season", ""), "")
    return f"The series is {truth['trend']} and {volatility}.{season}"
