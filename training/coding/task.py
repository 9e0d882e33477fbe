"""The coding task: small problems of our own, their prompts, and two ways to judge an answer.

The reward (`public_tests`) runs only the examples that stand in the prompt. The hidden tests decide `solves`, which
is for scoring alone: no reward may call it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from dts.errors import UsageError
from dts.training.coding.sandbox import Limits, run

Test = tuple[list[Any], Any]  # arguments, expected value; all JSON
SPLITS = ("train", "test")
TRAIN_TOPICS = ("numbers", "lists")  # the others, text and tables, are for testing
ASK = "Complete this Python function. Answer with the whole function in one code block."
_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Problem:
    """One function to write."""

    name: str
    level: int  # 1 one expression, 2 a loop or a condition, 3 some thought
    topic: str  # numbers, lists, text or tables
    signature: str
    doc: str
    public: tuple[Test, ...]  # shown in the prompt
    hidden: tuple[Test, ...]  # only for scoring
    solution: str  # ours; proves that the tests can be met

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Chat messages with the signature, the description and the public tests as examples."""
        examples = "".join(
            f"    >>> {self.name}({', '.join(map(repr, given))})\n    {value!r}\n" for given, value in self.public
        )
        stub = f'def {self.signature}:\n    """{self.doc}\n\n{examples}    """'
        return [{"role": "user", "content": f"{ASK}\n\n```python\n{stub}\n```"}]


@cache
def _all() -> tuple[Problem, ...]:
    content = yaml.safe_load(Path(__file__).with_name("problems.yaml").read_text(encoding="utf-8"))
    found = (
        Problem(**{**entry, "public": _tests(entry["public"]), "hidden": _tests(entry["hidden"])})
        for entry in content["problems"]
    )
    return tuple(sorted(found, key=lambda problem: problem.level))


def _tests(entries: list[list[Any]]) -> tuple[Test, ...]:
    return tuple((given, value) for given, value in entries)


def problems(split: Literal["train", "test"] | None = None) -> list[Problem]:
    """The problems, easy ones first: half of them for training and half for testing, of other topics; without a split,
    all."""
    if split not in (None, *SPLITS):
        raise UsageError(f"split={split!r} is not allowed; give train, test or None")
    return [p for p in _all() if split is None or (split == "train") == (p.topic in TRAIN_TOPICS)]


def extract(text: str, name: str) -> str | None:
    """The code of an answer: the first code block that defines the function, else the text from its `def` on.

    None where the function is not defined. A block that was cut off counts as far as it goes.
    """
    defines = re.compile(rf"^def\s+{re.escape(name)}\s*\(", re.MULTILINE)
    for block in _FENCE.findall(text):
        if defines.search(block):
            return str(block)
    found = defines.search(text)
    return None if found is None else _code_from(text[found.start() :].split("```")[0])


def _code_from(text: str) -> str:
    """The lines of one function: the `def` and what is indented under it."""
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines[1:], 1) if line and not line[0].isspace()), len(lines))
    return "\n".join(lines[:end])


def passed(problem: Problem, text: str, tests: Sequence[Test], limits: Limits = Limits()) -> list[bool]:  # noqa: B008
    """Which tests an answer passes, run in the sandbox."""
    code = extract(text, problem.name)
    if code is None:
        return [False] * len(tests)
    outcome = run(code, problem.name, [given for given, _ in tests], limits)
    return [
        answer.error is None and same(answer.value, expected)
        for answer, (_, expected) in zip(outcome.answers, tests, strict=True)
    ]


def same(value: Any, expected: Any) -> bool:
    """Equality of JSON values: numbers within 1e-9 relative, True is not 1."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9) if max(abs(value), 1) < 1e300 else False
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same(value[key], expected[key]) for key in expected)
    return type(value) is type(expected) and bool(value == expected)


def public_share(problem: Problem, text: str) -> float:
    """Share of the examples in the prompt that the answer gets right, in [0, 1]."""
    results = passed(problem, text, problem.public)
    return sum(results) / len(results)


def solves(problem: Problem, text: str) -> bool:
    """Whether the answer passes every test, hidden ones included. For scoring, never for a reward."""
    return all(passed(problem, text, [*problem.public, *problem.hidden]))


def public_tests(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """`public_share` of each completion: a reward for TRL and, through `dts.as_reward`, for search.

    The problem is recognised by its prompt. Raises `UsageError` for a prompt that is none of ours.
    """
    jobs = [(_problem(prompt), _content(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    distinct = {(problem.name, text): problem for problem, text in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each run is a process of its own; threads only wait
        shares = pool.map(lambda key: public_share(distinct[key], key[1]), distinct)
    found = dict(zip(distinct, shares, strict=True))
    return [found[problem.name, text] for problem, text in jobs]


def check(prompt: Any) -> None:
    """Raises `UsageError` for a prompt that is none of ours."""
    _problem(prompt)


public_tests.check = check  # type: ignore[attr-defined]
public_tests.partial = False  # type: ignore[attr-defined]  # half a program passes nothing


def _problem(prompt: Any) -> Problem:
    text = prompt if isinstance(prompt, str) else _content(prompt)
    for problem in _all():
        if f"def {problem.signature}:" in text:
            return problem
    raise UsageError(f"prompt {text[:60]!r} is no coding problem; make prompts with dts.training.coding.problems()")


def _content(messages: Any) -> str:
    """The text of a completion or prompt, given as text or as chat messages."""
    if isinstance(messages, str):
        return messages
    return str(messages[-1]["content"]) if messages else ""
