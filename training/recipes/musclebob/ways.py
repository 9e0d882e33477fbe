"""Three ways to the same behaviour, side by side on the same unseen questions: prompting, search, training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dts
from dts.models.huggingface import HFModel
from dts.search import MaxEnt
from dts.training.recipes.musclebob.questions import Message, Question, examples, prompt
from dts.training.recipes.musclebob.reward import NameReward
from dts.training.recipes.musclebob.validation import Answer, Draw, Drawn, answers_to, sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """The tree search of the ways that search."""

    rollouts: int = 8
    reward_scale: float = 4.0


def with_examples(draw: Draw) -> Draw:
    """The same draws from prompts that begin with the few-shot examples."""

    def prompted(messages: list[Message], seed: int) -> Drawn:
        return draw(prompt(messages[-1]["content"], examples()), seed)

    return prompted


def searcher(lm: HFModel, settings: SearchSettings, *, max_new_tokens: int, temperature: float = 1.0) -> Draw:
    """One draw from the tree's estimate of p(x) exp(lambda r(x)) / Z, r the reward of the training."""
    method = MaxEnt(settings.rollouts, settings.reward_scale)

    def draw(messages: list[Message], seed: int) -> Drawn:
        result = dts.decode(
            lm,
            messages,
            reward=NameReward(),
            method=method,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        text = result.sample(1, seed)[0].text
        return Drawn(text, result.usage.forwarded_tokens)

    return draw


def compare_ways(
    trained: HFModel,
    base: HFModel,
    questions: Sequence[Question],
    *,
    search: SearchSettings = SearchSettings(),
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, list[Answer]]:
    """Answers to the same questions, by the name of the way."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    plain, searched = sampler(base, **options), searcher(base, search, **options)
    ways = {
        "base model": plain,
        "prompting": with_examples(plain),
        "search": searched,
        "prompting and search": with_examples(searched),
        "training": sampler(trained, **options),
    }
    answers: dict[str, list[Answer]] = {}
    for name, draw in ways.items():
        log.info("%s: %d questions", name, len(questions))
        answers[name] = answers_to(questions, draw, base, seed=seed)
    return answers
