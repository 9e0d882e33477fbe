"""Rows of several tensors, taken and given back one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from dts.memory import is_out_of_memory

log = logging.getLogger(__name__)


class Rows:
    """The same rows in each of several tensors [rows, ...]: more of them as they are needed, up to a limit or as far as
    memory goes."""

    def __init__(self, like: Sequence[torch.Tensor], first: int, limit: int | None, lack: str) -> None:
        """like: one tensor [0, ...] each. first: rows to begin with. limit: None for none. lack: a warning, with %d for
        the rows that there are when memory runs out."""
        self.columns = list(like)
        self.free: list[int] = []
        self.limit = limit
        self.nbytes = 0  # held, unused rows included
        self._first, self._lack = first, lack

    @property
    def held(self) -> int:
        """Rows that all tensors have; they grow in order."""
        return self.columns[-1].shape[0]

    def reserve(self, count: int) -> None:
        """Have so many free rows, as far as limit and memory allow."""
        if count <= len(self.free):
            return
        try:
            self._grow(self.held - len(self.free) + count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.limit = self.held
            log.warning(self._lack, self.limit)

    def _grow(self, wanted: int) -> None:
        held = self.held
        rows = max(wanted, 2 * held, self._first)
        rows = rows if self.limit is None else min(rows, self.limit)
        if rows <= held:
            return
        for index, old in enumerate(self.columns):
            grown = old.new_zeros(rows, *old.shape[1:])
            grown[:held] = old[:held]
            self.columns[index] = grown
            self.nbytes += grown.nbytes - old.nbytes
        self.free += range(held, rows)
