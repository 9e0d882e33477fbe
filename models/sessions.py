"""One prompt's tree on a Hugging Face model: through the tree-shaped cache, or sent anew each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dts.lm import PROMPT_SLOT
from dts.models.forest import Forest
from dts.models.prefixes import Prefix, Segment
from dts.models.states import PromptState, StateHomes, settled
from dts.models.treecache import Place, TreeCache
from dts.models.view import ModelView, Viewable
from dts.models.vocabulary import without
from dts.results import Usage


class TreeSession:
    """One prompt's tree in a `Forest`: each token enters the model once, unless a memory bound gave it up.

    prompt: where the prompt ends. place: the tree's lanes. reopen: gives the session a forest of its own when it is
    used after `close`.
    """

    def __init__(
        self,
        forest: Forest,
        prompt: Segment,
        place: Place,
        reopen: Callable[[], tuple[Forest, Segment, Place]] | None = None,
    ) -> None:
        self.prompt: Segment | None = prompt
        self._forest: Forest | None = forest
        self._reopen = reopen
        self.usage = Usage(prompt_tokens=prompt.stop)
        self.cache = TreeCache(prompt, forest.lanes, place)
        self._unheard: set[int] = set()  # slots whose hidden state was given up by `close`
        self._fresh_row: dict[int, int] = {}  # by slot: its row in what the last forward call of many trees gave
        self._fresh = torch.empty(0)  # logits, [B, V]
        self._settle(prompt)

    def _settle(self, prompt: Segment) -> None:
        last = prompt.held.hidden[-1]
        self._hidden = last.new_zeros(max(256, len(self.cache)), len(last))  # [slots, H]
        self._hidden[PROMPT_SLOT] = last
        self._note_memory()

    @property
    def forest(self) -> Forest:
        """Where its tokens go through the model; opened again if the session was closed."""
        if self._forest is None:
            assert self._reopen is not None
            self._forest, self.prompt, place = self._reopen()
            self.cache.move(self.prompt, self._forest.lanes, place)
            self.usage.forwarded_tokens += self.prompt.stop
            self.usage.recomputed_tokens += self.prompt.stop
            self._settle(self.prompt)
        return self._forest

    def close(self) -> None:
        """Give up everything it holds. It may still be used: then it is recomputed, and counted."""
        if self._forest is not None:
            self.cache.clear()
            self._forest = self.prompt = None
            self._hidden = self._hidden[:0]
            self._drop_logits()
            self._unheard = set(range(1, len(self.cache)))

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        return self.forest.extend([(self, parents, tokens)])[0]

    @torch.inference_mode()
    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        if all(slot in self._fresh_row for slot in slots):
            return self._fresh[_index([self._fresh_row[slot] for slot in slots], self._fresh.device)]
        forest = self.forest
        for slot in slots:
            while slot in self._unheard:
                forest.recompute(self, self.cache.missing(slot)[:1], reserved=[slot])
        return forest.logits(self._hidden[torch.tensor(list(slots), device=self._hidden.device)])

    # -- what `dts.models.chains` calls ----------------------------------------------------------------------------

    def held(self, slot: int) -> list[torch.Tensor]:
        """Keys and values from the prompt's first token to this slot, [heads, tokens, dim] each, all keys first. What
        was given up is sent again, and counted."""
        forest = self.forest
        assert self.prompt is not None
        while lost := self.cache.missing(slot)[:1]:
            forest.recompute(self, lost, reserved=[slot])
        chain = self.prompt.chain()
        prompt = zip(*((*segment.held.keys, *segment.held.values) for segment in chain), strict=True)
        own = self.cache.read(slot)
        return [torch.cat([*parts, tail], dim=1) for parts, tail in zip(prompt, own, strict=True)] if chain else own

    def adopt(self, slot: int, tokens: Sequence[int], content: Sequence[torch.Tensor]) -> list[int]:
        """New slots for tokens after a slot, with keys and values up to the last of them, as `held` would give them."""
        return self.cache.adopt(slot, tokens, [column[:, self.cache.prefix_length :] for column in content])

    # -- what the forest calls -------------------------------------------------------------------------------------

    def keep(self, slots: Sequence[int], hidden: torch.Tensor) -> None:
        """Last hidden states [B, H] of slots that went through the model in one call."""
        self._drop_logits()
        while max(slots) >= len(self._hidden):
            self._hidden = torch.cat([self._hidden, torch.zeros_like(self._hidden)])
        self._hidden[_index(slots, self._hidden.device)] = hidden
        self._unheard.difference_update(slots)
        self.usage.forwarded_tokens += len(slots)
        self.usage.model_calls += 1
        self._note_memory()

    def keep_logits(self, slots: Sequence[int], logits: torch.Tensor) -> None:
        """Logits [B, V] of slots, until the next forward call."""
        self._fresh_row, self._fresh = {slot: row for row, slot in enumerate(slots)}, logits

    def _drop_logits(self) -> None:
        self._fresh_row, self._fresh = {}, torch.empty(0)

    def _note_memory(self) -> None:
        held = [segment.held for segment in self.prompt.chain()] if self.prompt else []
        prompt = sum(part.nbytes + (part.state.nbytes if part.state else 0) for part in held)
        self.usage.kv_bytes = max(self.usage.kv_bytes, prompt + self.cache.bytes() + self._hidden.nbytes)
        self.usage.kv_tokens = max(self.usage.kv_tokens, self.cache.held_tokens())


def _index(rows: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Rows of a tensor: without another tensor where they follow each other, which is usual."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(list(rows), device=device)


class RecomputeSession:
    """The slow correct path: every prefix is sent from its first token, and counted.

    view: makes a new one for each call, because a model may remember the longest sequence it saw.
    """

    def __init__(
        self,
        view: Callable[[], ModelView],
        prompt_ids: Sequence[int],
        device: torch.device,
        unknown: torch.Tensor | None = None,
    ) -> None:
        self._view, self._device, self._unknown = view, device, unknown
        self._ids: list[tuple[int, ...]] = [tuple(prompt_ids)]  # by slot
        self._logits = [self._forward(prompt_ids)]  # by slot, [V]
        count = len(prompt_ids)
        self.usage = Usage(prompt_tokens=count, forwarded_tokens=count, unique_tokens=count, model_calls=1)

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        first = len(self._ids)
        for parent, token in zip(parents, tokens, strict=True):
            ids = (*self._ids[parent], token)
            self._ids.append(ids)
            self._logits.append(self._forward(ids))
            self.usage.forwarded_tokens += len(ids)
            self.usage.recomputed_tokens += len(ids) - 1
            self.usage.model_calls += 1
        return list(range(first, len(self._ids)))

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[V]; a copy, so that the logits of the other positions are given up."""
        return without(self._unknown, whole_logits(self._view(), token_ids, self._device)[0, -1].clone())

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._logits[slot] for slot in slots])


