"""Sampled replies of fine-tuned models, and what is measured on them, prompt by prompt.

Two kinds of test data: replies (JSON Lines with human replies, and engagement where known) and the coding task.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

import dts
from dts.errors import UsageError
from dts.evaluation.measures import metrics, statistics
from dts.lm import LanguageModel
from dts.results import Result, Rollout
from dts.rewards import Finished, Reward
from dts.search import Sampling
from dts.training.coding import Problem, extract, passed, problems
from dts.training.data import Row, read_rows
from dts.training.diversity import well_formed
from dts.training.engagement import above_group_mean, fit_engagement
from dts.training.heuristic_reward import HeuristicReward, is_copy, prompt_text
from dts.training.rewards import score

CODING = "coding"  # in place of a file: the test problems of the coding task
CODING_ALL = "coding-all"  # all its problems, also those that training may have seen
FOLDS = 5
KS = (1, 5, 10)
INVALID = ("empty", "broken", "copies the post", "no code")  # failure modes that make a reply invalid


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt."""

    prompt: list[dict[str, str]]
    references: tuple[str, ...]  # human replies
    cluster: str  # items of a cluster are alike: a thread
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One sampled reply."""

    text: str
    tokens: int
    cut: bool  # ended by the length limit
    ids: tuple[int, ...] = ()  # its tokens, EOS included; empty where they were not kept
    logprob: float = 0.0  # of the tokens, under the model and the temperature it was drawn with


class Scorer(Protocol):
    """Engagement of replies in [0, 1], by something that no training saw."""

    def __call__(self, item: Item, replies: Sequence[str]) -> list[float]: ...


def read_items(
    test_data: str, count: int | None, seed: int, need: Sequence[str] = ("prompt", "response")
) -> tuple[list[Item], list[Row]]:
    """Items in a seeded order, at most `count`, and all rows of the file (none for the coding task). need: fields that
    every row must have."""
    if test_data in (CODING, CODING_ALL):
        items = [Item(p.prompt, (), p.name, p) for p in problems("test" if test_data == CODING else None)]
        return items[:count], []
    rows = read_rows(test_data, need=need)
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps(row.prompt), []).append(row)
    items = [
        Item(own[0].prompt, tuple(row.response for row in own if row.response), _cluster(own[0]))
        for own in by_prompt.values()
    ]
    random.Random(seed).shuffle(items)
    return items[:count], rows


def _cluster(row: Row) -> str:
    return row.group if row.group is not None else json.dumps(row.prompt)


def sample_replies(
    lm: LanguageModel, items: Sequence[Item], which: Sequence[int], *, samples: int, max_tokens: int,
    temperature: float, seed: int,
) -> Iterator[list[Reply]]:  # fmt: skip
    """Independent replies to the items of these numbers in turn; the same seed for the same item whatever the model.
    The items share a batch."""
    seeds = {index: int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in which}
    requests = [dts.Request(items[index].prompt, seed=own) for index, own in seeds.items()]
    for result in dts.decode_many(
        lm, requests, method=Sampling(samples), width=samples, max_new_tokens=max_tokens, temperature=temperature
    ):
        yield [_reply(result, rollout, max_tokens) for rollout in result.rollouts]


def _reply(result: Result, rollout: Rollout, max_tokens: int) -> Reply:
    ids, logprob = result.tree.tokens(rollout.leaf), math.fsum(result.tree.log_probs(rollout.leaf))
    return Reply(rollout.text.strip(), rollout.length, rollout.length >= max_tokens, ids, logprob)


# Failure modes -------------------------------------------------------------------------------------------------------


def failures(item: Item, replies: Sequence[Reply]) -> list[list[str]]:
    """Names of what is wrong with each reply; several may hold."""
    seen: set[str] = set()
    found = []
    for reply in replies:
        code = None if item.problem is None else extract(reply.text, item.problem.name)
        checks = {
            "empty": not reply.text,
            "no code": item.problem is not None and code is None,
            "broken": item.problem is None and bool(reply.text) and not well_formed(reply.text),
            "copies the post": item.problem is None and is_copy(prompt_text(item.prompt), reply.text),
            "very short": item.problem is None and 0 < len(reply.text.split()) < 3,
            "cut off": reply.cut,
            "repeats another sample": bool(reply.text) and reply.text in seen,
        }
        seen.add(reply.text)
        found.append([name for name, holds in checks.items() if holds])
    return found


# Held-out engagement -------------------------------------------------------------------------------------------------


class CrossFitted:
    """Engagement models fitted on the test rows themselves, each on the clusters that it does not score.

    No training reward saw these rows, and no model scores a thread that it was fitted on.
    """

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        clusters = sorted({_cluster(row) for row in rows})
        if len(clusters) < FOLDS:
            raise UsageError(f"{len(clusters)} groups with engagement are too few for {FOLDS} folds")
        random.Random(seed).shuffle(clusters)
        self._fold = {cluster: i % FOLDS for i, cluster in enumerate(clusters)}
        self._models = [fit_engagement([r for r in rows if self._fold[_cluster(r)] != fold]) for fold in range(FOLDS)]
        scores = np.array([self._score(_cluster(row), [row.response or ""])[0] for row in rows])
        self.human_median = float(np.median(scores))
        self.validity = _rank_correlation(scores, above_group_mean(rows), [_cluster(row) for row in rows])

    def _score(self, cluster: str, replies: Sequence[str]) -> list[float]:
        return self._models[self._fold.get(cluster, 0)].score(replies)

    def __call__(self, item: Item, replies: Sequence[str]) -> list[float]:
        return self._score(item.cluster, replies)


def _rank_correlation(scores: np.ndarray, truth: np.ndarray, clusters: Sequence[str]) -> statistics.Interval:
    """Spearman's correlation, with an interval over clusters."""
    import scipy.stats

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.nan_to_num(scipy.stats.spearmanr(a, b).statistic))

    return statistics.bootstrap(correlation, scores, truth, clusters=clusters, method="percentile", resamples=500)


