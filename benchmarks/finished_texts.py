"""Rewards that judge a finished text: tokens to the best that best-of-N finds, with and without a value model.

    python benchmarks/finished_texts.py --output finished_texts.jsonl
    python benchmarks/finished_texts.py --output finished_texts.jsonl --report

Best-of-N draws its samples once; they are scored by every reward. Each search may forward as many tokens as all samples
did, and stops when it has reached their best: a search that never gets there is scored at its full budget, ratio 1.
The score is the reward, or with `--score target` log p + lambda r. One JSON line a search; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import dts
from dts.results import Completion, Result
from dts.search import BestOfN, Budget, MaxEnt, Outcome, Search

SCALE = 16.0
WIDTH = 8
PROMPTS = (  # no setting was chosen on these
    "The film that we saw last night", "Yesterday my neighbour", "The hotel room was", "At the end of the match,",
    "The book begins with", "Her speech at the meeting", "The train to the coast", "In the small kitchen,",
    "The new phone is", "Everyone in the village", "The doctor looked at", "On the last day of school,",
    "The concert in the park", "My grandmother always", "The customer wrote that", "Before the storm came,",
)  # fmt: skip
METHODS: dict[str, Callable[[], MaxEnt]] = {
    "DTS*": lambda: MaxEnt(10**6, reward_scale=SCALE, search="best"),
    "DTS* values": lambda: MaxEnt(10**6, reward_scale=SCALE, search="best", values="online"),
    "DTS": lambda: MaxEnt(10**6, reward_scale=SCALE),
    "DTS values": lambda: MaxEnt(10**6, reward_scale=SCALE, values="online"),
}
_vader = SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, in [0, 1]."""
    return (float(_vader.polarity_scores(text)["compound"]) + 1) / 2


def word_length(text: str) -> float:
    """Mean letters of a word, over 10."""
    words = re.findall(r"[A-Za-z]+", text)
    return min(1.0, sum(map(len, words)) / len(words) / 10) if words else 0.0


def surface(text: str) -> float:
    """A question mark, a digit, quotation marks: a third each."""
    return (("?" in text) + any(c.isdigit() for c in text) + ('"' in text or "“" in text)) / 3


def readability(text: str) -> float:
    """Flesch reading ease over 120, times the share of three sentences that are there."""
    sentences = [s for s in re.split(r"[.!?]+", text) if s.strip()]
    words = re.findall(r"[A-Za-z']+", text)
    if not words or not sentences:
        return 0.0
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.lower()))) for word in words) / len(words)
    ease = 206.835 - 1.015 * len(words) / len(sentences) - 84.6 * syllables
    return max(0.0, min(1.0, ease / 120)) * min(1.0, len(sentences) / 3)


REWARDS = {f.__name__: f for f in (sentiment, word_length, surface, readability)}


class Watched:
    """A method whose search ends when it has found a score; it remembers what it found and when."""

    def __init__(self, method: MaxEnt, score: Callable[[Completion], float], goal: float, tokens: int) -> None:
        self.method, self.score, self.goal, self.tokens, self.name = method, score, goal, tokens, method.name
        self.best: Completion | None = None
        self.high, self.seen = -math.inf, 0
        self.reached: int | None = None  # tokens forwarded

    def batch_size(self) -> int:
        return WIDTH

    def budget(self) -> Budget:
        return Budget(tokens=self.tokens)

    def start(self, search: Search) -> Watched:
        self.search, self.run = search, self.method.start(search)
        return self

    def ask(self) -> Sequence[int] | None:
        nodes = self.run.ask()
        for rollout in self.search.rollouts[self.seen :]:
            completion = self.search.completion(rollout.leaf)
            if (score := self.score(completion)) > self.high:
                self.high, self.best = score, completion
            if self.reached is None and score >= self.goal - 1e-9:
                self.reached = rollout.tokens
        self.seen = len(self.search.rollouts)
        return None if self.reached is not None else nodes

    def outcome(self) -> Outcome:
        return self.run.outcome()


