"""Human activity recognition: windows into prompts, a verifier fitted on the training split, the metrics."""

from __future__ import annotations

import functools
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.evaluation.data import Windows, load_windows
from dts.evaluation.measures import metrics
from dts.evaluation.measures.forecasting import weighted_vote
from dts.evaluation.rewards import LabelParser, LabelReward, shown
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose

STRENGTHS = ("still", "gentle", "brisk", "strong")  # by quartile of the training windows' movement


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML file."""

    answer: str
    format_weight: float
    shots: int
    pieces: int


def load(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> HarTask:
    """The task over the test windows of `data_dir`, or of the packaged set."""
    return HarTask(file, load_windows(data_dir), num_samples, seed)


class HarTask(Task):
    """Name the activity of a window. Test labels stay in `_references`, which only `score` reads."""

    def __init__(self, file: TaskFile, windows: Windows, num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        self.source, self.classes = windows.source, windows.classes
        self._options = Options(**file.options)
        self._parser = LabelParser(self.classes, self._options.answer)
        train = [row for row, part in enumerate(windows.split) if part == "train"]
        test = [row for row, part in enumerate(windows.split) if part == "test"]
        self._train = windows.signals[train]  # [n, samples, channels]
        self._train_labels = [windows.labels[row] for row in train]
        chosen = choose([windows.labels[row] for row in test], num_samples, seed, windows.source)
        self._rationales = [windows.rationales[row] for row in train] if windows.rationales else None
        self._describe = Describer(windows.channels, windows.hz, self._train, self._options.pieces)
        self._file, self._seed = file, seed
        self.examples: Sequence[Example] = [
            Example(
                f"test-{number}",
                self._prompt(str(number), windows.signals[test[number]]),
                windows.signals[test[number]],
            )
            for number in chosen
        ]
        self._references = {f"test-{number}": windows.labels[test[number]] for number in chosen}
        self.clusters: Mapping[str, Hashable] = {f"test-{number}": windows.subjects[test[number]] for number in chosen}

    def _prompt(self, key: str, window: np.ndarray, itself: int | None = None) -> list[dict[str, str]]:
        """Messages for a window. `itself` is its row among the training windows, which is then no worked example."""
        file, describe = self._file, self._describe
        labels = ", ".join(map(shown, self.classes))
        messages = [{"role": "system", "content": file.system.format(labels=labels)}]
        generator = random.Random(f"shots-{self._seed}-{key}")
        rows: dict[str, list[int]] = {label: [] for label in self.classes}
        for row, label in enumerate(self._train_labels):
            if row != itself:
                rows[label].append(row)
        known = [label for label in self.classes if rows[label]]
        for label in generator.sample(known, min(self._options.shots, len(known))):
            shot = self._train[generator.choice(rows[label])]
            user = file.prompt.format(details="", summary=describe.summary(shot))
            reply = file.reply.format(reason=describe.reason(shot), label=shown(label))
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        user = file.prompt.format(details=describe.details(window), summary=describe.summary(window))
        return [*messages, {"role": "user", "content": user}]

    def training_rows(self) -> Iterator[dict[str, Any]]:
        """Chat rows for fine-tuning, one per TRAINING window: the prompt of the task, and a reply.

        The reply is the source's own rationale where it has one, else a reason written from the window's statistics.
        """
        for row, (window, label) in enumerate(zip(self._train, self._train_labels, strict=True)):
            reply = self._file.reply.format(reason=self._describe.reason(window), label=shown(label))
            if self._rationales and self._rationales[row]:
                reply = self._rationales[row]
                if self.answer(reply) != label:
                    reply = f"{reply}\nAnswer: {shown(label)}"
            yield {"messages": [*self._prompt(f"train-{row}", window, row), {"role": "assistant", "content": reply}]}

    def answer(self, text: str) -> str | None:
        """The label that a completion commits to."""
        return self._parser.find(text)

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> str:
        """The label with the most weight, in the form of an answer."""
        label = weighted_vote([self.answer(text) for text in texts], weights)
        return "" if label is None else f"Answer: {shown(label)}"

    @functools.cached_property
    def verifier(self) -> Any:
        """A classifier on window features, fitted on the training split only."""
        from sklearn.ensemble import ExtraTreesClassifier, VotingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        # By cross-validation over training subjects, neither is best on every set; their mean is close to it on all.
        trees = ExtraTreesClassifier(n_estimators=200, min_samples_leaf=2, random_state=0, n_jobs=1)
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        both = VotingClassifier([("trees", trees), ("linear", linear)], voting="soft")
        return both.fit(features(self._train), self._train_labels)

    def probabilities(self, window: np.ndarray) -> dict[str, float]:
        """The verifier's probability of each label for one window [samples, channels]."""
        row = self.verifier.predict_proba(features(window[None]))[0]
        seen = dict(zip(self.verifier.classes_, row.tolist(), strict=True))
        return {label: seen.get(label, 0.0) for label in self.classes}

    def reward(self, example: Example) -> LabelReward:
        """Format and verifier, from the window alone."""
        return LabelReward(self._parser, self.probabilities(example.inputs), self._options.format_weight)

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: reference, answer (None where unparsed) and correct (1.0 or 0.0)."""
        check_ids(texts, self._references, self.name)
        return self._rows({name: self.answer(text) for name, text in texts.items()})

    def _rows(self, answers: Mapping[str, str | None]) -> dict[str, Row]:
        return {
            name: {
                "reference": self._references[name],
                "answer": answer,
                "correct": float(answer == self._references[name]),
            }
            for name, answer in answers.items()
        }

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of classification; a completion without an answer is wrong."""
        values = metrics.classification([row["reference"] for row in rows], [row["answer"] for row in rows])
        return {name: values[name] for name in self.metrics}

    def confusion(self, texts: Mapping[str, str]) -> tuple[list[str], np.ndarray]:
        """Names, and counts [names, names], rows true, columns answered; the last column is "(unparsed)"."""
        rows = self.details(texts).values()
        return metrics.confusion([r["reference"] for r in rows], [r["answer"] for r in rows], self.classes)

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """The training split's largest class, and the verifier's own choice."""
        counts = {label: self._train_labels.count(label) for label in self.classes}
        majority = max(self.classes, key=lambda label: counts[label])
        probabilities = {example.id: self.probabilities(example.inputs) for example in self.examples}
        return {
            "majority class": self._rows(dict.fromkeys(probabilities, majority)),
            "verifier alone": self._rows({name: max(p, key=lambda k: p[k]) for name, p in probabilities.items()}),
        }


