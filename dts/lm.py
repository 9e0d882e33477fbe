"""What a search needs from a language model, and nothing more.

A `LanguageModel` turns prompts into ids and opens a `Session` per prompt. A session is a key/value cache shaped
like the tree: slot 0 is the prompt, `extend` adds one more token after given slots, `logits` reads the next-token
logits of any slot that is still held.

A `Completer` is the other capability: whole tails from given prefixes, each drawn by the engine with a seed of its own.
It is what engines behind a server have. `dts.models.engines` makes sessions of it, whose rows may list only the
likeliest tokens and whose tails are stored until a search walks on them (`Stored`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from dts.results import Usage
from dts.rewards import Prompt

PROMPT_SLOT = 0


class Session(Protocol):
    """One prompt's prefixes inside the model."""

    usage: Usage  # counted at the model's forward calls

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Forward one token after each parent slot, all in one call. (parent, token) pairs are distinct."""

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        """Next-token logits after these slots, [len(slots), vocab]. Not to be written to."""


@runtime_checkable
class Stored(Protocol):
    """What a session has beside `Session` that got more from its engine than was asked for.

    Its logits are log-probabilities with one more column, [len(slots), vocab + 1]: the mass of all tokens that the row
    does not list, which are -inf. A search that draws this column asks for one of `others`.
    """

    def seed(self, seed: int) -> None:
        """Tails are drawn with this seed from now on."""

    def stored(self, slot: int, token: int) -> int | None:
        """The slot of a token after a slot, if it is there without another request."""

    def draft(self, slot: int) -> int | None:
        """A token after this slot that the engine has drawn from p, independently of all that a search knows; None
        where it has drawn none, or no more. Each is given once: a search may take it for one draw there."""

    def expect(self, paths: Mapping[tuple[int, int], int], *, to_end: bool) -> None:
        """How many paths wait, by slot and token, for what is asked for next. Each of them walks on a tail of its own;
        to_end: as far as the tail may go."""

    def others(self, slots: Sequence[int]) -> list[int]:
        """For each slot a draw from p among the tokens that its row does not list; the row lists it afterwards."""

    def fork(self) -> Any:
        """A session that continues from here with what is stored now, and counts in the same `usage`."""


class Batch(Protocol):
    """Sessions of many prompts whose paths go through the model together.

    A model that has a method `batch(*, prompts, width, max_new_tokens, max_kv_bytes) -> Batch | None` serves
    `decode_many` with it; other models open one session after another.
    """

    def admit(self, key: int, prompt_ids: Sequence[int]) -> bool:
        """Take a prompt in; False where it must wait for memory. Raises `UsageError` where it can never fit."""

    def advance(self, tokens: int) -> list[tuple[int, Session | Exception]]:
        """Send about so many tokens of admitted prompts through the model. Returns the keys of the prompts that are
        through, with their sessions or with what went wrong."""

    def extend(
        self, requests: Sequence[tuple[Session, Sequence[int], Sequence[int]]]
    ) -> Sequence[list[int] | Exception]:
        """`Session.extend` of several sessions, all in one call. In the place of slots stands what went wrong with a
        session alone."""

    def close(self, key: int) -> None:
        """Give up what a prompt holds. Its session still works: what it lacks is recomputed, and counted."""


class LanguageModel(Protocol):
    """A causal language model with its tokenizer."""

    @property
    def name(self) -> str:
        """For messages and tables."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a sequence."""

    @property
    def vocab_size(self) -> int:
        """Ids the model may produce."""

    @property
    def context_length(self) -> int | None:
        """Tokens, prompt and completion together; None for no limit."""

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """Prompt ids: text is tokenized, chat messages go through the chat template with these variables, ids pass
        through."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Completion ids to text, special tokens dropped."""

    def batch_limit(self, prompt_tokens: int, max_new_tokens: int, max_kv_bytes: int | None) -> int:
        """Paths that can be extended together in the memory there is, or within the bound; at least 1."""

    def open(
        self, prompt_ids: Sequence[int], *, batch_size: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> Session:
        """Prefill a prompt. At most `batch_size` paths are extended together, each by at most `max_new_tokens`.

        max_kv_bytes bounds the keys and values held; beyond it idle branches are given up, and recomputed (and
        counted) if a path comes back to them.
        """


# -- whole tails -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TailRequest:
    """A continuation that an engine is to draw from p."""

    prompt: tuple[int, ...]  # ids
    tokens: tuple[int, ...]  # ids after the prompt
    limit: int  # new tokens at most; EOS ends it before
    seed: int
    top: int  # tokens that each row lists
    barred: tuple[int, ...] = ()  # ids that must not be drawn; only with a limit of 1


@dataclass(frozen=True, slots=True)
class Tail:
    """What the engine drew, with the row that each token was drawn from."""

    tokens: tuple[int, ...]  # at least one; with the EOS token where one was drawn
    rows: tuple[Mapping[int, float], ...]  # log p by id, nats: the likeliest tokens and the one that was drawn
    computed: int  # token positions that entered the model, of the prefix and of the tail
    ended: bool = False  # whether the last token is one that the engine ends at; the tokenizer may know fewer of them


class Completer(Protocol):
    """An engine that completes."""

    @property
    def max_top(self) -> int:
        """Tokens that a row can list."""

    def complete(self, requests: Sequence[TailRequest]) -> Sequence[Tail | Exception]:
        """For each request, in their order, a tail, or why the engine refuses this request alone; they are drawn
        together. Raises `EngineError` where the engine is gone or refuses everybody."""
