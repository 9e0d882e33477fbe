"""Many prompts in one batch, against one wide search and against one prompt after another. One JSON line per case.

    python benchmarks/many.py                   # SmolLM2: 16 prompts of 64 to 512 tokens, MaxEnt(32) x 32 tokens
    python benchmarks/many.py --lengths 64 256 --rollouts 16 --tokens 24     # a third of the work
    python benchmarks/many.py --tiny            # tiny Llama: Sampling(8) over 8 prompts against transformers
    python benchmarks/many.py --profile         # where a step's time goes, SmolLM2

many: `decode_many`, width 4, 64 paths in flight. wide: one search at width 64 with as many rollouts as all prompts
together. one by one: `decode` at width 4 on each prompt. prompts: the prompts of `many` alone, of which `wide` has one.
generate: 8 sequences for each prompt in one padded batch. generate_batch: continuous batching of 8 requests for each.
`many` gets --max-kv-bytes; the peak of the keys and values that it held is measured at every forward call.
Figures are CPU seconds of one thread per generated token, medians over repetitions; the implementations take turns
within one repetition, and ratios are medians of ratios within repetitions. Prompts are random, lengths are fixed.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from decode_speed import NoTokenizer, random_prompt
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import dts
from dts.models.forest import Forest, Part
from dts.models.huggingface import HFModel
from dts.results import Result
from dts.search import MaxEnt, Sampling


def reward(text: str) -> float:
    return text.count("e") / 10


def many(lm: HFModel, prompts: Sequence[list[int]], options: argparse.Namespace) -> list[Result]:
    results = list(dts.decode_many(
        lm, prompts, reward=reward, method=MaxEnt(options.rollouts, reward_scale=4.0), batch_size=options.batch_size,
        width=options.width, max_new_tokens=options.tokens, min_new_tokens=options.tokens,
        max_kv_bytes=options.max_kv_bytes,
    ))  # fmt: skip
    assert all(r.usage.forwarded_tokens == r.usage.unique_tokens for r in results)
    return results


def one_by_one(lm: HFModel, prompts: Sequence[list[int]], options: argparse.Namespace) -> list[Result]:
    return [dts.decode(
        lm, ids, reward=reward, method=MaxEnt(options.rollouts, reward_scale=4.0), batch_size=options.width,
        max_new_tokens=options.tokens, min_new_tokens=options.tokens, seed=seed,
    ) for seed, ids in enumerate(prompts)]  # fmt: skip


def wide(lm: HFModel, prompts: Sequence[list[int]], options: argparse.Namespace) -> list[Result]:
    middle = sorted(prompts, key=len)[len(prompts) // 2]
    return [dts.decode(
        lm, middle, reward=reward, method=MaxEnt(options.rollouts * len(prompts), reward_scale=4.0),
        batch_size=options.batch_size, max_new_tokens=options.tokens, min_new_tokens=options.tokens,
    )]  # fmt: skip


def prompts_only(lm: HFModel, prompts: Sequence[list[int]], options: argparse.Namespace) -> list[Result]:
    return list(dts.decode_many(lm, prompts, method=Sampling(1), max_new_tokens=1, width=options.width))


def ragged(lm: HFModel, options: argparse.Namespace, seed: int) -> list[list[int]]:
    """Prompts whose lengths are spread evenly from the shortest to the longest."""
    shortest, longest = options.lengths
    step = (longest - shortest) / max(options.prompts - 1, 1)
    return [random_prompt(lm, round(shortest + i * step), 1000 * seed + i) for i in range(options.prompts)]


def watch_memory() -> list[int]:
    """Bytes of keys and values held after each forward call from now on: lanes, archives, prompts."""
    held: list[int] = []
    forward = Forest._forward_all

    def watched(self: Forest, parts: Sequence[Part]) -> None:
        forward(self, parts)
        trees = [tree for tree, _, _ in parts]
        prompts = {id(s): s.held.nbytes for tree in trees if tree.prompt for s in tree.prompt.chain()}
        archives = sum(tree.cache.bytes() - round(self.lanes.nbytes * tree.cache._share) for tree in trees)
        held.append(self.lanes.nbytes + archives + sum(prompts.values()))

    Forest._forward_all = watched  # type: ignore[method-assign]
    return held


def searches(lm: HFModel, options: argparse.Namespace) -> None:
    cases: dict[str, Callable[..., list[Result]]] = {
        "many": many, "prompts": prompts_only, "wide": wide, "one by one": one_by_one
    }  # fmt: skip
    cases = {name: run for name, run in cases.items() if name not in options.without}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    tokens, peak, held = 1, 0, watch_memory()
    for repetition in range(options.repeats):
        prompts = ragged(lm, options, repetition)
        for name, run in cases.items():
            held.clear()
            start = time.process_time()
            results = run(lm, prompts, options)
            seconds = time.process_time() - start
            if name == "many":
                peak = max(peak, *held)
                assert peak <= options.max_kv_bytes
            if name != "prompts":
                tokens = sum(result.usage.generated_tokens for result in results)
            taken[name].append(seconds / tokens)
            print(name, f"{seconds:.1f} s", tokens, file=sys.stderr, flush=True)
    for name, per_token in taken.items():
        emit(
            options, name, ms_per_token=1e3 * statistics.median(per_token), many_to_this=ratio(taken["many"], per_token)
        )
    more = [per_token - prompts for per_token, prompts in zip(taken["many"], taken["prompts"], strict=True)]
    emit(options, "many without prompts", ms_per_token=1e3 * statistics.median(more),
         to_wide=ratio(more, taken["wide"]), peak_kv_bytes=peak)  # fmt: skip


def tiny(options: argparse.Namespace) -> None:
    """`Sampling(8)` over 8 prompts, and what transformers has for 8 sequences of each."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
    lm = HFModel(LlamaForCausalLM(config), NoTokenizer(), "tiny")
    for lengths in ((16, 16), (256, 256), (16, 256)):
        options.lengths, options.prompts = lengths, 8
        cases: dict[str, Callable[[HFModel, list[list[int]], int], None]] = {
            "decode_many": sampled, "generate": padded, "generate_batch": continuous, "one by one": sampled_one_by_one
        }  # fmt: skip
        cases = {name: run for name, run in cases.items() if name not in options.without}
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for repetition in range(options.repeats + 1):
            prompts = ragged(lm, options, repetition)
            for name, run in cases.items():
                start = time.process_time()
                run(lm, prompts, options.tokens)
                if repetition:  # the first one warms up
                    taken[name].append((time.process_time() - start) / (64 * options.tokens))
        for name, per_token in taken.items():
            emit(options, f"tiny {name}", ms_per_token=1e3 * statistics.median(per_token),
                 many_to_this=ratio(taken["decode_many"], per_token))  # fmt: skip


