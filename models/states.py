"""Recurrent and convolution states of hybrid models.

Keys and values of a path can be read up to any of its tokens. A recurrent state cannot: it is known after the token
that went through the model last, and the next token changes it. So each lane has a state of its own, a prompt has the
one after its last token, and a tree keeps copies at the slots where a path may branch. They are large. Under a bound,
those near the prompt, where DTS branches most, stay; of the others every second one is given up, then every second one
of the rest, and so on. A path that branches elsewhere sends the few tokens from the nearest kept state again, and they
are counted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dts.models.rows import Rows

_OF_LAYERS = ("conv_states", "recurrent_states")  # where transformers' cache layers hold states
_OF_MODULES = ("conv1d_state", "recurrent_states")  # where modules do that keep them themselves (RecurrentGemma)
FIRST_ROWS = 16
LACK = "no memory to keep more recurrent states: %d stay; paths that branch elsewhere send a few tokens again"

Home = tuple[dict[Any, Any], Any]  # where a forward call finds and leaves a state [B, ...]: a dict and its key


@dataclass(frozen=True, eq=False)
class PromptState:
    """What a recurrent model knows of a prompt after its last token."""

    layers: list[Any]  # the cache's layers: states and settings, no keys
    tensors: list[torch.Tensor]  # [1, ...], of the layers and then of the modules

    @property
    def nbytes(self) -> int:
        """Bytes of one state."""
        return sum(tensor.nbytes for tensor in self.tensors)


class StateHomes:
    """Every place where a model looks for states during a forward call."""

    def __init__(self, layers: Sequence[Any], modules: Iterable[nn.Module]) -> None:
        """layers: those of a cache. modules: of the model's view; the states of earlier calls are dropped."""
        self._layers, self._of_modules = layers, list(_homes_in(modules))
        for held, name in self._of_modules:
            held[name] = None

    def _homes(self) -> list[Home]:
        """Those that are in use: a cache fills its layers in the first call."""
        homes = [*_homes_of(self._layers), *self._of_modules]
        return [(held, name) for held, name in homes if held[name] is not None]

    def read(self) -> list[torch.Tensor]:
        """States [B, ...] as the last call left them; they may be the model's own tensors."""
        return [held[name] for held, name in self._homes()]

    def write(self, states: Sequence[torch.Tensor]) -> None:
        """Put states [B, ...] where the next call finds them; it may write into them."""
        for (held, name), state in zip([*_homes_of(self._layers), *self._of_modules], states, strict=True):
            held[name] = state


def _homes_of(layers: Iterable[Any]) -> Iterator[Home]:
    for layer in layers:
        for name in _OF_LAYERS:
            held = vars(layer).get(name)
            if isinstance(held, dict):
                yield from ((held, index) for index in held if held[index] is not None)
            elif held is not None:
                yield vars(layer), name


def _homes_in(modules: Iterable[nn.Module]) -> Iterator[Home]:
    for module in modules:
        held = vars(module)
        yield from ((held, name) for name in _OF_MODULES if name in held)


def settled(layers: Sequence[Any]) -> list[Any]:
    """Copies of a used cache's layers that hold their settings and states, and no keys; changing one changes no
    other."""
    made = [copy.copy(layer) for layer in layers]
    for layer in made:
        held = vars(layer)
        held.update({name: dict(value) for name, value in held.items() if isinstance(value, dict)})
        if "keys" in held:
            held.update(keys=None, values=None, is_initialized=False)
    return made


class LaneStates:
    """The state at the end of each lane, [lanes, ...] per tensor."""

    def __init__(self, like: Sequence[torch.Tensor], count: int) -> None:
        self.columns = [state.new_zeros(count, *state.shape[1:]) for state in like]
        self.nbytes = sum(column.nbytes for column in self.columns)

    def rows(self, lanes: Sequence[int]) -> list[torch.Tensor]:
        """Copies [len(lanes), ...], so that a call that fails halfway changes nothing."""
        return [column[torch.tensor(lanes, device=column.device)] for column in self.columns]

    def put(self, lanes: Sequence[int], states: Sequence[torch.Tensor]) -> None:
        """States [len(lanes), ...], or [1, ...] for all of them."""
        for column, state in zip(self.columns, states, strict=True):
            column[torch.tensor(lanes, device=column.device)] = state


class KeptStates:
    """Copies of states by slot: of every slot while there is room, then of those at every second depth, and so on. The
    first depths stay, as many as fit into a quarter of the rows."""

    def __init__(self, like: Sequence[torch.Tensor], max_rows: int) -> None:
        """like: [?, ...] per tensor."""
        self._rows = Rows([state.new_zeros(0, *state.shape[1:]) for state in like], FIRST_ROWS, max_rows, LACK)
        self._row: dict[int, int] = {}  # by slot
        self._depth: dict[int, int] = {}  # by slot
        self._first, self._stride = sys.maxsize, 1  # kept: depths up to `_first`, and multiples of `_stride`

    @property
    def nbytes(self) -> int:
        """Bytes held, those of unused rows included."""
        return self._rows.nbytes

    def __contains__(self, slot: int) -> bool:
        return slot in self._row

    def __len__(self) -> int:
        return len(self._row)

    def save(self, slots: Sequence[int], depths: Sequence[int], lanes: Sequence[int], states: LaneStates) -> None:
        """Keep what ends in these lanes, at the depths that are kept at all."""
        wanted = self._wanted(slots, depths)
        while wanted and not self._has_room(len(wanted)):
            self._thin([depths[index] for index in wanted])
            wanted = self._wanted(slots, depths)
        if not wanted:
            return
        rows = [self._rows.free.pop() for _ in wanted]
        for index, row in zip(wanted, rows, strict=True):
            self._row[slots[index]], self._depth[slots[index]] = row, depths[index]
        for column, source in zip(self._rows.columns, states.columns, strict=True):
            to, taken = (torch.tensor(each, device=column.device) for each in (rows, [lanes[i] for i in wanted]))
            column[to] = source[taken]

    def read(self, slot: int) -> list[torch.Tensor]:
        """A kept state, [1, ...] per tensor."""
        row = self._row[slot]
        return [column[row : row + 1] for column in self._rows.columns]

    def _wanted(self, slots: Sequence[int], depths: Sequence[int]) -> list[int]:
        """Indices of slots that are to be kept and are not."""
        return [i for i, slot in enumerate(slots) if self._keeps(depths[i]) and slot not in self._row]

    def _keeps(self, depth: int) -> bool:
        return depth <= self._first or depth % self._stride == 0

    def _thin(self, wanted: Sequence[int]) -> None:
        """Give up every second depth of those that are kept. wanted: depths of the slots that need room."""
        too_deep = sorted([*self._depth.values(), *wanted])[self._rows.held // 4]  # not all of this depth fit
        self._first, self._stride = min(self._first, too_deep - 1), 2 * self._stride
        for slot in [slot for slot, depth in self._depth.items() if not self._keeps(depth)]:
            self._rows.free.append(self._row.pop(slot))
            del self._depth[slot]

    def _has_room(self, wanted: int) -> bool:
        self._rows.reserve(wanted)
        return wanted <= len(self._rows.free)
