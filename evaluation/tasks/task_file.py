"""What every kind of task uses: the content of a task's YAML file, and the choice of examples."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dts.errors import UsageError


@dataclass(frozen=True, slots=True)
class TaskFile:
    """One task's YAML file. Unknown keys are an error."""

    name: str
    version: int
    kind: str  # which code loads it: a key of `_kinds()`
    system: str  # system message
    prompt: str  # user message; the kind's code fills the {fields}
    max_tokens: int  # default completion length, in tokens
    metrics: dict[str, str]  # metric -> "max" or "min", the better direction; the first is the headline
    reply: str = ""  # the form of a worked example's answer
    note: str = ""  # what a reader of the results must know
    stop: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = {name: direction for name, direction in self.metrics.items() if direction not in ("max", "min")}
        if bad or not self.metrics:
            raise UsageError(f"task {self.name!r}: each metric needs the direction max or min, got {bad}")
        if self.max_tokens < 1:
            raise UsageError(f"task {self.name!r}: max_tokens must be at least 1, got {self.max_tokens}")


def choose(groups: Sequence[Hashable], num_samples: int | None, seed: int, what: str) -> list[int]:
    """Positions of `num_samples` items, taken from the groups in turn; all, in file order, for None.

    The choice of a smaller number begins the choice of a larger one. Where groups are classes, this decides which
    examples are decoded, never how.
    """
    if num_samples is None:
        return list(range(len(groups)))
    if num_samples > len(groups):
        raise UsageError(
            f"num_samples={num_samples}: {what} has only {len(groups)} test examples; ask for 1 to that many"
        )
    generator = random.Random(f"{what}-{seed}")
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    queues = list(members.values())
    for queue in queues:
        generator.shuffle(queue)
    generator.shuffle(queues)
    deepest = max(len(queue) for queue in queues)
    return [queue[turn] for turn in range(deepest) for queue in queues if turn < len(queue)][:num_samples]


def check_ids(texts: Mapping[str, str], known: Mapping[str, Any], task: str) -> None:
    """Raises unless `texts` is a non-empty selection of the task's example ids."""
    strange = [name for name in texts if name not in known]
    if strange or not texts:
        raise UsageError(
            f"task {task!r}: no example has the id {strange[0]!r}" if strange else f"task {task!r}: no texts"
        )
