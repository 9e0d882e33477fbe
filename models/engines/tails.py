"""A language model whose engine draws whole tails (`dts.lm.Completer`).

One request costs an engine little more for a tail of many tokens than for one token. So a session asks for a tail where
a search asks for a token, and stores it: the tokens with the rows that they were drawn from. The search walks on what
is stored without another request. It takes the engine's token as a draft and keeps or replaces it such that its draws
have exactly the distribution that it wants (`dts.search.readings`); where a draft is replaced, or a tail ends, the next
request starts.

Rows list the likeliest tokens only, with the mass of all others in one more column. Where a search draws this column,
a request of one token, in which the listed ones are barred, names the token.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from dts.errors import ModelError, UnavailableError, raised
from dts.lm import PROMPT_SLOT, Completer, Session, Tail, TailRequest
from dts.results import Usage
from dts.rewards import Prompt
from dts.settings import LARGEST

log = logging.getLogger(__name__)

UNLISTED = 1e-6  # mass below which a row is taken to list everything; log-probabilities of float32 are no better
TOO_MUCH = 1e-2  # above 1, of a row's sum: it is no distribution


class Texts(Protocol):
    """What an engine's tokenizer knows."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a sequence."""

    @property
    def vocab_size(self) -> int:
        """Ids that the model may produce."""

    @property
    def context_length(self) -> int | None:
        """Tokens, prompt and completion together; None for no limit."""

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """Prompt ids."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Completion ids to text."""


