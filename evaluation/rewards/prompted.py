"""One reward for many prompts, as a training run needs it: what to look for stands in the prompt."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from dts.errors import UsageError
from dts.evaluation.rewards.generic import Found, Keywords
from dts.evaluation.rewards.text import TextReward
from dts.rewards import Context, Prompt

_WORD = re.compile(r"[A-Za-z']+")
# Common English words that connect others. A list of nouns has none of them.
_CONNECTING = """
    a about above after all along among an and are around as at be before behind but by can could for from had has
    have he her his how i if in into is it its many my near no not of off on or our out over she so some that the
    their them then there these they this through to under until up was we were when where which while who will
    with would you your
"""
FUNCTION_WORDS = frozenset(_CONNECTING.split())
PROSE = 0.25  # share of function words from which a text counts as prose

Notes = tuple[Keywords, Found]


class PromptKeywords(TextReward):
    """`Keywords` of the words that stand after "the words:" in the last message of the prompt.

    Raises `UsageError` for a prompt without such a list.
    """

    name = "prompt_keywords"

    def empty(self) -> Any:
        return None  # `start` knows more

    def start(self, context: Context) -> Any:
        return dataclasses.replace(super().start(context), notes=(Keywords(asked_words(context.prompt)), Found()))

    def read(self, notes: Notes, piece: str) -> Notes:
        return notes[0], notes[0].read(notes[1], piece)

    def worth(self, notes: Notes) -> tuple[float, float]:
        return notes[0].worth(notes[1])

    def final(self, notes: Notes) -> float:
        return notes[0].final(notes[1])


prompt_keywords = PromptKeywords()  # for `grpo.reward: dts.evaluation.rewards.prompted:prompt_keywords`


def asked_words(prompt: Prompt) -> list[str]:
    """The words that a prompt (text or chat messages) asks for."""
    last: Any = prompt if isinstance(prompt, str) or not prompt else prompt[-1]
    text = last["content"] if isinstance(last, dict) else str(last)
    found = re.search(r"the words: ([^.\n]+)", text)
    if found is None:
        raise UsageError(f"prompt {text[:60]!r} asks for no words; write for example: Use the words: rain, window.")
    return [word.strip() for word in found[1].split(",")]


def prose(text: str) -> float:
    """1 for text that has a sentence's end and at least a quarter of function words, else 0: a bare list is none."""
    words = _WORD.findall(text.lower())
    connecting = sum(word in FUNCTION_WORDS for word in words)
    return float(bool(words) and connecting >= PROSE * len(words) and any(mark in text for mark in ".!?"))
