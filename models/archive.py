"""Keys and values of idle branches: rows of one tensor per layer, given up least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from dts.models.rows import Rows

FIRST_ROWS = 256
LACK = "no memory to keep more idle branches: %d tokens stay, others are recomputed if a path comes back to them"


class Archive:
    """Tokens by slot, [rows, heads, dim] per layer and for keys and values alike.

    Every use of a path counts for all of it, ancestors last, so an ancestor always outlives its descendants and what is
    held of a path is its beginning.
    """

    def __init__(self, like: Sequence[torch.Tensor], max_rows: int | None) -> None:
        """`like`: one tensor [heads, ?, dim] per layer and kind. max_rows: None for no limit."""
        columns = [tensor.new_zeros(0, tensor.shape[0], tensor.shape[2]) for tensor in like]
        self._rows = Rows(columns, FIRST_ROWS, max_rows, LACK)
        self._row: OrderedDict[int, int] = OrderedDict()  # slot -> row, least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes held, those of unused rows included."""
        return self._rows.nbytes

    def __contains__(self, slot: int) -> bool:
        return slot in self._row

    def __len__(self) -> int:
        return len(self._row)

    def save(self, path: Sequence[int], lanes: Sequence[torch.Tensor], lane: int) -> None:
        """Keep what `lane` holds of `path`, as far as it is new and there is room. lanes: [lanes, heads, T, dim]."""
        self._use(path)
        held = sum(slot in self._row for slot in path)  # the beginning of the path
        rows = self._take(len(path) - held, keep=held)
        if not rows:
            return
        for slot, row in zip(path[held : held + len(rows)], rows, strict=True):
            self._row[slot] = row
        self._use(path)
        for column, tensor in zip(self._rows.columns, lanes, strict=True):
            index = torch.tensor(rows, device=column.device)
            column[index] = tensor[lane, :, held : held + len(rows)].transpose(0, 1)

    def read(self, path: Sequence[int]) -> list[torch.Tensor]:
        """A held path, [heads, len(path), dim] per column."""
        self._use(path)
        rows = [self._row[slot] for slot in path]
        return [column[torch.tensor(rows, device=column.device)].transpose(0, 1) for column in self._rows.columns]

    def _use(self, path: Sequence[int]) -> None:
        for slot in reversed(path):
            if slot in self._row:
                self._row.move_to_end(slot)

    def _take(self, wanted: int, keep: int) -> list[int]:
        """Up to `wanted` free rows; the `keep` most recently used slots stay."""
        free = self._rows.free
        self._rows.reserve(wanted)
        while len(free) < wanted and len(self._row) > keep:
            free.append(self._row.popitem(last=False)[1])
        rows = free[:wanted]
        del free[:wanted]
        return rows
