"""Where the time of a search goes, with the embedded model on real prompts. One JSON line per data set and method.

    python benchmarks/search_overhead.py --datasets keyword har m4 --rollouts 64

CPU seconds of one process, as shares: the model (forward calls, keys and values, logits), p (softmax and draws over
the vocabulary, which plain sampling pays too), the reward (tokens, bounds, finished texts), and the rest, which is the
bookkeeping of the tree: descent, values, look-ahead, pruning, records.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import dts
from dts.evaluation.tasks import load_task
from dts.models.sessions import TreeSession
from dts.search import METHODS, Search
from dts.settings import Decoding

spent: Counter[str] = Counter()
running: list[str] = []
started = 0.0


def switch(to: str | None) -> None:
    """Book the time since the last switch on what was running; then run `to`, or go back to what ran before it."""
    global started
    now = time.process_time()
    if running:
        spent[running[-1]] += now - started
    if to is None:
        running.pop()
    else:
        running.append(to)
    started = now


def timed(owner: Any, name: str, part: str) -> None:
    """Count what a method takes as `part`, less what is counted inside it."""
    inner: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        switch(part)
        try:
            return inner(*args, **kwargs)
        finally:
            switch(None)

    setattr(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["keyword", "har", "m4"])
    parser.add_argument("--methods", nargs="+", default=["maxent", "maxent-star", "best-of-n"])
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = dts.load("smollm2-135m")
    dts.decode(lm, "warm", method=METHODS["greedy"](1, 0.0), max_new_tokens=4)
    timed(type(lm), "open", "model")
    for name in ("extend", "logits"):
        timed(TreeSession, name, "model")
    timed(Decoding, "probabilities", "p")
    timed(Search, "draw", "p")
    timed(Search, "_add", "tree")  # inside draw
    for dataset in options.datasets:
        task = load_task(dataset, num_samples=1)
        reward = task.reward(task.examples[0])
        for name in ("extend", "earned", "upper", "promise", "finish"):
            if hasattr(reward, name):
                timed(reward, name, "reward")
        for method in options.methods:
            spent.clear()
            switch("tree")
            result = dts.decode(
                lm, task.examples[0].prompt, reward=reward, method=METHODS[method](options.rollouts, 16.0),
                max_new_tokens=options.tokens, stop=task.stop, batch_size=options.batch_size,
            )  # fmt: skip
            switch(None)
            total = sum(spent.values())
            row = {"dataset": dataset, "method": method, "rollouts": len(result.rollouts), "nodes": len(result.tree)}
            shares = {part: round(seconds / total, 4) for part, seconds in spent.items()}
            print(json.dumps({**row, "cpu_seconds": round(total, 2), **shares}), flush=True)


if __name__ == "__main__":
    main()
