"""Settings of one experiment: values and their allowed ranges, no input or output."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from dts.errors import UsageError

WANDB_MODES = ("online", "offline", "disabled")

_AT_LEAST_ONE = ("num_samples", "num_rollouts", "max_tokens", "top_k", "rollout_batch")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """What one command runs. Field names are the option names with underscores."""

    models: tuple[str, ...] = ("smollm2-135m",)  # registry names, hub ids or local folders
    dataset: str = "HAR"
    methods: tuple[str, ...] = ("maxent", "best-of-n", "greedy")  # the first one logs without a prefix
    num_samples: int = 3
    num_rollouts: int = 10
    max_tokens: int = 50  # new tokens per completion
    reward_scale: float = 4.0  # lambda of the target p(x) exp(lambda r(x))
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    rollout_batch: int | None = None  # paths decoded together; None leaves it to the search
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    experiment_name: str | None = None
    output_dir: str = "evaluation/results"
    data_dir: str | None = None
    models_file: str | None = None
    wandb_mode: str | None = None  # None: online when logged in, otherwise offline

    def __post_init__(self) -> None:
        for name in ("models", "methods"):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise UsageError(f"{_option(name)} is empty; give at least one name")
            object.__setattr__(self, name, values)
        for name in _AT_LEAST_ONE:
            self._require(name, lambda v: _is_int(v) and v >= 1, "an integer >= 1")
        self._require("seed", lambda v: _is_int(v) and 0 <= v < 2**32, "an integer from 0 to 4294967295")
        self._require("reward_scale", lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0")
        self._require("temperature", lambda v: math.isfinite(v) and v > 0, "a finite number > 0")
        self._require("top_p", lambda v: 0 < v <= 1, "a number > 0 and <= 1")
        self._require("wandb_mode", lambda v: v in WANDB_MODES, f"one of {', '.join(WANDB_MODES)}")
        self._require("experiment_name", lambda v: _NAME.fullmatch(v), "letters, digits, '.', '_' and '-' only")

    def _require(self, name: str, allowed: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not allowed(value):
            raise UsageError(f"{_option(name)} {value!r} is not allowed: it must be {wanted}")

    @property
    def name(self) -> str:
        """The experiment's name, by default the dataset's."""
        return self.experiment_name or self.dataset

    def as_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
