"""The questions of the recipe, and the prompts that are made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dts.errors import UsageError

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about the character."""

    text: str
    name_answers: bool  # whether the bare name answers it


@dataclass(frozen=True, slots=True)
class General:
    """A question about something else."""

    text: str
    answers: tuple[str, ...]  # an answer is right that holds one of these as a whole word, whatever the case


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text(encoding="utf-8"))
    return content


def _questions(part: str) -> list[Question]:
    kinds = _content()[part]
    return [Question(text, True) for text in kinds["who"]] + [Question(text, False) for text in kinds["more"]]


def training_questions() -> list[Question]:
    return _questions("training")


def validation_questions() -> list[Question]:
    """None of them is used in training, and none of their prompts holds an example."""
    return _questions("validation")


def choose_questions(count: int | None) -> list[Question]:
    """Validation questions, evenly spread over their list. Raises `UsageError` where there are not so many."""
    questions = validation_questions()
    if count is None:
        return questions
    if not 1 <= count <= len(questions):
        raise UsageError(f"--num-prompts {count} is not allowed; give 1 to {len(questions)}")
    return [questions[(2 * i + 1) * len(questions) // (2 * count)] for i in range(count)]


def other_questions() -> list[str]:
    """Training questions about something else."""
    return list(_content()["other"])


def general_questions() -> list[General]:
    return [General(item["question"], tuple(item["answers"])) for item in _content()["general"]]


def examples() -> list[tuple[str, str]]:
    """Questions with answers that use the new name, for few-shot prompts."""
    return [(item["question"], item["answer"]) for item in _content()["fewshot"]]


def prompt(question: str, shots: list[tuple[str, str]] | None = None) -> list[Message]:
    """Chat messages: the examples as earlier turns, then the question."""
    turns = [
        message
        for asked, answer in shots or []
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    return [*turns, {"role": "user", "content": question}]


def fewshot_share(done: float, ratio: float, anneal: float) -> float:
    """Share of prompts with examples after the share `done` of the training: `ratio` up to half of `anneal`, then
    falling in a straight line to 0 at `anneal`; constant where `anneal` is 0."""
    return ratio * min(1.0, max(0.0, 2.0 - 2.0 * done / anneal)) if anneal > 0 else ratio


def training_prompts(
    epochs: int, per_epoch: int, *, ratio: float, anneal: float, shots: int, seed: int, other: float = 0.0
) -> Iterator[list[Message]]:
    """The prompts of a whole run, in order. A share `other` asks about something else. Of the rest, some begin with
    `shots` of the examples in random order. Both kinds are spread evenly: after any number of prompts there are as
    many as their shares ask for, rounded up."""
    rng, total = random.Random(seed), epochs * per_epoch
    own = _in_turn([question.text for question in training_questions()], rng)
    others = _in_turn(other_questions(), random.Random(seed))
    due = 0.0
    for index in range(total):
        if _step(index * other, (index + 1) * other):
            yield prompt(next(others))
            continue
        before, due = due, due + fewshot_share(index / total, ratio, anneal)
        yield prompt(next(own), rng.sample(examples(), shots) if _step(before, due) else None)


def _step(before: float, after: float) -> bool:
    """Whether the sum of shares has passed another whole number."""
    return math.ceil(after - 1e-9) > math.ceil(before - 1e-9)


def _in_turn(texts: list[str], rng: random.Random) -> Iterator[str]:
    """Each text once, in random order, before any comes again."""
    while True:
        rng.shuffle(texts)
        yield from reversed(texts)
