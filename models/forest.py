"""Trees of many prompts on one model: every forward call takes paths of all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from dts.errors import UnavailableError, UsageError
from dts.memory import REMEDY, first_line, is_out_of_memory, release
from dts.models.attention import ATTENTION, Span, Step
from dts.models.prefixes import Prefix, Segment
from dts.models.states import StateHomes, settled
from dts.models.treecache import Lanes, Place, StepCache, TreeCache
from dts.models.view import ModelView
from dts.models.vocabulary import without
from dts.results import Usage

log = logging.getLogger(__name__)


class Grown(Protocol):
    """What a forest needs of each of its trees: `dts.models.sessions.TreeSession`."""

    cache: TreeCache
    usage: Usage
    prompt: Segment | None  # its last part

    def keep(self, slots: Sequence[int], hidden: torch.Tensor) -> None:
        """Last hidden states [B, H] of slots that went through the model in one call."""

    def keep_logits(self, slots: Sequence[int], logits: torch.Tensor) -> None:
        """Logits [B, V] of slots, until the next forward call."""


Left = list[tuple[Grown, list[int]]]
Request = tuple[Grown, Sequence[int], Sequence[int]]  # a tree, and the parents and tokens of its new slots
Part = tuple[Grown, list[int], list[int]]  # a tree, slots to forward, slots whose lanes must stay


class Forest:
    """The lanes of several trees, and the forward calls that extend them together."""

    def __init__(
        self,
        view: ModelView,
        like: Prefix,
        *,
        device: torch.device,
        lanes: int,
        max_length: int,
        unknown: torch.Tensor | None = None,
    ) -> None:
        """view: its own. like: shows the shapes of keys, values and states. lanes: of all trees together. max_length:
        tokens that a lane can hold. unknown: ids of logit -inf."""
        own_attention = view.way.own_attention
        if not own_attention:
            view.attend_with(ATTENTION)
        self._view, self._device, self._unknown = view, device, unknown
        state = like.state
        self.lanes = Lanes([*like.keys, *like.values], lanes, max_length, state.tensors if state else ())
        self._cache = StepCache(self.lanes, settled(state.layers) if state else (), own_attention)
        self._homes = StateHomes(self._cache.layers, view.modules()) if state else None
        self._at_once = lanes  # rows of a forward call; fewer once memory has run out

    def extend(self, requests: Sequence[Request]) -> list[list[int]]:
        """In one call where memory allows, otherwise in smaller and smaller ones: the numbers are the same and every
        token is counted once, so no search can tell. Raises `UnavailableError` where even one row finds no room."""
        slots = [[tree.cache.add(*pair) for pair in zip(parents, tokens, strict=True)]
                 for tree, parents, tokens in requests]  # fmt: skip
        left = [(tree, new) for (tree, _, _), new in zip(requests, slots, strict=True)]
        while left := [(tree, new) for tree, new in left if new]:
            now, later = _first(left, self._at_once)
            for tree, new, waiting in now:
                needed = tree.cache.parents([*new, *waiting])
                while lost := {slot: None for parent in needed[: len(new)] for slot in tree.cache.missing(parent)[:1]}:
                    self.recompute(tree, list(lost)[: self._at_once], needed)
            if self._forward([(tree, new, tree.cache.parents(waiting)) for tree, new, waiting in now]):
                left = later
        return slots

    def recompute(self, tree: Grown, slots: Sequence[int], reserved: Sequence[int]) -> None:
        """Send slots again that had been given up; lanes that hold a slot of `reserved` stay."""
        if self._forward([(tree, list(slots), list(reserved))]):
            tree.usage.recomputed_tokens += len(slots)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, V] from last hidden states [B, H]."""
        return without(self._unknown, self._view.head(hidden))

    def _forward(self, parts: Sequence[Part]) -> bool:
        """Send slots through the model. False where memory ran out: nothing happened, but fewer go at once now."""
        try:
            self._forward_all(parts)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for tree, slots, _ in parts:
                tree.cache.undo(slots)
            self._halve(sum(len(slots) for _, slots, _ in parts), error)
        release()  # outside the handler, whose traceback keeps the tensors of the failed call
        return False

    def _halve(self, rows: int, error: BaseException) -> None:
        if rows == 1:
            raise UnavailableError(f"out of memory with one path at a time ({first_line(error)}); {REMEDY}") from error
        self._at_once = rows // 2
        log.warning("out of memory with %d paths in one call: continuing with %d (%s)", rows, self._at_once,
                    first_line(error))  # fmt: skip

    @torch.inference_mode()
    def _forward_all(self, parts: Sequence[Part]) -> None:
        begun = [(tree, *tree.cache.begin(slots, reserved)) for tree, slots, reserved in parts]
        begun.sort(key=lambda part: part[2])  # by lanes: each tree has a block of its own
        step, segments = _step(begun)
        self._cache.begin(step, segments)
        positions = [prefix + length - 1 for prefix, length in zip(step.prefix_lengths, step.lengths, strict=True)]
        tokens = [token for tree, slots, _ in begun for token in tree.cache.tokens(slots)]
        ids, places = (torch.tensor([values], device=self._device) for values in (tokens, positions))
        hidden = self._hidden(step, ids, places)
        self._cache.begin(step, ())  # lets go of the prompts
        logits = self._logits_of_all(hidden) if len(begun) > 1 else None
        first = 0
        for tree, slots, _ in begun:
            rows = slice(first, first + len(slots))
            tree.cache.keep_states(slots)
            tree.keep(slots, hidden[rows])
            if logits is not None:
                tree.keep_logits(slots, logits[rows])
            first += len(slots)

    def _hidden(self, step: Step, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, H] of ids [1, B]."""
        paths = self._cache.paths
        if self._homes is None and paths is None:
            return self._view.hidden(ids, self._cache, positions)[0]
        # Recurrent layers and attention code of a family's own know nothing of trees: a row for each path.
        if self._homes is not None:
            self._homes.write(self.lanes.states.rows(step.lanes))
        mask = paths.mask(self._device) if paths is not None else None
        hidden = self._view.hidden(ids.T, self._cache, positions.T, mask)[:, 0]
        if self._homes is not None:
            self.lanes.states.put(step.lanes, self._homes.read())
        return hidden

    def _logits_of_all(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """One product with the head for the rows of all trees; None where memory is short, which is no error yet."""
        try:
            return self.logits(hidden)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release()
        return None


def _first(left: Left, rows: int) -> tuple[list[Part], Left]:
    """The first slots, as many as go at once, and what is left after them."""
    now: list[Part] = []
    later = []
    for tree, slots in left:
        taken, waiting = slots[:rows], slots[rows:]
        rows -= len(taken)
        if taken:
            now.append((tree, taken, waiting))
        if waiting:
            later.append((tree, waiting))
    return now, later


def _step(begun: Sequence[tuple[Grown, list[int], list[int]]]) -> tuple[Step, list[Segment]]:
    """The step of one forward call, and the segments of its spans."""
    lanes, lengths, prefixes = [], [], []
    readers: dict[int, tuple[Segment, list[int]]] = {}
    for tree, slots, own in begun:
        lanes += own
        lengths += tree.cache.depths(slots)
        prefixes += [tree.cache.prefix_length] * len(own)
        assert tree.prompt is not None
        for segment in tree.prompt.chain():
            readers.setdefault(id(segment), (segment, []))[1].extend(range(own[0], own[-1] + 1))
    spans = [Span(segment.start, segment.stop, read_by) for segment, read_by in readers.values()]
    return Step(lanes, lengths, prefixes, spans), [segment for segment, _ in readers.values()]


def share_out(left: int, token: int, state: int) -> tuple[int, int]:
    """Tokens of idle branches and copies of states for so many bytes; of a recurrent model, half for each."""
    copies = left // 2 // state if state else 0
    return (left - copies * state) // token, copies


def rooms(
    prompt: Prefix, max_bytes: int | None, *, lanes: int, max_length: int, state_bytes: int
) -> tuple[int | None, int]:
    """Tokens of idle branches (None: no limit) and copies of recurrent states that a memory bound leaves room for
    beside a prompt and its lanes. state_bytes: for the copies where there is no bound."""
    token, state = max(prompt.token_bytes, 1), prompt.state.nbytes if prompt.state else 0
    if max_bytes is None:
        return None, state_bytes // state if state else 0
    needed = token * (len(prompt) + lanes * max_length) + state * (lanes + 1)
    if needed > max_bytes:
        raise UsageError(
            f"max_kv_bytes={max_bytes} is too small: the prompt and {lanes} paths of {max_length} "
            f"tokens need {needed}; raise it, or lower batch_size or max_new_tokens"
        )
    return share_out(max_bytes - needed, token, state)


def lone(
    view: ModelView,
    prefix: Prefix,
    *,
    device: torch.device,
    lanes: int,
    max_new_tokens: int,
    max_kv_bytes: int | None = None,
    state_bytes: int = 0,
    unknown: torch.Tensor | None = None,
) -> tuple[Forest, Segment, Place]:
    """A forest for one tree, and the tree's part of it. state_bytes: for copies of recurrent states without a bound."""
    longest = lane_length(max_new_tokens)
    rows, copies = rooms(prefix, max_kv_bytes, lanes=lanes, max_length=longest, state_bytes=state_bytes)
    forest = Forest(view, prefix, device=device, lanes=lanes, max_length=longest, unknown=unknown)
    return forest, Segment(prefix), Place(0, lanes, rows, copies)


def lane_length(max_new_tokens: int) -> int:
    """Tokens that a lane holds at most: nothing is read after the last one."""
    return max(max_new_tokens - 1, 1)
