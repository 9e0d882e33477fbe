"""GRPO on groups that share beginnings (`groups: tree`): an advantage for each token, and one pass for a group."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import dts
from dts.results import Result
from dts.rewards import Prompt, Reward, as_reward
from dts.training.branches import Branching, Drawn, drawn_tokens, packed_draws
from dts.training.config import GRPOSettings, derive_accumulation
from dts.training.grpo import fitting_groups
from dts.training.health import Meter
from dts.training.nodetargets import mean_kl
from dts.training.packed import Packed
from dts.training.parts import Parts
from dts.training.sampling import in_eval_mode
from dts.training.trees import TreeTrainer, step_requests, tree_trainer

LEAST = 1e-4  # of the deviation that advantages are divided by, as in TRL


class TreeGroups:
    """`Objective`: draws a group for a prompt from the policy as it is, and takes GRPO's loss on it."""

    def __init__(self, settings: GRPOSettings, reward: Reward) -> None:
        self._settings, self._reward = settings, reward
        self.method = Branching(settings.tree_roots, settings.tree_segment, settings.tree_splits)

    def prepare(self, trainer: TreeTrainer, examples: Sequence[Prompt]) -> list[tuple[Packed, list[int], list[Drawn]]]:
        """A group for each prompt: its beginnings as a tree, the row of each draw, and the draws."""
        settings, lm = self._settings, trainer.lm
        with trainer.meter.timed("draw"), in_eval_mode(lm.model):
            results = dts.decode_many(
                lm, step_requests(trainer, examples), reward=self._reward, method=self.method,
                width=self.method.batch_size(), max_new_tokens=settings.max_completion_length,
                temperature=settings.temperature,
            )  # fmt: skip
            groups = [self._group(result, trainer.meter) for result in results]
        packed = [packed_draws(lm.encode(prompt), drawn) for prompt, drawn in zip(examples, groups, strict=True)]
        return [(tree, rows, drawn) for (tree, rows), drawn in zip(packed, groups, strict=True)]

    def loss(self, trainer: TreeTrainer, model: Any, ready: tuple[Packed, list[int], list[Drawn]]) -> torch.Tensor:
        packed, rows, drawn = ready
        logits, reference = (part / self._settings.temperature for part in trainer.both(model, packed))
        policy, kl, tokens = self._parts(logits, reference, drawn, rows)
        loss = policy + self._settings.kl_coeff * kl / tokens
        passes_of_step = trainer.current_gradient_accumulation_steps
        trainer.meter.add("policy_loss", policy.item() / passes_of_step)
        trainer.meter.add("total_loss", loss.item() / passes_of_step)
        trainer.meter.observe("kl_penalty", kl.item())
        return loss

    def _group(self, result: Result, meter: Meter) -> list[Drawn]:
        rewards = [rollout.reward for rollout in result.rollouts]
        ids = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
        siblings = self.method.branches(list(zip(ids, rewards, strict=True)))
        deviation = statistics.stdev(rewards)
        meter.add("sampled_tokens", result.usage.forwarded_tokens)
        meter.scored(result.usage.reward_seconds)
        meter.observe("avg_reward", statistics.fmean(branch.value for branch in siblings))
        meter.observe("frac_reward_zero_std", float(deviation == 0))
        scale = deviation + LEAST if self._settings.scale_rewards == "group" else 1.0
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


def build_tree_grpo(parts: Parts) -> TreeTrainer:
    """A ready trainer. A pass is one group, and a step as many of them as plain groups would have."""
    config = parts.config
    settings, size = config.grpo, config.batch_size
    groups = size * derive_accumulation(size, settings.n_generations, config.accumulation) // settings.n_generations
    objective = TreeGroups(settings, as_reward(parts.judge))
    return tree_trainer(
        parts, fitting_groups(parts), objective, per_device_train_batch_size=1, gradient_accumulation_steps=groups
    )
