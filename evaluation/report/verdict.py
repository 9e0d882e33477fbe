"""What was won: the search against each other method of its run, at no more tokens than that method used.

The runner gives methods equal rollouts, not equal tokens. So the search counts, on each sample, with the best reward
that it had when it had forwarded as many tokens as the other method did in all; where it needed fewer, with its result.
A method with one answer cannot use more tokens; there the search counts with its result, and the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from dts.evaluation.measures import statistics
from dts.evaluation.records import Cell, Comparison, Job, Mark, SampleRecord, Unaided, Verdict
from dts.evaluation.tasks.oracle import marked, sees_reference

if TYPE_CHECKING:
    import pandas as pd

    from dts.evaluation.tasks.base import Task

SEARCHES = ("maxent-star", "maxent")  # the first of them that a run has is its search
SURE = 0.05  # p of a difference that counts is below
ENOUGH = 6  # examples (or clusters of them) whose signs can give such a p: 2 / 2^6
Pair = tuple[SampleRecord, SampleRecord]  # of the search and of the other method, for one example and seed


class Curve(NamedTuple):
    """The rollouts of one search, in order."""

    tokens: np.ndarray  # forwarded when each was finished, [rollouts]
    reward: np.ndarray  # of each, [rollouts]
    best: np.ndarray  # reward so far, [rollouts]


def verdicts(
    samples: Sequence[SampleRecord],
    cells: Sequence[Cell],
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    tasks: Mapping[str, Task],
    rollouts: Callable[[], pd.DataFrame],
) -> list[Verdict]:
    """One for each model and data set that has a search and another method on the same samples.

    cells: the aggregates of the samples. rollouts: makes `Collected.rollouts`.
    """
    found = []
    curves = _Curves(rollouts)
    for model, dataset in dict.fromkeys((s["model"], s["dataset"]) for s in samples):
        own = [s for s in samples if (s["model"], s["dataset"]) == (model, dataset)]
        methods = list(dict.fromkeys(s["method"] for s in own))
        search = next((name for name in SEARCHES if name in methods), None)
        pairs = {name: _pairs(own, search, name) for name in methods if search and name not in SEARCHES}
        known = {c["method"]: c for c in cells if (c["model"], c["dataset"]) == (model, dataset)}
        others = [_compare(known[name], both, tasks[dataset], curves) for name, both in pairs.items() if both]
        if search is not None and others:
            unaided = _unaided(tasks[dataset], known[search], baselines[dataset])
            found.append(_verdict(known[search], others, unaided, tasks[dataset]))
    return found


class _Curves:
    """The rollouts of searches by job; read when one is asked for, since most runs need none."""

    def __init__(self, rollouts: Callable[[], pd.DataFrame]) -> None:
        self._make = rollouts
        self._known: dict[Job, Curve] | None = None

    def __getitem__(self, job: Job) -> Curve:
        if self._known is None:
            frame = self._make()
            frame = frame[frame["method"].isin(SEARCHES)]
            self._known = {
                Job._make(key): Curve(*(one[name].to_numpy() for name in ("tokens", "rollout_reward", "best_so_far")))
                for key, one in frame.groupby(list(Job._fields), observed=True)
            }
        return self._known[job]


def _pairs(samples: Sequence[SampleRecord], search: str, other: str) -> list[Pair]:
    first, second = ({(s["id"], s["seed"]): s for s in samples if s["method"] == method} for method in (search, other))
    return [(first[key], second[key]) for key in first if key in second]


def _compare(cell: Cell, pairs: Sequence[Pair], task: Task, curves: _Curves) -> Comparison:
    one_answer = all(other["rollouts"] == 1 for _, other in pairs)
    own = [ours["best_reward"] if one_answer else _within(ours, other, curves) for ours, other in pairs]
    theirs = [other["best_reward"] for _, other in pairs]
    spent = [ours["forwarded_tokens"] if one_answer else min(ours["forwarded_tokens"], other["forwarded_tokens"])
             for ours, other in pairs]  # fmt: skip
    clusters = [task.clusters[ours["id"]] for ours, _ in pairs]
    gap = statistics.paired_difference(own, theirs, clusters=clusters, method="percentile")
    return {
        "method": cell["method"],
        "logprob_per_token": cell["logprob_per_token"],
        "one_answer": one_answer,
        "samples": len(pairs),
        "clusters": len(set(clusters)),
        "search_reward": float(np.mean(own)),
        "search_tokens": float(np.mean(spent)),
        "reward": float(np.mean(theirs)),
        "tokens": float(np.mean([other["forwarded_tokens"] for _, other in pairs])),
        "difference": gap.value,
        "interval": [gap.low, gap.high] if math.isfinite(gap.low) else None,
        "p": statistics.sign_flip_test(own, theirs, clusters=clusters),
        "better": sum(a > b for a, b in zip(own, theirs, strict=True)),
        "worse": sum(a < b for a, b in zip(own, theirs, strict=True)),
    }


def _within(ours: SampleRecord, other: SampleRecord, curves: _Curves) -> float:
    """The search's reward for the tokens of the other method; a lower bound where it is not known."""
    if ours["forwarded_tokens"] <= other["forwarded_tokens"]:
        return ours["best_reward"]
    curve = curves[Job.of(ours)]
    finished = int((curve.tokens <= other["forwarded_tokens"]).sum())
    if not finished:  # it had no text yet
        return min(float(curve.reward[0]), other["best_reward"])
    if ours["best_reward"] < curve.best[-1]:  # something else than the reward chose its text
        return float(curve.reward[:finished].min())
    return float(curve.best[finished - 1])


