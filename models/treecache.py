"""A key/value cache shaped like the tree, for unmodified Hugging Face decoders.

Three places hold keys and values, per layer:

- the *prefix*: the prompt, once, [heads, P, dim]; every path attends to it as one matrix product;
- *lanes*: one per path being extended, [lanes, heads, T, dim]; a path attends to its own lane only, so neither other
  paths nor idle branches are read;
- the *archive*: tokens of branches that lost their lane, [slots, heads, dim]; a path that starts from deep in the tree
  gathers its ancestors from there once, or takes over a lane that already holds them.

A decode step is one forward call of B tokens (`input_ids` [1, B], `position_ids` = prompt length + depth). The model's
own attention asks the cache for keys and values; the cache stores the new ones and hands out a `LayerView`, which
`tree_attention` reads. Keys and values are never repeated for grouped heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from dts.tree import NONE

ATTENTION = "dts_tree"
FIRST_LANE_LENGTH = 64
FIRST_ARCHIVE_SLOTS = 256


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt that went through the model: keys and values per layer, [heads, P, dim], and its last hidden state."""

    token_ids: tuple[int, ...]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: torch.Tensor  # [hidden]

    def __len__(self) -> int:
        return len(self.token_ids)


class Step:
    """What every layer of one decode step shares: which lane each row writes, and who sees what.

    lanes, lengths: for each row of the forward call, ascending lanes and the tokens they hold with the new one.
    """

    def __init__(self, lanes: list[int], lengths: list[int], prefix_length: int) -> None:
        self.lanes, self.lengths, self.prefix_length = lanes, lengths, prefix_length
        self.width = lanes[-1] + 1  # lanes that take part; idle ones among them are computed and dropped
        self.span = max(lengths)  # lane positions that take part
        self.dense = self.width == len(lanes)
        self._tensors: dict[tuple[str, torch.device, int | None], Any] = {}

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Lane and position that each row writes, [B] each."""
        key = ("indices", device, None)
        if key not in self._tensors:
            ends = torch.tensor([length - 1 for length in self.lengths], device=device)
            self._tensors[key] = (torch.tensor(self.lanes, device=device), ends)
        found: tuple[torch.Tensor, torch.Tensor] = self._tensors[key]
        return found

    def hidden_keys(self, device: torch.device, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of keys a lane must not see: over the prefix [width, P] and over the lanes [width, span], or None."""
        key = ("hidden", device, window)
        if key not in self._tensors:
            self._tensors[key] = self._build_masks(device, window)
        found: tuple[torch.Tensor | None, torch.Tensor | None] = self._tensors[key]
        return found

    def _build_masks(self, device: torch.device, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        lengths = [0] * self.width
        for lane, held in zip(self.lanes, self.lengths, strict=True):
            lengths[lane] = held
        length = torch.tensor(lengths, device=device)[:, None]  # [width, 1]
        lane_position = torch.arange(self.span, device=device)[None]
        lane_mask = lane_position >= length
        prefix_mask = None
        if window is not None and self.prefix_length + self.span > window:
            first_seen = self.prefix_length + length - window  # a query at the lane's last position sees from here on
            prefix_mask = torch.arange(self.prefix_length, device=device)[None] < first_seen
            lane_mask = lane_mask | (lane_position + self.prefix_length < first_seen)
        ragged = prefix_mask is not None or min(lengths) < self.span
        return prefix_mask, lane_mask if ragged else None


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's keys and values during one step."""

    prefix_keys: torch.Tensor  # [heads, P, dim]
    prefix_values: torch.Tensor
    lane_keys: torch.Tensor  # [lanes, heads, T, dim]
    lane_values: torch.Tensor
    step: Step


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: LayerView,
    value: LayerView,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of B paths over the shared prefix and their own lanes.

    query: [1, query heads, B, dim]. Returns [1, B, query heads, dim].
    """
    step, view = key.step, key
    heads, _, dim = view.prefix_keys.shape
    groups, width, span = query.shape[1] // heads, step.width, step.span
    rows = query[0]  # [query heads, B, dim]
    if not step.dense:
        lanes, _ = step.indices(query.device)
        rows = query.new_zeros(query.shape[1], width, dim).index_copy_(1, lanes, rows)
    scale = dim**-0.5 if scaling is None else scaling
    rows = (rows * scale).reshape(heads, groups, width, dim)
    lane_keys, lane_values = view.lane_keys[:width, :, :span], view.lane_values[:width, :, :span]

    over_prefix = torch.matmul(rows.reshape(heads, groups * width, dim), view.prefix_keys.transpose(1, 2))
    over_lanes = torch.matmul(rows.permute(2, 0, 1, 3), lane_keys.transpose(2, 3))  # [width, heads, groups, span]
    length = view.prefix_keys.shape[1]
    scores = torch.cat(
        [over_prefix.reshape(heads, groups, width, length), over_lanes.permute(1, 2, 0, 3)], dim=-1
    ).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    prefix_mask, lane_mask = step.hidden_keys(query.device, sliding_window)
    if prefix_mask is not None:
        scores[..., :length].masked_fill_(prefix_mask, -torch.inf)
    if lane_mask is not None:
        scores[..., length:].masked_fill_(lane_mask, -torch.inf)
    weights = scores.softmax(-1).to(query.dtype)
    from_prefix = torch.matmul(weights[..., :length].reshape(heads, groups * width, length), view.prefix_values).view(
        heads, groups, width, dim
    )
    from_lanes = torch.matmul(weights[..., length:].permute(2, 0, 1, 3), lane_values)  # [width, heads, groups, dim]
    output = (from_prefix.permute(2, 0, 1, 3) + from_lanes).reshape(width, heads * groups, dim)
    if not step.dense:
        output = output.index_select(0, lanes)
    return output[None], None


AttentionInterface.register(ATTENTION, tree_attention)


class TreeCache(Cache):
    """Keys and values of one prompt's tree. Tokens are named by slots; slot 0 is the prompt.

    `begin` assigns lanes to the next forward call, the model calls `update` layer by layer, `end` closes the call.
    """

    def __init__(self, prefix: Prefix, lanes: int, max_length: int) -> None:
        # The base class is only an interface here: its layers are not used.
        self.layers: list[Any] = []
        self._prefix, self._lanes, self._max_length = prefix, lanes, max(max_length, 1)
        length = min(FIRST_LANE_LENGTH, self._max_length)
        self._keys = [self._new_lanes(k, length) for k in prefix.keys]  # [lanes, heads, T, dim] per layer
        self._values = [self._new_lanes(v, length) for v in prefix.values]
        self._archive_keys: list[torch.Tensor] = []  # [slots, heads, dim] per layer, allocated when first needed
        self._archive_values: list[torch.Tensor] = []
        self._parent, self._depth = [NONE], [0]  # by slot
        self._lane_of = [NONE]  # by slot: a lane that may hold it
        self._archived = [True]  # by slot
        self._path: list[list[int]] = [[] for _ in range(lanes)]  # slots a lane holds, in order of depth
        self._used_at = [0] * lanes
        self._clock = 0
        self._step: Step | None = None

    def _new_lanes(self, like: torch.Tensor, length: int) -> torch.Tensor:
        return like.new_zeros(self._lanes, like.shape[0], length, like.shape[2])

    # -- what the model calls --------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store one layer's new keys and values, [1, heads, B, dim]; returns the layer's view, twice."""
        step = self._step
        assert step is not None
        lanes, positions = step.indices(key_states.device)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[lanes, :, positions] = key_states[0].transpose(0, 1)
        values[lanes, :, positions] = value_states[0].transpose(0, 1)
        prefix = self._prefix
        view = LayerView(prefix.keys[layer_idx], prefix.values[layer_idx], keys, values, step)
        return view, view

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self._prefix)

    # -- what the session calls ------------------------------------------------------------------------------------

    def begin(self, parents: Sequence[int]) -> tuple[list[int], list[int]]:
        """Give each parent's child a lane and a slot. Returns the order in which the rows must enter the model
        (indices into `parents`) and the new slots, in the order of `parents`."""
        self._clock += 1
        lane_of_row = self._assign(parents)
        slots = []
        for parent, lane in zip(parents, lane_of_row, strict=True):
            slot = len(self._parent)
            self._parent.append(parent)
            self._depth.append(self._depth[parent] + 1)
            self._lane_of.append(lane)
            self._archived.append(False)
            self._path[lane].append(slot)
            self._used_at[lane] = self._clock
            slots.append(slot)
        order = sorted(range(len(parents)), key=lane_of_row.__getitem__)
        lengths = [self._depth[slots[row]] for row in order]
        self._make_room(max(lengths))
        self._step = Step([lane_of_row[row] for row in order], lengths, len(self._prefix))
        return order, slots

    def depth(self, slot: int) -> int:
        """Tokens after the prompt."""
        return self._depth[slot]

    def bytes(self) -> int:
        """Bytes of all keys and values, prefix and unused capacity included."""
        tensors = [*self._prefix.keys, *self._prefix.values, *self._keys, *self._values]
        return sum(t.nbytes for t in [*tensors, *self._archive_keys, *self._archive_values])

    # -- lanes -----------------------------------------------------------------------------------------------------

    def _assign(self, parents: Sequence[int]) -> list[int]:
        """A lane for each row that holds exactly the row's ancestors. Paths that go on keep theirs."""
        assigned = [NONE] * len(parents)
        taken: set[int] = set()
        for row, parent in enumerate(parents):
            lane = self._lane_of[parent]
            if lane != NONE and lane not in taken and self._path[lane][-1:] == [parent]:
                assigned[row] = lane
                taken.add(lane)
        for row, parent in enumerate(parents):
            if assigned[row] == NONE:
                lane = self._open_lane(parent, taken)
                assigned[row] = lane
                taken.add(lane)
        return assigned

    def _open_lane(self, parent: int, taken: set[int]) -> int:
        """A free lane, filled with the path to `parent`."""
        depth, source = self._depth[parent], self._lane_of[parent]
        held = source != NONE and depth <= len(self._path[source]) and self._path[source][depth - 1] == parent
        if held and depth and source not in taken:
            self._save(source)
            del self._path[source][depth:]
            return source
        free = [lane for lane in range(self._lanes) if lane not in taken]
        lane = min(free, key=lambda lane: (len(self._path[lane]) > 0, self._used_at[lane]))  # empty, else least recent
        self._save(lane)
        path = self._ancestors(parent)
        if held and depth:
            for column in (*self._keys, *self._values):
                column[lane, :, :depth] = column[source, :, :depth]
        elif depth:
            self._load(lane, path)
        self._path[lane] = path
        for slot in path:
            self._lane_of[slot] = lane
        return lane

    def _ancestors(self, slot: int) -> list[int]:
        path = []
        while slot:
            path.append(slot)
            slot = self._parent[slot]
        return path[::-1]

    def _save(self, lane: int) -> None:
        """Copy what only this lane holds into the archive."""
        new = [(position, slot) for position, slot in enumerate(self._path[lane]) if not self._archived[slot]]
        if not new:
            return
        first, slots = new[0][0], [slot for _, slot in new]
        self._grow_archive()
        for lanes, archive in zip(
            (*self._keys, *self._values), (*self._archive_keys, *self._archive_values), strict=True
        ):
            index = torch.tensor(slots, device=archive.device)
            archive[index] = lanes[lane, :, first : first + len(slots)].transpose(0, 1)
        for slot in slots:
            self._archived[slot] = True

    def _load(self, lane: int, path: list[int]) -> None:
        """Gather an archived path into a lane."""
        self._make_room(len(path))
        for lanes, archive in zip(
            (*self._keys, *self._values), (*self._archive_keys, *self._archive_values), strict=True
        ):
            index = torch.tensor(path, device=archive.device)
            lanes[lane, :, : len(path)] = archive[index].transpose(0, 1)

    # -- capacity --------------------------------------------------------------------------------------------------

    def _make_room(self, length: int) -> None:
        held = self._keys[0].shape[2]
        if length > held:
            wanted = min(max(2 * held, length), self._max_length)
            for columns in (self._keys, self._values):
                for layer, old in enumerate(columns):
                    columns[layer] = self._new_lanes(old[0], wanted)
                    columns[layer][:, :, :held] = old

    def _grow_archive(self) -> None:
        held = self._archive_keys[0].shape[0] if self._archive_keys else 0
        if len(self._parent) > held:
            slots = max(2 * held, len(self._parent), FIRST_ARCHIVE_SLOTS)
            self._archive_keys = self._grown(self._archive_keys, self._prefix.keys, held, slots)
            self._archive_values = self._grown(self._archive_values, self._prefix.values, held, slots)

    @staticmethod
    def _grown(old: list[torch.Tensor], like: list[torch.Tensor], held: int, slots: int) -> list[torch.Tensor]:
        new = [tensor.new_zeros(slots, tensor.shape[0], tensor.shape[2]) for tensor in like]
        for column, before in zip(new, old, strict=False):
            column[:held] = before
        return new
