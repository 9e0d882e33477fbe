"""JSON under a schema: what masks and conditions write, and what it costs.

    python benchmarks/constraints.py --output constraints.jsonl
    python benchmarks/constraints.py --output constraints.jsonl --report

20 schemas such as programming interfaces have (those of the task `json`), SmolLM2-135M-Instruct, no reward. The prompt
holds the schema, after two answered questions on others. Rejection draws from p, and keeps what is valid. Mask draws
from p masked token by token. Condition samples p among the valid texts, by a tree or by a particle filter. Texts are
checked by the package `jsonschema`. Log p is the model's own in all of them, weighted as the method weights its texts;
tokens are without the prompt. One JSON line a schema and method; the same command continues after those that it has.

`--methods awrs` is adaptive weighted rejection sampling with sequential Monte Carlo (arXiv 2504.05410) by genlm-control
(extra `peers`, an environment of its own); its tokens are those that it drew, though it computes prefixes anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch

import dts
from dts.evaluation.tasks.registry import read_task_file
from dts.results import Completion, Result
from dts.search import MaxEnt, Method, ParticleFilter, Sampling

QUESTION = "{ask} Answer with JSON in one line, and nothing else. The JSON schema: {schema}"
SHOWN = 2  # answered questions of other schemas before each question
METHODS: dict[str, tuple[Callable[[int], Method], bool]] = {  # with whether it has the constraint
    "rejection": (Sampling, False),
    "mask": (Sampling, True),
    "condition, tree": (lambda n: MaxEnt(n, reward_scale=0.0), True),
    "condition, particles": (lambda n: ParticleFilter(n, reward_scale=0.0), True),
}
PEER = "awrs"
KEY = ("schema", "method", "n", "tokens")


def is_valid(text: str, schema: Any) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def weighted(result: Result) -> list[tuple[Completion, float]]:
    """Completions with their shares of what the method samples."""
    by_ids = {completion.token_ids: completion for completion in result.completions}
    leaves = [rollout.leaf for rollout in result.rollouts]
    if result.log_weights is not None:
        logs = result.log_weights
        shares = {leaf: math.exp(logs[leaf] - max(logs.values())) for leaf in logs}
    elif result.estimate is not None and result.estimate.shares is not None:
        shares = dict(result.estimate.shares)
    else:
        shares = {leaf: float(leaves.count(leaf)) for leaf in leaves}
    found = [(by_ids.get(result.tree.tokens(leaf)), share) for leaf, share in shares.items()]
    total = sum(share for completion, share in found if completion is not None)
    return [(completion, share / total) for completion, share in found if completion is not None and share]


def prompt_of(entries: list[dict[str, Any]], index: int) -> list[dict[str, str]]:
    """The question of an entry, after those that come before it with their answers."""
    shown = [entries[(index - back) % len(entries)] for back in range(SHOWN, -1, -1)]
    turns = []
    for entry in shown:
        question = QUESTION.format(ask=entry["ask"], schema=json.dumps(entry["schema"]))
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": json.dumps(entry["valid"])}]
    return turns[:-1]


def own_log_p(lm: Any, prompt: list[int], tokens: list[int]) -> float:
    """The model's log-probability of these tokens after the prompt."""
    with torch.no_grad():
        rows = lm.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(tokens)[:, None]).sum())


def measure_peer(lm: Any, entries: list[dict[str, Any]], index: int, method: str, options: Any) -> dict[str, Any]:
    from genlm.backend.llm import AsyncTransformer
    from genlm.control import AWRS, JsonSchema, PromptedLLM

    entry, prompt = entries[index], list(lm.encode(prompt_of(entries, index)))
    backend = AsyncTransformer(lm.model, lm.tokenizer, batch_size=options.n)
    llm = PromptedLLM(backend, prompt_ids=prompt)
    backend.cache_kv(prompt)
    began = time.perf_counter()
    sampler = AWRS(llm, JsonSchema(entry["schema"]).coerce(llm, f=b"".join), seed=1)
    found = asyncio.run(sampler.smc(n_particles=options.n, ess_threshold=0.5, max_tokens=options.tokens))
    seconds = time.perf_counter() - began
    kept, texts, ended = [], [], 0
    for context, share in zip(found.contexts, found.normalized_weights.tolist(), strict=True):
        pieces = [piece for piece in context if isinstance(piece, bytes)]
        if len(pieces) == len(context) or not share:  # cut, or outside the schema
            continue
        ended += 1
        text = b"".join(pieces).decode(errors="replace")
        if is_valid(text, entry["schema"]):
            ids = [*llm.encode_tokens(pieces), lm.tokenizer.eos_token_id]
            kept.append((own_log_p(lm, prompt, ids), share))
            texts.append(text)
    total = sum(share for _, share in kept)
    return {
        "schema": entry["name"], "method": method, "n": options.n, "tokens": options.tokens,
        "found": ended, "valid": len(kept), "drawn": len(kept),
        "log_p": sum(log_p * share for log_p, share in kept) / total if kept else None,
        "forwarded": sum(map(len, found.contexts)), "seconds": seconds, "constraint_seconds": None,
        "text": texts[0] if texts else "",
    }  # fmt: skip