class Prefill:
    """A prompt on its way through the model, in pieces, after what earlier prompts share with it."""

    def __init__(self, view: ModelView, token_ids: Sequence[int], device: torch.device, leaf: Segment | None = None):
        """token_ids: the whole prompt. leaf: the last segment of its beginning that went through the model already."""
        self._view, self._ids, self._device = view, tuple(token_ids), device
        self._first = self._next = leaf.stop if leaf else 0
        self._hidden: list[torch.Tensor] = []
        self._cache = view.cache()
        state = leaf.held.state if leaf else None
        if state is not None:
            self._cache.layers = settled(state.layers)
        for index, layer in enumerate(zip(*map(_layers, leaf.chain()), strict=True) if leaf else ()):
            keys, values = (torch.cat(parts, dim=1)[None] for parts in zip(*layer, strict=True))
            if keys.shape[1]:  # the layer has keys
                self._cache.update(keys, values, index)
        self._homes = StateHomes(self._cache.layers, view.modules()) if view.recurrent else None
        self._state = [tensor.clone() for tensor in state.tensors] if state else None
        self.calls = 0

    @property
    def left(self) -> int:
        """Tokens that have not been sent."""
        return len(self._ids) - self._next

    @torch.inference_mode()
    def send(self, tokens: int) -> None:
        """Send the next tokens."""
        if not self._view.way.whole_prompts:
            return self._send(tokens)
        if not self._next:
            return self._send(self.left)
        for _ in range(min(tokens, self.left)):
            self._send(1)

    def _send(self, tokens: int) -> None:
        ids = torch.tensor([self._ids[self._next : self._next + tokens]], device=self._device)
        if self._homes is not None and self._state is not None:  # prompts under way may share the view's modules
            self._homes.write(self._state)
        positions = torch.arange(self._next, self._next + ids.shape[1], device=self._device)[None]
        self._hidden.append(self._view.hidden(ids, self._cache, positions)[0])
        self._state = self._homes.read() if self._homes is not None else None
        self._next += ids.shape[1]
        self.calls += 1

    @torch.inference_mode()
    def prefix(self) -> Prefix:
        """What was sent, once all of it was."""
        layers, hidden = self._cache.layers, torch.cat(self._hidden)
        if not layers:
            raise ValueError("it has no cache")
        none = hidden.new_zeros(1, 0, len(self._ids), 0)  # of layers without attention
        keys, values = ([(none if t is None else t)[0][:, self._first :].contiguous() for t in kind]
                        for kind in zip(*map(_attended, layers), strict=True))  # fmt: skip
        state = PromptState(settled(layers), self._state) if self._state else None
        return Prefix(self._ids[self._first :], keys, values, hidden, state)


def _attended(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values of a cache's layer."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def _layers(segment: Segment) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(segment.held.keys, segment.held.values, strict=True))


def prefill(view: ModelView, prompt_ids: Sequence[int], device: torch.device, *, chunk: int) -> Prefix:
    """Send a prompt through the model, `chunk` tokens at a time."""
    sent = Prefill(view, prompt_ids, device)
    while sent.left:
        sent.send(chunk)
    return sent.prefix()


@torch.inference_mode()
def whole_logits(view: ModelView, token_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Logits [1, T, V] of a sequence, by plain attention and without any cache."""
    logits: torch.Tensor = view.model(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False).logits
    return logits


def full_logits(lm: Viewable, token_ids: Sequence[int]) -> torch.Tensor:
    """Next-token logits [1, V] after a sequence, ids outside the tokenizer included."""
    return whole_logits(lm.view(), token_ids, lm.device)[:, -1]
