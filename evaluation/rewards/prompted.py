"""One reward for many prompts, as a training run needs it: what to look for stands in the prompt."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from dts.errors import UsageError
from dts.evaluation.rewards.generic import Keywords
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
Notes = tuple[TextReward, Any]  # the reward of the prompt, and its own notes
PROSE = 0.25  # share of function words from which a text counts as prose


class Prompted(TextReward):
    """The reward that `of_prompt` makes of a prompt. It raises `UsageError` for a prompt that asks for nothing."""

    def __init__(self, name: str, of_prompt: Callable[[Prompt], TextReward]) -> None:
        self.name, self._of_prompt = name, of_prompt

    def empty(self) -> Any:
        return None  # `start` knows more

    def start(self, context: Context) -> Any:
        own = self._of_prompt(context.prompt)
        return dataclasses.replace(super().start(context), notes=(own, own.empty()))

    def read(self, notes: Notes, piece: str) -> Notes:
        return notes[0], notes[0].read(notes[1], piece)

    def worth(self, notes: Notes) -> tuple[float, float]:
        return notes[0].worth(notes[1])

    def likely(self, notes: Notes) -> float:
        return notes[0].likely(notes[1])

    def final(self, notes: Notes) -> float:
        return notes[0].final(notes[1])


def last_message(prompt: Prompt) -> str:
    """The text of a prompt's last chat message, or of a prompt that is text."""
    last: Any = prompt if isinstance(prompt, str) or not prompt else prompt[-1]
    return last["content"] if isinstance(last, dict) else str(last)


def asked_words(prompt: Prompt) -> list[str]:
    """The words that a prompt (text or chat messages) asks for."""
    text = last_message(prompt)
    found = re.search(r"the words: ([^.\n]+)", text)
    if found is None:
        raise UsageError(f"prompt {text[:60]!r} asks for no words; write for example: Use the words: rain, window.")
    return [word.strip() for word in found[1].split(",")]


# The share of the words after "the words:" in the last message of the prompt:
# `grpo.reward: dts.evaluation.rewards.prompted:prompt_keywords`.
prompt_keywords = Prompted("prompt_keywords", lambda prompt: Keywords(asked_words(prompt)))


def prose(text: str) -> float:
    """1 for text that has a sentence's end and at least a quarter of function words, else 0: a bare list is none."""
    words = _WORD.findall(text.lower())
    connecting = sum(word in FUNCTION_WORDS for word in words)
    return float(bool(words) and connecting >= PROSE * len(words) and any(mark in text for mark in ".!?"))
