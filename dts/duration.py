"""Lengths of time in words."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them; unknown for None."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
