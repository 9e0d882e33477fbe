"""Write a Python function: HumanEval, and easier problems of our own.

The reward sees what the prompt shows: whether the answer is a program, whether it runs, and the share of the shown
examples that it gets right, in the sandbox of `dts.training.coding`. Hidden tests score the outcome.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.data.programs import Program, load_programs
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.hidden_tests import VALUE, literal, passes
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose
from dts.rewards import Reward, as_reward
from dts.training.coding.sandbox import run
from dts.training.coding.task import Problem, extract, problems, public_share, solves

PARSES, RUNS = 0.1, 0.1  # of the reward; examples give the rest


@dataclass(frozen=True, slots=True)
class Question:
    """One function to write, of either set. All three take the text of an answer."""

    id: str
    prompt: list[dict[str, str]]
    examples: int  # that the prompt shows and a program can read
    visible: Callable[[str], float]  # the reward
    solved: Callable[[str], bool]  # the hidden tests: only for scoring


def humaneval_question(file: TaskFile, program: Program) -> Question:
    prompt = file.prompt.format(code=program.prompt.strip())
    messages = [{"role": "system", "content": file.system}] * bool(file.system) + [{"role": "user", "content": prompt}]
    return Question(
        program.id, messages, len(program.examples),
        lambda text: visible_share(program, text), lambda text: passes_tests(program, text),
    )  # fmt: skip


def own_question(file: TaskFile, problem: Problem) -> Question:
    def visible(text: str) -> float:
        code = extract(text, problem.name)
        if code is None or not _parses(code):
            return 0.0
        share = public_share(problem, text)
        runs = share > 0 or run(code, problem.name, [list(problem.public[0][0])]).answers[0].error is None
        return PARSES + RUNS * runs + (1 - PARSES - RUNS) * share

    return Question(problem.name, problem.prompt, len(problem.public), visible, lambda text: solves(problem, text))


def visible_share(program: Program, text: str) -> float:
    """In [0, 1]: a step for code that parses, one for code that runs, and the share of the shown examples passed."""
    code = _code(program, text)
    if code is None:
        return 0.0
    sources = ["0", *(source for source, _ in program.examples)]
    first, *answers = run(code + VALUE, "_value_of", [[s] for s in sources]).answers
    if first.error is not None:
        return PARSES
    right = sum(
        _same(answer.value, value) for answer, (_, value) in zip(answers, program.examples, strict=True)
        if answer.error is None
    )  # fmt: skip
    return PARSES + RUNS + (1 - PARSES - RUNS) * right / max(len(program.examples), 1)


def passes_tests(program: Program, text: str) -> bool:
    """Whether the answer passes the hidden tests."""
    code = _code(program, text)
    return code is not None and passes(program, code)


def _code(program: Program, text: str) -> str | None:
    """The answer's function after what the prompt has before it; None where it is no Python."""
    code = extract(text, program.function)
    whole = f"{program.before}\n{code}\n"
    return whole if code is not None and _parses(whole) else None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _same(shown: Any, expected: Any) -> bool:
    """Whether the text of a value is the value of an example; numbers within 1e-6."""
    try:
        return _equal(literal(shown), expected)
    except ValueError:
        return False


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, list | tuple) and type(value) is type(expected):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    if isinstance(value, float) or isinstance(expected, float):
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (value, expected))
        return numbers and math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    return type(value) is type(expected) and bool(value == expected)


def load_humaneval(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> ProgramTask:
    """The package's problems, or those of a file in the same form."""
    return ProgramTask(file, [humaneval_question(file, one) for one in load_programs(data_dir)], num_samples, seed)


def load_own(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> ProgramTask:
    """The problems of `dts.training.coding`."""
    if data_dir is not None:
        raise UsageError(f"--data-dir {data_dir}: dataset {file.name} brings its own problems; leave the option out")
    return ProgramTask(file, [own_question(file, one) for one in problems()], num_samples, seed)


class ProgramTask(Task):
    """Write one function."""

    def __init__(self, file: TaskFile, questions: Sequence[Question], num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        chosen = choose([0] * len(questions), num_samples, seed, file.name)
        self._questions = {questions[number].id: questions[number] for number in chosen}
        self.examples: Sequence[Example] = [Example(q.id, q.prompt, None) for q in self._questions.values()]
        self.clusters: Mapping[str, Hashable] = {example.id: example.id for example in self.examples}
        self.without_examples = [q.id for q in self._questions.values() if not q.examples]

    def reward(self, example: Example) -> Reward:
        """What the shown examples say of a finished answer."""
        visible = self._questions[example.id].visible

        def shown(texts: list[str]) -> list[float]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # each run is a process of its own; threads only wait
                return list(pool.map(visible, texts))

        return as_reward(shown, "visible examples", batched=True, partial=False)

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> None:
        """Programs have no mean."""

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per problem: whether the hidden tests pass, the reward, whether the answer is a program."""
        check_ids(texts, self._questions, self.name)
        return {name: self._row(self._questions[name], text) for name, text in texts.items()}

    def _row(self, question: Question, text: str) -> Row:
        visible = question.visible(text)
        return {
            "solved": float(visible > 0 and question.solved(text)),
            "visible": visible,
            "parse_failures": float(visible == 0),
        }

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Means."""
        return {name: float(np.mean([row[name] for row in rows])) for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """None: no program writes these programs."""
        return {}
