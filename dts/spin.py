"""How long idle threads wait in a loop before they sleep."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Let PyTorch's OpenMP threads sleep when they have nothing to do. The commands call it before torch is imported,
    because OpenMP reads its settings then.

    By default these threads spin for a while, and a step takes several times as long where another process wants the
    cores (docs/performance.md has the table). What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
