"""Follow verifiable instructions: a subject, and some demands on the form of the text that a program can check."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.errors import UsageError
from dts.evaluation.measures import metrics
from dts.evaluation.rewards.instructions import Instructions
from dts.evaluation.tasks.base import Example, Row, Task
from dts.evaluation.tasks.task_file import TaskFile, check_ids, choose

Instruction = tuple[str, dict[str, Any]]  # the kind and its arguments
Draw = Callable[[random.Random, "Options"], tuple[dict[str, Any], str]]  # arguments, and the words of the prompt


@dataclass(frozen=True, slots=True)
class Options:
    """The `options` of the YAML file."""

    prompts: int
    seed: int
    at_once: int
    forms: list[str]
    subjects: list[str]
    words: list[str]  # to be used, repeated or begun with
    forbidden: list[str]


def _existence(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    words = rng.sample(options.words, 2)
    return {"keywords": words}, f"Use the words {words[0]} and {words[1]}."


def _forbidden(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    words = sorted(rng.sample(options.forbidden, 2))
    return {"forbidden_words": words}, f"Do not use the words {words[0]} and {words[1]}."


def _frequency(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    word, times = rng.choice(options.words), rng.choice([2, 3])
    arguments = {"keyword": word, "frequency": times, "relation": "at least"}
    return arguments, f"Use the word {word} at least {times} times."


def _letters(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    letter, times = rng.choice("bcfgkpvw"), rng.choice([8, 10, 12])
    arguments = {"letter": letter, "let_frequency": times, "let_relation": "at least"}
    return arguments, f"Use the letter {letter} at least {times} times."


def _longer(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    count = rng.choice([25, 30, 35])
    return {"num_words": count, "relation": "at least"}, f"Write at least {count} words."


def _shorter(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    count = rng.choice([15, 20, 25])
    return {"num_words": count, "relation": "less than"}, f"Write less than {count} words."


def _first_word(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    word = rng.choice(options.words)
    arguments = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": word}
    return arguments, f"Write two paragraphs with an empty line between them. The second begins with the word {word}."


def _bullets(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    count = rng.choice([2, 3, 4])
    return {"num_bullets": count}, f"Give exactly {count} bullet points, each in a line that begins with *."


def _sections(rng: random.Random, options: Options) -> tuple[dict[str, Any], str]:
    count = rng.choice([2, 3])
    arguments = {"section_spliter": "Section", "num_sections": count}
    return arguments, f"Give {count} sections that begin with Section 1, Section 2 and so on."


def _fixed(arguments: dict[str, Any], words: str) -> Draw:
    return lambda rng, options: (arguments, words)


GROUPS: Sequence[Mapping[str, Sequence[Draw]]] = (  # of a group, a prompt has one instruction: they exclude each other
    {"change_case:english_lowercase": [_fixed({}, "Write in lowercase letters only.")],
     "change_case:english_capital": [_fixed({}, "Write in capital letters only.")],
     "detectable_format:multiple_sections": [_sections],
     "detectable_format:constrained_response": [
         _fixed({}, "Say one of these: My answer is yes. My answer is no. My answer is maybe.")]},
    {"detectable_format:number_bullet_lists": [_bullets],
     "length_constraints:number_paragraphs": [
         _fixed({"num_paragraphs": 2}, "Write two paragraphs that are separated by ***.")],
     "length_constraints:nth_paragraph_first_word": [_first_word],
     "detectable_format:number_highlighted_sections": [
         _fixed({"num_highlights": 2}, "Highlight two parts, each *like this*.")],
     "detectable_content:number_placeholders": [
         _fixed({"num_placeholders": 2}, "Use two placeholders in square brackets, such as [name].")]},
    {"startend:quotation": [_fixed({}, "Put the whole text in double quotation marks.")],
     "startend:end_checker": [_fixed({"end_phrase": phrase}, f"End with the words: {phrase}") for phrase in
                              ("That is all.", "Is there anything else?", "Thank you for reading.")],
     "detectable_content:postscript": [
         _fixed({"postscript_marker": "P.S."}, "Add a postscript that begins with P.S.")],
     "detectable_format:title": [_fixed({}, "Begin with a title in double angular brackets, such as <<title>>.")]},
    {"keywords:existence": [_existence], "keywords:forbidden_words": [_forbidden], "keywords:frequency": [_frequency],
     "keywords:letter_frequency": [_letters]},
    {"punctuation:no_comma": [_fixed({}, "Use no commas.")],
     "length_constraints:number_words": [_longer, _shorter]},
)  # fmt: skip


def load(file: TaskFile, *, data_dir: str | Path | None, num_samples: int | None, seed: int) -> InstructionTask:
    """The prompts that the task file's options make."""
    if data_dir is not None:
        raise UsageError(f"--data-dir {data_dir}: dataset {file.name} brings its own prompts; leave the option out")
    return InstructionTask(file, num_samples, seed)


class InstructionTask(Task):
    """Share of the instructions followed. There is no reference: the instructions are in the prompt."""

    def __init__(self, file: TaskFile, num_samples: int | None, seed: int) -> None:
        self.name, self.version, self.max_tokens, self.stop = file.name, file.version, file.max_tokens, file.stop
        self.metrics: Mapping[str, str] = dict(file.metrics)
        self.note = file.note
        options = Options(**file.options)
        examples = [made(file, options, number) for number in range(options.prompts)]
        chosen = choose([example.inputs[0][0] for example in examples], num_samples, seed, file.name)
        self.examples: Sequence[Example] = [examples[number] for number in chosen]
        self._rewards = {example.id: self.reward(example) for example in self.examples}
        self.clusters: Mapping[str, Hashable] = {example.id: example.id for example in self.examples}

    def reward(self, example: Example) -> Instructions:
        """Share of the instructions that the text follows."""
        return Instructions(example.inputs)

    def combine(self, example: Example, texts: Sequence[str], weights: Sequence[float]) -> None:
        """Texts have no mean."""

    def details(self, texts: Mapping[str, str]) -> dict[str, Row]:
        """Per example: share of the instructions, whether all are met, words, and how many pairs of them differ."""
        check_ids(texts, self._rewards, self.name)
        return {name: self._row(name, text) for name, text in texts.items()}

    def _row(self, name: str, text: str) -> Row:
        share = self._rewards[name].score_text(text)
        return {
            "text": text,
            "followed": share,
            "all_followed": float(share == 1),
            "distinct_2": metrics.distinct_n([text], 2),
            "length": len(text.split()),
        }

    def pool(self, rows: Sequence[Row]) -> dict[str, float]:
        """Means."""
        return {name: float(np.mean([row[name] for row in rows])) for name in self.metrics}

    def baseline_rows(self) -> dict[str, dict[str, Row]]:
        """None: a program could meet the demands with any words, and the metrics say nothing about the subject."""
        return {}


def made(file: TaskFile, options: Options, number: int) -> Example:
    """One prompt. Its random numbers are its own, so that more prompts do not change the first ones."""
    rng = random.Random(f"{file.name}-{options.seed}-{number}")
    instructions: list[Instruction] = []
    words: list[str] = []
    for group in rng.sample(GROUPS, options.at_once):
        kind = rng.choice(list(group))
        arguments, sentence = rng.choice(group[kind])(rng, options)
        instructions.append((kind, arguments))
        words.append(sentence)
    user = file.prompt.format(
        form=rng.choice(options.forms), subject=rng.choice(options.subjects), instructions=" ".join(words)
    )
    messages = [{"role": "system", "content": file.system}, {"role": "user", "content": user}]
    return Example(f"instructions-{number}", messages, instructions)