def samples(lm: Any, prompt: str, n: int, tokens: int, seed: int) -> Result:
    return dts.decode(lm, prompt, method=BestOfN(n), max_new_tokens=tokens, seed=seed, batch_size=16)


def row(lm: Any, prompt: str, drawn: Result, name: str, reward: str, options: argparse.Namespace) -> dict[str, Any]:
    """One search against the samples of its prompt."""
    function, own = REWARDS[reward], drawn.usage.prompt_tokens
    bonus = 0.0 if options.score == "reward" else 1.0

    def score(completion: Completion) -> float:
        value = function(completion.text)
        return value if not bonus else completion.logprob + SCALE * value

    best = max(drawn.completions, key=score)
    watched = Watched(METHODS[name](), score, score(best), drawn.usage.forwarded_tokens)
    start = time.perf_counter()
    dts.decode(lm, prompt, reward=function, method=watched, max_new_tokens=options.tokens, seed=1)
    full, found = drawn.usage.forwarded_tokens - own, watched.best
    return {
        "prompt": prompt, "reward": reward, "method": name, "score": options.score, "n": options.samples,
        "ratio": full / ((watched.reached or drawn.usage.forwarded_tokens) - own),
        "reached": watched.reached is not None,
        "seconds": drawn.usage.seconds / (time.perf_counter() - start),
        "gain": (function(found.text) if found else 0.0) - function(best.text),
        "nats": (found.logprob if found else -math.inf) - best.logprob,
        "text": found.text if found else "", "best_of_n": best.text,
    }  # fmt: skip


def interval(logs: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean with a 95 % bootstrap interval over prompts."""
    rng = np.random.default_rng(0)
    means = logs[rng.integers(len(logs), size=(4000, len(logs)))].mean(-1)
    low, high = np.quantile(means, (0.025, 0.975))
    return math.exp(logs.mean()), math.exp(low), math.exp(high)


def report(rows: list[dict[str, Any]]) -> str:
    head = ("score", "N", "reward", "method", "token ratio", "least", "not reached", "ratio of seconds",
            "reward gained", "nats gained")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    keys = dict.fromkeys((r["score"], r["n"], r["reward"], r["method"]) for r in rows)
    for key in keys:
        own = [r for r in rows if (r["score"], r["n"], r["reward"], r["method"]) == key]
        mean, low, high = interval(np.log([r["ratio"] for r in own]))
        seconds = math.exp(float(np.mean(np.log([r["seconds"] for r in own]))))
        missed = sum(not r["reached"] for r in own)
        gain, nats = (float(np.mean([r[name] for r in own])) for name in ("gain", "nats"))
        lines.append(
            f"| {' | '.join(map(str, key))} | {mean:.1f} [{low:.1f}, {high:.1f}] | "
            f"{min(r['ratio'] for r in own):.1f} | {missed} of {len(own)} | {seconds:.1f} | {gain:+.3f} | {nats:+.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("finished_texts.jsonl"))
    parser.add_argument("--rewards", nargs="+", choices=list(REWARDS), default=list(REWARDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--score", choices=["reward", "target"], default="reward")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--report", action="store_true", help="only print the table of what --output holds")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if not options.report:
        torch.set_num_threads(1)
        lm = dts.load("smollm2-135m")
        done = {(r["prompt"], r["reward"], r["method"], r["score"], r["n"]) for r in rows}
        for index, prompt in enumerate(PROMPTS[: options.prompts]):
            asked = [(prompt, r, m, options.score, options.samples) for r in options.rewards for m in options.methods]
            missing = [key for key in asked if key not in done]
            drawn = samples(lm, prompt, options.samples, options.tokens, 100 + index) if missing else None
            for _, reward, name, *_ in missing:
                assert drawn is not None
                rows.append(row(lm, prompt, drawn, name, reward, options))
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
