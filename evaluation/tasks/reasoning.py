"""Puzzles of the package `reasoning-gym`: a question, some solved ones before it, an answer in one line.

Where an answer can be checked against the question alone, the reward is our check of it, with parts for what is half
right. Where only the reference tells, the reward is whether the line has the form of an answer, and votes or likelihood
choose. The package scores the outcome.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UnavailableError, UsageError
from dts.evaluation.rewards import Format
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose
from dts.rewards import Reward, as_reward

SHOTS_FROM = 1_000_000  # between the seeds of questions and those of solved ones
TRIES = 20  # entries looked at for each question wanted
EVALUATED = frozenset((  # by reasoning-gym 0.1.25: its scorers run an answer as Python code, outside any sandbox
    "binary_matrix", "intermediate_integration", "n_queens", "polynomial_multiplication", "simple_integration",
    "spiral_matrix", "string_insertion",
))  # fmt: skip
Inputs = Mapping[str, Any]  # what the question says, without its solution


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML file."""

    dataset: str  # of reasoning-gym
    config: dict[str, Any]
    keys: list[str]  # of an entry's metadata: what the question says
    size: int = 200
    seed: int = 1
    shots: int = 3  # solved questions
    form: str = ".+"  # of an answer
    show: dict[str, str] = field(default_factory=dict)  # how lists and answers are written: old text -> new text


def _numbers(text: str) -> list[Fraction]:
    return [Fraction(word) for word in re.findall(r"-?\d+(?:\.\d+)?", text)]


