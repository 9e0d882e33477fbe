"""Reward-guided tree-search decoding for Hugging Face causal language models.

```python
import dts
from dts.search import MaxEnt

lm = dts.load("smollm2-135m")
result = dts.decode(lm, "The weather today is", reward=my_function, method=MaxEnt(rollouts=32))
result.best.text
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dts import constraints as constraints
    from dts.decoding import decode
    from dts.errors import DTSError, ModelError, RewardError, UnavailableError, UsageError
    from dts.generation import generate
    from dts.many import Request, decode_many
    from dts.models.huggingface import load
    from dts.models.rewards import ModelReward, load_reward
    from dts.rewards import (
        CheckMonotone,
        Confidence,
        Context,
        Finished,
        Reward,
        as_reward,
        clip,
        gate,
        minimum,
        weighted_sum,
    )
    from dts.rewards.judge import JudgeReward
    from dts.settings import Budget
    from dts.timeout import with_timeout

    __version__: str

# Public names and where they live. Imported on first use: `import dts` must stay quick.
_HOMES = {
    "load": "dts.models.huggingface",
    **dict.fromkeys(["ModelReward", "load_reward"], "dts.models.rewards"),
    "decode": "dts.decoding",
    "decode_many": "dts.many",
    "Request": "dts.many",
    "generate": "dts.generation",
    "Budget": "dts.settings",
    **dict.fromkeys(["DTSError", "ModelError", "RewardError", "UnavailableError", "UsageError"], "dts.errors"),
    **dict.fromkeys(
        [
            "CheckMonotone",
            "Confidence",
            "Context",
            "Finished",
            "Reward",
            "as_reward",
            "clip",
            "gate",
            "minimum",
            "weighted_sum",
        ],
        "dts.rewards",
    ),
    "JudgeReward": "dts.rewards.judge",
    "with_timeout": "dts.timeout",
}

__all__ = [
    "Budget",
    "CheckMonotone",
    "Confidence",
    "Context",
    "DTSError",
    "Finished",
    "JudgeReward",
    "ModelError",
    "ModelReward",
    "Request",
    "Reward",
    "RewardError",
    "UnavailableError",
    "UsageError",
    "as_reward",
    "clip",
    "decode",
    "decode_many",
    "gate",
    "generate",
    "load",
    "load_reward",
    "minimum",
    "weighted_sum",
    "with_timeout",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name == "constraints":
        return importlib.import_module("dts.constraints")
    if name not in _HOMES:
        raise AttributeError(f"module 'dts' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _version() -> str:
    """Of the installed package, which has it from git's tags; "0.0" in a checkout that was not installed."""
    from importlib import metadata  # slow to import

    try:
        return metadata.version("maxent-decoding")
    except metadata.PackageNotFoundError:
        return "0.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
