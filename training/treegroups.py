"""GRPO on groups that share beginnings (`groups: tree`): an advantage for each token, and one pass for a group."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import dts
from dts.models.huggingface import HFModel
from dts.rewards import Prompt, Reward, as_reward
from dts.training.branches import Branching, Drawn, drawn_tokens, packed_draws
from dts.training.config import GRPOSettings, TrainConfig, derive_accumulation
from dts.training.data import Row
from dts.training.grpo import fitting_groups
from dts.training.nodetargets import mean_kl
from dts.training.sampling import decoder_of, in_eval_mode, stream
from dts.training.trees import TreeTrainer, adapted, trainer_options

LEAST = 1e-4  # of the deviation that advantages are divided by, as in TRL


class TreeGroups:
    """`Objective`: draws a group for a prompt from the policy as it is, and takes GRPO's loss on it."""

    def __init__(self, settings: GRPOSettings, reward: Reward) -> None:
        self._settings, self._reward = settings, reward
        self.method = Branching(settings.tree_roots, settings.tree_segment, settings.tree_splits)
        self._lm: HFModel | None = None
        self._pass = (-1, 0)  # optimizer step, passes made in it

    def loss(self, trainer: TreeTrainer, model: Any, example: Prompt) -> torch.Tensor:
        step = trainer.state.global_step
        passes = self._pass[1] + 1 if self._pass[0] == step else 0
        self._pass = (step, passes)
        self._lm = self._lm or decoder_of(trainer)
        seed = stream(trainer.args.seed, step, passes, trainer.args.process_index)
        with in_eval_mode(self._lm.model):
            drawn = self._draw(self._lm, example, seed, trainer)
        packed, rows = packed_draws(self._lm.encode(example), drawn)
        logits, reference = (part / self._settings.temperature for part in trainer.both(model, packed))
        policy, kl, tokens = self._parts(logits, reference, drawn, rows)
        loss = policy + self._settings.kl_coeff * kl / tokens
        passes_of_step = trainer.current_gradient_accumulation_steps
        trainer.meter.add("policy_loss", policy.item() / passes_of_step)
        trainer.meter.add("total_loss", loss.item() / passes_of_step)
        trainer.meter.observe("kl_penalty", kl.item())
        return loss

    def _draw(self, lm: HFModel, prompt: Prompt, seed: int, trainer: TreeTrainer) -> list[Drawn]:
        settings, meter = self._settings, trainer.meter
        result = dts.decode(
            lm, prompt, method=self.method, reward=self._reward, max_new_tokens=settings.max_completion_length,
            temperature=settings.temperature, seed=seed,
        )  # fmt: skip
        rewards = [rollout.reward for rollout in result.rollouts]
        ids = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
        siblings = self.method.branches(list(zip(ids, rewards, strict=True)))
        deviation = statistics.stdev(rewards)
        meter.add("sampled_tokens", result.usage.forwarded_tokens)
        meter.observe("avg_reward", statistics.fmean(branch.value for branch in siblings))
        meter.observe("frac_reward_zero_std", float(deviation == 0))
        scale = deviation + LEAST if settings.scale_rewards == "group" else 1.0
        return [replace(draw, advantage=draw.advantage / scale) for draw in drawn_tokens(siblings)]

    def _parts(
        self, logits: torch.Tensor, reference: torch.Tensor, drawn: Sequence[Drawn], rows: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The policy's loss for each token, the KL to the reference of a sequence, and the tokens of one, as
        `loss_type` counts them."""
        weights = torch.tensor([draw.weight for draw in drawn], device=logits.device)
        advantages = torch.tensor([draw.advantage for draw in drawn], device=logits.device)
        tokens = torch.tensor([draw.token for draw in drawn], device=logits.device)
        at = torch.tensor(rows, device=logits.device)
        log_probs = logits.log_softmax(-1)[at, tokens]
        longest, dapo = self._settings.max_completion_length, self._settings.loss_type == "dapo"
        count = weights.sum().item() if dapo else float(longest)
        kl = (weights * mean_kl(logits, reference)[at]).sum()  # of the whole distributions, not of the drawn tokens
        return -(weights * advantages * log_probs).sum() / count, kl, count


def build_tree_grpo(
    config: TrainConfig,
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    lora: Any,
    arguments: dict[str, Any],
    reward: Reward | Callable[..., Any],
) -> TreeTrainer:
    """A ready trainer; see `build_sft`. A pass is one group, and a step as many of them as plain groups would have."""
    settings, size = config.grpo, config.batch_size
    groups = size * derive_accumulation(size, settings.n_generations, config.accumulation) // settings.n_generations
    prompts = fitting_groups(config, rows, HFModel(model, tokenizer))
    arguments = {**arguments, "per_device_train_batch_size": 1, "gradient_accumulation_steps": groups}
    options = trainer_options(config, adapted(model, lora, arguments), tokenizer, arguments)
    return TreeTrainer(prompts, TreeGroups(settings, as_reward(reward)), **options)