def measure(lm: Any, entries: list[dict[str, Any]], index: int, method: str, options: Any) -> dict[str, Any]:
    make, constrained = METHODS[method]
    entry, schema = entries[index], entries[index]["schema"]
    result = dts.decode(
        lm, prompt_of(entries, index),
        method=make(options.n), max_new_tokens=options.tokens, seed=1, require_eos=True,
        constraint=dts.constraints.JsonSchema(schema) if constrained else None,
    )  # fmt: skip
    found = [(one, share, is_valid(one.text, schema)) for one, share in weighted(result) if one.finished_by == "eos"]
    kept = [(one, share) for one, share, valid in found if valid]
    total = sum(share for _, share in kept)
    usage = result.usage
    valid_ids = {one.token_ids for one, _ in kept}
    return {
        "schema": entry["name"], "method": method, "n": options.n, "tokens": options.tokens,
        "found": len(found), "valid": len(kept),
        "drawn": sum(result.tree.tokens(rollout.leaf) in valid_ids for rollout in result.rollouts),
        "log_p": sum(one.logprob * share for one, share in kept) / total if kept else None,
        "forwarded": usage.forwarded_tokens - usage.prompt_tokens,
        "seconds": usage.seconds, "constraint_seconds": usage.constraint_seconds,
        "text": kept[0][0].text if kept else "",
    }  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean with a 95 % bootstrap interval over schemas."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(-1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


HEAD = (
    "method", "schemas", "valid among its texts", "valid texts of its rollouts", "schemas without one",
    "tokens for each", "mean log p", "log p above mask [95 %]", "constraint's share of the seconds",
)  # fmt: skip


def report(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    masked = {row["schema"]: row["log_p"] for row in rows if row["method"] == "mask" and row["valid"]}
    for method in (*METHODS, PEER):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        found, valid, drawn = (sum(row[name] for row in own) for name in ("found", "valid", "drawn"))
        logs = [row["log_p"] for row in own if row["valid"]]
        gains = np.array(
            [row["log_p"] - masked[row["schema"]] for row in own if row["valid"] and row["schema"] in masked]
        )
        above = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval(gains)) if len(gains) > 1 and method != "mask" else ""
        spent = [row["constraint_seconds"] for row in own if row["constraint_seconds"] is not None]
        share = f"{sum(spent) / sum(row['seconds'] for row in own):.1%}" if spent else ""
        each = f"{sum(row['forwarded'] for row in own) / drawn:.0f}" if drawn else "none found"
        lines.append(
            f"| {method} | {len(own)} | {valid / max(found, 1):.0%} of {found} | "
            f"{drawn / sum(row['n'] for row in own):.0%} | {sum(not row['valid'] for row in own)} | "
            f"{each} | {np.mean(logs) if logs else math.nan:.2f} | {above} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("constraints.jsonl"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, PEER], default=list(METHODS))
    parser.add_argument("--schemas", type=int, default=20, help="take the first so many")
    parser.add_argument("--n", type=int, default=8, help="rollouts of each method")
    parser.add_argument("--tokens", type=int, default=80, help="greatest length")
    parser.add_argument("--report", action="store_true", help="only print the table of what --output holds")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if not options.report:
        torch.set_num_threads(1)
        lm = dts.load("smollm2-135m")
        done = {tuple(row[name] for name in KEY) for row in rows}
        entries = read_task_file("json").options["items"]
        for index, entry in enumerate(entries[: options.schemas]):
            for method in options.methods:
                if (entry["name"], method, options.n, options.tokens) in done:
                    continue
                run = measure_peer if method == PEER else measure
                rows.append(run(lm, entries, index, method, options))
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
