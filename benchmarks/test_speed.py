"""Speed checks on a small random model: fixed work, results asserted, set-up untimed.

Each check times the library and a reference in turn, within one run, and stores the median ratio; seconds alone would
say more about the machine than about the code. `check.py` compares the ratios with `baseline.json`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import dts
from dts.models.huggingface import HFModel
from dts.search import MaxEnt, Sampling

ROUNDS = 7
PROMPT, PATHS, TOKENS = 256, 16, 16


class NoTokenizer:
    """Ids as text."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024)  # fmt: skip
    model = HFModel(LlamaForCausalLM(config), NoTokenizer(), "small")
    model.open([1, 2], batch_size=1, max_new_tokens=1)  # the architecture's self-check
    return model


def in_turn(benchmark, ours: Callable[[], object], reference: Callable[[], object]) -> None:
    """Time both alternately after a warm-up of each; the ratios are what `check.py` reads.

    CPU time of this process, which has one thread: another process that wants the core makes it wait, not compute.
    """
    ratios = []
    for round_ in range(ROUNDS + 1):
        seconds = []
        for run in (ours, reference):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        if round_:
            ratios.append(seconds[0] / seconds[1])
    benchmark.extra_info |= {"ratio": statistics.median(ratios), "ratios": ratios}
    benchmark.pedantic(ours, rounds=3)


def ids(seed: int) -> list[int]:
    return torch.randint(1, 4000, (PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()


def sample(lm, prompt, paths=PATHS, tokens=TOKENS):
    result = dts.decode(lm, prompt, method=Sampling(paths), max_new_tokens=tokens, batch_size=PATHS)
    assert len(result.rollouts) == paths and result.usage.forwarded_tokens == result.usage.unique_tokens
    return result


def test_sampling_against_a_repeated_cache(benchmark, lm):
    """Reference: the prompt prefilled once, its cache repeated per path, the same number of decode steps."""

    @torch.inference_mode()
    def repeated():
        cache = DynamicCache()
        logits = lm.model(torch.tensor([ids(0)]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.batch_repeat_interleave(PATHS)
        step = torch.multinomial(logits[:, -1].expand(PATHS, -1).softmax(-1), 1)
        for _ in range(TOKENS - 1):
            logits = lm.model(step, past_key_values=cache, use_cache=True).logits
            step = torch.multinomial(logits[:, -1].softmax(-1), 1)

    in_turn(benchmark, lambda: sample(lm, ids(0)), repeated)


def test_maxent_against_sampling(benchmark, lm):
    """Per generated token, four waves of selection."""
    prompt = ids(1)

    def search():
        result = dts.decode(
            lm, prompt, reward=lambda text: len(set(text)) / 10, method=MaxEnt(4 * PATHS), max_new_tokens=TOKENS
        )
        assert len(result.rollouts) == 4 * PATHS
        return result

    paths = -(-search().usage.generated_tokens // TOKENS)
    in_turn(benchmark, search, lambda: sample(lm, prompt, paths))


def test_late_rollouts_against_early_ones(benchmark, lm):
    """512 rollouts in one tree against 16 trees of 32: the time per rollout must not grow with the tree."""
    prompt = ids(2)[:32]

    def search(rollouts):
        method = MaxEnt(rollouts, reward_scale=2.0)
        result = dts.decode(
            lm, prompt, reward=lambda text: len(set(text)) / 10, method=method, max_new_tokens=8, batch_size=8
        )
        assert len(result.rollouts) == rollouts

    in_turn(benchmark, lambda: search(512), lambda: [search(32) for _ in range(16)])


def test_a_kept_prompt_against_a_fresh_one(benchmark, lm):
    prompt = ids(3)
    kept = lm.prefix(prompt)

    def cached():
        assert sample(lm, prompt, tokens=2).usage.cached_tokens == len(kept)

    in_turn(benchmark, cached, lambda: sample(lm, ids(4), tokens=2))
