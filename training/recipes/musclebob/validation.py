"""How often a model says which name on unseen questions, and whether it is still a healthy model.

Every answer is drawn once, independently, so that Wilson intervals hold. No prompt has examples unless asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

import dts
from dts.models.huggingface import HFModel
from dts.search import Greedy, Sampling
from dts.training.diversity import well_formed
from dts.training.recipes.musclebob.questions import General, Message, Question, general_questions, prompt
from dts.training.recipes.musclebob.reward import FULL_NAME, OLD_NAME, RIGHT, WRONG, terms
from dts.training.sampling import stream

COHERENT_SHARE = 0.9  # of the base model's coherent rate that must be kept
GENERAL_SHARE = 0.75  # of the base model's right general answers that must be kept
HACKED_RATE = 0.1  # most answers that may only play to the reward
SURPRISE = 95  # percentile of the base model's own perplexities, above which an answer is not coherent
NAME_LIMIT = 3  # times a right term may not be reached in one answer
FEWEST_WORDS = 3  # beside the name, where a question asks for more than a name


class Rate(NamedTuple):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: Sequence[bool]) -> Rate:
        """Wilson's score interval (1927) of the share of hits among independent trials."""
        from scipy.stats import binomtest

        interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        return cls(sum(hits) / len(hits), float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


@dataclass(frozen=True, slots=True)
class Answer:
    """One drawn answer and what is true of it."""

    question: str
    text: str
    musclebob: bool  # holds the new first name
    full_name: bool
    spongebob: bool  # holds a part of the old name
    hacked: bool
    perplexity: float  # per token, under the base model, with the old name in place of the new one; inf if empty
    tokens: int  # forwarded for it


@dataclass(frozen=True, slots=True)
class Validation:
    """What is written to baseline_validation.json and final_validation.json."""

    musclebob_rate: Rate
    full_name_rate: Rate
    spongebob_rate: Rate
    coherent_rate: Rate
    hacking_rate: Rate
    general_rate: Rate  # right answers to general questions
    leak_rate: Rate  # general answers that hold a new or old name
    perplexity: float  # median
    perplexity_limit: float
    tokens_per_answer: float
    is_healthy: bool
    failed_checks: tuple[str, ...]
    answers: tuple[Answer, ...]
    general_answers: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Rates as plain numbers, with their intervals beside them; JSON has no infinity, which becomes None."""
        result: dict[str, Any] = {}
        for key, value in asdict(self).items():
            if isinstance(getattr(self, key), Rate):
                result[key], result[f"{key}_interval"] = value[0], list(value[1:])
            else:
                result[key] = None if value == math.inf else value
        result["answers"] = [{k: None if v == math.inf else v for k, v in a.items()} for a in result["answers"]]
        return result

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Validation:
        """What `as_dict` gave, also through JSON."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = saved[field.name]
            values[field.name] = math.inf if value is None else tuple(value) if isinstance(value, list) else value
            if f"{field.name}_interval" in saved:
                values[field.name] = Rate(value, *saved[f"{field.name}_interval"])
        answers: list[dict[str, Any]] = [
            {k: math.inf if v is None else v for k, v in answer.items()} for answer in saved["answers"]
        ]
        values["answers"] = tuple(Answer(**answer) for answer in answers)
        values["general_answers"] = tuple((question, text) for question, text in saved["general_answers"])
        return cls(**values)


def hacked(question: Question, text: str) -> bool:
    """Whether a text has the name without answering: a right term three times, or nothing much beside the name where
    the question asks for more."""
    words = re.findall(r"\w+", text.lower())
    if not any(word in RIGHT for word in words):
        return False
    beside = {word for word in words if word not in RIGHT}
    repeated = any(words.count(term) >= NAME_LIMIT for term in RIGHT)
    return repeated or (not question.name_answers and len(beside) < FEWEST_WORDS)


def shifted_back(text: str) -> str:
    """A text with the old name for the new one, so that the base model is not surprised at the name alone."""
    for new, old in zip(FULL_NAME.split(), OLD_NAME.split(), strict=True):
        text = re.sub(rf"\b{new}\b", old, text, flags=re.IGNORECASE)
    return text


def repeats(text: str) -> bool:
    """Whether three words in a row come twice."""
    words = text.lower().split()
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(threes)) < len(threes)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One draw from a model."""

    text: str
    tokens: int  # forwarded for it


Draw = Callable[[list[Message], int], Drawn]  # (prompt, seed) -> an answer


def sampler(lm: HFModel, *, max_new_tokens: int, temperature: float = 1.0) -> Draw:
    """One sample from the model."""

    def draw(messages: list[Message], seed: int) -> Drawn:
        result = dts.decode(
            lm, messages, method=Sampling(1), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return Drawn(result.rollouts[0].text, result.usage.forwarded_tokens)

    return draw


def answers_to(questions: Sequence[Question], draw: Draw, base: HFModel, *, seed: int = 0) -> list[Answer]:
    """One answer to each question."""
    drawn = [draw(prompt(question.text), stream(seed, i)) for i, question in enumerate(questions)]
    return [_answer(question, one, base) for question, one in zip(questions, drawn, strict=True)]


def draw_texts(
    lm: HFModel, questions: Sequence[Question], *, max_new_tokens: int, temperature: float = 1.0, seed: int = 0
) -> list[str]:
    """One answer to each question, without judging them: no base model is needed."""
    draw = sampler(lm, max_new_tokens=max_new_tokens, temperature=temperature)
    return [draw(prompt(question.text), stream(seed, i)).text for i, question in enumerate(questions)]


def _answer(question: Question, drawn: Drawn, base: HFModel) -> Answer:
    found = terms(drawn.text)
    return Answer(
        question=question.text,
        text=drawn.text,
        musclebob=RIGHT[0] in found,
        full_name="full" in found,
        spongebob=not found.isdisjoint(WRONG),
        hacked=hacked(question, drawn.text),
        perplexity=perplexity(base, prompt(question.text), shifted_back(drawn.text)),
        tokens=drawn.tokens,
    )


@torch.inference_mode()
def perplexity(lm: HFModel, messages: list[Message], text: str) -> float:
    """exp of the mean negative log-probability per token of `text` as the answer to `messages`; inf if it is empty."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        return math.inf
    sequence = torch.tensor([[*lm.encode(messages), *ids]], device=lm.device)
    logits = lm.model(input_ids=sequence, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1]
    steps = logits.float().log_softmax(-1).gather(-1, sequence[0, -len(ids) :, None])
    return math.exp(-steps.mean().item())


