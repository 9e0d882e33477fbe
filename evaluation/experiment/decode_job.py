"""Decodes one job. Depends on nothing but its arguments, so any process may do any job."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.measures.metrics import monotonicity, shuffled_monotonicity
from dts.evaluation.records import Costs, Head, Job, Record, RolloutRecord, SampleRecord
from dts.evaluation.report import tree_record
from dts.evaluation.tasks.oracle import is_oracle
from dts.results import Result, Rollout
from dts.timeout import with_timeout


@dataclass(frozen=True, slots=True)
class Outcome:
    """The records of a finished job, as they go into the run folder."""

    job: Job
    sample: SampleRecord
    rollouts: list[RolloutRecord]
    tree: Record | None  # for the first `save_trees` samples


def run_job(
    lm: Any, plan: Plan, job: Job, backend: Backend, on_rollout: Callable[[RolloutRecord], None] = lambda record: None
) -> Outcome:
    """Decode one example with one method on the loaded model; `on_rollout` gets each rollout as it finishes."""
    config, task = plan.config, plan.tasks[job.dataset]
    example = task.examples[job.sample]
    head = cast("Head", {**job._asdict(), "id": example.id})
    reward = task.reward(example)
    oracle = is_oracle(reward)
    if oracle:
        head["oracle"] = True  # rollouts and trees carry the mark too
    if config.reward_timeout is not None:
        reward = with_timeout(reward, config.reward_timeout)
    rollouts: list[RolloutRecord] = []

    def take(rollout: Rollout) -> None:
        rollouts.append(rollout_record(head, rollout))
        on_rollout(rollouts[-1])

    result = backend.decode(
        lm,
        example.prompt,
        reward=reward,
        method=plan.methods[job.method],
        max_new_tokens=config.max_tokens,
        seed=sample_seed(job.seed, job.sample),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop=task.stop,
        batch_size=config.rollout_batch,
        max_kv_bytes=config.max_kv_bytes,
        on_rollout=take,
    )
    tree = {**head, **tree_record(result, lm.decode)} if job.sample < config.save_trees else None
    about = {"prompt": example.prompt, "reward": reward.name, "oracle": oracle}
    return Outcome(job, sample_record({**head, **about}, result), rollouts, tree)


def sample_seed(seed: int, index: int) -> int:
    """The seed of one sample: the same for every model and method, independent of the order of work."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def rollout_record(head: Head, rollout: Rollout) -> RolloutRecord:
    """A rollout as it stands in rollouts.jsonl."""
    return {
        **head,
        "rollout_idx": rollout.index,
        "rollout_reward": rollout.reward,
        "best_so_far": rollout.best_so_far,
        "output_length": rollout.length,
        "nodes_explored": rollout.nodes,
        "start_depth": rollout.start_depth,
        "tokens": rollout.tokens,
        "time": rollout.seconds,
        "text": rollout.text,
    }


def _shares(result: Result) -> list[float] | None:
    """The weight of each rollout as a sample of pi*, where the method estimates pi*; equal ones divide theirs."""
    if result.estimate is None or result.estimate.shares is None:
        return None
    times = collections.Counter(rollout.leaf for rollout in result.rollouts)
    by_leaf = result.estimate.shares
    return [by_leaf[rollout.leaf] / times[rollout.leaf] for rollout in result.rollouts]


def sample_record(about: Mapping[str, Any], result: Result) -> SampleRecord:
    """What one search found and what it cost, as it stands in samples.jsonl. about: head, prompt and reward."""
    rewards = [rollout.reward for rollout in result.rollouts]
    usage = result.usage.as_dict()
    seconds = usage.pop("seconds")
    several = len(rewards) > 1
    below_root = sum(rollout.start_depth > 0 for rollout in result.rollouts)
    return {
        **cast("SampleRecord", about),
        "best_reward": result.best.reward,
        "monotonicity": monotonicity(rewards) if several else None,
        "independent_monotonicity": shuffled_monotonicity(rewards).mean if several else None,
        "time": seconds,
        "nodes": len(result.tree),
        "rollouts": len(rewards),
        "below_root": below_root / len(rewards) if rewards else None,
        "logprob": result.best.logprob,
        "finished_by": result.best.finished_by,
        **cast("Costs", usage),
        "shares": _shares(result),
        "text": result.best.text,
    }
