"""Rewards that judge a finished text: tokens to the best that best-of-N finds.

    python benchmarks/finished_texts.py --output finished_texts.jsonl
    python benchmarks/finished_texts.py --output finished_texts.jsonl --report

Best-of-N draws its samples once; they are scored by every reward. Each search may forward as many tokens as all samples
did, and stops when it has reached their best: a search that never gets there is scored at its full budget, ratio 1.
Prompts whose samples all have the same reward are left out: there is nothing to find.
The score is the reward, or with `--score target` log p + lambda r. All prompts are decoded at once, four paths each,
best-of-N too; seconds are of this process, the reward's own among them. One JSON line a prompt and method; the same
command continues after the groups (reward and method) that it has finished.

`profanity` needs `pip install alt-profanity-check==1.9.1`; `engaging` fits its classifier on `tweet_replies.jsonl.gz`
under --data; without them these rewards are left out. `coding` has prompts of its own and answers of 64 tokens.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import dts
from dts.evaluation.measures.metrics import tokens_reused
from dts.results import Completion, Usage
from dts.rewards import Context, Finished
from dts.search import BestOfN, Budget, MaxEnt, OnlineValues, Outcome, Run, Search
from dts.training.coding import Problem, problems
from dts.training.coding.task import public_tests

SCALE = 16.0
WIDTH = 4
SEED = 1
PROMPTS = (  # no setting was chosen on these
    "The film that we saw last night", "Yesterday my neighbour", "The hotel room was", "At the end of the match,",
    "The book begins with", "Her speech at the meeting", "The train to the coast", "In the small kitchen,",
    "The new phone is", "Everyone in the village", "The doctor looked at", "On the last day of school,",
    "The concert in the park", "My grandmother always", "The customer wrote that", "Before the storm came,",
)  # fmt: skip
OTHER_PROMPTS = (  # for value models that are carried over
    "The weather today is", "My first day at the new job was", "The old bridge over the river",
    "When the guests arrived,", "The review of the new restaurant said that", "After the long winter,",
    "The teacher told the class", "Our trip to the mountains",
)  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "DTS*": {"search": "best"},
    "DTS* no values": {"search": "best", "values": None},
    "DTS* carried": {"search": "best", "values": "carried"},
    "DTS": {"values": "online"},
    "DTS no values": {"values": None},
}
OTHER_STORY = "A happy story for children. {completion}"
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


def engaging(data: Path) -> Callable[[list[str]], list[float]]:
    """Probability that a reply of this text gets a like: logistic regression on words, fitted here on 2,856 replies."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    with gzip.open(data / "tweet_replies.jsonl.gz", "rt", encoding="utf-8") as file:
        replies = [json.loads(line) for line in file]
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(C=10, max_iter=1000))
    model.fit([reply["reply_text"] for reply in replies], [reply["reply_likes"] > 0 for reply in replies])

    def engaging(texts: list[str]) -> list[float]:
        return model.predict_proba(texts)[:, 1].tolist()

    return engaging


def profanity() -> Callable[[list[str]], list[float]]:
    """One minus the probability of offence by the model that alt-profanity-check ships."""
    from profanity_check import predict_prob

    def polite(texts: list[str]) -> list[float]:
        return (1 - predict_prob(texts)).tolist()

    return polite


def likelihood(lm: Any) -> dts.Reward:
    """Mean log-likelihood of the text's tokens in another context, over 5 nats."""
    model = dts.ModelReward(lm.model, lm.tokenizer, "likelihood", template=OTHER_STORY)
    return dts.rewards.weighted_sum([(model, 0.2)])


NAMES = ("sentiment", "word_length", "surface", "readability", "engaging", "profanity", "likelihood", "coding")
PLAIN = {f.__name__: f for f in (sentiment, word_length, surface, readability)}


