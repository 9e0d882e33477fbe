"""A language model given by a table: small enough that every sequence, V and pi* can be enumerated.

`TableModel` serves the searches exactly as a real model does, so what is proved on it is proved about them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dts.errors import UsageError, shown
from dts.lm import PROMPT_SLOT
from dts.models.prompts import token_ids
from dts.results import Usage
from dts.rewards import Prompt
from dts.settings import check_text

Logits = Callable[[tuple[int, ...]], np.ndarray]


def random_logits(vocab_size: int, seed: int, spread: float = 1.0) -> Logits:
    """Independent normal logits for every prefix, a function of the prefix and the seed alone."""

    def logits(prefix: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng([seed, len(prefix), *prefix]).normal(0.0, spread, vocab_size)

    return logits


@dataclass(frozen=True, slots=True)
class TableModel:
    """Next-token logits as a function of the ids so far (prompt included). Token `eos` ends a sequence; None: never."""

    table: Logits
    vocab_size: int
    eos: int | None = None
    name: str = "table"
    context_length: int | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset() if self.eos is None else frozenset([self.eos])

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        if chat_template_kwargs:
            raise UsageError(f"chat_template_kwargs={shown(chat_template_kwargs)}: a table model has no chat template")
        if isinstance(prompt, str):
            check_text("prompt", prompt)
            try:
                prompt = [int(part) for part in prompt.split()]
            except ValueError as error:
                raise UsageError(
                    f"prompt={shown(prompt)}: a table model takes token ids or a string of them"
                ) from error
        return token_ids(prompt, None)  # a table may answer any prefix

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids if token not in self.eos_ids)

    def batch_limit(self, prompt_tokens: int, max_new_tokens: int, max_kv_bytes: int | None) -> int:
        return sys.maxsize

    def open(
        self, prompt_ids: Sequence[int], *, batch_size: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> TableSession:
        return TableSession(self, tuple(prompt_ids))

    def sequences(self, horizon: int, prompt_ids: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
        """Every complete sequence of at most `horizon` tokens with log p."""

        def walk(done: tuple[int, ...], log_p: float) -> Iterator[tuple[tuple[int, ...], float]]:
            if len(done) == horizon or (done and done[-1] in self.eos_ids):
                yield done, log_p
                return
            step = torch.from_numpy(self.table(prompt_ids + done)).double().log_softmax(-1).tolist()
            yield from itertools.chain.from_iterable(walk((*done, a), log_p + step[a]) for a in range(self.vocab_size))

        return walk((), 0.0)


class TableSession:
    """The session of a `TableModel`: slots hold prefixes."""

    def __init__(self, model: TableModel, prompt_ids: tuple[int, ...]) -> None:
        self._model, self._prefixes = model, {PROMPT_SLOT: prompt_ids}
        count = len(prompt_ids)
        self.usage = Usage(prompt_tokens=count, forwarded_tokens=count, unique_tokens=count, model_calls=1)

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        slots = list(range(len(self._prefixes), len(self._prefixes) + len(parents)))
        for slot, parent, token in zip(slots, parents, tokens, strict=True):
            self._prefixes[slot] = (*self._prefixes[parent], token)
        self.usage.forwarded_tokens += len(slots)
        self.usage.model_calls += 1
        return slots

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._model.table(self._prefixes[slot]) for slot in slots]))
