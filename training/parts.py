"""What a trainer is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dts.models.huggingface import HFModel
from dts.rewards import Reward
from dts.training.config import TrainConfig
from dts.training.data import Row


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one run."""

    config: TrainConfig
    rows: Sequence[Row]
    model: Any
    tokenizer: Any
    lora: Any  # configuration of a new adapter; None for a warm start, whose adapter the model has
    arguments: dict[str, Any]  # of `transformers.TrainingArguments`
    reward: Reward | Callable[..., Any] | None = None  # of grpo and distill

    @property
    def lm(self) -> HFModel:
        """The model as something to decode with."""
        return HFModel(self.model, self.tokenizer)

    @property
    def judge(self) -> Reward | Callable[..., Any]:
        """The reward, of a method that has one."""
        assert self.reward is not None
        return self.reward
