"""A key/value cache shaped like the tree, for unmodified Hugging Face decoders.

Three places hold keys and values, per layer:

- the *prefixes*: each prompt once, in segments [heads, P, dim], a beginning that prompts share being one of them; all
  paths after a segment attend to it as one matrix product (`dts.models.prefixes`);
- *lanes*: one per path being extended, [lanes, heads, T, dim], a block of them for each tree; a path attends to its
  own lane only, so neither other paths nor idle branches are read;
- the *archive*: tokens of branches that lost their lane, [rows, heads, dim]; a path that starts from deep in the tree
  gathers its ancestors from there once, or takes over a lane that already holds them. Under a memory bound the least
  recently used branches are given up; the session sends their tokens through the model again if a path comes back.

A decode step is one forward call of B tokens, of one tree or of many (`input_ids` [1, B], `position_ids` = prompt
length + depth). The model's own attention asks the cache for keys and values; the cache stores the new ones and hands
out a `LayerView`, which `dts.models.attention` reads.

Layers with a recurrent state (`dts.models.states`) and attention code that takes nothing but tensors
(`dts.models.gathered`) get a row for each path instead (`input_ids` [B, 1]).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from dts.models.archive import Archive
from dts.models.attention import LayerView, Step
from dts.models.gathered import Paths
from dts.models.prefixes import Segment
from dts.models.states import KeptStates, LaneStates
from dts.tree import NONE

FIRST_LANE_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Place:
    """What a tree gets of a forest: a block of lanes, room for tokens of idle branches (None: no limit) and, of a
    recurrent model, for copies of states."""

    first: int
    count: int
    archive_rows: int | None
    state_rows: int = 0


class Lanes:
    """Keys and values of the paths being extended: [lanes, heads, T, dim] per layer, all keys before all values."""

    def __init__(
        self, like: Sequence[torch.Tensor], count: int, max_length: int, states: Sequence[torch.Tensor] = ()
    ) -> None:
        """`like`: one tensor [heads, ?, dim] per layer and kind. max_length: tokens a lane can hold. states: shapes of
        the recurrent states, [?, ...]."""
        self.count, self._max_length = count, max_length
        self.states = LaneStates(states, count)
        length = min(FIRST_LANE_LENGTH, max_length)
        self.columns = [tensor.new_zeros(count, tensor.shape[0], length, tensor.shape[2]) for tensor in like]
        self.nbytes = self.states.nbytes + sum(column.nbytes for column in self.columns)  # unused capacity included

    def make_room(self, length: int) -> None:
        """Let every lane hold `length` tokens."""
        for index, old in enumerate(self.columns):  # each by its own length: memory may have run out among them
            count, heads, held, dim = old.shape
            if length > held:
                grown = old.new_zeros(count, heads, min(max(2 * held, length), self._max_length), dim)
                grown[:, :, :held] = old
                self.columns[index] = grown
                self.nbytes += grown.nbytes - old.nbytes


class StepCache(Cache):
    """What the model sees of prefixes and lanes during one forward call."""

    def __init__(self, lanes: Lanes, layers: Sequence[Any] = (), gathered: bool = False) -> None:
        """layers: of transformers' own cache; recurrent layers find their states in them. gathered: hand out tensors
        instead of views."""
        self.layers: list[Any] = list(layers)
        self._lanes = lanes
        self._gathered = gathered
        self._step: Step | None = None
        self.paths: Paths | None = None  # of the step, where tensors are handed out
        self._segments: Sequence[Segment] = ()

    def begin(self, step: Step, segments: Sequence[Segment]) -> None:
        """segments: those of the step's spans, in their order."""
        self._step, self._segments = step, segments
        self.paths = Paths(step) if self._gathered else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store one layer's new keys and values, [1, heads, B, dim] or [B, heads, 1, dim]; returns the layer's view,
        twice, or the keys and values of all paths."""
        step, columns = self._step, self._lanes.columns
        assert step is not None
        lanes, positions = step.indices(key_states.device)
        keys, values = columns[layer_idx], columns[len(columns) // 2 + layer_idx]
        keys[lanes, :, positions] = key_states.transpose(1, 2).flatten(0, 1)
        values[lanes, :, positions] = value_states.transpose(1, 2).flatten(0, 1)
        prefix_keys = [segment.held.keys[layer_idx] for segment in self._segments]
        prefix_values = [segment.held.values[layer_idx] for segment in self._segments]
        if self.paths is not None:
            return self.paths.gather(prefix_keys, keys), self.paths.gather(prefix_values, values)
        view = LayerView(prefix_keys, prefix_values, keys, values, step)
        return view, view

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this call."""
        if self.paths is not None:
            return self.paths.longest - 1
        return self._step.prefix_length if self._step else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys and the position of the first one."""
        return self.get_seq_length(layer_idx) + 1, 0


class TreeCache:
    """Which slots of one prompt's tree are held where. Tokens are named by slots; slot 0 is the prompt.

    `begin` assigns lanes to the next forward call, which fills them.
    """

    def __init__(self, prompt: Segment, lanes: Lanes, place: Place) -> None:
        self.prefix_length = prompt.stop
        self._parent, self._token, self._depth = [NONE], [NONE], [0]  # by slot
        self.move(prompt, lanes, place)

    def move(self, prompt: Segment | None, lanes: Lanes, place: Place) -> None:
        """Start again in other lanes: the slots stay, but nothing of them is held."""
        first, count = place.first, place.count
        self._lanes, self._share = lanes, count / lanes.count
        self._archive = Archive([column[0] for column in lanes.columns], place.archive_rows)
        state = prompt.held.state if prompt else None
        self._start = state.tensors if state else []  # the recurrent state after the prompt
        self._kept = KeptStates(self._start, place.state_rows) if state else None
        self._lane_of = [NONE] * len(self._parent)  # by slot: a lane that may hold it
        self._path: dict[int, list[int]] = {lane: [] for lane in range(first, first + count)}  # slots, by depth
        self._used_at = dict.fromkeys(self._path, 0)
        self._clock = 0

    def clear(self) -> None:
        """Hold nothing."""
        self.move(None, Lanes([], 1, 1), Place(0, 0, 0))

    # -- what the session calls ------------------------------------------------------------------------------------

    def add(self, parent: int, token: int) -> int:
        """A new slot after `parent`; it holds nothing until it went through the model."""
        self._parent.append(parent)
        self._token.append(token)
        self._depth.append(self._depth[parent] + 1)
        self._lane_of.append(NONE)
        return len(self._parent) - 1

    def missing(self, slot: int) -> list[int]:
        """Slots on the path to `slot` that go through the model again before it can be continued, in order of depth:
        their keys and values were given up, or a recurrent state that follows from theirs."""
        lost = []
        while slot and not (self._has_keys(slot) and self._has_state(slot)):
            lost.append(slot)
            slot = self._parent[slot]
        return lost[::-1]

    def __len__(self) -> int:
        """Slots, the prompt's included."""
        return len(self._parent)

    def begin(self, slots: Sequence[int], reserved: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Give each slot a lane for the next forward call; parents are held. Lanes that hold a slot of `reserved` stay.

        Returns the slots in the order in which they enter the model, and their lanes, ascending.
        """
        self._clock += 1
        ready = [slot for slot in reserved if self._held(slot) and self._has_state(slot)]
        lanes = self._assign([self._parent[slot] for slot in slots], ready)
        for slot, lane in zip(slots, lanes, strict=True):
            self._path[lane].append(slot)
            self._lane_of[slot] = lane
            self._used_at[lane] = self._clock
        ordered = sorted(slots, key=self._lane_of.__getitem__)
        self._lanes.make_room(max(self._depth[slot] for slot in ordered))
        return ordered, [self._lane_of[slot] for slot in ordered]

    def read(self, slot: int) -> list[torch.Tensor]:
        """Keys and values of the path to a held slot, [heads, depth, dim] each, all keys before all values."""
        return self._read(slot)

    def adopt(self, slot: int, tokens: Sequence[int], content: Sequence[torch.Tensor]) -> list[int]:
        """New slots after `slot`, computed elsewhere. content: of the whole path, as `read` would give it for the last
        of them."""
        new = list(itertools.accumulate(tokens, self.add, initial=slot))[1:]
        self._clock += 1
        lane = self._idle(self._path)
        self._fill(lane, self._ancestors(new[-1]), list(content))
        self._used_at[lane] = self._clock
        return new

    def tokens(self, slots: Sequence[int]) -> list[int]:
        return [self._token[slot] for slot in slots]

    def depths(self, slots: Sequence[int]) -> list[int]:
        """Tokens from the prompt to these slots, they included."""
        return [self._depth[slot] for slot in slots]

    def keep_states(self, slots: Sequence[int]) -> None:
        """Slots went through the model: copy their recurrent states for branches."""
        if self._kept is not None:
            lanes = [self._lane_of[slot] for slot in slots]
            self._kept.save(slots, self.depths(slots), lanes, self._lanes.states)

    def undo(self, slots: Sequence[int]) -> None:
        """Takes back `begin` for slots that did not get through the model; what it moved to lanes stays there."""
        for slot in slots:
            if self._held(slot):
                self._path[self._lane_of[slot]].pop()
            self._lane_of[slot] = NONE

    def parents(self, slots: Sequence[int]) -> list[int]:
        """The slots that these follow."""
        return [self._parent[slot] for slot in slots]

    def bytes(self) -> int:
        """Bytes of its lanes and its archive, unused capacity included."""
        kept = self._kept.nbytes if self._kept else 0
        return round(self._lanes.nbytes * self._share) + self._archive.nbytes + kept

    def held_tokens(self) -> int:
        """Token positions in use after the prompt: in lanes and in the archive."""
        return sum(map(len, self._path.values())) + len(self._archive)

    # -- lanes -----------------------------------------------------------------------------------------------------

    def _held(self, slot: int) -> bool:
        """Whether a lane holds the slot, and with it all its ancestors."""
        lane, depth = self._lane_of[slot], self._depth[slot]
        return lane != NONE and depth <= len(self._path[lane]) and self._path[lane][depth - 1] == slot

    def _has_keys(self, slot: int) -> bool:
        return self._held(slot) or slot in self._archive

    def _has_state(self, slot: int) -> bool:
        return self._kept is None or slot in self._kept or self._ends_lane(slot)

    def _ends_lane(self, slot: int) -> bool:
        lane = self._lane_of[slot]
        return lane != NONE and self._path[lane][-1:] == [slot]

    def _assign(self, parents: Sequence[int], reserved: Sequence[int]) -> list[int]:
        """A lane for each row that holds exactly the row's ancestors. Paths that continue keep theirs."""
        assigned = [NONE] * len(parents)
        taken: set[int] = set()
        waiting = {self._lane_of[slot] for slot in reserved}
        # A lane's state is lost when the lane continues: others that wait for it need it.
        needed = {slot for slot in reserved if self._kept is not None and slot not in self._kept}
        for row, parent in enumerate(parents):
            lane = self._lane_of[parent]
            if self._ends_lane(parent) and lane not in taken and parent not in needed:
                assigned[row] = lane
                taken.add(lane)
        opened = [row for row, lane in enumerate(assigned) if lane == NONE]
        # All of them, before a lane is given away.
        contents = [(self._read(parents[row]), self._state(parents[row])) for row in opened]
        for row, (content, state) in zip(opened, contents, strict=True):
            lane = self._idle(lane for lane in self._path if lane not in taken and lane not in waiting)
            self._fill(lane, self._ancestors(parents[row]), content)
            self._lanes.states.put([lane], state)
            assigned[row] = lane
            taken.add(lane)
        return assigned

    def _idle(self, lanes: Iterable[int]) -> int:
        """An empty one of these lanes, or the one that was used longest ago."""
        return min(lanes, key=lambda lane: (len(self._path[lane]) > 0, self._used_at[lane]))

    def _read(self, slot: int) -> list[torch.Tensor]:
        """Keys and values of the path to `slot`, [heads, depth, dim] each, from a lane or from the archive."""
        depth = self._depth[slot]
        if depth and not self._held(slot):
            return self._archive.read(self._ancestors(slot))
        return [column[self._lane_of[slot], :, :depth].clone() for column in self._lanes.columns]

    def _state(self, slot: int) -> list[torch.Tensor]:
        """The recurrent state after a slot, [1, ...] per tensor; empty for other models."""
        if self._kept is None or not slot:
            return self._start
        return self._lanes.states.rows([self._lane_of[slot]]) if self._ends_lane(slot) else self._kept.read(slot)

    def _fill(self, lane: int, path: list[int], content: list[torch.Tensor]) -> None:
        self._archive.save(self._path[lane], self._lanes.columns, lane)
        self._lanes.make_room(len(path))
        for column, tensor in zip(self._lanes.columns, content, strict=True):
            column[lane, :, : len(path)] = tensor
        self._path[lane] = path
        for slot in path:
            if self._kept is None or not self._ends_lane(slot):  # a lane that ends there has its state, too
                self._lane_of[slot] = lane

    def _ancestors(self, slot: int) -> list[int]:
        path = []
        while slot:
            path.append(slot)
            slot = self._parent[slot]
        return path[::-1]
