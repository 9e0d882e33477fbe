"""Decodes one job. Depends on nothing but its arguments, so any process may do any job."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dts.errors import RewardError
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.measures.metrics import branch_depth, expected_monotonicity, monotonicity, tokens_reused
from dts.evaluation.records import Costs, Head, Job, Record, RolloutRecord, SampleRecord
from dts.evaluation.report import tree_record
from dts.evaluation.tasks.base import Example
from dts.evaluation.tasks.oracle import is_oracle
from dts.results import Result, Rollout
from dts.rewards import Reward
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
    search = Described.of(plan, job)
    rollouts: list[RolloutRecord] = []

    def take(rollout: Rollout) -> None:
        rollouts.append(rollout_record(search.head, rollout))
        on_rollout(rollouts[-1])

    result = backend.decode(
        lm,
        search.example.prompt,
        reward=search.reward,
        method=plan.methods[job.method],
        seed=sample_seed(job.seed, job.sample),
        batch_size=plan.config.rollout_batch,
        on_rollout=take,
        **decoding(plan, job),
    )
    return search.outcome(result, rollouts, lm.decode, plan.config.save_trees)


def decoding(plan: Plan, job: Job) -> dict[str, Any]:
    """The settings of `dts.decode` that are the same for every sample of a data set."""
    config = plan.config
    return {
        "max_new_tokens": config.max_tokens, "temperature": config.temperature, "top_k": config.top_k,
        "top_p": config.top_p, "stop": plan.tasks[job.dataset].stop, "max_kv_bytes": config.max_kv_bytes,
        "require_eos": config.require_eos,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Described:
    """What a job decodes, and what its records begin with."""

    job: Job
    example: Example
    reward: Reward
    head: Head  # rollouts and trees carry the mark of an oracle too
    oracle: bool

    @classmethod
    def of(cls, plan: Plan, job: Job) -> Described:
        """Raises `RewardError` with the name of the job where the task cannot make its reward."""
        task = plan.tasks[job.dataset]
        example = task.examples[job.sample]
        try:
            reward = task.reward(example)
        except Exception as error:
            raise RewardError(
                f"{' '.join(map(str, job))}: the reward of example {example.id!r} cannot be made: "
                f"{type(error).__name__}: {error}"
            ) from error
        oracle = is_oracle(reward)
        head = cast("Head", {**job._asdict(), "id": example.id, **({"oracle": True} if oracle else {})})
        timeout = plan.config.reward_timeout
        return cls(job, example, reward if timeout is None else with_timeout(reward, timeout), head, oracle)

    def outcome(
        self, result: Result, rollouts: list[RolloutRecord], decode: Callable[[Sequence[int]], str], save_trees: int
    ) -> Outcome:
        about = {"prompt": self.example.prompt, "reward": self.reward.name, "oracle": self.oracle}
        tree = {**self.head, **tree_record(result, decode)} if self.job.sample < save_trees else None
        return Outcome(self.job, sample_record({**self.head, **about}, result), rollouts, tree)


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
    if result.estimate is None or not result.estimate.shares:
        return None
    times = collections.Counter(rollout.leaf for rollout in result.rollouts)
    by_leaf = result.estimate.shares
    return [by_leaf.get(rollout.leaf, 0.0) / times[rollout.leaf] for rollout in result.rollouts]


def sample_record(about: Mapping[str, Any], result: Result) -> SampleRecord:
    """What one search found and what it cost, as it stands in samples.jsonl. about: head, prompt and reward."""
    rewards = [rollout.reward for rollout in result.rollouts]
    usage = result.usage.as_dict()
    seconds = usage.pop("seconds")
    several = len(rewards) > 1
    return {
        **cast("SampleRecord", about),
        "best_reward": result.best.reward,
        "monotonicity": monotonicity(rewards) if several else None,
        "independent_monotonicity": expected_monotonicity(rewards) if several else None,
        "time": seconds,
        "nodes": len(result.tree),
        "rollouts": len(rewards),
        "tokens_reused": tokens_reused(result.tree, result.rollouts),
        "branch_depth": branch_depth(result.rollouts),
        "logprob": result.best.logprob,
        "logprob_per_token": result.best.logprob / max(len(result.best.token_ids), 1),
        "finished_by": result.best.finished_by,
        **cast("Costs", usage),
        "shares": _shares(result),
        "text": result.best.text,
    }
