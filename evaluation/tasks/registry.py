"""Finds a task by name and reads its YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

from dts.errors import DTSError, UsageError
from dts.evaluation.tasks.base import Task
from dts.evaluation.tasks.kinds import KINDS
from dts.evaluation.tasks.task_file import TaskFile
from dts.yamlfile import decode_text, parse_yaml

TASKS: Mapping[str, str] = {
    "har": "human activity: one reason, then the activity that a motion sensor recorded",
    "har-zero": "the same without worked examples in the prompt, for a fine-tuned model",
    "m4": "M4 forecasting: the next steps of a series, numbers in, numbers out (horizon capped at 8)",
    "m4-full": "M4 forecasting over the official horizon of each series",
    "m4-caption": "M4 captions: trend, volatility, season, range and extremes of a series in words",
    "weather-caption": "weather captions: temperature, wind, pressure and humidity in words (needs --data-dir)",
    "keyword": "lexical constraints: sentences that contain given words",
    "instructions": "texts that follow three verifiable instructions each",
    "humaneval": "HumanEval: Python functions, judged by the examples in their docstrings, scored by hidden tests",
    "coding": "smaller Python functions of our own",
    "json": "answers in JSON that are valid under the schema in the prompt",
    "reasoning-countdown": "reasoning-gym: a value from given numbers, checked without a reference",
    "reasoning-primes": "reasoning-gym: prime factors, checked without a reference",
    "reasoning-sorting": "reasoning-gym: numbers in order, checked without a reference",
    "reasoning-gcd": "reasoning-gym: greatest common divisors; the reward is the form of an answer",
    "reasoning-arithmetic": "reasoning-gym: sums and products; the reward is the form of an answer",
}
FILES = (".yaml", ".yml")  # how a task file of one's own ends
ALIASES: Mapping[str, str] = {"m4-forecast": "m4"}


def load_task(name: str, *, data_dir: str | Path | None = None, num_samples: int | None = None, seed: int = 0) -> Task:
    """A task with `num_samples` examples of its test split; all of them for None.

    `name` is a listed one, in any case, or the path of a task file that ends in .yaml. `data_dir` is a folder (or a
    file) in the documented formats; without it the packaged data are used.
    """
    if num_samples is not None and num_samples < 1:
        raise UsageError(f"num_samples must be at least 1, got {num_samples}")
    file = read_task_file(name)
    load = KINDS[file.kind]
    try:
        return load(file, data_dir=data_dir, num_samples=num_samples, seed=seed)
    except DTSError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
        if not name.endswith(FILES):
            raise  # our own file: a mistake of ours
        raise UsageError(
            f"task file {name}: its options or its prompt do not fit kind {file.kind!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def canonical(name: str) -> str:
    """The listed name of a task, for any case, underscores and aliases."""
    plain = name.strip().lower().replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain not in TASKS:
        near = difflib.get_close_matches(plain, [*TASKS, *ALIASES], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown dataset {name!r}: {hint}choose from {', '.join(TASKS)}")
    return plain


def read_task_file(name: str) -> TaskFile:
    """The YAML file of a listed task, or the file that `name` is the path of."""
    if name.endswith(FILES):
        path: Any = Path(name)
    else:
        path = resources.files("dts.evaluation.tasks") / f"{canonical(name).replace('-', '_')}.yaml"
    try:
        data = parse_yaml(decode_text(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"task file {path}: cannot be read ({' '.join(str(error).split())})") from error
    return _task_file(data, path)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


_TEXT = (lambda value: isinstance(value, str), "text")
_NUMBER = (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number")
_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(["name", "kind", "system", "prompt", "reply", "note"], _TEXT),
    **dict.fromkeys(["version", "max_tokens"], _NUMBER),
    "metrics": (lambda value: isinstance(value, dict) and _are_texts([*value]), "a direction for each metric"),
    "stop": (_are_texts, "a list of texts"),
    "options": (lambda value: isinstance(value, dict), "keys and values"),
}


def _task_file(data: Any, path: Any) -> TaskFile:
    if not isinstance(data, dict):
        raise UsageError(f"task file {path}: expected keys and values, got {type(data).__name__}")
    known, data = {f.name for f in fields(TaskFile)}, {str(key): value for key, value in data.items()}
    missing = [f.name for f in fields(TaskFile) if f.default is MISSING and f.default_factory is MISSING]
    unknown, missing = sorted(set(data) - known), [name for name in missing if name not in data]
    if unknown or missing:
        raise UsageError(f"task file {path}: unknown keys {unknown}, missing keys {missing}; known are {sorted(known)}")
    for name, (allowed, wanted) in _VALUES.items():
        if name in data and not allowed(data[name]):
            raise UsageError(f"task file {path}: {name} is {str(data[name])[:60]!r}; give {wanted}")
    if data["kind"] not in KINDS:
        raise UsageError(f"task file {path}: kind {data['kind']!r} is none of {', '.join(KINDS)}")
    return TaskFile(**{**data, "stop": tuple(data.get("stop", ()))})
