"""What a task is: prompts and a label-free reward on one side, references and metrics on the other.

The two sides meet only in `Task.score`. An `Example`, which is all a reward is built from, has no field for the
reference answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dts.rewards import Reward

Row = Mapping[str, Any]  # how one completion did: what the metrics are pooled from


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to decode."""

    id: str
    prompt: list[dict[str, str]]  # chat messages
    inputs: Any  # what the reward may look at: the window, the history; never the answer


class Task(Protocol):
    """A data set turned into prompts, with its reward and its metrics."""

    name: str
    max_tokens: int  # default completion length
    stop: tuple[str, ...]
    examples: Sequence[Example]
    metrics: Mapping[str, str]  # name -> "max" or "min", the better direction; the first is the headline
    clusters: Mapping[str, Hashable]  # example id -> what belongs together when resampling, such as the subject
    note: str = ""  # what a reader of its results must know

    def reward(self, example: Example) -> Reward:
        """The label-free reward of one example."""

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """How each completion did, by example id."""

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics over rows of `details`, unparseable ones counted as wrong. A row may occur several times, as it does
        in a bootstrap sample."""

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        """Metrics over completions by example id."""
        return self.pool(list(self.details(texts).values()))

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> str | None:
        """One answer text out of several weighted completions of an example; None where the task has no such answer.

        A forecast: the weighted median of each step. A label: the one with the most weight. Completions without an
        answer have no say; where none has one, the result is a text that scores as unparseable.
        """

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """Details of methods without a language model, on the same examples: the rows that keep us honest."""

    def baselines(self) -> dict[str, dict[str, float]]:
        """Their metrics."""
        return {method: self.pool(list(rows.values())) for method, rows in self.baseline_rows().items()}