def _unaided(task: Task, cell: Cell, baselines: Mapping[str, Mapping[str, float]]) -> Unaided | None:
    """The best row without a language model, by the task's headline metric."""
    metric, direction = next(iter(task.metrics.items()))
    sign = 1 if direction == "max" else -1
    known = {name: row[metric] for name, row in baselines.items() if math.isfinite(row.get(metric, math.nan))}
    own = cell["metrics"].get(metric)
    if own is None or not known:
        return None
    name = max(known, key=lambda row: sign * known[row])
    ahead = sign * (known[name] - own) >= 0
    return {"method": name, "metric": metric, "value": known[name], "search_value": own, "ahead": ahead}


def _verdict(cell: Cell, others: Sequence[Comparison], unaided: Unaided | None, task: Task) -> Verdict:
    signs = [_sign(one) for one in others]
    return {
        **cast("Mark", {"oracle": True} if cell.get("oracle") else {}),
        "model": cell["model"],
        "dataset": cell["dataset"],
        "method": cell["method"],
        "logprob_per_token": cell["logprob_per_token"],
        "outcome": "lost" if -1 in signs else "won" if all(signs) else "open",
        "others": sorted(others, key=lambda one: one["difference"]),
        "unaided": unaided,
        "note": task.note,
    }


def _sign(one: Comparison) -> int:
    """1 or -1 where a difference is sure, otherwise 0."""
    sure = one["interval"] is not None and one["interval"][0] * one["interval"][1] > 0 and one["p"] < SURE
    return int(np.sign(one["difference"])) if sure else 0


# ---- in words ----

_OUTCOMES = {
    "won": "Search ({method}) won on",
    "lost": "Search ({method}) lost on",
    "open": "We could not show that search ({method}) won on",
}


def sentence(verdict: Verdict) -> str:
    """What was won, with the figures that say so."""
    return f"{headline(verdict)}: {figures(verdict)}"


def headline(verdict: Verdict) -> str:
    outcome = _OUTCOMES[verdict["outcome"]].format(method=verdict["method"])
    return marked(f"{outcome} {verdict['dataset']} with {verdict['model']}", sees_reference(verdict))


def figures(verdict: Verdict) -> str:
    """The search against the methods that `compared` names."""
    return "; ".join(_against(verdict["method"], one) for one in _shown(verdict)) + "."


def compared(verdict: Verdict) -> list[str]:
    """The search, and the methods of the sentence."""
    return [verdict["method"], *(one["method"] for one in _shown(verdict))]


def _shown(verdict: Verdict) -> list[Comparison]:
    """The closest method, the closest one with a single answer, and all that the search did not beat."""
    closest = {one["one_answer"]: one for one in reversed(verdict["others"])}
    shown = [one for one in verdict["others"] if one is closest[one["one_answer"]] or _sign(one) < 1]
    return sorted(shown, key=lambda one: one["one_answer"])


def _against(search: str, one: Comparison) -> str:
    own, other = one["search_tokens"], one["tokens"]
    if one["one_answer"]:
        budget = f"against the one answer of {one['method']} ({other:.0f} tokens, {search} {own:.0f})"
    else:
        budget = f"at no more tokens than {one['method']} ({own:.0f} a sample against {other:.0f})"
    rewards = f"the mean reward is {one['search_reward']:.3f} against {one['reward']:.3f}, {one['difference']:+.3f}"
    bounds = " [{:+.3f}, {:+.3f}]".format(*one["interval"]) if one["interval"] else ""
    counts = f"better on {one['better']} of {one['samples']} samples and worse on {one['worse']}"
    return f"{budget} {rewards}{bounds}, p {one['p']:.3f}, {counts}"


def remarks(verdict: Verdict) -> list[str]:
    """What else a reader has to know, a sentence each."""
    said = []
    few = min(one["clusters"] for one in verdict["others"])
    if verdict["outcome"] == "open" and few < ENOUGH:
        said.append(f"Too few to tell: {few} independent examples; from {ENOUGH} on a difference can be shown.")
    if (row := verdict["unaided"]) is not None:
        about = "does as well or better" if row["ahead"] else "does worse, even the best"
        said.append(
            f"Without a language model, {row['method']} {about}: {row['metric'].replace('_', ' ')} {row['value']:.3f}, "
            f"{verdict['method']} {row['search_value']:.3f}."
        )
    texts = [(one["method"], one["logprob_per_token"]) for one in (verdict, *_shown(verdict))]
    known = [f"{method} {value:.2f}" for method, value in texts if value is not None]
    if len(known) == len(texts):
        said.append(f"Log p per token of the texts under the model: {', '.join(known)}.")
    return [*said, *([verdict["note"]] if verdict["note"] else [])]