def _overlap(given: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Shared elements over all elements of the larger, in [0, 1]."""
    return (Counter(given) & Counter(wanted)).total() / max(len(given), len(wanted), 1)


def _sorted(given: Sequence[Any], words: Sequence[Any], descending: bool) -> float:
    """A half for the elements, a half for neighbours in order."""
    pairs = [(b, a) if descending else (a, b) for a, b in pairwise(words)]
    order = sum(a <= b for a, b in pairs) / len(pairs) if pairs else 1.0
    return 0.5 * _overlap(words, given) * (1 + order)


def number_sorting(inputs: Inputs, answer: str) -> float:
    given = [Fraction(number) for number in inputs["original_numbers"]]
    return _sorted(given, _numbers(answer), inputs["direction"] == "descending")


def word_sorting(inputs: Inputs, answer: str) -> float:
    words = [word.strip() for word in answer.split(",")]
    return _sorted(inputs["transformed_words"], words, inputs["direction"] == "descending")


def palindrome_generation(inputs: Inputs, answer: str) -> float:
    """A half for the letters, a half for letters that agree with those of the other end."""
    same = sum(a == b for a, b in zip(answer, reversed(answer), strict=True)) / max(len(answer), 1)
    return 0.5 * _overlap(answer, inputs["letters"]) * (1 + same)


def prime_factorization(inputs: Inputs, answer: str) -> float:
    """A half for the product, a half for the share of primes."""
    if not re.fullmatch(r"\d{1,9}(\s*[×x*]\s*\d{1,9})*", answer):
        return 0.0
    factors = [int(word) for word in re.findall(r"\d+", answer)]
    primes = sum(factor > 1 and all(factor % d for d in range(2, int(factor**0.5) + 1)) for factor in factors)
    product = 1
    for factor in factors:
        product *= factor
    close = 1.0 if product == inputs["number"] else 0.5 * (product > 0 and inputs["number"] % product == 0)
    return 0.5 * close + 0.5 * primes / len(factors)


def fraction_simplification(inputs: Inputs, answer: str) -> float:
    """A half for the value, a half for lowest terms of that value."""
    match = re.fullmatch(r"(\d{1,9})\s*/\s*(\d{1,9})", answer)
    if match is None or not int(match[2]):
        return 0.0
    top, bottom = int(match[1]), int(match[2])
    if Fraction(top, bottom) != Fraction(inputs["numerator"], inputs["denominator"]):
        return 0.25 * (Fraction(top, bottom).denominator == bottom)
    return 1.0 if Fraction(top, bottom).denominator == bottom else 0.5


_OPERATORS: Mapping[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def _value(node: ast.AST) -> Fraction:
    """Of an expression with + - * / and signs on whole numbers. Raises `ValueError` for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    raise ValueError("no arithmetic expression")


def arithmetic(numbers: Sequence[int], target: int, answer: str) -> float:
    """A half for the numbers used, a half for the value."""
    used = 0.4 * _overlap([int(word) for word in re.findall(r"\d{1,9}", answer)], numbers)
    try:
        value = _value(ast.parse(answer.strip(), mode="eval").body)
        away = abs(float(value - target))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return 0.5 * used
    right = value == target
    return 1.0 if right and used == 0.4 else used + (0.4 if right else 0.2 / (1 + away))


def countdown(inputs: Inputs, answer: str) -> float:
    return arithmetic(inputs["numbers"], inputs["target"], answer)


def puzzle24(inputs: Inputs, answer: str) -> float:
    return arithmetic(inputs["numbers"], 24, answer)


def spell_backward(inputs: Inputs, answer: str) -> float:
    """Share of letters that stand where they belong, counted from the front."""
    wanted = inputs["word"][::-1]
    return sum(a == b for a, b in zip(answer, wanted, strict=False)) / max(len(answer), len(wanted))


VERIFIERS: Mapping[str, Callable[[Inputs, str], float]] = {
    check.__name__: check
    for check in (
        number_sorting, word_sorting, palindrome_generation, prime_factorization, fraction_simplification, countdown,
        puzzle24, spell_backward,
    )
}  # fmt: skip
"""By data set: how right an answer is, in [0, 1], from the question alone; 1 where it is right."""


def load(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> ReasoningTask:
    """Questions made by the package. Raises `UnavailableError` without it."""
    if data_dir is not None:
        raise UsageError(f"--data-dir {data_dir}: dataset {file.name} makes its own questions; leave the option out")
    return ReasoningTask(file, num_samples, seed)


class ReasoningTask(Task):
    """Answer in one line."""

    def __init__(self, file: TaskFile, num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        self._options = options = Options(**file.options)
        if options.dataset in EVALUATED:
            raise UsageError(
                f"options.dataset={options.dataset!r}: reasoning-gym would run its answers as Python code; take another"
            )
        self._form = re.compile(options.form)
        shots = _made(options, options.seed + SHOTS_FROM, options.shots, set())
        made = _made(options, options.seed, options.size, {str(entry["question"]) for entry in shots})
        chosen = choose([0] * len(made), num_samples, seed, file.name)
        head = [{"role": "system", "content": file.system}]
        for entry in shots:
            head += [{"role": "user", "content": _asked(file, entry, options)},
                     {"role": "assistant", "content": _shown(str(entry["answer"]), options)}]  # fmt: skip
        self.examples: Sequence[Example] = [
            Example(
                f"{file.name}-{number}",
                [*head, {"role": "user", "content": _asked(file, made[number], options)}],
                {key: made[number]["metadata"][key] for key in options.keys},
            )
            for number in chosen
        ]
        self._references = {example.id: made[number] for example, number in zip(self.examples, chosen, strict=True)}
        self._inputs = {example.id: example.inputs for example in self.examples}
        self.clusters: Mapping[str, Hashable] = {example.id: example.id for example in self.examples}

    def answer(self, text: str) -> str | None:
        """The first line; None where it has not the form of an answer."""
        line = text.strip().split("\n")[0].strip()
        return line if self._form.fullmatch(line) else None

    def reward(self, example: Example) -> Reward:
        """How right the answer is, as far as the question tells."""
        check = VERIFIERS.get(self._options.dataset)
        if check is None:
            return Format(rf"\A\s*(?:{self._options.form})\s*\Z", name="form")

        def verified(text: str) -> float:
            answer = self.answer(text)
            return 0.0 if answer is None else check(example.inputs, answer)

        return as_reward(verified, "verified")

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> str:
        """The answer with the most weight."""
        votes: dict[str, float] = {}
        for text, weight in zip(texts, weights, strict=True):
            if (answer := self.answer(text)) is not None:
                votes[answer] = votes.get(answer, 0.0) + weight
        return max(votes, key=lambda answer: votes[answer]) if votes else ""

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: the answer, whether it is right, whether there is one."""
        check_ids(texts, self._inputs, self.name)
        return {name: self._row(name, self.answer(text)) for name, text in texts.items()}

    def _row(self, name: str, answer: str | None) -> Row:
        right = answer is not None and self._right(name, answer)
        return {"answer": answer, "solved": float(right), "parse_failures": float(answer is None)}

    def _right(self, name: str, answer: str) -> bool:
        """By our check where there is one (the package's may evaluate answers as Python code), else by the package."""
        if (check := VERIFIERS.get(self._options.dataset)) is not None:
            return check(self._inputs[name], answer) == 1
        return bool(_package().get_score_answer_fn(self._options.dataset)(answer, self._references[name]) == 1)

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Means."""
        return {name: float(np.mean([row[name] for row in rows])) for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """The package's own answers: a program solves every question, without a language model."""
        if self._options.dataset not in VERIFIERS:
            return {}
        answers = {name: _shown(str(entry["answer"]), self._options) for name, entry in self._references.items()}
        return {"program": self.details(answers)}


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UnavailableError("this task needs reasoning-gym: pip install 'maxent-decoding[tasks]'") from error
    return reasoning_gym


def _made(options: Options, seed: int, size: int, known: set[str]) -> list[dict[str, Any]]:
    """Entries with different questions, none of them known. The package makes entry i with seed + i."""
    made = _package().create_dataset(options.dataset, seed=seed, size=TRIES * size, **options.config)
    entries: dict[str, dict[str, Any]] = {}
    for number in range(TRIES * size):
        entry = made[number]
        if entry["question"] not in known:
            entries.setdefault(entry["question"], entry)
        if len(entries) == size:
            return list(entries.values())
    raise UsageError(
        f"options.size={size}: {options.dataset} has only {len(entries)} different questions; ask for less"
    )


def _asked(file: TaskFile, entry: Mapping[str, Any], options: Options) -> str:
    given = {key: entry["metadata"][key] for key in options.keys}
    words = {
        key: _shown(", ".join(map(str, value)), options) if isinstance(value, list) else value
        for key, value in given.items()
    }
    return file.prompt.format(question=entry["question"], **words)


def _shown(answer: str, options: Options) -> str:
    for old, new in options.show.items():
        answer = answer.replace(old, new)
    return answer