def sampled(lm: HFModel, prompts: Sequence[list[int]], tokens: int) -> None:
    results = list(dts.decode_many(lm, prompts, method=Sampling(8), batch_size=64, width=8, max_new_tokens=tokens,
                                   min_new_tokens=tokens))  # fmt: skip
    assert [len(result.rollouts) for result in results] == [8] * len(prompts)


def sampled_one_by_one(lm: HFModel, prompts: Sequence[list[int]], tokens: int) -> None:
    for ids in prompts:
        dts.decode(lm, ids, method=Sampling(8), batch_size=8, max_new_tokens=tokens, min_new_tokens=tokens)


def continuous(lm: HFModel, prompts: Sequence[list[int]], tokens: int) -> None:
    """Its cache has the blocks that these requests need: by default it fills the memory there is, which on a CPU takes
    many times as long."""
    page = 256
    blocks = sum(8 * -(-(len(ids) + tokens) // page) for ids in prompts)
    settings = GenerationConfig(do_sample=True, max_new_tokens=tokens, top_k=0, eos_token_id=-1, pad_token_id=0)
    found = lm.model.generate_batch(
        inputs=[ids for ids in prompts for _ in range(8)], generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=1024),
    )  # fmt: skip
    assert [len(one.generated_tokens) for one in found.values()] == [tokens] * (8 * len(prompts))


@torch.inference_mode()
def padded(lm: HFModel, prompts: Sequence[list[int]], tokens: int) -> None:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = lm.model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=8, max_new_tokens=tokens,
                            min_new_tokens=tokens, top_k=0, pad_token_id=0)  # fmt: skip
    assert out.shape == (64, longest + tokens)


PARTS = {  # of the time; each holds what is called inside it
    "steps": ("models/forest.py", "_forward_all"), "attention": ("models/attention.py", "tree_attention"),
    "head": ("models/view.py", "head"), "prefill": ("models/sessions.py", "send"),
    "p": ("dts/settings.py", "probabilities"), "draw": ("search/readings.py", "answer"),
    "runs": ("search/method.py", "_step"),
}  # fmt: skip


def shares(lm: HFModel, options: argparse.Namespace) -> None:
    """Where the time goes, by the profiler of Python, which makes small calls look longer than they are."""
    with cProfile.Profile() as profile:
        many(lm, ragged(lm, options, 0), options)
    stats = pstats.Stats(profile)
    calls: Any = stats.stats  # type: ignore[attr-defined]
    seconds = {
        part: sum(entry[3] for (path, _, name), entry in calls.items() if path.endswith(file) and name == function)
        for part, (file, function) in PARTS.items()
    }
    total: float = stats.total_tt  # type: ignore[attr-defined]
    emit(options, "profile", seconds=total, **{part: taken / total for part, taken in seconds.items()})
    stats.sort_stats("tottime").print_stats(15)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def emit(options: argparse.Namespace, case: str, **figures: float) -> None:
    settings = {name: value for name, value in vars(options).items() if name not in ("tiny", "profile", "without")}
    rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
    print(json.dumps({"case": case, **rounded, **settings, "threads": torch.get_num_threads()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs=2, default=(64, 512), help="tokens of the prompts, from and to")
    parser.add_argument("--rollouts", type=int, default=32, help="per prompt")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-kv-bytes", type=int, default=2**30, help="bound on the keys and values of `many`")
    parser.add_argument("--without", nargs="+", default=[], metavar="CASE", help="cases to leave out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tiny:
        tiny(options)
        return
    lm = dts.load("smollm2-135m")
    dts.decode(lm, random_prompt(lm, 8, 0), method=Sampling(1), max_new_tokens=1)  # with the self-check
    if options.profile:
        shares(lm, options)
    else:
        searches(lm, options)


if __name__ == "__main__":
    main()
