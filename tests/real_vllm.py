"""The real vLLM, in process and as a server, against the same model in transformers. Run by `make test-vllm` with the
Python of an environment that has vLLM and what `import dts` needs.

    python tests/real_vllm.py [--server] [--speed]
    python tests/real_vllm.py --equal [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from real_engine import MODEL, differences, equal, recomputed, served, unlisted

ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
BLOCK = 32  # tokens


def load_in_process() -> Any:
    import dts

    return dts.load(
        f"vllm:{MODEL}", dtype="float32", enforce_eager=True, block_size=BLOCK, max_num_seqs=64, max_model_len=1024
    )


def server_command(port: int) -> list[str]:
    from dts.fetch import cached

    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(cached(MODEL)), "--host",
        "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--block-size", str(BLOCK), "--max-logprobs", "64", "--enable-prompt-tokens-details",
        "--served-model-name", "m",
    ]  # fmt: skip


def speed(lm: Any, reference: Any, rounds: int) -> dict[str, float]:
    """CPU seconds for texts of 24 tokens after 512: vLLM's own n=16, our searches on vLLM, and on the tree cache.
    Medians of rounds in which each has its turn, and ratios of these medians."""
    import dts
    from dts.search import MaxEnt, Sampling

    prompt = [(7 * i) % 4000 + 1000 for i in range(512)]
    params = lm.engine._params(n=16, max_tokens=24, temperature=1.0, ignore_eos=True, detokenize=False, seed=1)

    def own() -> None:
        lm.engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)

    def sampled(model: Any, method: Any) -> Callable[[], None]:
        return lambda: dts.decode(model, prompt, reward=len, method=method, max_new_tokens=24, batch_size=16) and None

    calls: dict[str, Callable[[], None]] = {
        "vLLM n=16": own, "Sampling(16) on vLLM": sampled(lm, Sampling(16)),
        "Sampling(64) on vLLM": sampled(lm, Sampling(64)), "MaxEnt(64) on vLLM": sampled(lm, MaxEnt(64)),
        "Sampling(16) on the tree cache": sampled(reference, Sampling(16)),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            lm.engine.llm.reset_prefix_cache()
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
        print({name: round(times[-1], 2) for name, times in seconds.items()}, file=sys.stderr, flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    medians["Sampling(16) / vLLM n=16"] = medians["Sampling(16) on vLLM"] / medians["vLLM n=16"]
    medians["MaxEnt(64) / Sampling(64)"] = medians["MaxEnt(64) on vLLM"] / medians["Sampling(64) on vLLM"]
    return medians


def check(lm: Any, reference: Any) -> dict[str, Any]:
    """Facts of one engine, with what must hold checked."""
    facts: dict[str, Any] = {**differences(lm, reference), "log p of unlisted": unlisted(lm, reference)}
    again, usage = recomputed(lm)
    facts["blocks again for each rollout"], facts["usage"] = again / BLOCK, usage.as_dict()
    assert max(facts["log p"], facts["top"]) < 1e-4 and facts["log p of unlisted"] < 1e-3, facts
    assert facts["blocks again for each rollout"] <= 1.5, facts
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="store_true", help="also start vLLM's server and ask it")
    parser.add_argument("--speed", action="store_true", help="also compare CPU seconds, in process")
    parser.add_argument("--rounds", type=int, default=3, help="of --speed")
    parser.add_argument("--equal", action="store_true", help="only compare rewards of searches, in process")
    parser.add_argument("--seeds", type=int, default=5, help="of --equal")
    options = parser.parse_args(arguments)
    os.environ.update({name: os.environ.get(name, value) for name, value in ON_CPU.items()})
    import torch

    import dts
    from dts.search import BestOfN, MaxEnt

    torch.set_num_threads(1)
    reference = dts.load(MODEL, device="cpu", dtype="float32")
    lm = load_in_process()
    if options.equal:
        for line in equal(lm, reference, (BestOfN(16), MaxEnt(16)), prompts=8, seeds=options.seeds):
            print(json.dumps(line), flush=True)
        return
    report = {"in process": check(lm, reference)}
    print(json.dumps(report), flush=True)
    if options.speed:
        report["seconds"] = speed(lm, reference, options.rounds)
        print(json.dumps(report["seconds"]), flush=True)
    if options.server:
        del lm
        with served(server_command, "vLLM") as url:
            asked = dts.load(url, model="m", tokenizer=MODEL, top=64, wait=900)
            report["server"] = check(asked, reference)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
