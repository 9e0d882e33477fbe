"""Lexical constraints: write a sentence that contains given words."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.measures import metrics
from dts.evaluation.rewards import Keywords
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML file."""

    items: list[dict[str, Any]]  # about: the subject of the sentence; words: those it must contain


def load(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> KeywordTask:
    """The prompts of the task file itself."""
    if data_dir is not None:
        raise UsageError(f"--data-dir {data_dir}: dataset {file.name} brings its own prompts; leave the option out")
    return KeywordTask(file, num_samples, seed)


class KeywordTask(Task):
    """Use every given word. There is no reference: the words are in the prompt."""

    def __init__(self, file: TaskFile, num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        self.note = file.note
        items = Options(**file.options).items
        chosen = choose([len(item["words"]) for item in items], num_samples, seed, file.name)
        self.examples: Sequence[Example] = [self._example(file, number, items[number]) for number in chosen]
        self._words: dict[str, tuple[str, ...]] = {example.id: example.inputs for example in self.examples}
        self.clusters: Mapping[str, Hashable] = {example.id: example.id for example in self.examples}

    def _example(self, file: TaskFile, number: int, item: Mapping[str, Any]) -> Example:
        user = file.prompt.format(about=item["about"], words=", ".join(item["words"]))
        messages = [{"role": "system", "content": file.system}, {"role": "user", "content": user}]
        return Example(f"keyword-{number}", messages, tuple(item["words"]))

    def reward(self, example: Example) -> Keywords:
        """Share of the words that occur, each earned once it is complete."""
        return Keywords(example.inputs)

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> None:
        """Sentences have no mean."""

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: the share of words that occur, whether all do, and the number of words written."""
        check_ids(texts, self._words, self.name)
        coverage = {name: Keywords(self._words[name]).score_text(text) for name, text in texts.items()}
        return {
            name: {
                "text": texts[name],
                "coverage": value,
                "all_words": float(value == 1),
                "length": len(texts[name].split()),
            }
            for name, value in coverage.items()
        }

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Coverage; share of texts with every word; distinct bigrams; share of texts with none of the words."""
        values = {
            "coverage": float(np.mean([row["coverage"] for row in rows])),
            "all_words": float(np.mean([row["all_words"] for row in rows])),
            "distinct_2": metrics.distinct_n([row["text"] for row in rows], 2),
            "length": float(np.mean([row["length"] for row in rows])),
            "parse_failures": float(np.mean([row["coverage"] == 0 for row in rows])),
        }
        return {name: values[name] for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """The bare list of words: full coverage, and no sentence. Coverage alone says nothing about the text."""
        return {"word list": self.details({name: ", ".join(words) for name, words in self._words.items()})}
