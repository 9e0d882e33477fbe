"""Decode speed against its bounds, on one prompt and many paths. One JSON line per case and implementation.

    python benchmarks/decode_speed.py --prompt 512 --paths 16 --tokens 24
    python benchmarks/decode_speed.py --prompt 1024 --paths 32 --tokens 64 --threads 1 --generate-repeats 1
    python benchmarks/decode_speed.py --search             # MaxEnt against Sampling, 64 rollouts x 32 tokens
    python benchmarks/decode_speed.py --growth             # time per rollout at 1,024 and at 32 rollouts, tiny model

ours: `Sampling` on the tree cache. generate: `model.generate(num_return_sequences=N)`. repeat: the prompt prefilled
once, its cache repeated N times. bound: one prefill plus the same batched decode with a context of one token.
bound2: that plus the arithmetic of attention over the shared prompt. Prompts are random and fresh at each repetition,
lengths are fixed, implementations take turns within one repetition; ratios are medians over repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import dts
from dts.models.huggingface import HFModel
from dts.results import Result
from dts.search import MaxEnt, Sampling


def random_prompt(lm: HFModel, length: int, seed: int) -> list[int]:
    return torch.randint(10, lm.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ours(lm: HFModel, ids: list[int], paths: int, tokens: int) -> None:
    result = dts.decode(lm, ids, method=Sampling(paths), max_new_tokens=tokens, min_new_tokens=tokens, batch_size=paths)
    assert len(result.rollouts) == paths and all(len(c.token_ids) == tokens for c in result.completions)
    assert result.usage.forwarded_tokens == result.usage.unique_tokens


@torch.inference_mode()
def generate(lm: HFModel, ids: list[int], paths: int, tokens: int) -> None:
    out = lm.model.generate(
        torch.tensor([ids]), do_sample=True, num_return_sequences=paths, max_new_tokens=tokens, min_new_tokens=tokens,
        top_k=0, pad_token_id=0,
    )  # fmt: skip
    assert out.shape == (paths, len(ids) + tokens)


def draw(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits[:, -1].softmax(-1), 1)


@torch.inference_mode()
def repeat(lm: HFModel, ids: list[int], paths: int, tokens: int) -> None:
    cache = DynamicCache()
    logits = lm.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.batch_repeat_interleave(paths)
    step = draw(logits.expand(paths, -1, -1))
    for _ in range(tokens - 1):
        step = draw(lm.model(step, past_key_values=cache, use_cache=True).logits)


@torch.inference_mode()
def bound(lm: HFModel, ids: list[int], paths: int, tokens: int, attention: bool = False) -> None:
    prompt = DynamicCache()
    lm.decoder(torch.tensor([ids]), past_key_values=prompt, use_cache=True)
    keys = [layer.keys[0] for layer in prompt.layers]  # [heads, P, dim]
    config = lm.model.config
    groups = config.num_attention_heads // keys[0].shape[0]
    query = torch.randn(keys[0].shape[0], paths * groups, keys[0].shape[2])
    cache, step = DynamicCache(), torch.full((paths, 1), 5)
    lm.model(step, past_key_values=cache, use_cache=True)
    for _ in range(tokens - 1):
        cache.crop(-1)
        step = draw(lm.model(step, past_key_values=cache, use_cache=True).logits)
        for layer in prompt.layers if attention else ():
            (query @ layer.keys[0].transpose(1, 2)).softmax(-1) @ layer.values[0]


def bound2(lm: HFModel, ids: list[int], paths: int, tokens: int) -> None:
    bound(lm, ids, paths, tokens, attention=True)


def clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(lm: HFModel, options: argparse.Namespace) -> None:
    """All implementations in turn; prints seconds and the ratio to ours."""
    contenders = {"ours": ours, "bound": bound, "bound2": bound2, "repeat": repeat, "generate": generate}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    ours(lm, random_prompt(lm, 32, 0), 2, 2)  # warm-up, with the architecture's self-check
    for repetition in range(options.repeats):
        for index, (name, run) in enumerate(contenders.items()):
            if name == "generate" and repetition >= options.generate_repeats:
                continue
            ids = random_prompt(lm, options.prompt, 1 + 10 * repetition + index)
            seconds[name].append(clock(lambda run=run, ids=ids: run(lm, ids, options.paths, options.tokens)))
    for name, taken in seconds.items():
        if taken:
            ratio = statistics.median(t / o for t, o in zip(taken, seconds["ours"], strict=False))
            emit(options, name, seconds=statistics.median(taken), to_ours=ratio, repeats=len(taken))


def search(lm: HFModel, options: argparse.Namespace) -> None:
    """MaxEnt against Sampling at the same width, per generated token."""
    ratios, taken = [], []
    for repetition in range(options.repeats):
        ids = random_prompt(lm, 512, repetition)
        arguments: dict[str, Any] = {"max_new_tokens": 32, "min_new_tokens": 32, "batch_size": 16, "seed": repetition}
        start = time.perf_counter()
        found = dts.decode(lm, ids, reward=lambda text: text.count("e") / 10, method=MaxEnt(64), **arguments)
        seconds = time.perf_counter() - start
        assert found.usage.forwarded_tokens == found.usage.unique_tokens
        samples = -(-found.usage.generated_tokens // 32)
        start = time.perf_counter()
        plain = dts.decode(lm, ids, method=Sampling(samples), **arguments)
        per_token = (time.perf_counter() - start) / plain.usage.generated_tokens
        ratios.append(seconds / found.usage.generated_tokens / per_token)
        taken.append(seconds)
    emit(options, "maxent/sampling", seconds=statistics.median(taken), ratio=statistics.median(ratios), waves=4,
         tokens=found.usage.generated_tokens, repeats=options.repeats)  # fmt: skip


def growth(options: argparse.Namespace) -> None:
    """Time per rollout late in a large tree against a small one; the model is tiny, so bookkeeping shows."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
    lm = HFModel(LlamaForCausalLM(config), NoTokenizer(), "tiny")
    per_rollout: dict[int, list[float]] = {32: [], 1024: []}
    for repetition in range(options.repeats + 1):
        for rollouts, taken in per_rollout.items():
            ids = random_prompt(lm, 64, repetition)
            seconds = clock(lambda n=rollouts, ids=ids: run_growth(lm, ids, n))
            if repetition:  # the first one warms up
                taken.append(seconds / rollouts)
    ratio = statistics.median(b / a for a, b in zip(*per_rollout.values(), strict=True))
    usage = run_growth(lm, random_prompt(lm, 64, 0), 1024).usage
    live = usage.unique_tokens - usage.prompt_tokens  # tree tokens whose keys and values exist
    emit(options, "growth 1024/32", ms_per_rollout=1e3 * statistics.median(per_rollout[1024]), ratio=ratio,
         slots_per_live_token=usage.kv_tokens / live, kv_bytes=usage.kv_bytes)  # fmt: skip


