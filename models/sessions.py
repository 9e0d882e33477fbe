"""One prompt's tree on a Hugging Face model: through the tree-shaped cache, or sent anew each time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from dts.errors import UnavailableError
from dts.lm import PROMPT_SLOT
from dts.memory import REMEDY, first_line, is_out_of_memory, release
from dts.models.attention import ATTENTION
from dts.models.treecache import Prefix, TreeCache
from dts.models.view import ModelView
from dts.results import Usage

if TYPE_CHECKING:
    from dts.models.huggingface import HFModel

log = logging.getLogger(__name__)


class TreeSession:
    """One prompt's tree in a `TreeCache`: each token enters the model once, unless a memory bound gave it up.

    view: this session's own. unknown: ids of logit -inf.
    """

    def __init__(
        self,
        view: ModelView,
        prefix: Prefix,
        *,
        device: torch.device,
        lanes: int,
        max_new_tokens: int,
        max_kv_bytes: int | None = None,
        unknown: torch.Tensor | None = None,
    ) -> None:
        view.attend_with(ATTENTION)
        self._view, self._device, self._unknown = view, device, unknown
        self.usage = Usage(prompt_tokens=len(prefix))
        self.cache = TreeCache(prefix, lanes, max_new_tokens - 1, max_kv_bytes)
        self._hidden = prefix.hidden.new_zeros(256, prefix.hidden.shape[-1])  # [slots, H]
        self._hidden[PROMPT_SLOT] = prefix.hidden
        self._at_once = lanes  # rows of a forward call; fewer once memory has run out
        self._note_memory()

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """In one call where memory allows, otherwise in smaller and smaller ones: the numbers are the same and every
        token is counted once, so no search can tell. Raises `UnavailableError` where even one row finds no room."""
        left = slots = [self.cache.add(parent, token) for parent, token in zip(parents, tokens, strict=True)]
        while left:
            part, behind = left[: self._at_once], self.cache.parents(left)
            while lost := [slot for parent in behind[: len(part)] for slot in self.cache.missing(parent)[:1]]:
                self._forward(lost[:1], reserved=behind)
                self.usage.recomputed_tokens += 1
            if self._forward(part, reserved=behind[len(part) :]):
                left = left[len(part) :]
        return slots

    def _forward(self, slots: Sequence[int], reserved: Sequence[int]) -> bool:
        """Send slots through the model. False where memory ran out: nothing happened, but fewer go at once now."""
        try:
            self._forward_all(slots, reserved)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.cache.undo(slots)
            self._halve(len(slots), error)
        release()  # outside the handler, whose traceback keeps the tensors of the failed call
        return False

    def _halve(self, rows: int, error: BaseException) -> None:
        if rows == 1:
            raise UnavailableError(f"out of memory with one path at a time ({first_line(error)}); {REMEDY}") from error
        self._at_once = rows // 2
        log.warning("out of memory with %d paths in one call: going on with %d (%s)", rows, self._at_once,
                    first_line(error))  # fmt: skip

    @torch.inference_mode()
    def _forward_all(self, slots: Sequence[int], reserved: Sequence[int]) -> None:
        ordered, tokens, positions = self.cache.begin(slots, reserved)
        output = self._view.decoder(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            past_key_values=self.cache,
            use_cache=True,
        )
        while max(ordered) >= len(self._hidden):
            self._hidden = torch.cat([self._hidden, torch.zeros_like(self._hidden)])
        self._hidden[torch.tensor(ordered, device=self._hidden.device)] = output.last_hidden_state[0]
        self.usage.forwarded_tokens += len(tokens)
        self.usage.model_calls += 1
        self._note_memory()

    def _note_memory(self) -> None:
        self.usage.kv_bytes = max(self.usage.kv_bytes, self.cache.bytes() + self._hidden.nbytes)
        self.usage.kv_tokens = max(self.usage.kv_tokens, self.cache.held_tokens())

    @torch.inference_mode()
    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        logits = self._view.head(self._hidden[torch.tensor(list(slots), device=self._hidden.device)])
        return _without(self._unknown, logits)


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
        return _without(self._unknown, whole_logits(self._view(), token_ids, self._device)[0, -1].clone())

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._logits[slot] for slot in slots])


def _without(unknown: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    if unknown is None:
        return logits
    return logits.index_fill_(-1, unknown.to(logits.device), -torch.inf)


@torch.inference_mode()
def prefill(view: ModelView, prompt_ids: Sequence[int], device: torch.device, *, chunk: int) -> Prefix:
    """Send a prompt through the model, `chunk` tokens at a time."""
    cache = DynamicCache()
    hidden = torch.empty(0)
    for start in range(0, len(prompt_ids), chunk):
        ids = torch.tensor([list(prompt_ids[start : start + chunk])], device=device)
        hidden = view.decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0, -1]
    keys = [layer.keys[0].contiguous() for layer in cache.layers]
    return Prefix(tuple(prompt_ids), keys, [layer.values[0].contiguous() for layer in cache.layers], hidden)


@torch.inference_mode()
def whole_logits(view: ModelView, token_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Logits [1, T, V] of a sequence, by plain attention and without any cache."""
    logits: torch.Tensor = view.model(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False).logits
    return logits


def full_logits(lm: HFModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Next-token logits [1, V] after a sequence, ids outside the tokenizer included."""
    return whole_logits(lm.view(), token_ids, lm.device)[:, -1]