def reward_of(name: str, lm: Any, data: Path) -> dts.Reward:
    """Raises what a missing package or file raises."""
    makers: dict[str, Callable[[], Any]] = {
        "engaging": lambda: engaging(data),
        "profanity": profanity,
        "likelihood": lambda: likelihood(lm),
        "coding": lambda: public_tests,
    }
    return dts.as_reward(PLAIN[name] if name in PLAIN else makers[name](), name)


def prompts_of(name: str, count: int) -> list[Any]:
    """Of `coding`: the first problems that want one expression; their samples differ in what they pass."""
    if name == "coding":
        return [problem.prompt for problem in _easy()[:count]]
    return list(PROMPTS[:count])


def _easy() -> list[Problem]:
    return [problem for problem in problems() if problem.level == 1]


def options_of(name: str) -> dict[str, Any]:
    """What the reward asks of a search: tests are asked about finished answers only, whatever the method."""
    return {"values": None} if name == "coding" else {}


def scores(lm: Any, reward: dts.Reward, prompt: Any, texts: Sequence[Completion]) -> list[float]:
    """Rewards of complete texts."""
    states = []
    context = Context(prompt, tuple(lm.encode(prompt)), lm.decode)
    for text in texts:
        state = reward.start(context)
        for token in text.token_ids:
            (state,) = reward.extend([state], [token])
        states.append(state)
    return list(reward.finish(states, [Finished(text.token_ids, text.text) for text in texts]))


@dataclasses.dataclass
class Goal:
    """What one search has to reach."""

    score: float
    tokens: int  # that it may forward, without the prompt


class Watched:
    """A method whose searches end when they have found a score; search i is of prompt i."""

    def __init__(self, options: dict[str, Any], goals: Sequence[Goal], target: bool) -> None:
        self.options, self.goals, self.target = options, goals, target
        self.runs: dict[int, WatchedRun] = {}
        self.name = "watched"

    def batch_size(self) -> int:
        return WIDTH

    def budget(self) -> Budget:
        return Budget()

    def start(self, search: Search) -> WatchedRun:
        index = search.decoding.seed - SEED
        method = MaxEnt(10**6, reward_scale=SCALE, **copy.deepcopy(self.options))
        self.runs[index] = WatchedRun(search, method.start(search), self.goals[index], self.target)
        return self.runs[index]


class WatchedRun:
    """A run that remembers the best that it found and when."""

    def __init__(self, search: Search, run: Run, goal: Goal, target: bool) -> None:
        self.search, self.run, self.goal, self.target = search, run, goal, target
        self.best: Completion | None = None
        self.high, self.seen = -math.inf, 0
        self.reached: int | None = None  # tokens forwarded

    def score(self, completion: Completion) -> float:
        return completion.logprob + SCALE * completion.reward if self.target else completion.reward

    def ask(self) -> Sequence[int] | None:
        nodes = self.run.ask()
        for rollout in self.search.rollouts[self.seen :]:
            completion = self.search.completion(rollout.leaf)
            if (score := self.score(completion)) > self.high:
                self.high, self.best = score, completion
            if self.reached is None and score >= self.goal.score - 1e-9:
                self.reached = self.tokens(rollout.tokens)
        self.seen = len(self.search.rollouts)
        used_up = nodes is not None and self.tokens(self.search.usage.forwarded_tokens) + len(nodes) > self.goal.tokens
        return None if self.reached is not None or used_up else nodes

    def tokens(self, forwarded: int) -> int:
        """Without the prompt, part of which neighbours in the batch may have sent."""
        return forwarded - own_prompt(self.search.usage)

    def outcome(self) -> Outcome:
        return self.run.outcome()

    def branches(self) -> dict[str, Any]:
        """Where its rollouts left the tree, in quarters of their texts, and `tokens_reused`."""
        rollouts = self.search.rollouts
        shares = [rollout.start_depth / max(rollout.length, 1) for rollout in rollouts]
        quarters = np.bincount([min(int(4 * share), 3) for share in shares], minlength=4).tolist()
        return {"quarters": quarters, "reused": tokens_reused(self.search.tree, rollouts) or 0.0}