class EngineModel:
    """A `dts.lm.LanguageModel` over an engine. Searches that draw from p run on it; `dts.decoding.check_engine` refuses
    the others."""

    completes_only = True

    def __init__(self, engine: Completer, texts: Texts, name: str, *, top: int, segment: int | None = None) -> None:
        """top: tokens that a row lists. segment: tokens of a tail at most; None: as many as searches walk on
        (`_Length`)."""
        self.engine, self.texts, self.name = engine, texts, name
        self.top, self.segment = min(top, engine.max_top, texts.vocab_size), segment
        self.tokenizer = getattr(texts, "tokenizer", None)
        self._ends: set[int] = set()  # see `_tell_of_end`

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.texts.eos_ids

    @property
    def vocab_size(self) -> int:
        return self.texts.vocab_size

    @property
    def context_length(self) -> int | None:
        return self.texts.context_length

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        return self.texts.encode(prompt, chat_template_kwargs)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.texts.decode(token_ids)

    def batch_limit(self, prompt_tokens: int, max_new_tokens: int, max_kv_bytes: int | None) -> int:
        """The engine has a queue of its own."""
        return 2**20

    def open(
        self, prompt_ids: Sequence[int], *, batch_size: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> TailSession:
        return raised(self.open_all([prompt_ids], max_new_tokens)[0])

    def open_all(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[TailSession | Exception]:
        """Sessions of several prompts, which go through the model together, or what went wrong with one alone."""
        requests = [TailRequest(tuple(ids), (), 1, 0, self.top) for ids in prompts]
        return [
            tail if isinstance(tail, Exception) else TailSession(self, request.prompt, tail, max_new_tokens)
            for request, tail in zip(requests, self.each(requests), strict=True)
        ]

    def batch(self, *, prompts: int, width: int, max_new_tokens: int, max_kv_bytes: int | None = None) -> TailBatch:
        """Sessions of up to `prompts` prompts, whose requests the engine gets together."""
        return TailBatch(self, prompts, max_new_tokens)

    def complete(self, requests: Sequence[TailRequest]) -> list[Tail]:
        """One tail for each request. Raises what went wrong with one."""
        return [raised(tail) for tail in self.each(requests)]

    def each(self, requests: Sequence[TailRequest]) -> list[Tail | Exception]:
        """One tail for each request, or what went wrong with it alone; `ModelError` where a tail cannot be right."""
        tails = self.engine.complete(requests) if requests else []
        return [self._checked(request, tail) for request, tail in zip(requests, tails, strict=True)]

    def _checked(self, request: TailRequest, tail: Tail | Exception) -> Tail | Exception:
        if isinstance(tail, Exception):
            return tail
        if problem := self._problem(request, tail):
            return ModelError(
                f"{self.name}: {problem}; the tokenizer must be that of the engine's model, and the engine must give "
                "log-probabilities of the distribution that it draws from"
            )
        listed = min(map(len, tail.rows))
        if listed < self.top and not request.barred:
            return UnavailableError(
                f"{self.name}: the engine lists {listed} log-probabilities of a token, and top={self.top} were asked "
                "for; let it list more, or give a smaller top="
            )
        self._tell_of_end(tail)
        return tail

    def _tell_of_end(self, tail: Tail) -> None:
        """Once for each token at which the engine ends and searches continue."""
        last = tail.tokens[-1]
        if tail.ended and last not in self.eos_ids and last not in self._ends:
            self._ends.add(last)
            log.warning(
                "%s: the engine ends at token %d (%r), and searches continue after it, because the tokenizer and its "
                "generation_config.json do not name it as an end", self.name, last, self.decode([last]),
            )  # fmt: skip

    def _problem(self, request: TailRequest, tail: Tail) -> str | None:
        """What shows that an answer cannot be right."""
        if not 1 <= len(tail.tokens) <= request.limit or len(tail.rows) != len(tail.tokens):
            return f"an answer has {len(tail.tokens)} tokens and {len(tail.rows)} rows, up to {request.limit} wanted"
        if len(tail.tokens) < request.limit and not (tail.ended or tail.tokens[-1] in self.eos_ids):
            return f"a tail ended after token {tail.tokens[-1]}, which is no EOS token of the tokenizer"
        if any(token in self.eos_ids for token in tail.tokens[:-1]):
            return f"a tail continues after an EOS token, one of {sorted(self.eos_ids)}"
        if tail.tokens[0] in request.barred:
            return f"token {tail.tokens[0]} was drawn, which the request had barred"
        for token, row in zip(tail.tokens, tail.rows, strict=True):
            if token not in row or not all(0 <= listed < self.vocab_size for listed in row):
                return f"ids of a row go beyond the {self.vocab_size} of the tokenizer, or lack the drawn id {token}"
            total = math.fsum(math.exp(min(log, 1.0)) for log in row.values())  # 1: too much already
            if not total <= 1 + TOO_MUCH:  # NaN too
                return f"the probabilities of a row sum to {total:.3g}"
        return None


@dataclass(slots=True)
class _Prefix:
    """What is stored at a slot."""

    parent: int
    token: int
    depth: int  # tokens after the prompt
    row: dict[int, float]  # log p of the next token, by id
    drafts: tuple[int, ...] = ()  # the engine's own next tokens, one of each tail that comes by


@dataclass(slots=True)
class _Length:
    """How many tokens to ask for: twice as many after tails that were walked on nearly to their ends, half as many
    after such that were left before their middle. Samples get whole tails soon; a search that often leaves them wastes
    few tokens."""

    tokens: int = 8
    stored: int = 0  # tokens of the last tails that could be walked on
    walked: int = 0

    def next(self) -> int:
        """For the next tails, which are asked for together."""
        if self.stored:
            share = self.walked / self.stored
            self.tokens = max(4, self.tokens // 2) if share < 0.5 else self.tokens * (1 + (share > 0.75))
            self.tokens = min(self.tokens, LARGEST)
        self.stored = self.walked = 0
        return self.tokens


@dataclass(slots=True)
class _Counted:
    """Requests, for their seeds."""

    seed: int = 0
    count: int = 0

    def next(self) -> int:
        self.count += 1
        return int(np.random.SeedSequence([self.seed, self.count]).generate_state(1)[0]) >> 1  # 31 bits


class TailSession:
    """One prompt's prefixes that an engine has told about: `dts.lm.Session` and `dts.lm.Stored`."""

    def __init__(self, lm: EngineModel, prompt: tuple[int, ...], opened: Tail, max_new_tokens: int) -> None:
        """opened: a tail of one token after the prompt."""
        self._lm, self._prompt, self._longest = lm, prompt, max_new_tokens
        self._prefixes = [_Prefix(PROMPT_SLOT, -1, 0, dict(opened.rows[0]))]  # by slot
        self._slots: dict[tuple[int, int], int] = {}  # by parent slot and token
        self._seeds, self._length = _Counted(), _Length()
        self._paths: dict[tuple[int, int], int] = {}  # see `expect`
        self.usage = Usage(prompt_tokens=len(prompt), cached_tokens=max(0, len(prompt) - opened.computed))
        self.usage.forwarded_tokens = self.usage.unique_tokens = opened.computed
        self.usage.model_calls = 1

    # -- Session ---------------------------------------------------------------------------------------------------

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        return raised(extend_all(self._lm, [(self, parents, tokens)])[0])

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        rows = torch.full((len(slots), self._lm.vocab_size + 1), -math.inf, dtype=torch.double)
        for place, slot in enumerate(slots):
            row = self._prefixes[slot].row
            log_p = torch.tensor(list(row.values()), dtype=torch.double)
            rows[place, torch.tensor(list(row))] = log_p
            unlisted = 1 - float(log_p.exp().sum())
            if unlisted > UNLISTED and len(row) < self._lm.vocab_size:
                rows[place, -1] = math.log(unlisted)
        return rows

    # -- Stored ----------------------------------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        self._seeds = _Counted(seed, self._seeds.count)

    def stored(self, slot: int, token: int) -> int | None:
        found = self._slots.get((slot, token))
        self._length.walked += found is not None
        return found

    def draft(self, slot: int) -> int | None:
        prefix = self._prefixes[slot]
        if not prefix.drafts:
            return None
        draft, *left = prefix.drafts
        prefix.drafts = tuple(left)
        return draft

    def expect(self, paths: Mapping[tuple[int, int], int], *, to_end: bool) -> None:
        self._paths = dict(paths)
        if to_end:
            self._length.tokens = max(self._length.tokens, self._longest)

    def others(self, slots: Sequence[int]) -> list[int]:
        requests = [self._request(slot, 1, barred=tuple(self._prefixes[slot].row)) for slot in slots]
        drawn = []
        for slot, request, tail in zip(slots, requests, self._lm.complete(requests), strict=True):
            self._count(tail, 0)
            token, prefix = tail.tokens[0], self._prefixes[slot]
            if token not in prefix.row:  # another draw may have been the same
                log_p = _unbarred(tail, request, self._unlisted(request.barred, prefix.row))
                prefix.row = {**prefix.row, token: log_p}
            drawn.append(token)
        return drawn

    def fork(self) -> TailSession:
        other = copy.copy(self)
        other._prefixes, other._slots = list(map(copy.copy, self._prefixes)), dict(self._slots)
        other._seeds, other._length = copy.copy(self._seeds), copy.copy(self._length)
        return other

    def _unlisted(self, listed: Sequence[int], row: Mapping[int, float]) -> float:
        return math.log(max(1 - math.fsum(math.exp(row[token]) for token in listed), UNLISTED))

    # -- requests --------------------------------------------------------------------------------------------------

    def requests(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], TailRequest]]:
        """For what follows tokens after slots, (slot, token) each, as far as it is not stored: one for each path that
        waits there."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._slots]
        most = (self._lm.segment or self._length.next()) if missing else 0
        made = []
        for slot, token in missing:
            limit = max(1, min(self._longest - self._prefixes[slot].depth - 1, most))
            for _ in range(self._paths.get((slot, token), 1)):
                made.append(((slot, token), self._request(slot, limit, token)))
        return made

    def slot(self, parent: int, token: int) -> int:
        """Of a token after a slot, which is stored."""
        return self._slots[parent, token]

    def _request(self, slot: int, limit: int, *more: int, barred: tuple[int, ...] = ()) -> TailRequest:
        tokens = (*self._tokens(slot), *more)
        return TailRequest(self._prompt, tokens, limit, self._seeds.next(), self._lm.top, barred)

    def _tokens(self, slot: int) -> list[int]:
        """After the prompt."""
        tokens = []
        while slot != PROMPT_SLOT:
            tokens.append(self._prefixes[slot].token)
            slot = self._prefixes[slot].parent
        return tokens[::-1]

    def adopt(self, parent: int, token: int, tail: Tail) -> None:
        """Store a token after a slot and what the engine drew after it, as far as another tail did not bring it."""
        known, asked_for = len(self._prefixes), (parent, token) in self._slots
        for after, drawn, row in zip((token, *tail.tokens), tail.tokens, tail.rows, strict=False):
            slot = self._slots.setdefault((parent, after), len(self._prefixes))
            if slot == len(self._prefixes):
                self._prefixes.append(_Prefix(parent, after, self._prefixes[parent].depth + 1, dict(row)))
            prefix = self._prefixes[slot]
            prefix.row, prefix.drafts = {**prefix.row, drawn: row[drawn]}, (*prefix.drafts, drawn)
            parent = slot
        new = len(self._prefixes) - known
        self._length.stored += new - (not asked_for)
        self._count(tail, new)

    def _count(self, tail: Tail, new: int) -> None:
        """new: positions that had not been in the model."""
        usage = self.usage
        usage.model_calls += 1
        usage.forwarded_tokens += tail.computed
        usage.recomputed_tokens += max(0, tail.computed - new)


def _unbarred(tail: Tail, request: TailRequest, log_left: float) -> float:
    """log p of a token that was drawn with others barred. log_left: of their complement's mass.

    Engines report it before the bar or after. What the row lists tells: one from before lists barred tokens, which are
    the likeliest, with more than next to nothing.
    """
    row = tail.rows[0]
    before = any(row.get(token, -math.inf) > -50.0 for token in request.barred)
    return min(row[tail.tokens[0]] + (0.0 if before else log_left), log_left)


def extend_all(
    lm: EngineModel, asked: Sequence[tuple[Session, Sequence[int], Sequence[int]]]
) -> list[list[int] | Exception]:
    """`Session.extend` of several sessions of tails: what is not stored is asked for together. In the place of slots
    stands what went wrong with a session's requests."""
    sessions = [session for session, _, _ in asked if isinstance(session, TailSession)]
    pairs = [list(zip(parents, tokens, strict=True)) for _, parents, tokens in asked]
    missing = [
        (session, pair, request)
        for session, wanted in zip(sessions, pairs, strict=True)
        for pair, request in session.requests(wanted)
    ]
    tails = lm.each([request for _, _, request in missing])
    wrong: dict[int, Exception] = {}
    for (session, pair, _), tail in zip(missing, tails, strict=True):
        if isinstance(tail, Exception):
            wrong.setdefault(id(session), tail)
        else:
            session.adopt(*pair, tail)
    return [
        wrong[id(session)] if id(session) in wrong else [session.slot(*pair) for pair in wanted]
        for session, wanted in zip(sessions, pairs, strict=True)
    ]


@dataclass(slots=True)
class TailBatch:
    """`dts.lm.Batch` over an engine, which decides itself what runs together."""

    lm: EngineModel
    prompts: int  # open at most
    max_new_tokens: int
    _waiting: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)

    def admit(self, key: int, prompt_ids: Sequence[int]) -> bool:
        if len(self._waiting) + len(self._open) >= self.prompts:
            return False
        self._waiting[key] = tuple(prompt_ids)
        return True

    def advance(self, tokens: int) -> list[tuple[int, Session | Exception]]:
        """All that wait, whatever their tokens."""
        keys, ids = list(self._waiting), list(self._waiting.values())
        self._waiting.clear()
        self._open.update(keys)
        if not keys:
            return []
        return list(zip(keys, self.lm.open_all(ids, self.max_new_tokens), strict=True))

    def extend(self, requests: Sequence[tuple[Session, Sequence[int], Sequence[int]]]) -> list[list[int] | Exception]:
        return extend_all(self.lm, requests)

    def close(self, key: int) -> None:
        self._waiting.pop(key, None)
        self._open.discard(key)
