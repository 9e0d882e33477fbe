"""Figures of a step, and the warnings they call for."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dts.duration import duration
from dts.training.adapters import name_base
from dts.training.progress import Clock

log = logging.getLogger(__name__)

# Logged under these names by trackers and, with the prefix, in trainer_state.json.
TRACKED = (
    "diversity_score", "combined_loss", "quality_loss", "avg_unique_words",
    "policy_loss", "avg_reward", "kl_penalty", "total_loss", "target_kl", "kl_to_start",
)  # fmt: skip
KL_LIMIT = 50.0  # nats per sequence
KL_JUMP = 10.0  # times the median of the steps before, from 5 nats on
FLAT_STEPS = 5  # steps in a row in which every group's rewards were all equal
LITTLE_DIVERSITY = 0.05
PARTS = ("draw", "score", "loss", "update")  # of a step's time


class Meter:
    """Sums and means over the passes of one optimizer step."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._means: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """One pass's share of a sum."""
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def observe(self, name: str, value: float) -> None:
        """One value of a mean."""
        self._means.setdefault(name, []).append(float(value))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the seconds spent to `time_PART`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"time_{part}", time.perf_counter() - start)

    def scored(self, seconds: float) -> None:
        """So many of the seconds that went to drawing were the reward's."""
        self.add("time_draw", -seconds)
        self.add("time_score", seconds)

    def take(self) -> dict[str, float]:
        """The step's figures; the meter is empty afterwards."""
        figures = {**self._sums, **{name: statistics.fmean(values) for name, values in self._means.items()}}
        self._sums, self._means = {}, {}
        return figures


def findings(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong after the last of these logged steps: kind -> message with the fix."""
    if not history:
        return {}
    last, found = history[-1], {}
    kl, before = last.get("kl_penalty"), [h["kl_penalty"] for h in history[:-1] if "kl_penalty" in h]
    jumped = kl is not None and len(before) >= FLAT_STEPS and kl > max(5.0, KL_JUMP * statistics.median(before))
    if kl is not None and (jumped or kl > KL_LIMIT):
        found["kl"] = f"KL to the reference is {kl:.1f} nats per sequence: lower learning_rate or raise grpo.kl_coeff"
    recent = [h.get("frac_reward_zero_std") for h in history[-FLAT_STEPS:]]
    if len(recent) == FLAT_STEPS and all(share == 1 for share in recent):
        found["flat"] = (
            f"no group had two different rewards for {FLAT_STEPS} steps, so nothing is learned: raise "
            "grpo.n_generations or grpo.temperature, set grpo.groups=search, or use a finer reward"
        )
    diversity = last.get("diversity_score")
    if diversity is not None and diversity < LITTLE_DIVERSITY:
        found["diversity"] = (
            f"diversity is {diversity:.3f}: samples are nearly alike, or the gate rejects them; lower learning_rate, "
            "raise polychromic.weight, or look at the gate"
        )
    if last.get("combined_loss", 0.0) > last.get("quality_loss", 0.0):
        found["combined"] = (
            "the combined loss is above the quality loss: the diversity was negative; check the distance"
        )
    return found


class Watch(TrainerCallback):
    """Logs each finding when it first appears, writes the tracked names and the times of a step's parts into the
    history, and has checkpoints name the base model."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._warned: set[str] = set()
        self._clock = Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.begin(state.log_history)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.after_update()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.log_history or "loss" not in state.log_history[-1]:
            return
        record = state.log_history[-1]
        record.update(self._clock.figures(record))
        found = findings(state.log_history)
        for kind in found.keys() - self._warned:
            log.warning("step %d: %s", state.global_step, found[kind])
        self._warned = set(found)
        record.update({f"train/{name}": record[name] for name in TRACKED if name in record})
        if args.disable_tqdm:  # else a bar shows them
            left = duration(self._clock.left(state.max_steps - state.global_step))
            log.info("step %d of %d: %s; %s left", state.global_step, state.max_steps, _line(record), left)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name_base(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._base, kwargs["model"])
        self._clock.go_on()


def _line(record: Mapping[str, Any]) -> str:
    names = ("loss", "learning_rate", *TRACKED)
    figures = [f"{name} {record[name]:.4g}" for name in names if isinstance(record.get(name), int | float)]
    parts = [f"{part} {record[f'time_{part}']:.2g} s" for part in PARTS if f"time_{part}" in record]
    rate = "time_tokens_per_second"
    return ", ".join([*figures, *parts, *([f"{record[rate]:.0f} tokens/s"] if rate in record else [])])
