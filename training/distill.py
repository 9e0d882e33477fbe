"""Training on node targets: searches with the model that the run starts from, then a trainer on their trees."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dts.models.huggingface import HFModel
from dts.rewards import Reward, as_reward
from dts.search import MaxEnt
from dts.training.config import TrainConfig
from dts.training.data import Row
from dts.training.grpo import distinct_prompts, fitting
from dts.training.kept import TREES, kept
from dts.training.nodetargets import Taught, mean_kl, node_losses, search_trees, taught_from
from dts.training.sampling import in_eval_mode, stream
from dts.training.trees import TreeTrainer, adapted, trainer_options

log = logging.getLogger(__name__)


class NodeTargets:
    """`Objective`: KL of the policy from each tree's targets, weighted by the share of pi* that comes by."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def loss(self, trainer: TreeTrainer, model: Any, example: Taught) -> torch.Tensor:
        logits, reference = trainer.both(model, example.packed)
        logits, reference = logits / self._temperature, reference / self._temperature
        weights = torch.tensor(example.weights, device=logits.device)
        loss = (weights * node_losses(logits, reference, example.nats)).sum()
        trainer.meter.observe("target_kl", loss.item())
        with torch.no_grad():
            trainer.meter.observe("kl_to_start", (weights * mean_kl(logits, reference)).sum().item())
        trainer.meter.add("tree_tokens", len(example.packed.prompt_ids) + len(example.packed.tokens))
        return loss


def draw_trees(
    config: TrainConfig, rows: Sequence[Row], lm: HFModel, reward: Reward | Callable[..., Any], folder: Path
) -> list[Taught]:
    """What a search of each prompt teaches; kept in the folder as they come. A prompt's tree depends on the seed, and
    on nothing that training does."""
    settings = config.distill
    prompts = fitting(distinct_prompts(rows), lm, config.max_length - settings.max_new_tokens)

    def make(indices: range) -> list[dict[str, Any]]:
        asked = [(prompts[index], stream(config.seed, index)) for index in indices]
        found = search_trees(
            lm, asked, reward=as_reward(reward), method=MaxEnt(settings.rollouts, settings.reward_scale),
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        )  # fmt: skip
        return [taught.as_dict() for taught in found]

    whole = config.as_dict()
    about = {key: whole[key] for key in ("model", "data", "max_rows", "max_length", "seed", "distill")}
    with in_eval_mode(lm.model):
        records = kept(folder / TREES, {**about, "start": config.warm_start}, len(prompts), make)
    trees = [taught_from(record) for record in records]
    log.info("%d trees for %d tokens; mean reward %.4g of what was finished, %.4g by the estimate of pi*", len(trees),
             sum(tree.forwarded_tokens for tree in trees), *_means(trees))  # fmt: skip
    return trees


def _means(trees: Sequence[Taught]) -> tuple[float, float]:
    pairs = [(tree.start_reward, tree.reward) for tree in trees]
    first, second = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return first, second


def build_distill(
    config: TrainConfig,
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    lora: Any,
    arguments: dict[str, Any],
    reward: Reward | Callable[..., Any],
) -> TreeTrainer:
    """A ready trainer, with all trees drawn; see `build_sft`. A warm start is its own reference."""
    trees = draw_trees(config, rows, HFModel(model, tokenizer), reward, Path(config.folder))
    options = trainer_options(config, adapted(model, lora, arguments), tokenizer, arguments)
    return TreeTrainer(trees, NodeTargets(config.distill.temperature), **options)
