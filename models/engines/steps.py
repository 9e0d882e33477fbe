"""Tails from a model of steps: what an engine does, on the tree cache, with everything countable."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dts.errors import raised
from dts.lm import PROMPT_SLOT, Batch, LanguageModel, Session, Tail, TailRequest

Ids = tuple[int, ...]


@dataclass(slots=True)
class _Prompt:
    """An open session with the slots of the prefixes that went through the model."""

    session: Session
    slots: dict[Ids, int] = field(default_factory=lambda: {(): PROMPT_SLOT})

    def missing(self, prefix: Ids) -> Ids | None:
        """The shortest beginning of this prefix that has to go through the model; None where nothing has to."""
        known = next(n for n in range(len(prefix), -1, -1) if prefix[:n] in self.slots)
        return prefix[: known + 1] if known < len(prefix) else None


@dataclass(slots=True)
class _Walk:
    """A request under way."""

    request: TailRequest
    prompt: _Prompt
    rng: np.random.Generator
    computed: int
    tokens: list[int] = field(default_factory=list)  # drawn
    rows: list[dict[int, float]] = field(default_factory=list)
    ended: bool = False

    @property
    def prefix(self) -> Ids:
        return (*self.request.tokens, *self.tokens)


class Stepwise:
    """`dts.lm.Completer` over a `LanguageModel`. Prompts and prefixes stay in its cache, of all requests so far."""

    def __init__(self, lm: LanguageModel, *, max_new_tokens: int, width: int = 16, prompts: int = 1) -> None:
        """max_new_tokens: after a prompt at most. width: requests of a prompt that are extended together. prompts: that
        are extended together; with more than one, at most so many are kept."""
        self._lm, self._width, self._longest = lm, width, max_new_tokens
        self._prompts: dict[Ids, _Prompt] = {}
        make = getattr(lm, "batch", None) if prompts > 1 else None
        self._batch: Batch | None = make(prompts=prompts, width=width, max_new_tokens=max_new_tokens) if make else None

    @property
    def max_top(self) -> int:
        return self._lm.vocab_size

    def complete(self, requests: Sequence[TailRequest]) -> list[Tail]:
        new = self._open(dict.fromkeys(request.prompt for request in requests))
        walks = []
        for request in requests:
            rng = np.random.default_rng(request.seed)
            walks.append(_Walk(request, self._prompts[request.prompt], rng, new.pop(request.prompt, 0)))
        while under_way := [walk for walk in walks if not walk.ended]:
            waiting = [(walk, prefix) for walk in under_way if (prefix := walk.prompt.missing(walk.prefix)) is not None]
            if waiting:
                self._extend(waiting)
            else:
                for walk in under_way:
                    self._draw(walk)
        return [Tail(tuple(walk.tokens), tuple(walk.rows), walk.computed) for walk in walks]

    def _open(self, prompts: dict[Ids, None]) -> dict[Ids, int]:
        """Send those that are new. Returns what each of them cost."""
        new = [ids for ids in prompts if ids not in self._prompts]
        for key, ids in enumerate(new, len(self._prompts)):
            if self._batch is None:
                session = self._lm.open(ids, batch_size=self._width, max_new_tokens=self._longest)
                self._prompts[ids] = _Prompt(session)
            elif not self._batch.admit(key, ids):
                raise RuntimeError("more prompts than it was made for")
        if self._batch is not None:
            self._prompts.update((ids, _Prompt(session)) for ids, session in zip(new, self._through(), strict=True))
        return {ids: self._prompts[ids].session.usage.forwarded_tokens for ids in new}

    def _through(self) -> list[Session]:
        """Sessions of the prompts that were admitted, in their order."""
        assert self._batch is not None
        found: dict[int, Session] = {}
        while through := self._batch.advance(sys.maxsize):
            for key, session in through:
                if isinstance(session, Exception):
                    raise session
                found[key] = session
        return [found[key] for key in sorted(found)]

    def _extend(self, waiting: Sequence[tuple[_Walk, Ids]]) -> None:
        """Send one token for each of these, equal prefixes once."""
        for part in self._parts(waiting):
            asked = [
                (prompt.session, [prompt.slots[ids[:-1]] for ids in walks], [ids[-1] for ids in walks])
                for prompt, walks in part
            ]
            if self._batch is not None:
                slots = [raised(new) for new in self._batch.extend(asked)]
            else:
                slots = [session.extend(parents, tokens) for session, parents, tokens in asked]
            for (prompt, walks), new in zip(part, slots, strict=True):
                prompt.slots.update(zip(walks, new, strict=True))
                for walk in walks.values():
                    walk.computed += 1

    def _parts(self, waiting: Sequence[tuple[_Walk, Ids]]) -> Iterator[list[tuple[_Prompt, dict[Ids, _Walk]]]]:
        """What is sent together: of each prompt, as much as it may extend at once."""
        by_prompt: dict[int, tuple[_Prompt, dict[Ids, _Walk]]] = {}
        for walk, prefix in waiting:
            by_prompt.setdefault(id(walk.prompt), (walk.prompt, {}))[1].setdefault(prefix, walk)
        while by_prompt:
            yield [
                (prompt, {ids: walks.pop(ids) for ids in list(walks)[: self._width]})
                for prompt, walks in by_prompt.values()
            ]
            by_prompt = {key: group for key, group in by_prompt.items() if group[1]}

    def _draw(self, walk: _Walk) -> None:
        logits = walk.prompt.session.logits([walk.prompt.slots[walk.prefix]])[0]
        log_p = logits.double().log_softmax(-1).cpu()
        p = log_p.exp()
        p[list(walk.request.barred)] = 0.0
        cumulative = p.cumsum(-1)
        target = cumulative[-1:] * walk.rng.random()
        token = min(int(torch.searchsorted(cumulative, target, right=True)), len(p) - 1)
        top = log_p.topk(min(walk.request.top, len(p)))
        listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        row = {index: value for index, value in listed if value > -700.0}
        row[token] = float(log_p[token])
        walk.tokens.append(token)
        walk.rows.append(row)
        walk.ended = token in self._lm.eos_ids or len(walk.tokens) == walk.request.limit
