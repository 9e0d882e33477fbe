"""What `real_vllm.py` and `real_llama.py` check alike: an engine against the same model in transformers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

COUNTS = ("forwarded_tokens", "cached_tokens", "recomputed_tokens", "generated_tokens", "model_calls")
MODEL = "smollm2-135m"
PROMPTS = ("The weather today is", "My grandmother always", "The train to the coast", "In the small kitchen,")
LONG_PROMPT = list(range(1000, 1480))


@contextlib.contextmanager
def served(command: Callable[[int], Sequence[str]], name: str) -> Iterator[str]:
    """The address of a server that is started for so long. command: with a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(command(port))
    try:
        await_health(f"http://127.0.0.1:{port}/health", process, name)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def await_health(address: str, process: subprocess.Popen[bytes], name: str) -> None:
    """Until the server answers; `dts.load` itself fails at once where none does."""
    while True:
        with contextlib.suppress(OSError):  # nobody listens yet
            urllib.request.urlopen(address, timeout=10).close()
            return
        if process.poll() is not None:
            raise SystemExit(f"{name}'s server ended with code {process.returncode}")
        time.sleep(1)


def differences(lm: Any, reference: Any, prompts: Sequence[str] = PROMPTS) -> dict[str, float]:
    """The largest difference of listed log-probabilities from those of transformers; and by how much a listed token is
    less likely there than the last that should be listed, at most."""
    import torch

    from dts.lm import TailRequest
    from dts.models.sessions import whole_logits

    encoded = [tuple(lm.encode(prompt)) for prompt in prompts]
    tails = lm.complete([TailRequest(ids, (), 24, seed, lm.top) for seed, ids in enumerate(encoded)])
    worst = lower = 0.0
    for ids, tail in zip(encoded, tails, strict=True):
        logits = whole_logits(reference.view(), [*ids, *tail.tokens], torch.device("cpu"))[0]
        log_p = logits.double().log_softmax(-1)[len(ids) - 1 :]
        for place, row in enumerate(tail.rows):
            worst = max([worst, *(abs(log - float(log_p[place, token])) for token, log in row.items())])
            likeliest = [float(log_p[place, token]) for token in sorted(row, key=lambda t: -row[t])[: lm.top]]
            lower = max(lower, float(log_p[place].topk(lm.top).values[-1]) - min(likeliest))
    return {"log p": worst, "top": lower}


def unlisted(lm: Any, reference: Any) -> float:
    """The difference of log p of a token that is drawn with all listed ones barred."""
    ids = lm.encode(PROMPTS[0])
    session = lm.open(ids, batch_size=1, max_new_tokens=4)
    (token,) = session.others([0])
    wanted = reference.open(ids, batch_size=1, max_new_tokens=4).logits([0])[0].double().log_softmax(-1)[token]
    return abs(float(session.logits([0])[0, token] - wanted))


def recomputed(lm: Any) -> tuple[float, Any]:
    """Tokens that the engine computes again for each rollout of a search after a prompt of 480, and its usage."""
    import dts
    from dts.search import MaxEnt

    result = dts.decode(lm, LONG_PROMPT, reward=len, method=MaxEnt(24), max_new_tokens=24, batch_size=8)
    return result.usage.recomputed_tokens / len(result.rollouts), result.usage


def equal(lm: Any, reference: Any, methods: Sequence[Any], prompts: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Rewards of the same searches on the engine and in transformers, paired by prompt and seed. Yields a line for each
    method: of the best reward and of the mean one, the mean difference with its 95 % interval."""
    import dts
    from dts.evaluation.tasks import load_task
    from dts.results import Usage

    task = load_task("keyword", num_samples=prompts)
    asked = [
        dts.Request(one.prompt, task.reward(one), 1000 * seed + place)
        for seed in range(seeds) for place, one in enumerate(task.examples)
    ]  # fmt: skip
    for method in methods:
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
