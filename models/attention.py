"""Attention of many paths over one shared prompt and, each, over its own tokens: what a `TreeCache` hands to a model.

Nothing but a path's own ancestors is read, and keys and values are never repeated for grouped heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

ATTENTION = "dts_tree"  # the name under which models find it


class Step:
    """What every layer of one decode step shares: which lane each row writes, and who sees what.

    lanes, lengths: for each row of the forward call, ascending lanes and the tokens they hold with the new one.
    """

    def __init__(self, lanes: list[int], lengths: list[int], prefix_length: int) -> None:
        self.lanes, self.lengths, self.prefix_length = lanes, lengths, prefix_length
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
            lengths[lane - self.first] = held
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
        lanes = lanes - step.first
        rows = query.new_zeros(query.shape[1], width, dim).index_copy_(1, lanes, rows)
    scale = dim**-0.5 if scaling is None else scaling
    rows = (rows * scale).reshape(heads, groups, width, dim)
    part = slice(step.first, step.first + width)
    lane_keys, lane_values = view.lane_keys[part, :, :span], view.lane_values[part, :, :span]

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
    return output[None].contiguous(), None  # some families take a view of it


AttentionInterface.register(ATTENTION, tree_attention)