class Describer:
    """A window in words and whole numbers, scaled by the training windows: a small model reads digits one by one."""

    def __init__(self, channels: Sequence[str], hz: float, train: np.ndarray, pieces: int) -> None:
        self._hz, self._pieces = hz, pieces
        self._rotation = [index for index, name in enumerate(channels) if name.startswith("gyro")]
        self._quartiles = np.quantile([movement(window) for window in train], [0.25, 0.5, 0.75])
        means = np.linalg.norm(train[:, :, :3].mean(axis=1), axis=1)  # [windows]
        self._unit = max(float(np.median(means)), 1e-9) / 100  # one per cent of gravity, whatever the source's unit

    def details(self, window: np.ndarray) -> str:
        """Line by line: spread, change and lean per axis, rotation, and the down-sampled size of the acceleration."""
        axes = window[:, :3] / self._unit
        centred, spread = axes - axes.mean(axis=0), axes.std(axis=0)
        lean = 10 * (centred**3).mean(axis=0) / np.maximum(spread, 0.1) ** 3
        lines = [
            f"spread {_row(spread)}",
            f"change {_row(np.abs(np.diff(axes, axis=0)).mean(axis=0))}",
            f"lean {_row(np.clip(lean, -99, 99))}",
        ]
        if self._rotation:
            turns = 100 * window[:, self._rotation]
            lines += [f"turn {_row(turns.mean(axis=0))}", f"turn spread {_row(turns.std(axis=0))}"]
        sizes = [piece.mean() for piece in np.array_split(_size(window) / self._unit, self._pieces)]
        return "\n".join([*lines, f"over time {_row(sizes)}", ""])

    def summary(self, window: np.ndarray) -> str:
        """Tilt, strength and rhythm in one line."""
        tilt = _row(window[:, :3].mean(axis=0) / self._unit)
        strength = f"{movement(window) / self._unit:.0f} {self._strength(window)}"
        return f"tilt {tilt}, movement {strength}, rhythm {self._rhythm(window)} Hz"

    def reason(self, window: np.ndarray) -> str:
        """A short reason, by template."""
        if self._strength(window) == "still":
            return f"the sensor stays still, with a tilt of {_row(window[:, :3].mean(axis=0) / self._unit)}."
        return f"the movement is {self._strength(window)}, with a rhythm of {self._rhythm(window)} Hz."

    def _strength(self, window: np.ndarray) -> str:
        return STRENGTHS[int(np.searchsorted(self._quartiles, movement(window)))]

    def _rhythm(self, window: np.ndarray) -> str:
        return f"{_peak_hz(_size(window), self._hz):.1f}"


def movement(window: np.ndarray) -> float:
    """Root-mean-square deviation of the acceleration [samples, 3+] from its mean, over all axes."""
    return float(np.sqrt(window[:, :3].var(axis=0).sum()))


def _size(window: np.ndarray) -> np.ndarray:
    return np.linalg.norm(window[:, :3], axis=1)


def _peak_hz(values: np.ndarray, hz: float) -> float:
    power = np.abs(np.fft.rfft(values - values.mean()))
    return float(np.fft.rfftfreq(len(values), 1 / hz)[int(power.argmax())])


def _row(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(str(round(float(value))) for value in values)


def features(windows: np.ndarray) -> np.ndarray:
    """Features [n, f] of windows [n, samples, channels]: level, spread, quantiles, change and spectrum per channel
    and for the size of the acceleration, and correlations between channels.
    """
    size = np.linalg.norm(windows[:, :, :3], axis=2, keepdims=True)
    signals = np.concatenate([windows, size], axis=2)
    centred = signals - signals.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(centred, axis=1)) ** 2
    bands = np.stack([band.sum(axis=1) for band in np.array_split(power[:, 1:], 6, axis=1)], axis=1)
    spread = signals.std(axis=1)
    scaled = centred / np.where(spread == 0, 1.0, spread)[:, None, :]
    pairs = np.triu_indices(windows.shape[2], k=1)
    correlations = (np.einsum("ntc,ntd->ncd", scaled, scaled) / signals.shape[1])[:, pairs[0], pairs[1]]
    parts = [
        signals.mean(axis=1),
        spread,
        *np.quantile(signals, [0.0, 0.25, 0.5, 0.75, 1.0], axis=1),
        np.abs(np.diff(signals, axis=1)).mean(axis=1),
        np.log1p(bands).reshape(len(signals), -1),
        power.argmax(axis=1),
        correlations,
    ]
    return np.concatenate(parts, axis=1)
