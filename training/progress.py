"""How a run is going: where a step's time went, how fast it is, how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = {"loss": "loss", "avg_reward": "reward", "kl_penalty": "KL", "kl_to_start": "KL", "diversity_score": "D"}


class Clock:
    """Seconds of the steps of a run, checkpoints not counted."""

    def __init__(self) -> None:
        self._mark = self._updating = 0.0
        self._update = 0.0  # of this step
        self._tokens = 0.0  # that TRL had counted before this step
        self._seconds, self._steps = 0.0, 0

    def begin(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Before the first step; history: of the steps before a resume."""
        self._tokens = next((row["num_tokens"] for row in reversed(history) if "num_tokens" in row), 0.0)
        self.go_on()

    def go_on(self) -> None:
        """After what is no part of a step, such as a checkpoint."""
        self._mark = time.perf_counter()

    def before_update(self) -> None:
        self._updating = time.perf_counter()

    def after_update(self) -> None:
        self._update = time.perf_counter() - self._updating

    def figures(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Of the step whose figures are in `record`: seconds of the loss (forward and backward) and of the update,
        beside those of drawing and scoring that are there, and tokens a second of the whole step."""
        now = time.perf_counter()
        whole, self._mark = now - self._mark, now
        self._seconds, self._steps = self._seconds + whole, self._steps + 1
        other = record.get("time_draw", 0.0) + record.get("time_score", 0.0) + self._update
        found = {"time_loss": max(0.0, whole - other), "time_update": self._update}
        tokens = record.get("sampled_tokens") or record.get("tree_tokens")
        if tokens is None and "num_tokens" in record:
            tokens, self._tokens = record["num_tokens"] - self._tokens, record["num_tokens"]
        return found if tokens is None else {**found, "time_tokens_per_second": tokens / whole}

    def left(self, steps: int) -> float:
        """Seconds that so many more steps will take."""
        return steps * self._seconds / max(1, self._steps)


def shown(record: Mapping[str, Any]) -> str:
    """The figures that a display has room for."""
    parts = [f"{label} {record[name]:.3g}" for name, label in SHOWN.items() if name in record]
    if "time_tokens_per_second" in record:
        parts.append(f"{record['time_tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


class Bar(TrainerCallback):
    """A progress bar with loss, reward, KL, tokens a second and the time that is left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and state.log_history and "loss" in state.log_history[-1]:
            self._bar.set_postfix_str(shown(state.log_history[-1]), refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
