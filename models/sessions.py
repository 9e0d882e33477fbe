"""One prompt's tree on a Hugging Face model: through the tree-shaped cache, or sent anew each time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dts.errors import UnavailableError
from dts.lm import PROMPT_SLOT
from dts.memory import REMEDY, first_line, is_out_of_memory, release
from dts.models.treecache import Prefix, TreeCache
from dts.results import Usage

if TYPE_CHECKING:
    from dts.models.huggingface import HFModel

log = logging.getLogger(__name__)


class TreeSession:
    """One prompt's tree in a `TreeCache`: each token enters the model once, unless a memory bound gave it up."""

    def __init__(
        self, lm: HFModel, prefix: Prefix, *, lanes: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> None:
        self._lm, self.usage = lm, Usage(prompt_tokens=len(prefix))
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
        device = self._lm.device
        with self._lm.tree_attention():
            output = self._lm.decoder(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
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

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        return self._lm.head(self._hidden[torch.tensor(list(slots), device=self._hidden.device)])


class RecomputeSession:
    """The slow correct path: every prefix is sent from its first token, and counted."""

    def __init__(self, lm: HFModel, prompt_ids: Sequence[int]) -> None:
        self._lm, self._prompt_length = lm, len(prompt_ids)
        self._ids: list[tuple[int, ...]] = [tuple(prompt_ids)]  # by slot
        self._logits = [full_logits(lm, prompt_ids)[0]]  # by slot, [V]
        count = len(prompt_ids)
        self.usage = Usage(prompt_tokens=count, forwarded_tokens=count, unique_tokens=count, model_calls=1)

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        first = len(self._ids)
        for parent, token in zip(parents, tokens, strict=True):
            ids = (*self._ids[parent], token)
            self._ids.append(ids)
            self._logits.append(full_logits(self._lm, ids)[0])
            self.usage.forwarded_tokens += len(ids)
            self.usage.recomputed_tokens += len(ids) - 1
            self.usage.model_calls += 1
        return list(range(first, len(self._ids)))

    def logits(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._logits[slot] for slot in slots])


@torch.inference_mode()
def full_logits(lm: HFModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Next-token logits [1, V] after a sequence, by the plain model without any cache."""
    ids = torch.tensor([list(token_ids)], device=lm.device)
    logits: torch.Tensor = lm.model(input_ids=ids, use_cache=False).logits[:, -1]
    return logits
