"""JSON that is valid under a schema: as a reward, or with the constraint that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dts.errors import UnavailableError, UsageError
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose
from dts.rewards import Reward, as_reward
from dts.yamlfile import parse_yaml

if TYPE_CHECKING:
    from dts.constraints import JsonSchema

PARSES, REQUIRED = 0.3, 0.3  # of the reward; validity gives the rest


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML file."""

    items: list[dict[str, Any]]  # ask: a sentence; schema; valid: an answer, shown with the question before it
    shots: int = 2  # answered questions of other schemas before each question


def load(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> SchemaTask:
    """The task file's own schemas, or those of a JSON file: a list of {ask, schema, valid}."""
    return SchemaTask(file, None if data_dir is None else _read(Path(data_dir)), num_samples, seed)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        items = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--data-dir {path}: cannot be read ({error}); give a JSON file of schemas") from error
    whole = isinstance(items, list) and all(isinstance(i, dict) and {"ask", "schema", "valid"} <= set(i) for i in items)
    if not whole or not items:
        raise UsageError(f"--data-dir {path}: expected a list of objects with ask, schema and valid")
    for number, item in enumerate(items):
        if problem := _fault(item["schema"]):
            raise UsageError(f"--data-dir {path}: schema {number} cannot be used ({problem}); correct it")
    return items


def _fault(schema: Any) -> str:
    """What is wrong with a schema; empty where nothing is."""
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict):
        return "it is no object"
    try:
        _validator().check_schema(schema)
    except SchemaError as error:
        return str(error.message)
    return ""


class SchemaTask(Task):
    """Answer with JSON. There is no reference: the schema is in the prompt."""

    def __init__(self, file: TaskFile, items: list[dict[str, Any]] | None, num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        options = Options(**file.options)
        items = options.items if items is None else items
        chosen = choose([0] * len(items), num_samples, seed, file.name)
        self.examples: Sequence[Example] = [
            Example(f"json-{number}", _messages(file, items, number, options.shots), items[number]["schema"])
            for number in chosen
        ]
        self._schemas = {example.id: example.inputs for example in self.examples}
        self.clusters: Mapping[str, Hashable] = {example.id: example.id for example in self.examples}

    def constraint(self, example: Example) -> JsonSchema:
        """What lets through only valid answers, in one line."""
        from dts.constraints import JsonSchema  # imports torch, which commands must not do before they set its threads

        return JsonSchema(example.inputs, whitespace=" ?")

    def reward(self, example: Example) -> Reward:
        """1 for a valid answer, less for JSON that is none."""
        return as_reward(lambda text: share_valid(example.inputs, text), "json")

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> None:
        """Objects have no mean."""

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: whether the answer is valid, the reward, whether it is no JSON."""
        check_ids(texts, self._schemas, self.name)
        shares = {name: share_valid(self._schemas[name], text) for name, text in texts.items()}
        return {
            name: {"valid": float(share == 1), "share": share, "parse_failures": float(share == 0)}
            for name, share in shares.items()
        }

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Means."""
        return {name: float(np.mean([row[name] for row in rows])) for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """None: a program could write a valid object, and validity says nothing about the question."""
        return {}


def _messages(file: TaskFile, items: Sequence[Mapping[str, Any]], number: int, shots: int) -> list[dict[str, str]]:
    """The question, after those that come before it with their answers."""
    turns = [{"role": "system", "content": file.system}] if file.system else []
    for back in range(min(shots, len(items) - 1), -1, -1):  # never the question itself, with its answer
        item = items[(number - back) % len(items)]
        question = file.prompt.format(ask=item["ask"], schema=json.dumps(item["schema"]))
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": json.dumps(item["valid"])},
        ]
    return turns[:-1]


def share_valid(schema: Mapping[str, Any], text: str) -> float:
    """In [0, 1]: a step for JSON, the share of required members that are there and valid, and 1 for a valid whole."""
    validator = _validator()(schema)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    if validator.is_valid(value):
        return 1.0
    names = schema.get("required", [])
    if not isinstance(value, dict) or not names:
        return PARSES
    members = schema.get("properties", {})
    # `evolve` keeps the whole schema at hand, for members that refer to its definitions
    right = sum(
        name in value and validator.evolve(schema=members.get(name, {})).is_valid(value[name]) for name in names
    )
    return PARSES + REQUIRED * right / len(names)


def _validator() -> Any:
    try:
        import jsonschema
    except ImportError as error:
        raise UnavailableError("this task needs jsonschema: pip install 'maxent-decoding[tasks]'") from error
    return jsonschema.Draft202012Validator
