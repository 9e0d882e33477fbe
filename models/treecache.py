"""A key/value cache shaped like the tree, for unmodified Hugging Face decoders.

Three places hold keys and values, per layer:

- the *prefix*: the prompt, once, [heads, P, dim]; every path attends to it as one matrix product;
- *lanes*: one per path being extended, [lanes, heads, T, dim]; a path attends to its own lane only, so neither other
  paths nor idle branches are read;
- the *archive*: tokens of branches that lost their lane, [rows, heads, dim]; a path that starts from deep in the tree
  gathers its ancestors from there once, or takes over a lane that already holds them. Under a memory bound the least
  recently used branches are given up; the session sends their tokens through the model again if a path comes back.

A decode step is one forward call of B tokens (`input_ids` [1, B], `position_ids` = prompt length + depth). The model's
own attention asks the cache for keys and values; the cache stores the new ones and hands out a `LayerView`, which
`dts.models.attention` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from dts.errors import UsageError
from dts.models.archive import Archive
from dts.models.attention import LayerView, Step
from dts.tree import NONE

FIRST_LANE_LENGTH = 64


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that went through the model: keys and values per layer, [heads, P, dim], and its last hidden state."""

    token_ids: tuple[int, ...]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: torch.Tensor  # [hidden]

    def __len__(self) -> int:
        return len(self.token_ids)


