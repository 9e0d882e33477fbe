"""Human activity recognition: windows into prompts, a verifier fitted on the training split, the metrics."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.evaluation import metrics
from dts.evaluation.data import Windows, load_windows
from dts.evaluation.rewards import LabelParser, LabelReward, shown
from dts.evaluation.tasks.base import Example
from dts.evaluation.tasks.registry import TaskFile, check_ids, choose

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


class HarTask:
    """Name the activity of a window. Test labels stay in `_references`, which only `score` reads."""

    def __init__(self, file: TaskFile, windows: Windows, num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics, self.source, self.classes = dict(file.metrics), windows.source, windows.classes
        self._options = Options(**file.options)
        self._parser = LabelParser(self.classes, self._options.answer)
        train = [row for row, part in enumerate(windows.split) if part == "train"]
        test = [row for row, part in enumerate(windows.split) if part == "test"]
        self._train = windows.signals[train]  # [n, samples, channels]
        self._train_labels = [windows.labels[row] for row in train]
        chosen = choose([windows.labels[row] for row in test], num_samples, seed, windows.source)
        describe = Describer(windows.channels, windows.hz, self._train, self._options.pieces)
        prompt = functools.partial(self._prompt, file, describe, seed)
        self.examples: Sequence[Example] = [
            Example(f"test-{number}", prompt(number, window), window)
            for number, window in ((number, windows.signals[test[number]]) for number in chosen)
        ]
        self._references = {f"test-{number}": windows.labels[test[number]] for number in chosen}
        self.clusters = {f"test-{number}": windows.subjects[test[number]] for number in chosen}

    def _prompt(
        self, file: TaskFile, describe: Describer, seed: int, number: int, window: np.ndarray
    ) -> list[dict[str, str]]:
        labels = ", ".join(map(shown, self.classes))
        messages = [{"role": "system", "content": file.system.format(labels=labels)}]
        generator = random.Random(f"shots-{seed}-{number}")
        classes = generator.sample(self.classes, min(self._options.shots, len(self.classes)))
        for label in classes:
            row = generator.choice([row for row, name in enumerate(self._train_labels) if name == label])
            shot = self._train[row]
            user = file.prompt.format(details="", summary=describe.summary(shot))
            reply = file.reply.format(reason=describe.reason(shot), label=shown(label))
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        user = file.prompt.format(details=describe.details(window), summary=describe.summary(window))
        return [*messages, {"role": "user", "content": user}]

    def answer(self, text: str) -> str | None:
        """The label that a completion commits to."""
        return self._parser.find(text)

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

    def details(self, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per example: reference, answer (None where unparsed) and correct (1.0 or 0.0)."""
        check_ids(texts, self._references, self.name)
        answers = {name: self.answer(text) for name, text in texts.items()}
        return {
            name: {
                "reference": self._references[name],
                "answer": answer,
                "correct": float(answer == self._references[name]),
            }
            for name, answer in answers.items()
        }

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        """Metrics over completions by example id; one without an answer is wrong."""
        return self._score({name: row["answer"] for name, row in self.details(texts).items()})

    def _score(self, answers: Mapping[str, str | None]) -> dict[str, float]:
        values = metrics.classification([self._references[name] for name in answers], list(answers.values()))
        return {name: values[name] for name in self.metrics}

    def baselines(self) -> dict[str, dict[str, float]]:
        """The training split's largest class, and the verifier's own choice."""
        counts = {label: self._train_labels.count(label) for label in self.classes}
        majority = max(self.classes, key=lambda label: counts[label])
        probabilities = {example.id: self.probabilities(example.inputs) for example in self.examples}
        return {
            "majority class": self._score(dict.fromkeys(probabilities, majority)),
            "verifier alone": self._score({name: max(p, key=lambda k: p[k]) for name, p in probabilities.items()}),
        }


class Describer:
    """A window in words and numbers."""

    def __init__(self, channels: Sequence[str], hz: float, train: np.ndarray, pieces: int) -> None:
        self._channels, self._hz, self._pieces = channels, hz, pieces
        self._quartiles = np.quantile([movement(window) for window in train], [0.25, 0.5, 0.75])

    def details(self, window: np.ndarray) -> str:
        """Mean and spread per axis (rotation: spread) and the down-sampled size of the acceleration, line by line."""
        lines = []
        for first in range(0, len(self._channels), 3):
            axes = window[:, first : first + 3]
            spread = _row(axes.std(axis=0))
            if self._channels[first].startswith("gyro"):
                lines.append(f"rotation spread {spread}")  # the mean of a rotation says nothing
            else:
                lines.append(f"acceleration mean {_row(axes.mean(axis=0))} spread {spread}")
        sizes = [piece.mean() for piece in np.array_split(_size(window), self._pieces)]
        return "\n".join([*lines, f"over time {_row(sizes)}", ""])

    def summary(self, window: np.ndarray) -> str:
        """Tilt, strength and rhythm in one line."""
        tilt = _row(window[:, :3].mean(axis=0))
        return (
            f"tilt {tilt}, movement {movement(window):.2f} {self._strength(window)}, rhythm {self._rhythm(window)} Hz"
        )

    def reason(self, window: np.ndarray) -> str:
        """A short reason, by template."""
        if self._strength(window) == "still":
            return "the sensor stays still."
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
    return " ".join(f"{value:.1f}" for value in values)


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
