"""Training on node targets: tree searches, then a trainer on what they know at every node.

Trees are searched once, with the model that the run starts from (`trees: start`), or anew for every step with the
policy as it is (`trees: policy`): see `nodetargets` for what each optimises.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import dts
from dts.models.huggingface import HFModel
from dts.rewards import Prompt, Reward, as_reward
from dts.search import MaxEnt, ScoreSoFar
from dts.search.scoring import runs_a_model
from dts.training.config import DistillSettings, TrainConfig
from dts.training.data import Row
from dts.training.grpo import distinct_prompts, fitting
from dts.training.health import Meter
from dts.training.kept import TREES, kept
from dts.training.nodetargets import Taught, mean_kl, node_losses, search_trees, taught_from
from dts.training.parts import Parts
from dts.training.sampling import in_eval_mode, stream
from dts.training.trees import TreeTrainer, step_requests, tree_trainer

log = logging.getLogger(__name__)


class NodeTargets:
    """`Objective`: KL of the policy from each tree's targets, weighted by the share of pi* that comes by. The trees are
    given, of the start of the run."""

    def __init__(self, settings: DistillSettings) -> None:
        self._settings = settings

    def prepare(self, trainer: TreeTrainer, examples: Sequence[Taught]) -> Sequence[Taught]:
        return examples

    def loss(self, trainer: TreeTrainer, model: Any, ready: Taught) -> torch.Tensor:
        logits, start = (part / self._settings.temperature for part in trainer.both(model, ready.packed))
        return target_loss(self._settings, trainer.meter, ready, logits, start, start)


class FreshTargets:
    """As `NodeTargets`, of trees that are searched with the policy as it is at the step."""

    def __init__(self, settings: DistillSettings, reward: Reward) -> None:
        self._settings, self._reward = settings, reward

    def prepare(self, trainer: TreeTrainer, examples: Sequence[Prompt]) -> Sequence[Taught]:
        lm, meter = trainer.lm, trainer.meter
        with meter.timed("draw"), in_eval_mode(lm.model):
            trees = list(searches(self._settings, lm, step_requests(trainer, examples), self._reward))
        for tree in trees:
            meter.scored(tree.reward_seconds)
            meter.add("sampled_tokens", tree.forwarded_tokens)
            meter.observe("avg_reward", tree.start_reward)
            meter.observe("target_reward", tree.reward)
        return trees

    def loss(self, trainer: TreeTrainer, model: Any, ready: Taught) -> torch.Tensor:
        logits, start = (part / self._settings.temperature for part in trainer.both(model, ready.packed))
        return target_loss(self._settings, trainer.meter, ready, logits, logits.detach(), start)


def target_loss(
    settings: DistillSettings, meter: Meter, taught: Taught, logits: torch.Tensor, searched: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The loss of a tree. logits: of the policy; searched, start: of the model that the tree was searched with, and of
    the start of the run, [rows, V] each, at the temperature."""
    weights = torch.tensor(taught.weights, device=logits.device)
    loss = (weights * node_losses(logits, searched, taught.nats)).sum()
    meter.observe("target_kl", loss.item())
    kl = (weights * mean_kl(logits, start)).sum()
    meter.observe("kl_to_start", kl.item())
    meter.add("tree_tokens", len(taught.packed.prompt_ids) + len(taught.packed.tokens))
    return loss + settings.reward_scale * settings.kl_coeff * kl


def searches(
    settings: DistillSettings, lm: HFModel, requests: Sequence[dts.Request], reward: Reward
) -> Iterator[Taught]:
    """What a search of each request teaches, in order. A reward of finished texts is asked about unfinished ones, too:
    without, a few rollouts say so little of their nodes that the targets are hardly others than p (docs/log.md)."""
    values = ScoreSoFar() if asks_unfinished(reward) else None
    return search_trees(
        lm, requests, reward=reward, method=MaxEnt(settings.rollouts, settings.reward_scale, values=values),
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
    )  # fmt: skip


def asks_unfinished(reward: Reward) -> bool:
    """Whether texts so far and next tokens are tried on a reward of finished texts: where it allows that, and runs no
    model, which would read each of them."""
    return not reward.monotone and getattr(reward, "partial", True) and not runs_a_model(reward)


def draw_trees(
    config: TrainConfig, rows: Sequence[Row], lm: HFModel, reward: Reward | Callable[..., Any], folder: Path
) -> list[Taught]:
    """What a search of each prompt teaches; kept in the folder as they come. A prompt's tree depends on the seed, and
    on nothing that training does."""
    prompts = prompts_of(config, rows, lm)

    def make(indices: range) -> Iterator[dict[str, Any]]:
        asked = [dts.Request(prompts[index], seed=stream(config.seed, index)) for index in indices]
        return (taught.as_dict() for taught in searches(config.distill, lm, asked, as_reward(reward)))

    whole = config.as_dict()
    about = {key: whole[key] for key in ("model", "data", "max_rows", "max_length", "seed", "distill")}
    with in_eval_mode(lm.model):
        records = kept(folder / TREES, {**about, "start": config.warm_start}, len(prompts), make)
    trees = [taught_from(record) for record in records]
    log.info("%d trees for %d tokens; mean reward %.4g of what was finished, %.4g by the estimate of pi*", len(trees),
             sum(tree.forwarded_tokens for tree in trees), *_means(trees))  # fmt: skip
    return trees


def prompts_of(config: TrainConfig, rows: Sequence[Row], lm: HFModel) -> list[list[dict[str, str]]]:
    """Each different prompt that leaves room for a completion."""
    return fitting(distinct_prompts(rows), lm, config.max_length - config.distill.max_new_tokens)


def _means(trees: Sequence[Taught]) -> tuple[float, float]:
    pairs = [(tree.start_reward, tree.reward) for tree in trees]
    first, second = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return first, second


def build_distill(parts: Parts) -> TreeTrainer:
    """A ready trainer; with `trees: start`, all trees are drawn. A warm start is its own reference."""
    config = parts.config
    if config.distill.trees == "policy":
        objective = FreshTargets(config.distill, as_reward(parts.judge))
        return tree_trainer(parts, prompts_of(config, parts.rows, parts.lm), objective)
    trees = draw_trees(config, parts.rows, parts.lm, parts.judge, Path(config.folder))
    return tree_trainer(parts, trees, NodeTargets(config.distill))