def own_prompt(usage: Usage) -> int:
    """Tokens of the prompt that this search sent."""
    return usage.prompt_tokens - usage.cached_tokens


def distinct_2(text: str) -> float:
    """Share of a text's pairs of words that are different."""
    words = text.split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@cache
def samples(lm: Any, name: str, n: int, tokens: int, count: int, folder: Path) -> tuple[list[list[Completion]], Any]:
    """Best-of-N's completions by prompt, with the tokens that each cost and the seconds of all; drawn once."""
    kind = "coding" if name == "coding" else "texts"
    kept = folder / f"samples_{kind}_{n}_{tokens}_{count}.json"
    if not kept.exists():
        begun, prompts = time.process_time(), prompts_of(name, count)
        options = {"max_new_tokens": tokens, "seed": 100, "batch_size": WIDTH * count, "width": WIDTH}
        drawn = list(dts.decode_many(lm, prompts, method=BestOfN(n), **options))
        costs = [result.usage.forwarded_tokens - own_prompt(result.usage) for result in drawn]
        texts = [[dataclasses.asdict(one) for one in result.completions] for result in drawn]
        kept.write_text(json.dumps([texts, costs, time.process_time() - begun]))
    texts, costs, seconds = json.loads(kept.read_text())
    return [[Completion(**{**one, "token_ids": tuple(one["token_ids"])}) for one in row] for row in texts], (
        costs, seconds,
    )  # fmt: skip


def carried(lm: Any, reward: dts.Reward, tokens: int) -> OnlineValues:
    """A value model that has seen searches of other prompts."""
    model = OnlineValues()
    method = MaxEnt(16, reward_scale=SCALE, search="best", values=model)
    for _ in dts.decode_many(lm, OTHER_PROMPTS, method=method, reward=reward, max_new_tokens=tokens, batch_size=32):
        pass
    return model