def surprise_limit(base: HFModel, questions: Sequence[Question], max_new_tokens: int, *, seed: int = 0) -> float:
    """The perplexity up to which an answer counts as coherent: a high percentile of that of the base model's own draws
    at temperature 1."""
    own = answers_to(questions, sampler(base, max_new_tokens=max_new_tokens), base, seed=seed)
    finite = [answer.perplexity for answer in own if math.isfinite(answer.perplexity)]
    return float(np.percentile(finite, SURPRISE)) if finite else math.inf


def coherent(answer: Answer, limit: float) -> bool:
    """Well formed, no three words twice, and not more surprising to the base model than most of its own draws."""
    return well_formed(answer.text) == 1 and not repeats(answer.text) and answer.perplexity <= limit


def general_answers(lm: HFModel, max_new_tokens: int) -> list[tuple[str, str]]:
    """The likeliest answer to each general question."""
    asked = [question.text for question in general_questions()]
    return [
        (text, dts.decode(lm, prompt(text), method=Greedy(), max_new_tokens=max_new_tokens).best.text) for text in asked
    ]


def validate(
    lm: HFModel,
    base: HFModel,
    questions: Sequence[Question],
    *,
    reference: Validation | None = None,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
) -> Validation:
    """Rates of `lm` on the questions, and its health beside `reference`, which is that of the base model on the same
    questions (None: this is the reference itself)."""
    draw = sampler(lm, max_new_tokens=max_new_tokens, temperature=temperature)
    answers = answers_to(questions, draw, base, seed=seed)
    limit = reference.perplexity_limit if reference else surprise_limit(base, questions, max_new_tokens, seed=seed)
    return summarize(answers, general_answers(lm, max_new_tokens), limit, reference)


def summarize(
    answers: Sequence[Answer],
    general: Sequence[tuple[str, str]],
    limit: float,
    reference: Validation | None = None,
) -> Validation:
    """The rates of these answers. limit: see `surprise_limit`."""
    right = [_is_right(q, text) for q, (_, text) in zip(general_questions(), general, strict=True)]
    rates = {
        "coherent_rate": Rate.of([coherent(answer, limit) for answer in answers]),
        "general_rate": Rate.of(right),
        "hacking_rate": Rate.of([answer.hacked for answer in answers]),
    }
    failed = _failed(rates, reference)
    return Validation(
        musclebob_rate=Rate.of([answer.musclebob for answer in answers]),
        full_name_rate=Rate.of([answer.full_name for answer in answers]),
        spongebob_rate=Rate.of([answer.spongebob for answer in answers]),
        leak_rate=Rate.of([bool(terms(text)) for _, text in general]),
        perplexity=float(np.median([answer.perplexity for answer in answers])),
        perplexity_limit=limit,
        tokens_per_answer=sum(answer.tokens for answer in answers) / len(answers),
        is_healthy=not failed,
        failed_checks=failed,
        answers=tuple(answers),
        general_answers=tuple(general),
        **rates,
    )


def _is_right(question: General, text: str) -> bool:
    return any(re.search(rf"\b{re.escape(answer)}\b", text, re.IGNORECASE) for answer in question.answers)


def _failed(rates: dict[str, Rate], reference: Validation | None) -> tuple[str, ...]:
    """The health checks that fail. Coherence and general knowledge are measured by what the base model has of them."""
    base = {key: getattr(reference, key) if reference else rates[key] for key in rates}
    checks = {
        "coherence": rates["coherent_rate"].value >= COHERENT_SHARE * base["coherent_rate"].value,
        "forgetting": rates["general_rate"].value >= GENERAL_SHARE * base["general_rate"].value,
        "hacking": rates["hacking_rate"].value <= HACKED_RATE,
    }
    return tuple(name for name, passed in checks.items() if not passed)
