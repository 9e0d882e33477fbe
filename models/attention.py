"""Attention of many paths over the prompts they share and, each, over its own tokens: what a forest hands to a model.

Nothing but a path's own ancestors is read, and keys and values are never repeated for grouped heads. A stretch of a
prompt is read once for all paths after it, also of several prompts.
"""

from __future__ import annotations

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
        self._tensors: dict[tuple[str, torch.device, int | None], Any] = {}

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Lane and position that each row writes, [B] each."""
        key = ("indices", device, None)
        if key not in self._tensors:
            ends = torch.tensor([length - 1 for length in self.lengths], device=device)
            self._tensors[key] = (torch.tensor(self.lanes, device=device), ends)
        found: tuple[torch.Tensor, torch.Tensor] = self._tensors[key]
        return found

    def readers(self, device: torch.device) -> list[slice | torch.Tensor]:
        """For each span, which of the lanes that take part read it."""
        key = ("readers", device, None)
        if key not in self._tensors:
            self._tensors[key] = [self._part(span.lanes, device) for span in self.spans]
        found: list[slice | torch.Tensor] = self._tensors[key]
        return found

    def _part(self, lanes: Sequence[int], device: torch.device) -> slice | torch.Tensor:
        first, last = lanes[0] - self.first, lanes[-1] - self.first
        if last - first + 1 == len(lanes):
            return slice(first, last + 1)
        return torch.tensor(lanes, device=device) - self.first

    def hidden_keys(self, device: torch.device, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of keys a lane must not see: over the prefix [width, P] and over the lanes [width, span], or None."""
        key = ("hidden", device, window)
        if key not in self._tensors:
            self._tensors[key] = self._build_masks(device, window)
        found: tuple[torch.Tensor | None, torch.Tensor | None] = self._tensors[key]
        return found

    def _build_masks(self, device: torch.device, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        lengths, prefixes = [0] * self.width, [self.prefix_length] * self.width
        for lane, held, prefix in zip(self.lanes, self.lengths, self.prefix_lengths, strict=True):
            lengths[lane - self.first], prefixes[lane - self.first] = held, prefix
        length, behind = (torch.tensor(values, device=device)[:, None] for values in (lengths, prefixes))  # [width, 1]
        lane_position = torch.arange(self.span, device=device)[None]
        prefix_position = torch.arange(self.prefix_length, device=device)[None]
        lane_mask = lane_position >= length
        prefix_mask = prefix_position >= behind if min(prefixes) < self.prefix_length else None
        ragged = min(lengths) < self.span
        if window is not None and self.prefix_length + self.span > window:
            first_seen = behind + length - window  # a query at the lane's last position sees from here on
            outside = prefix_position < first_seen
            prefix_mask = outside if prefix_mask is None else prefix_mask | outside
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

    def score_prefixes(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Write products of queries [heads, width, groups, dim] with the keys of their prompts to `scores`
        [heads, width, groups, P], up to the end of each prompt."""
        heads, _, groups, dim = rows.shape
        readers = self.step.readers(rows.device)
        for span, part, keys in zip(self.step.spans, readers, self.prefix_keys, strict=True):
            products = torch.matmul(rows[:, part].reshape(heads, -1, dim), keys.transpose(1, 2)).float()
            scores[:, part, :, span.start : span.stop] = products.view(heads, -1, groups, keys.shape[1])

    def sum_prefixes(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums of the prompts' values with weights [heads, width, groups, P]: [heads, width, groups, dim]."""
        heads, width, groups, _ = weights.shape
        sums = weights.new_zeros(heads, width, groups, self.lane_values.shape[-1])
        readers = self.step.readers(weights.device)
        for span, part, values in zip(self.step.spans, readers, self.prefix_values, strict=True):
            picked = weights[:, part, :, span.start : span.stop].reshape(
                heads, -1, values.shape[1]
            )  # a view of a slice
            summed = torch.matmul(picked, values).view(heads, -1, groups, values.shape[2])
            if isinstance(part, slice):
                sums[:, part].add_(summed)
            else:
                sums.index_add_(1, part, summed)
        return sums


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
    groups, width, span, length = query.shape[1] // heads, step.width, step.span, step.prefix_length
    rows = query.transpose(0, 1).flatten(1, 2)  # [query heads, B, dim]
    if not step.dense:
        lanes, _ = step.indices(query.device)
        lanes = lanes - step.first
        rows = query.new_zeros(query.shape[1], width, dim).index_copy_(1, lanes, rows)
    scale = dim**-0.5 if scaling is None else scaling
    # By lanes and then by the queries of a head, so that those of one prompt are a matrix, without a copy.
    rows = (rows * scale).reshape(heads, groups, width, dim).transpose(1, 2).contiguous()
    part = slice(step.first, step.first + width)
    lane_keys, lane_values = view.lane_keys[part, :, :span], view.lane_values[part, :, :span]

    sinks = 0 if s_aux is None else 1
    every = rows.new_zeros(heads, width, groups, length + span + sinks, dtype=torch.float32)
    scores = every[..., : length + span]
    view.score_prefixes(rows, scores[..., :length])
    scores[..., length:] = torch.matmul(rows.transpose(0, 1), lane_keys.transpose(2, 3)).transpose(0, 1)
    if softcap is not None:
        scores.copy_(torch.tanh(scores / softcap) * softcap)
    prefix_mask, lane_mask = step.hidden_keys(query.device, sliding_window)
    if prefix_mask is not None:
        scores[..., :length].masked_fill_(prefix_mask[:, None], -torch.inf)
    if lane_mask is not None:
        scores[..., length:].masked_fill_(lane_mask[:, None], -torch.inf)
    if s_aux is not None:
        every[..., -1] = s_aux.float().view(heads, 1, groups)
    weights = every.softmax(-1)[..., : length + span].to(query.dtype)
    from_prefix = view.sum_prefixes(weights[..., :length])
    from_lanes = torch.matmul(weights[..., length:].transpose(0, 1), lane_values)  # [width, heads, groups, dim]
    output = (from_prefix.transpose(0, 1) + from_lanes).reshape(width, heads * groups, dim)
    if not step.dense:
        output = output.index_select(0, lanes)
    return output.reshape(query.shape[0], query.shape[2], *output.shape[1:]).contiguous(), None  # views are taken of it


AttentionInterface.register(ATTENTION, tree_attention)
