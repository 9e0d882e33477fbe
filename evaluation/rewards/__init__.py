"""Label-free rewards. Those that read the text as it grows are monotone: what a path earned, it keeps.

Each sees the completion, and where a task builds it, the task's input (a window, a history). None can see a
reference answer: no constructor takes one, and `dts.rewards.Context` has none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dts.evaluation.rewards.claims import Claimed, ClaimReward
from dts.evaluation.rewards.forecast import ForecastReward, NumberParser, Numbers
from dts.evaluation.rewards.generic import Format, Found, Keywords, Length, Repetition
from dts.evaluation.rewards.labels import Commit, LabelParser, LabelReward, shown
from dts.evaluation.rewards.text import TextReward

if TYPE_CHECKING:
    from dts.evaluation.rewards.models import ClassifierReward, LikelihoodReward

__all__ = [
    "ClaimReward",
    "Claimed",
    "ClassifierReward",
    "Commit",
    "ForecastReward",
    "Format",
    "Found",
    "Keywords",
    "LabelParser",
    "LabelReward",
    "Length",
    "LikelihoodReward",
    "NumberParser",
    "Numbers",
    "Repetition",
    "TextReward",
    "shown",
]


def __getattr__(name: str) -> Any:
    """Rewards that run a model import torch, which commands must not do before they have set up its threads."""
    if name not in ("ClassifierReward", "LikelihoodReward"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("dts.evaluation.rewards.models"), name)
