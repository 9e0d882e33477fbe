"""GRPO (Shao et al. 2024): TRL's trainer, with groups drawn by the library's own decoder.

A group is drawn from the policy (`groups: sample`) or from a tree search over it (`groups: search`). Draws of a search
come from a tilted distribution q that is known, so their advantages are multiplied by p / q: the gradient is that of
the same expected reward, and groups hold successes where the policy alone would hardly find one.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dts.errors import UnavailableError, UsageError
from dts.models.huggingface import HFModel
from dts.rewards import Reward, as_reward
from dts.search import MaxEnt
from dts.training.config import GRPOSettings, TrainConfig, derive_accumulation
from dts.training.data import Row
from dts.training.estimator import grpo_diversity_weight
from dts.training.health import Meter, Watch
from dts.training.parts import Parts
from dts.training.rewards import as_trl, diversity_reward, runs
from dts.training.sampling import (
    Draw,
    Group,
    decoder_of,
    draw_samples,
    draw_searched,
    effective_size,
    in_eval_mode,
    stream,
)

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise UnavailableError(f"training needs trl ({error}); run: pip install 'maxent-decoding[train]'") from error

log = logging.getLogger(__name__)


def distinct_prompts(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """Each prompt once, in order; GRPO writes its own responses."""
    return [list(map(dict, key)) for key in dict.fromkeys(tuple(tuple(m.items()) for m in row.prompt) for row in rows)]


def prompts_of(config: TrainConfig, rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """The prompts of an epoch, as `grpo.prompts` says."""
    return distinct_prompts(rows) if config.grpo.prompts == "distinct" else [row.prompt for row in rows]


def check_groups(config: TrainConfig, prompts: int) -> None:
    """Raise `UsageError` where there are not enough prompts for one optimizer step."""
    size, group = config.batch_size, config.grpo.n_generations
    needed = size * derive_accumulation(size, group, config.accumulation) // group
    if prompts < needed:
        raise UsageError(
            f"{prompts} different prompts are fewer than the {needed} of one step: lower accumulation="
            f"{config.accumulation} or batch_size={size}, or give more data"
        )


class GroupTrainer(GRPOTrainer):
    """TRL's trainer with importance weights for drawn groups, and sequence sums of the KL."""

    def __init__(self, *arguments: Any, settings: GRPOSettings, reward: Reward, **options: Any) -> None:
        self._settings, self._search_reward = settings, reward
        self._meter = Meter()
        self._lm: HFModel | None = None
        self._weights: list[float] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*experimental")
            super().__init__(*arguments, rollout_func=_rollout, **options)

    def draw_groups(self, prompts: list[Any]) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """Prompt ids and completion ids, a group for each run of equal prompts; keeps their weights."""
        key = (self.args.seed, self.state.global_step, self.args.process_index)
        self._weights, prompt_ids, completion_ids = [], [], []
        self._lm = self._lm or decoder_of(self)
        planned = [
            (trained_prompt(prompt, self._settings), Draw(shown, len(prompts[members]), stream(*key, members.start)))
            for prompt, part in _groups(prompts, self._settings.n_generations)
            for shown, members in draw_plan(prompt, part, self._settings)
        ]
        with self._meter.timed("draw"), in_eval_mode(self._lm.model):
            drawn = self._draw(self._lm, [draw for _, draw in planned])
            for (trained, draw), group in zip(planned, drawn, strict=True):
                prompt_ids += [self._lm.encode(trained)] * draw.n
                completion_ids += group.token_ids
                self._weights += [math.exp(weight) for weight in group.log_weights]
                self._meter.add("sampled_tokens", group.forwarded_tokens)
                self._meter.observe("effective_group", effective_size(group.log_weights))
                self._meter.scored(group.reward_seconds)
        return prompt_ids, completion_ids

    def _draw(self, lm: HFModel, draws: Sequence[Draw]) -> Iterator[Group]:
        settings = self._settings
        common: dict[str, Any] = {
            "max_new_tokens": settings.max_completion_length, "temperature": settings.temperature,
        }  # fmt: skip
        if settings.groups == "sample":
            return (draw_samples(lm, draw.prompt, draw.n, seed=draw.seed, **common) for draw in draws)
        return draw_searched(lm, draws, reward=self._search_reward, method=group_search(settings), **common)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = output["advantages"] * torch.tensor(self._weights).to(output["advantages"])
        self._meter.observe("avg_reward", self._metrics["train"]["reward"][-1])
        return output

    def _calculate_rewards(self, *arguments: Any) -> Any:
        with self._meter.timed("score"):
            return super()._calculate_rewards(*arguments)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask, beta = inputs["completion_mask"], self.args.beta
        self._meter.add("total_loss", loss.item())
        kl_sum = self._metrics["train"]["kl"][-1] * mask.sum().item() if beta else 0.0  # TRL logs the mean per token
        self._meter.observe("kl_penalty", kl_sum / len(mask))
        if self.args.loss_type == "dr_grpo":
            scale = len(mask) * self.args.max_completion_length * self.current_gradient_accumulation_steps
        else:
            scale = max(1.0, inputs["num_items_in_batch"].item()) / self.accelerator.num_processes
        self._meter.add("policy_loss", loss.item() - beta * kl_sum / scale)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._meter.take()}, start_time)


