"""Completions drawn from the model in training, prompt by prompt, through the library's own decoder.

Draws depend on the given seed alone, never on the global random state: training with and without them goes through
the same random numbers, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dts
from dts.models.huggingface import HFModel
from dts.rewards import Prompt, Reward
from dts.search import MaxEnt, Sampling


@dataclass(frozen=True, slots=True)
class Group:
    """Completions of one prompt."""

    prompt_ids: list[int]
    token_ids: list[tuple[int, ...]]  # with the EOS token where one was generated
    texts: list[str]
    log_weights: list[float]  # log of p / q of each draw, q the distribution it was drawn from; 0 for draws from p
    forwarded_tokens: int
    reward_seconds: float = 0.0


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Without dropout and gradients meanwhile, and back in its mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def decoder_of(trainer: Any) -> HFModel:
    """A trainer's model as something to decode with; its mode stays as it is."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return HFModel(model, trainer.processing_class, name="model in training")


def stream(*key: int) -> int:
    """A seed that depends on all numbers of the key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def draw_samples(lm: HFModel, prompt: Prompt, n: int, *, max_new_tokens: int, temperature: float, seed: int) -> Group:
    """n independent draws from p."""
    result = dts.decode(
        lm, prompt, method=Sampling(n), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    ids = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
    texts = [rollout.text for rollout in result.rollouts]
    return Group(lm.encode(prompt), ids, texts, [0.0] * n, result.usage.forwarded_tokens)


@dataclass(frozen=True, slots=True)
class Draw:
    """How many completions of which prompt."""

    prompt: Prompt
    n: int
    seed: int


def draw_searched(
    lm: HFModel, draws: Sequence[Draw], *, reward: Reward, method: MaxEnt, max_new_tokens: int, temperature: float
) -> Iterator[Group]:
    """For each of `draws`, n independent draws from the tree's estimate q of p exp(lambda r) / Z, with their weights
    p / q. The searches share a batch.

    The rollouts that build the tree depend on one another and have no such weight; given the finished tree, `sample`
    draws independently from a known q, so that the mean of weight * f is an unbiased estimate of E_p[f].
    """
    results = dts.decode_many(
        lm, [dts.Request(draw.prompt, seed=draw.seed) for draw in draws], reward=reward, method=method,
        width=method.batch_size(), max_new_tokens=max_new_tokens, temperature=temperature,
    )  # fmt: skip
    for draw, result in zip(draws, results, strict=True):
        assert result.values is not None
        own = result.sample(draw.n, draw.seed)
        log_weights = [one.logprob - result.values.log_prob(one.token_ids, one.token_logprobs) for one in own]
        texts, ids = [one.text for one in own], [one.token_ids for one in own]
        yield Group(
            lm.encode(draw.prompt), ids, texts, log_weights, result.usage.forwarded_tokens, result.usage.reward_seconds
        )


def effective_size(log_weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2: how many unweighted draws the weighted ones are worth; Kong 1992."""
    top = max(log_weights)
    weights = [math.exp(w - top) for w in log_weights]
    return math.fsum(weights) ** 2 / math.fsum(w * w for w in weights)