def run_growth(lm: HFModel, ids: list[int], rollouts: int) -> Result:
    method = MaxEnt(rollouts, reward_scale=2.0)
    result = dts.decode(
        lm, ids, reward=lambda text: len(set(text)) / 10, method=method, max_new_tokens=16, batch_size=8
    )
    assert len(result.rollouts) == rollouts
    return result


class NoTokenizer:
    """Ids as text."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def emit(options: argparse.Namespace, case: str, **figures: float) -> None:
    where = {"threads": options.threads, "model": options.model, "device": "cpu", "dtype": "float32"}
    size = {"prompt": options.prompt, "paths": options.paths, "length": options.tokens}
    rounded = {key: round(value, 4) for key, value in figures.items()}
    print(json.dumps({"case": case, **rounded, **size, **where}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--paths", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per path")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generate-repeats", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="MaxEnt against Sampling")
    parser.add_argument("--growth", action="store_true", help="time per rollout against the size of the tree")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.growth:
        options.model, options.prompt, options.paths, options.tokens = "tiny random Llama", 64, 8, 16
        growth(options)
        return
    if options.search:
        options.prompt, options.paths, options.tokens = 512, 16, 32
    lm = dts.load(options.model)
    (search if options.search else compare)(lm, options)


if __name__ == "__main__":
    main()
