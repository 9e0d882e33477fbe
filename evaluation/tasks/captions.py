"""Captions: a series in words, judged by the series itself. M4 series, and hours of weather."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.data import Series, Weather, load_captions, load_weather
from dts.evaluation.measures import metrics
from dts.evaluation.rewards import ClaimReward
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.digits import Digits
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose

TEST_FROM = "2016"  # weather that starts in this year or later is the test split
WORKED = ({"temperature_c": [18, 17, 15, 14, 12, 11], "humidity_pct": [60, 62, 64, 66, 68, 70],
           "pressure_mbar": [1005, 1005, 1006, 1006, 1007, 1008], "wind_kmh": [32, 33, 35, 35, 34, 32]})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML files."""

    vocabulary: dict[str, dict[str, list[str]]]  # fact -> claim -> words
    subjects: dict[str, list[str]]  # fact -> words; facts without any are claimed anywhere
    points: int  # values of a series that are shown
    width: int = 3
    low: int = 250
    high: int = 750


@dataclass(frozen=True, slots=True)
class Item:
    """One series to describe."""

    example: Example  # its inputs are the true facts, computed from the shown values
    group: str
    reference: str  # "" where the source has none


def load_m4(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> CaptionTask:
    """Captions of the M4 series in `data_dir`, or of the packaged ones."""
    options = Options(**file.options)
    head = _m4_head(file, options)
    series, captions = load_captions(data_dir)
    chosen = [series[i] for i in choose([one.frequency for one in series], num_samples, seed, file.name)]
    items = [_m4_item(file, options, head, one, captions.get(one.id, "")) for one in chosen]

    def training() -> Iterator[tuple[Example, str]]:
        # The facts of a test item come from its last values; earlier windows of the same series are for training.
        for one in series:
            for end in range(len(one.history) - options.points, options.points - 1, -2 * options.points):
                earlier = Series(one.id, one.frequency, one.season, one.horizon, one.history[:end], one.future)
                example = _m4_item(file, options, head, earlier, "").example
                yield example, m4_caption(example.inputs)

    return CaptionTask(file, options, items, m4_caption, training)


def load_weather_task(
    file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int
) -> CaptionTask:
    """Captions of the weather in `data_dir`, from 2016 on; all of it where the file has nothing older."""
    options = Options(**file.options)
    rows = load_weather(data_dir)
    test = [row for row in rows if row.id >= TEST_FROM]
    if not test:
        raise UsageError(f"task {file.name!r}: no row starts in {TEST_FROM} or later, the test split")
    chosen = [test[i] for i in choose([row.id[:4] for row in test], num_samples, seed, file.name)]
    items = [_weather_item(file, options, row) for row in chosen]

    def training() -> Iterator[tuple[Example, str]]:
        for row in rows:
            if row.id < TEST_FROM:
                example = _weather_item(file, options, row).example
                yield example, weather_caption(example.inputs)

    return CaptionTask(file, options, items, weather_caption, training)


class CaptionTask(Task):
    """Describe a series. The facts come from the shown values; a reference caption is read by `score` alone."""

    def __init__(
        self,
        file: TaskFile,
        options: Options,
        items: Sequence[Item],
        template: Callable[[Mapping[str, str]], str],
        training: Callable[[], Iterator[tuple[Example, str]]],
    ) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self._options, self._template, self._training = options, template, training
        self.examples: Sequence[Example] = [item.example for item in items]
        self._references = {item.example.id: item.reference for item in items}
        self._facts: dict[str, dict[str, str]] = {example.id: example.inputs for example in self.examples}
        self.clusters: Mapping[str, Hashable] = {example.id: example.id for example in self.examples}
        self.groups = {item.example.id: item.group for item in items}
        referenced = all(self._references.values())
        self.metrics: Mapping[str, str] = {
            name: way for name, way in file.metrics.items() if name != "rouge_l" or referenced
        }

    def _claims(self, facts: Mapping[str, str]) -> ClaimReward:
        return ClaimReward(self._options.vocabulary, facts, self._options.subjects)

    def reward(self, example: Example) -> ClaimReward:
        """Share of facts that the text states rightly."""
        return self._claims(example.inputs)

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> None:
        """Captions have no mean."""

    def training_rows(self) -> Iterator[dict[str, Any]]:
        """Chat rows for fine-tuning: prompts of the training part, and captions by template from their own facts."""
        for example, caption in self._training():
            yield {"messages": [*example.prompt, {"role": "assistant", "content": caption}]}

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: facts claimed rightly and wrongly, the faithfulness, and ROUGE-L where there is a reference."""
        check_ids(texts, self._facts, self.name)
        rows: dict[str, Row] = {}
        for name, text in texts.items():
            claimed = self._claims(self._facts[name]).claimed(text)
            right, wrong = sorted(claimed.right), sorted(claimed.wrong)
            facts = len(self._facts[name])
            row: dict[str, Any] = {
                "text": text,
                "right": right,
                "wrong": wrong,
                "faithfulness": len(right) / facts,
                "claims": (len(right) + len(wrong)) / facts,
            }
            if "rouge_l" in self.metrics:
                row["rouge_l"] = metrics.rouge_l([text], [self._references[name]])
            rows[name] = row
        return rows

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Faithfulness; ROUGE-L; share of facts claimed at all; distinct bigrams; share of texts that claim nothing."""
        values = {
            "faithfulness": float(np.mean([row["faithfulness"] for row in rows])),
            "claims": float(np.mean([row["claims"] for row in rows])),
            "distinct_2": metrics.distinct_n([row["text"] for row in rows], 2),
            "parse_failures": float(np.mean([row["claims"] == 0 for row in rows])),
        }
        if "rouge_l" in self.metrics:
            values["rouge_l"] = float(np.mean([row["rouge_l"] for row in rows]))
        return {name: values[name] for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """A template filled from the same facts, fully faithful without a language model; the references, if any."""
        rows = {"template": self.details({name: self._template(truth) for name, truth in self._facts.items()})}
        if "rouge_l" in self.metrics:
            rows["references"] = self.details(self._references)
        return rows


# M4 --------------------------------------------------------------------------------------------------------------


def _m4_head(file: TaskFile, options: Options) -> list[dict[str, str]]:
    """The messages before the series: the task, and a falling line as a worked example."""
    worked = np.linspace(options.high, options.low, 12)
    return [
        {"role": "system", "content": file.system},
        {"role": "user", "content": file.prompt.format(numbers=_digits(options).fit(worked).text(worked))},
        {"role": "assistant", "content": m4_caption(facts(worked, 1))},
    ]


def _m4_item(file: TaskFile, options: Options, head: list[dict[str, str]], one: Series, reference: str) -> Item:
    shown = one.history[-options.points :]
    user = file.prompt.format(numbers=_digits(options).fit(shown).text(shown))
    example = Example(one.id, [*head, {"role": "user", "content": user}], facts(shown, one.season))
    return Item(example, one.frequency, reference)


def _digits(options: Options) -> Digits:
    return Digits(options.width, options.low, options.high)


def facts(values: np.ndarray, season: int) -> dict[str, str]:
    """Trend, volatility, range, peak, low, and for a period above 1 the season, of values [n]; see m4_caption.yaml."""
    from scipy.stats import rankdata

    span = float(np.ptp(values))
    # Spearman's correlation by its definition; scipy's own function also computes a p-value, which costs more.
    rank = float(np.corrcoef(np.arange(len(values)), rankdata(values))[0, 1]) if span else 0.0
    step = float(np.median(np.abs(np.diff(values)))) / span if span else 0.0
    found = {
        "trend": "rising" if rank > 0.3 else "falling" if rank < -0.3 else "stable",
        "volatility": "high" if step > 0.1 else "low",
    }
    if span:
        found["range"] = ("low", "middle", "high")[_third((float(np.median(values)) - float(values.min())) / span)]
        found["peak"] = ("early", "middle", "late")[_third(int(values.argmax()) / len(values))]
        found["trough"] = ("early", "middle", "late")[_third(int(values.argmin()) / len(values))]
    # The M4 test wants 3 seasons; 2 shown ones are enough to call a caption's claim right or wrong.
    if 1 < season <= len(values) // 2:
        correlation = float(np.corrcoef(values[season:], values[:-season])[0, 1]) if span else 0.0
        found["season"] = "yes" if correlation > 0.3 else "no"
    return found


def _third(share: float) -> int:
    return min(int(share * 3), 2)


def m4_caption(truth: Mapping[str, str]) -> str:
    """The facts in the words that the prompt's example uses."""
    volatility = "volatile" if truth["volatility"] == "high" else "smooth"
    season = {"yes": " and seasonal", "no": " and aseasonal"}.get(truth.get("season", ""), "")
    text = f"The series is {truth['trend']}, {volatility}{season}."
    if "peak" in truth:
        text += f" Most values are {truth['range']}, the peak is {truth['peak']}, the minimum is {truth['trough']}."
    return text


# Weather ---------------------------------------------------------------------------------------------------------


def _weather_item(file: TaskFile, options: Options, row: Weather) -> Item:
    shown = {name: _evenly(values, options.points) for name, values in row.readings.items()}
    worked = {name: np.array(values, float) for name, values in WORKED.items()}
    messages = [
        {"role": "system", "content": file.system},
        {"role": "user", "content": _weather_prompt(file, worked)},
        {"role": "assistant", "content": weather_caption(weather_facts(worked))},
        {"role": "user", "content": _weather_prompt(file, shown)},
    ]
    return Item(Example(row.id, messages, weather_facts(row.readings)), row.id[:4], row.caption)


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """`count` of the values, or all, first and last among them."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))]


def _weather_prompt(file: TaskFile, readings: Mapping[str, np.ndarray]) -> str:
    return file.prompt.format(**{name: " ".join(f"{value:.0f}" for value in row) for name, row in readings.items()})


def weather_facts(readings: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Temperature trend, and the bands of mean pressure, humidity and wind; see weather_caption.yaml."""
    temperature = readings["temperature_c"]
    quarter = max(len(temperature) // 4, 1)
    change = float(temperature[-quarter:].mean() - temperature[:quarter].mean())
    return {
        "temperature": "rising" if change >= 1 else "falling" if change <= -1 else "stable",
        "pressure": _band(readings["pressure_mbar"], (989.5, 1009.5, 1016.5, 1030.5),
                          ("very low", "low", "average", "high", "very high")),
        "humidity": _band(readings["humidity_pct"], (29.5, 50.5, 70.5, 90.5),
                          ("very dry", "dry", "average", "humid", "very humid")),
        "wind": _band(readings["wind_kmh"], (19.5, 29.5, 39.5), ("light", "gentle", "moderate", "fresh")),
    }  # fmt: skip


def _band(values: np.ndarray, edges: Sequence[float], names: Sequence[str]) -> str:
    return names[int(np.searchsorted(edges, float(values.mean())))]


def weather_caption(truth: Mapping[str, str]) -> str:
    """The facts in the words of the set's own captions."""
    trend = {"rising": "increasing", "falling": "decreasing", "stable": "steady"}[truth["temperature"]]
    air = "The humidity is average." if truth["humidity"] == "average" else f"The air is {truth['humidity']}."
    return (
        f"The temperature is {trend}. There is a {truth['wind']} breeze. "
        f"The atmospheric pressure is {truth['pressure']}. {air}"
    )
