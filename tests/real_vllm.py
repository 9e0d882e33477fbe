"""The real vLLM, in process and as a server, against the same model in transformers. Run by `make test-vllm` with the
Python of an environment that has vLLM and what `import dts` needs.

    python tests/real_vllm.py [--server] [--speed]
    python tests/real_vllm.py --equal [--seeds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
COUNTS = ("forwarded_tokens", "cached_tokens", "recomputed_tokens", "generated_tokens", "model_calls")
MODEL, BLOCK = "smollm2-135m", 32
PROMPTS = ("The weather today is", "My grandmother always", "The train to the coast", "In the small kitchen,")


def load_in_process() -> Any:
    import dts

    return dts.load(
        f"vllm:{MODEL}", dtype="float32", enforce_eager=True, block_size=BLOCK, max_num_seqs=64, max_model_len=1024
    )


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server of this model."""
    from dts.fetch import cached

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(cached(MODEL)), "--host",
        "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--block-size", str(BLOCK), "--max-logprobs", "64", "--enable-prompt-tokens-details",
        "--served-model-name", "m",
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        await_health(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def await_health(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers; `dts.load` itself fails at once where none does."""
    while True:
        with contextlib.suppress(OSError):  # nobody listens yet
            urllib.request.urlopen(address, timeout=10).close()
            return
        if process.poll() is not None:
            raise SystemExit(f"vLLM's server ended with code {process.returncode}")
        time.sleep(1)


def differences(lm: Any, reference: Any) -> float:
    """The largest difference of listed log-probabilities from those of transformers."""
    import torch

    from dts.lm import TailRequest
    from dts.models.sessions import whole_logits

    prompts = [tuple(lm.encode(prompt)) for prompt in PROMPTS]
    tails = lm.complete([TailRequest(ids, (), 24, seed, lm.top) for seed, ids in enumerate(prompts)])
    worst = 0.0
    for ids, tail in zip(prompts, tails, strict=True):
        logits = whole_logits(reference.view(), [*ids, *tail.tokens], torch.device("cpu"))[0]
        log_p = logits.double().log_softmax(-1)[len(ids) - 1 :]
        for place, row in enumerate(tail.rows):
            worst = max([worst, *(abs(log - float(log_p[place, token])) for token, log in row.items())])
    return worst


def unlisted(lm: Any, reference: Any) -> float:
    """The difference of log p of a token that is drawn with all listed ones barred."""
    ids = lm.encode(PROMPTS[0])
    session = lm.open(ids, batch_size=1, max_new_tokens=4)
    (token,) = session.others([0])
    wanted = reference.open(ids, batch_size=1, max_new_tokens=4).logits([0])[0].double().log_softmax(-1)[token]
    return abs(float(session.logits([0])[0, token] - wanted))


def recomputed(lm: Any) -> tuple[float, Any]:
    """Blocks that the engine computes again for each rollout of a search after a long prompt."""
    import dts
    from dts.search import MaxEnt

    result = dts.decode(lm, list(range(1000, 1480)), reward=len, method=MaxEnt(24), max_new_tokens=24, batch_size=8)
    return result.usage.recomputed_tokens / BLOCK / len(result.rollouts), result.usage


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


def equal(lm: Any, reference: Any, prompts: int = 8, seeds: int = 5) -> Iterator[dict[str, Any]]:
    """Rewards of the same searches on the engine and in transformers, paired by prompt and seed. Yields a line for each
    method: of the best reward and of the mean one, the mean difference with its 95 % interval."""
    import dts
    from dts.evaluation.tasks import load_task
    from dts.results import Usage
    from dts.search import BestOfN, MaxEnt

    task = load_task("keyword", num_samples=prompts)
    asked = [
        dts.Request(one.prompt, task.reward(one), 1000 * seed + place)
        for seed in range(seeds) for place, one in enumerate(task.examples)
    ]  # fmt: skip
    for method in (BestOfN(16), MaxEnt(16)):
        found, used = {}, {}
        for name, model in (("engine", lm), ("transformers", reference)):
            drawn = dts.decode_many(
                model, asked, method=method, max_new_tokens=24, stop=task.stop, width=4, batch_size=4 * prompts
            )
            found[name], used[name] = [], Usage()
            for result in drawn:
                found[name].append([rollout.reward for rollout in result.rollouts])
                for field in COUNTS:
                    setattr(used[name], field, getattr(used[name], field) + getattr(result.usage, field))
        facts = compared(found["engine"], found["transformers"])
        counts = {name: {field: getattr(usage, field) for field in COUNTS} for name, usage in used.items()}
        yield {"method": method.name, "searches": len(asked), **facts, "usage": counts}


def compared(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means of the best and of all rewards of paired searches, and their difference with a 95 % interval."""
    from statistics import fmean

    from scipy.stats import bootstrap, ks_2samp

    facts: dict[str, Any] = {}
    for name, of in (("best", max), ("mean", fmean)):
        pairs = [(of(one), of(other)) for one, other in zip(ours, theirs, strict=True)]
        gaps = [one - other for one, other in pairs]
        made = bootstrap([gaps], fmean, vectorized=False, n_resamples=4000, rng=0, method="percentile")
        low, high = made.confidence_interval
        facts[name] = {"engine": fmean(one for one, _ in pairs), "transformers": fmean(other for _, other in pairs),
                       "difference": fmean(gaps), "interval": [low, high]}  # fmt: skip
    flat = [[reward for search in side for reward in search] for side in (ours, theirs)]
    facts["p of Kolmogorov-Smirnov"] = float(ks_2samp(*flat).pvalue)
    return facts


def check(lm: Any, reference: Any) -> dict[str, Any]:
    """Facts of one engine, with what must hold checked."""
    facts: dict[str, Any] = {"log p": differences(lm, reference), "log p of unlisted": unlisted(lm, reference)}
    facts["blocks again for each rollout"], usage = recomputed(lm)
    facts["usage"] = usage.as_dict()
    assert facts["log p"] < 1e-4 and facts["log p of unlisted"] < 1e-3, facts
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

    torch.set_num_threads(1)
    reference = dts.load(MODEL, device="cpu", dtype="float32")
    lm = load_in_process()
    if options.equal:
        for line in equal(lm, reference, seeds=options.seeds):
            print(json.dumps(line), flush=True)
        return
    report = {"in process": check(lm, reference)}
    print(json.dumps(report), flush=True)
    if options.speed:
        report["seconds"] = speed(lm, reference, options.rounds)
        print(json.dumps(report["seconds"]), flush=True)
    if options.server:
        del lm
        with server() as url:
            asked = dts.load(url, model="m", tokenizer=MODEL, top=64, wait=900)
            report["server"] = check(asked, reference)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
