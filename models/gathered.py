"""Keys and values of whole paths, for families whose attention code takes nothing but tensors.

They are copied together for each layer of each step, which costs about as much as reading them twice more; every token
still goes through the model once. Paths end at the same column and shorter ones are padded in front, as in batches of
`generate`, so windows and biases that count distances from the last token are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from dts.models.attention import Step


class Paths:
    """Where the tokens of each path of a step are."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._totals = [prefix + own for prefix, own in zip(step.prefix_lengths, step.lengths, strict=True)]
        self.longest = max(self._totals)
        self._uneven = len({*zip(step.prefix_lengths, step.lengths, strict=True)}) > 1
        self._readers = [[row for row, lane in enumerate(step.lanes) if lane in held]
                         for held in (set(span.lanes) for span in step.spans)]  # fmt: skip
        self._index: dict[torch.device, torch.Tensor] = {}

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """1 where a path has a token, [B, longest]; None if all have."""
        if min(self._totals) == self.longest:
            return None
        return (self._positions >= 0).long().to(device)

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Position in its path of each column, [B, longest]; negative for padding."""
        return torch.arange(self.longest)[None] - (self.longest - torch.tensor(self._totals)[:, None])

    def _columns(self, device: torch.device) -> torch.Tensor:
        """Columns of the prompts, padded to the longest, and then of the lanes, in which the tokens are."""
        if device not in self._index:
            prefix = torch.tensor(self._step.prefix_lengths)[:, None]
            gap = self._step.prefix_length - prefix  # padding of a prompt
            found = torch.where(self._positions < prefix, self._positions, self._positions + gap).clamp(min=0)
            self._index[device] = found.to(device)
        return self._index[device]

    def gather(self, prompts: Sequence[torch.Tensor], lanes: torch.Tensor) -> torch.Tensor:
        """[B, heads, longest, dim] from each span's [heads, P, dim] and the lanes' [lanes, heads, T, dim]."""
        step, device = self._step, lanes.device
        rows, (heads, _, dim) = len(step.lanes), lanes.shape[1:]
        prefix = lanes.new_zeros(rows, heads, step.prefix_length, dim)
        for span, held, readers in zip(step.spans, prompts, self._readers, strict=True):
            prefix[readers, :, span.start : span.stop] = held
        whole = torch.cat([prefix, lanes[step.indices(device)[0], :, : step.span]], dim=2)
        if not self._uneven:
            return whole
        return whole.gather(2, self._columns(device)[:, None, :, None].expand(-1, heads, -1, dim))