def group(lm: Any, name: str, method: str, reward: dts.Reward, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All prompts searched at once against the samples."""
    tokens = 64 if name == "coding" else options.tokens
    drawn, (costs, drawing) = samples(lm, name, options.samples, tokens, options.prompts, options.output.parent)
    prompts, target = prompts_of(name, options.prompts), options.score == "target"
    begun = time.process_time()
    bests, goals, flat = [], [], []
    for prompt, texts, full in zip(prompts, drawn, costs, strict=True):
        values = scores(lm, reward, prompt, texts)
        scored = [dataclasses.replace(text, reward=value) for text, value in zip(texts, values, strict=True)]
        best = max(scored, key=lambda text: text.reward * SCALE + target * text.logprob)
        bests.append(best)
        flat.append(max(values) == min(values))
        goals.append(Goal(best.reward * SCALE + best.logprob if target else best.reward, full))
    drawing += time.process_time() - begun
    settings = {**METHODS[method], **options_of(name)}
    if settings.get("values") == "carried":
        settings["values"] = carried(lm, reward, tokens)
    watched, begun = Watched(settings, goals, target), time.process_time()
    for _ in dts.decode_many(
        lm, prompts, method=watched, reward=reward, max_new_tokens=tokens, seed=SEED, width=WIDTH,
        batch_size=WIDTH * len(prompts),
    ):  # fmt: skip
        pass
    seconds = time.process_time() - begun
    rows = []
    for index, (best, full) in enumerate(zip(bests, costs, strict=True)):
        if flat[index]:
            continue
        run = watched.runs[index]
        found = run.best or dataclasses.replace(best, text="", logprob=-math.inf, reward=0.0)
        rows.append({
            "prompt": index, "reward": name, "method": method, "score": options.score, "n": options.samples,
            "tokens": tokens, "ratio": full / (run.reached or full), "reached": run.reached is not None,
            "seconds": drawing / seconds, "gain": found.reward - best.reward, "nats": found.logprob - best.logprob,
            "nats_token": found.logprob / max(len(found.token_ids), 1) - best.logprob / len(best.token_ids),
            "distinct_2": distinct_2(found.text) - distinct_2(best.text),
            "length": len(found.token_ids) - len(best.token_ids),
            "text": found.text, "best_of_n": best.text, **run.branches(),
        })  # fmt: skip
    return rows


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with a 95 % bootstrap interval over prompts."""
    array, rng = np.array(values), np.random.default_rng(0)
    means = array[rng.integers(len(array), size=(4000, len(array)))].mean(-1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(array.mean()), float(low), float(high)


HEAD = (
    "score", "N", "tokens", "reward", "method", "token ratio", "least", "not reached", "ratio of seconds",
    "reward gained", "nats gained", "nats a token", "distinct-2", "length", "branch, quarters", "reused",
)  # fmt: skip
KEY = ("score", "n", "tokens", "reward", "method")


def report(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for key in dict.fromkeys(tuple(r[k] for k in KEY) for r in rows):
        own = [r for r in rows if tuple(r[k] for k in KEY) == key]
        mean, low, high = map(math.exp, interval([math.log(r["ratio"]) for r in own]))
        nats, least, most = interval([r["nats"] for r in own])
        means = {k: float(np.mean([r[k] for r in own])) for k in
                 ("gain", "nats_token", "distinct_2", "length", "reused")}  # fmt: skip
        quarters = np.sum([r["quarters"] for r in own], axis=0)
        lines.append(
            f"| {' | '.join(map(str, key))} | {mean:.1f} [{low:.1f}, {high:.1f}] | "
            f"{min(r['ratio'] for r in own):.1f} | {sum(not r['reached'] for r in own)} of {len(own)} | "
            f"{own[0]['seconds']:.1f} | {means['gain']:+.3f} | "
            f"{nats:+.1f} [{least:+.1f}, {most:+.1f}] | {means['nats_token']:+.2f} | "
            f"{means['distinct_2']:+.2f} | {means['length']:+.1f} | "
            f"{' '.join(f'{100 * q / max(quarters.sum(), 1):.0f}' for q in quarters)} | {means['reused']:.2f} |"
        )
    return "\n".join(lines)


def texts(rows: list[dict[str, Any]]) -> str:
    """The texts of the first ten prompts, as Markdown."""
    lines = []
    for key in dict.fromkeys(tuple(r[k] for k in KEY) for r in rows):
        lines += ["", f"## {key[3]}, {key[4]}", "", "| prompt | found | reward gained | best of the samples |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for row in [r for r in rows if tuple(r[k] for k in KEY) == key][:10]:
            found, best = (re.sub(r"\s+", " ", row[k]).replace("|", "\\|").strip() for k in ("text", "best_of_n"))
            prompt = PROMPTS[row["prompt"]] if key[3] != "coding" else _easy()[row["prompt"]].name
            lines.append(f"| {prompt} | {found} | {row['gain']:+.3f} | {best} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("finished_texts.jsonl"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the replies")
    parser.add_argument("--rewards", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["DTS*", "DTS* no values"])
    parser.add_argument("--score", choices=["reward", "target"], default="reward")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--report", action="store_true", help="only print the table of what --output holds")
    parser.add_argument("--texts", action="store_true", help="only print ten texts for each group that it holds")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if options.texts:
        print(texts(rows))
        return
    if not options.report:
        torch.set_num_threads(1)
        lm = dts.load("smollm2-135m")
        done = {tuple(r[k] for k in KEY) for r in rows}
        for name in options.rewards:
            try:
                reward = reward_of(name, lm, options.data)
            except (ImportError, OSError) as error:
                print(f"{name} is left out: {error}")
                continue
            for method in options.methods:
                if (options.score, options.samples, 64 if name == "coding" else options.tokens, name, method) in done:
                    continue
                new = group(lm, name, method, reward, options)
                rows += new
                with options.output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
                print(report(new).splitlines()[-1], flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
