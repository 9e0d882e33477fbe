"""Attention of many paths over the prompts they share and, each, over its own tokens: what a forest hands to a model.

Nothing but a path's own ancestors is read, and keys and values are never repeated for grouped heads. A stretch of a
prompt is read once for all paths after it, also of several prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

ATTENTION = "dts_tree"  # the name under which models find it


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of prompt, from position `start` to `stop`, and the lanes whose prompts hold it, ascending."""

    start: int
    stop: int
    lanes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring lanes that read the same spans: lanes `start` to `stop`, counted from the first that takes part."""

    start: int
    stop: int
    parts: list[tuple[int, int]]  # spans by index, and how many lanes before these read each


class Step:
    """What every layer of one decode step shares: which lane each row writes, and who sees what.

    lanes, lengths, prefix_lengths: for each row of the forward call, ascending lanes, the tokens they hold with the
    new one, and the tokens of their prompts.
    """

    def __init__(
        self, lanes: Sequence[int], lengths: Sequence[int], prefix_lengths: Sequence[int], spans: Sequence[Span]
    ) -> None:
        self.lanes, self.lengths, self.prefix_lengths, self.spans = lanes, lengths, prefix_lengths, spans
        self.prefix_length = max(prefix_lengths)
        self.first = lanes[0]
        self.width = lanes[-1] + 1 - self.first  # lanes that take part; idle ones among them are computed and dropped
        self.span = max(lengths)  # lane positions that take part
        self.dense = self.width == len(lanes)
        self.blocks, self.readers = self._who_reads_what()
        self._tensors: dict[tuple[str, torch.device, int | None], Any] = {}

    def _who_reads_what(self) -> tuple[list[Block], list[list[tuple[int, int]]]]:
        """The blocks, and for each span the lanes that read it, as ranges."""
        read: list[list[int]] = [[] for _ in range(self.width)]  # spans by lane
        for index, span in enumerate(self.spans):
            for lane in span.lanes:
                read[lane - self.first].append(index)
        blocks, readers, start = [], [[] for _ in self.spans], 0  # type: ignore[var-annotated]
        for spans, neighbours in itertools.groupby(read):
            stop = start + sum(1 for _ in neighbours)
            blocks.append(Block(start, stop, [(index, sum(b - a for a, b in readers[index])) for index in spans]))
            for index in spans:
                if readers[index] and readers[index][-1][1] == start:
                    readers[index][-1] = readers[index][-1][0], stop
                else:
                    readers[index].append((start, stop))
            start = stop
        return blocks, readers

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
        lengths, prefixes = [self.span] * self.width, [self.prefix_length] * self.width  # idle lanes see everything
        for lane, held, prefix in zip(self.lanes, self.lengths, self.prefix_lengths, strict=True):
            lengths[lane - self.first], prefixes[lane - self.first] = held, prefix
        length, behind = (torch.tensor(values, device=device)[:, None] for values in (lengths, prefixes))  # [width, 1]
        lane_position = torch.arange(self.span, device=device)[None]
        prefix_position = torch.arange(self.prefix_length, device=device)[None]
        lane_mask = lane_position >= length
        prefix_mask = None
        ragged = min(lengths) < self.span
        if window is not None and self.prefix_length + self.span > window:
            first_seen = behind + length - window  # a query at the lane's last position sees from here on
            prefix_mask = prefix_position < first_seen
            lane_mask = lane_mask | (lane_position + behind < first_seen)
            ragged = True
        return prefix_mask, lane_mask if ragged else None


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's keys and values during one step."""

    prefix_keys: list[torch.Tensor]  # of each span of the step, [heads, tokens, dim]
    prefix_values: list[torch.Tensor]
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
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of B paths over their prompts and their own lanes.

    query: [1, query heads, B, dim] or [B, query heads, 1, dim]. s_aux: attention sinks, a score [query heads] of
    nothing. Returns [1, B, query heads, dim] or [B, 1, query heads, dim].
    """
    step, view = key.step, key
    _, heads, _, dim = view.lane_keys.shape
    groups, width, span, size = query.shape[1] // heads, step.width, step.span, view.lane_values.shape[3]
    rows = query.transpose(0, 1).flatten(1, 2)  # [query heads, B, dim]
    if not step.dense:
        lanes, _ = step.indices(query.device)
        lanes = lanes - step.first
        rows = query.new_zeros(query.shape[1], width, dim).index_copy_(1, lanes, rows)
    scale = dim**-0.5 if scaling is None else scaling
    # By lanes and then by the queries of a head, so that those of one prompt are a matrix, without a copy.
    rows = (rows * scale).reshape(heads, groups, width, dim).transpose(1, 2).reshape(heads, width * groups, dim)
    part = slice(step.first, step.first + width)
    lane_keys, lane_values = view.lane_keys[part, :, :span], view.lane_values[part, :, :span]

    def capped(scores: torch.Tensor) -> torch.Tensor:
        return scores.float() if softcap is None else torch.tanh(scores.float() / softcap) * softcap

    by_lane = rows.view(heads, width, groups, dim).transpose(0, 1)  # [width, heads, groups, dim]
    on_lanes = capped(torch.matmul(by_lane, lane_keys.transpose(2, 3)))
    prefix_mask, lane_mask = step.hidden_keys(query.device, sliding_window)
    if lane_mask is not None:
        on_lanes.masked_fill_(lane_mask[:, None, None], -torch.inf)
    on_spans = [
        capped(torch.bmm(_rows_of(rows, ranges, groups), keys.transpose(1, 2)))
        for ranges, keys in zip(step.readers, view.prefix_keys, strict=True)
    ]
    own = on_lanes.transpose(0, 1).reshape(heads, width * groups, span)
    if s_aux is not None:  # one more column that has no value
        sinks = s_aux.float().view(heads, 1, groups, 1).expand(heads, width, groups, 1)
        own = torch.cat([own, sinks.reshape(heads, width * groups, 1)], dim=-1)
    lane_weights, span_weights = _weights(step, own, on_spans, prefix_mask, query.dtype)
    lane_weights = lane_weights[..., :span]
    by_lane = lane_weights.reshape(heads, width, groups, span).transpose(0, 1)
    output = torch.matmul(by_lane, lane_values).transpose(0, 1).reshape(heads, width * groups, size)
    for ranges, weights, values in zip(step.readers, span_weights, view.prefix_values, strict=True):
        _add_rows(output, torch.bmm(weights, values), ranges, groups)
    output = output.view(heads, width, groups, size).transpose(0, 1).reshape(width, heads * groups, size)
    if not step.dense:
        output = output.index_select(0, lanes)
    return output.reshape(query.shape[0], query.shape[2], *output.shape[1:]).contiguous(), None  # views are taken of it


def _rows_of(rows: torch.Tensor, ranges: Sequence[tuple[int, int]], groups: int) -> torch.Tensor:
    """The queries [heads, n * groups, dim] of some ranges of lanes: a view where there is one."""
    parts = [rows[:, start * groups : stop * groups] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_rows(output: torch.Tensor, sums: torch.Tensor, ranges: Sequence[tuple[int, int]], groups: int) -> None:
    """Undo `_rows_of`, adding."""
    place = 0
    for start, stop in ranges:
        count = (stop - start) * groups
        output[:, start * groups : stop * groups].add_(sums[:, place : place + count])
        place += count


def _weights(
    step: Step,
    on_lanes: torch.Tensor,
    on_spans: Sequence[torch.Tensor],
    prefix_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Softmax of scores [heads, width * groups, columns] over the lanes and [heads, readers * groups, tokens] over each
    span, block by block, so that no prompt is padded to the length of another. Returns weights of the same shapes."""
    heads, groups, columns = on_lanes.shape[0], on_lanes.shape[1] // step.width, on_lanes.shape[2]
    of_lanes: list[torch.Tensor] = []
    of_spans: list[list[torch.Tensor]] = [[] for _ in on_spans]
    for block in step.blocks:
        first, count = block.start * groups, (block.stop - block.start) * groups
        parts = [on_spans[index][:, before * groups : before * groups + count] for index, before in block.parts]
        scores = torch.cat([*parts, on_lanes[:, first : first + count]], dim=-1)
        if prefix_mask is not None:
            length = scores.shape[2] - columns
            hidden = prefix_mask[block.start : block.stop, None, :length]
            scores.view(heads, -1, groups, length + columns)[..., :length].masked_fill_(hidden, -torch.inf)
        *found, own = scores.softmax(-1).to(dtype).split([*(part.shape[2] for part in parts), columns], dim=-1)
        of_lanes.append(own)
        for (index, _), weights in zip(block.parts, found, strict=True):
            of_spans[index].append(weights)
    return _joined(of_lanes), [_joined(weights) for weights in of_spans]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


AttentionInterface.register(ATTENTION, tree_attention)