def group_search(settings: GRPOSettings) -> MaxEnt:
    """The search that a group is drawn from. No look-ahead: it tilts the draws beyond the tree, and
    `SoftValues.log_prob`, which their weights come from, knows of no tilt."""
    return MaxEnt(settings.search_rollouts, settings.search_reward_scale, lookahead=0)


def trained_prompt(prompt: Any, settings: GRPOSettings) -> Any:
    """The prompt that a group's loss is taken on: with `examples: draw`, system messages and the last turn."""
    if settings.examples == "train" or isinstance(prompt, str):
        return prompt
    return [message for message in prompt[:-1] if message["role"] == "system"] + prompt[-1:]


def draw_plan(prompt: Any, part: slice, settings: GRPOSettings) -> list[tuple[Any, slice]]:
    """What the members of a group see. With `examples: draw` half of them, rounded up, see the earlier turns; the rest
    show what the policy does by itself, so that there is something to compare with. The draws that saw more are
    off-policy and are trained on uncorrected: the policy alone might never make them."""
    trained = trained_prompt(prompt, settings)
    if trained == prompt:
        return [(prompt, part)]
    middle = (part.start + part.stop + 1) // 2
    return [(prompt, slice(part.start, middle)), (trained, slice(middle, part.stop))]


def _rollout(prompts: list[Any], trainer: GroupTrainer) -> dict[str, Any]:
    """TRL's experimental `rollout_func`: the one place that knows its form."""
    prompt_ids, completion_ids = trainer.draw_groups(prompts)
    return {"prompt_ids": prompt_ids, "completion_ids": [list(ids) for ids in completion_ids], "logprobs": None}


def _groups(prompts: Sequence[Any], size: int) -> list[tuple[Any, slice]]:
    """The groups in a list of prompts, each repeated `size` times; neighbours may hold the same prompt."""
    if len(prompts) % size or any(part.start % size or part.stop % size for _, part in runs(prompts)):
        raise UsageError(f"{len(prompts)} prompts do not come in groups of {size}; keep each process's groups whole")
    return [(prompts[start], slice(start, start + size)) for start in range(0, len(prompts), size)]


def build_grpo(parts: Parts) -> GroupTrainer:
    """A ready trainer. A warm start is its own KL reference."""
    from datasets import Dataset

    config, lm = parts.config, parts.lm
    settings = config.grpo
    accumulation = derive_accumulation(config.batch_size, settings.n_generations, config.accumulation)
    rewards, weights = [as_trl(parts.judge, lm)], [1.0]
    if settings.diversity_weight > 0:
        rewards.append(diversity_reward)
        weights.append(grpo_diversity_weight(settings.diversity_weight, settings.n_generations))
    args = GRPOConfig(
        **{**parts.arguments, "gradient_accumulation_steps": accumulation},
        num_generations=settings.n_generations,
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        shuffle_dataset=settings.prompts == "distinct",
        top_k=0,
        beta=settings.kl_coeff,
        disable_dropout=True,  # groups are drawn without it, and the gradient and the KL must be of the same policy
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        reward_weights=weights,
    )
    return GroupTrainer(
        model=parts.model,
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in fitting_groups(parts)]),
        processing_class=parts.tokenizer,
        peft_config=parts.lora,
        callbacks=[Watch(config.model)],
        settings=settings,
        reward=as_reward(parts.judge),
    )


def fitting_groups(parts: Parts) -> list[list[dict[str, str]]]:
    """Prompts that leave room for a completion within max_length."""
    config = parts.config
    prompts = fitting(prompts_of(config, parts.rows), parts.lm, config.max_length - config.grpo.max_completion_length)
    check_groups(config, len(prompts))
    return prompts


def fitting(prompts: list[list[dict[str, str]]], lm: HFModel, room: int) -> list[list[dict[str, str]]]:
    """The prompts of at most `room` tokens; the rest is left out with a warning. Raises `UsageError` for none."""
    short = [prompt for prompt in prompts if len(lm.encode(prompt)) <= room]
    if len(short) < len(prompts):
        log.warning("%d of %d prompts left out: longer than max_length less the longest completion = %d tokens",
                    len(prompts) - len(short), len(prompts), room)  # fmt: skip
    if not short:
        raise UsageError(f"every prompt is longer than the {room} tokens that a completion leaves; raise max_length")
    return short