class TreeCache(Cache):
    """Keys and values of one prompt's tree. Tokens are named by slots; slot 0 is the prompt.

    `begin` assigns lanes to the next forward call, then the model calls `update` layer by layer.
    """

    def __init__(self, prefix: Prefix, lanes: int, max_length: int, max_bytes: int | None = None) -> None:
        """lanes: paths extended together. max_length: tokens a lane can hold. max_bytes: of all keys and values."""
        # The base class is only an interface here: its layers are not used.
        self.layers: list[Any] = []
        self._prefix, self._lanes, self._max_length = prefix, lanes, max(max_length, 1)
        shapes = [*prefix.keys, *prefix.values]
        length = min(FIRST_LANE_LENGTH, self._max_length)
        self._columns = [self._new_lanes(like, length) for like in shapes]  # [lanes, heads, T, dim]: keys, then values
        self._archive = Archive(shapes, self._archive_rows(max_bytes))
        self._parent, self._token, self._depth = [NONE], [NONE], [0]  # by slot
        self._lane_of = [NONE]  # by slot: a lane that may hold it
        self._path: list[list[int]] = [[] for _ in range(lanes)]  # slots a lane holds, in order of depth
        self._used_at = [0] * lanes
        self._clock = 0
        self._step: Step | None = None

    def _new_lanes(self, like: torch.Tensor, length: int) -> torch.Tensor:
        return like.new_zeros(self._lanes, like.shape[0], length, like.shape[2])

    def _archive_rows(self, max_bytes: int | None) -> int | None:
        """Tokens of idle branches that a memory bound leaves room for."""
        if max_bytes is None:
            return None
        shapes = [*self._prefix.keys, *self._prefix.values]
        token = sum(t.shape[0] * t.shape[2] * t.element_size() for t in shapes)
        needed = token * (len(self._prefix) + self._lanes * self._max_length)
        if needed > max_bytes:
            raise UsageError(
                f"max_kv_bytes={max_bytes} is too small: the prompt and {self._lanes} paths of {self._max_length} "
                f"tokens need {needed}; raise it, or lower batch_size or max_new_tokens"
            )
        return (max_bytes - needed) // token

    # -- what the model calls --------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store one layer's new keys and values, [1, heads, B, dim]; returns the layer's view, twice."""
        step, prefix = self._step, self._prefix
        assert step is not None
        lanes, positions = step.indices(key_states.device)
        keys, values = self._columns[layer_idx], self._columns[len(prefix.keys) + layer_idx]
        keys[lanes, :, positions] = key_states[0].transpose(0, 1)
        values[lanes, :, positions] = value_states[0].transpose(0, 1)
        view = LayerView(prefix.keys[layer_idx], prefix.values[layer_idx], keys, values, step)
        return view, view

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self._prefix)

    # -- what the session calls ------------------------------------------------------------------------------------

    def add(self, parent: int, token: int) -> int:
        """A new slot behind `parent`; it holds nothing until it went through the model."""
        self._parent.append(parent)
        self._token.append(token)
        self._depth.append(self._depth[parent] + 1)
        self._lane_of.append(NONE)
        return len(self._parent) - 1

    def missing(self, slot: int) -> list[int]:
        """Slots on the path to `slot` whose keys and values were given up, in order of depth."""
        lost = []
        while slot and not self._held(slot) and slot not in self._archive:
            lost.append(slot)
            slot = self._parent[slot]
        return lost[::-1]

    def begin(self, slots: Sequence[int], reserved: Sequence[int] = ()) -> tuple[list[int], list[int], list[int]]:
        """Give each slot a lane for the next forward call; parents are held. Lanes that hold a slot of `reserved` stay.

        Returns what enters the model, in this order: slots, tokens, positions.
        """
        self._clock += 1
        lanes = self._assign(
            [self._parent[slot] for slot in slots], {self._lane_of[s] for s in reserved if self._held(s)}
        )
        for slot, lane in zip(slots, lanes, strict=True):
            self._path[lane].append(slot)
            self._lane_of[slot] = lane
            self._used_at[lane] = self._clock
        ordered = sorted(slots, key=self._lane_of.__getitem__)
        lengths = [self._depth[slot] for slot in ordered]
        self._make_room(max(lengths))
        self._step = Step([self._lane_of[slot] for slot in ordered], lengths, len(self._prefix))
        positions = [len(self._prefix) + length - 1 for length in lengths]
        return ordered, [self._token[slot] for slot in ordered], positions

    def undo(self, slots: Sequence[int]) -> None:
        """Takes back `begin` for slots that did not get through the model; what it moved to lanes stays there."""
        for slot in slots:
            if self._held(slot):
                self._path[self._lane_of[slot]].pop()
            self._lane_of[slot] = NONE

    def parents(self, slots: Sequence[int]) -> list[int]:
        """The slots behind which these stand."""
        return [self._parent[slot] for slot in slots]

    def bytes(self) -> int:
        """Bytes of all keys and values, unused capacity included."""
        prefix = sum(t.nbytes for t in (*self._prefix.keys, *self._prefix.values))
        return prefix + sum(t.nbytes for t in self._columns) + self._archive.nbytes

    def held_tokens(self) -> int:
        """Token positions in use after the prompt: in lanes and in the archive."""
        return sum(map(len, self._path)) + len(self._archive)

    # -- lanes -----------------------------------------------------------------------------------------------------

    def _held(self, slot: int) -> bool:
        """Whether a lane holds the slot, and with it all its ancestors."""
        lane, depth = self._lane_of[slot], self._depth[slot]
        return lane != NONE and depth <= len(self._path[lane]) and self._path[lane][depth - 1] == slot

    def _assign(self, parents: Sequence[int], reserved: set[int]) -> list[int]:
        """A lane for each row that holds exactly the row's ancestors. Paths that go on keep theirs."""
        assigned = [NONE] * len(parents)
        taken: set[int] = set()
        for row, parent in enumerate(parents):
            lane = self._lane_of[parent]
            if lane != NONE and lane not in taken and self._path[lane][-1:] == [parent]:
                assigned[row] = lane
                taken.add(lane)
        opened = [row for row, lane in enumerate(assigned) if lane == NONE]
        contents = [self._read(parents[row]) for row in opened]  # all of them, before a lane is given away
        for row, content in zip(opened, contents, strict=True):
            free = [lane for lane in range(self._lanes) if lane not in taken | reserved]
            lane = min(free, key=lambda lane: (len(self._path[lane]) > 0, self._used_at[lane]))  # empty or oldest
            self._fill(lane, self._ancestors(parents[row]), content)
            assigned[row] = lane
            taken.add(lane)
        return assigned

    def _read(self, slot: int) -> list[torch.Tensor]:
        """Keys and values of the path to `slot`, [heads, depth, dim] each, from a lane or from the archive."""
        depth = self._depth[slot]
        if depth and not self._held(slot):
            return self._archive.read(self._ancestors(slot))
        return [column[self._lane_of[slot], :, :depth].clone() for column in self._columns]

    def _fill(self, lane: int, path: list[int], content: list[torch.Tensor]) -> None:
        self._archive.save(self._path[lane], self._columns, lane)
        self._make_room(len(path))
        for column, tensor in zip(self._columns, content, strict=True):
            column[lane, :, : len(path)] = tensor
        self._path[lane] = path
        for slot in path:
            self._lane_of[slot] = lane

    def _ancestors(self, slot: int) -> list[int]:
        path = []
        while slot:
            path.append(slot)
            slot = self._parent[slot]
        return path[::-1]

    def _make_room(self, length: int) -> None:
        for index, old in enumerate(self._columns):  # each by its own length: memory may have run out among them
            held = old.shape[2]
            if length > held:
                self._columns[index] = self._new_lanes(old[0], min(max(2 * held, length), self._max_length))
                self._columns[index][:, :, :held] = old
