"""A tree of tokens as one sequence: one forward pass in which every token stands once.

A token's position is its depth, and the attention mask lets it see the prompt, its own ancestors and itself. So its
logits are those of the path that leads to it, and what paths share is computed once, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dts.errors import UnavailableError

TOLERANCE = 1e-3  # of logits in float32, relative to the largest; models that ignore the mask are far off
LOW_PRECISION = 0.1


@dataclass(frozen=True, slots=True)
class Packed:
    """Row 0 is the prompt's last token, every other row one token after its parent's row."""

    prompt_ids: tuple[int, ...]  # not empty
    tokens: tuple[int, ...]  # of rows 1 to N
    parents: tuple[int, ...]  # of rows 1 to N: an earlier row

    @property
    def rows(self) -> int:
        return len(self.tokens) + 1

    def depths(self) -> list[int]:
        """Tokens after the prompt, by row."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def path(self, row: int) -> list[int]:
        """The rows after row 0 that lead to `row`."""
        path = []
        while row:
            path.append(row)
            row = self.parents[row - 1]
        return path[::-1]

    def mask(self) -> torch.Tensor:
        """Which position each position may see, [L, L] with L = prompt + N."""
        start, count = len(self.prompt_ids), len(self.tokens)
        seen = torch.ones(start + count, start + count, dtype=torch.bool).tril()
        below = torch.eye(count, dtype=torch.bool)
        for row, parent in enumerate(self.parents):
            if parent:
                below[row] |= below[parent - 1]
        seen[start:, start:] = below
        return seen


def tree_logits(model: Any, packed: Packed) -> torch.Tensor:
    """Next-token logits after each row, [rows, V], with gradients."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*packed.prompt_ids, *packed.tokens]], device=device)
    start = len(packed.prompt_ids)
    positions = [*range(start), *(start + depth - 1 for depth in packed.depths()[1:])]
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    seen = packed.mask()
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=hidden[None, None].to(device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=packed.rows,
        use_cache=False,
    ).logits[0]
    return logits


@torch.no_grad()
def check_packing(model: Any, packed: Packed) -> None:
    """Raise `UnavailableError` for a model that does not take a tree: recurrent states, windows shorter than a path.
    Compares the deepest path with a plain forward pass."""
    depths = packed.depths()
    rows = [0, *packed.path(depths.index(max(depths)))]
    ids = [*packed.prompt_ids, *(packed.tokens[row - 1] for row in rows[1:])]
    device = next(model.parameters()).device
    plain = model(input_ids=torch.tensor([ids], device=device), logits_to_keep=len(rows), use_cache=False).logits[0]
    found = tree_logits(model, packed)[rows]
    allowed = TOLERANCE if plain.dtype == torch.float32 else LOW_PRECISION
    difference = ((found - plain).abs().max() / plain.abs().max().clamp(min=1.0)).item()
    if not difference <= allowed:
        raise UnavailableError(
            f"{type(model).__name__} gives other logits for a tree in one pass than for its paths (by {difference:.2g} "
            "of the largest), as models with states or short windows do; use method: grpo with grpo.groups=sample, or "
            "sft"
        )


def ancestors_sum(parents: Sequence[int], values: Sequence[float]) -> list[float]:
    """Each row's value plus those of all rows below it. parents: of rows 1 to N; values: of rows 0 to N."""
    sums = list(values)
    for row in range(len(parents), 0, -1):
        sums[parents[row - 1]] += sums[row]
    return sums