# Measures ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What replies are measured with."""

    train_reward: HeuristicReward | None  # what GRPO was trained on; None for the coding task, whose reward is known
    scorer: Scorer | None
    human_median: float  # of the scorer, over the human replies
    checks: tuple[Reward, ...] = ()  # each a measure of its own, in [0, 1]

    @property
    def predicate(self) -> str:
        """What counts as success in pass@k for replies."""
        if self.checks:
            return f"the reply is valid, and {' and '.join(check.name for check in self.checks)} give it 1"
        if self.scorer is None:
            return "the reply is valid: not empty, not broken, not a copy of the post (no engagement to score with)"
        return "the reply is valid, and the held-out scorer rates it at or above the median human reply"

    def measure(self, item: Item, replies: Sequence[Reply]) -> dict[str, float]:
        """Values by name; means over the replies where they are scored one by one."""
        texts, n = [reply.text for reply in replies], len(replies)
        valid = [not set(modes) & set(INVALID) for modes in failures(item, replies)]
        values = {
            "self_bleu": metrics.self_bleu(texts),
            "distinct_1": metrics.distinct_n(texts, 1),
            "distinct_2": metrics.distinct_n(texts, 2),
            "valid": float(np.mean(valid)),
            "repetition": float(np.mean([metrics.repetition(text) for text in texts])),
            "words": float(np.mean([len(text.split()) for text in texts])),
        }
        values["diversity"] = 1.0 - values["self_bleu"] / 100.0
        if item.references:
            values["rouge_l"] = float(np.mean([_best_rouge(text, item.references) for text in texts]))
        success = self._success(item, texts, valid, values)
        correct = sum(success)
        return values | {f"pass@{k}": metrics.pass_at_k(n, correct, k) for k in KS if k <= n}

    def _success(self, item: Item, texts: Sequence[str], valid: list[bool], values: dict[str, float]) -> list[bool]:
        if item.problem is not None:
            results = _test_results(item.problem, texts)
            public = len(item.problem.public)
            values["train_reward"] = float(np.mean([np.mean(results[text][:public]) for text in texts]))
            return [all(results[text]) for text in texts]
        if self.checks:
            checked = {check.name: text_values(check, item.prompt, texts) for check in self.checks}
            values |= {name: float(np.mean(own)) for name, own in checked.items()}
            return [fine and all(own[i] >= 1 for own in checked.values()) for i, fine in enumerate(valid)]
        if self.train_reward is not None:
            values["train_reward"] = float(np.mean(self.train_reward([item.prompt] * len(texts), texts)))
        if self.scorer is None:
            return valid
        scores = self.scorer(item, texts)
        values["engagement"] = float(np.mean(scores))
        return [fine and score >= self.human_median for fine, score in zip(valid, scores, strict=True)]


def text_values(reward: Reward, prompt: Any, texts: Sequence[str]) -> list[float]:
    """A reward of whole texts without a model: each character stands for a token, so it must not count tokens."""

    characters: Any = SimpleNamespace(encode=lambda prompt: [], decode=lambda ids: "".join(map(chr, ids)))
    return score(reward, characters, prompt, [Finished(tuple(map(ord, text)), text) for text in texts])


def _test_results(problem: Problem, texts: Sequence[str]) -> dict[str, list[bool]]:
    """Which tests each distinct answer passes, the public ones first."""
    distinct, tests = list(dict.fromkeys(texts)), [*problem.public, *problem.hidden]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each run is a process of its own; threads only wait
        return dict(zip(distinct, pool.map(lambda text: passed(problem, text, tests), distinct), strict=True))


def _best_rouge(text: str, references: Sequence[str]) -> float:
    return max(metrics.rouge_l([text], [reference]) for reference in references[:5])


Values = Mapping[str, np.ndarray]  # metric -> [seeds, items]


def table(measured: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, np.ndarray]:
    """Measures by seed and item as arrays by metric; a metric that some item lacks is left out."""
    names = [name for name in measured[0][0] if all(name in values for row in measured for values in row)]
    return {name: np.array([[values[name] for values in row] for row in measured]) for name in names}
