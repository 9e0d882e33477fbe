"""The records of a run, as they stand in its files: rollouts.jsonl, samples.jsonl, and the aggregates of summary.json.

Keys are those of the files. A `Cell` stands in summary.json under the names that trackers use for it
(`dts.evaluation.tracking.keys`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

Record = dict[str, Any]  # any other record


class Unit(NamedTuple):
    """The jobs that share one tracker run."""

    model: str
    dataset: str
    seed: int


class Job(NamedTuple):
    """One search: the smallest piece of work that is done or not done."""

    model: str
    dataset: str
    seed: int
    sample: int  # position in the task's examples
    method: str

    @property
    def unit(self) -> Unit:
        return Unit(self.model, self.dataset, self.seed)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Job:
        """The job that a line of rollouts.jsonl or samples.jsonl belongs to."""
        return cls(record["model"], record["dataset"], record["seed"], record["sample"], record["method"])


class Mark(TypedDict, total=False):
    """What only some records carry."""

    oracle: bool  # the reward sees the reference answer


class Head(Mark):
    """What every line of rollouts.jsonl and samples.jsonl begins with: a `Job`, and the example's id."""

    model: str
    dataset: str
    seed: int
    sample: int
    method: str
    id: str


class RolloutRecord(Head):
    """A line of rollouts.jsonl. Tokens and seconds count from the start of the search."""

    rollout_idx: int
    rollout_reward: float
    best_so_far: float
    output_length: int  # tokens of the completion
    nodes_explored: int
    start_depth: int
    tokens: int  # forwarded, prompt included
    time: float  # seconds
    text: str


class Costs(TypedDict):
    """What a search and its reward cost; see `dts.results.Usage`."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    forwarded_tokens: int
    unique_tokens: int
    recomputed_tokens: int
    model_calls: int
    kv_tokens: int
    kv_bytes: int
    reward_calls: int
    reward_tokens: int
    reward_seconds: float


class SampleRecord(Head, Costs):
    """A line of samples.jsonl: what one search found and what it cost."""

    prompt: Any
    reward: str  # its name
    best_reward: float
    monotonicity: float | None  # None: of a single rollout
    independent_monotonicity: float | None
    time: float  # seconds
    nodes: int
    rollouts: int
    tokens_reused: float | None  # share of the rollouts' tokens that more than one of them has
    branch_depth: float | None  # median share of its text after which a rollout left the tree
    logprob: float
    logprob_per_token: float
    finished_by: str
    shares: list[float] | None  # weight of each rollout as a sample of pi*, where the method estimates pi*
    text: str


class Cell(Mark, total=False):
    """Aggregates of one model, data set and method; of one seed too in wandb_experiments_*.json."""

    model: str
    dataset: str
    method: str
    color: str
    seeds: list[int]
    samples: int
    avg_best_reward: float | None
    avg_monotonicity: float | None
    avg_time_per_sample: float | None  # seconds
    independent_monotonicity: float | None
    forwarded_tokens: float | None
    unique_tokens: float | None
    generated_tokens: float | None
    reward_calls: float | None
    reward_tokens: float | None
    reward_seconds: float | None
    nodes: float | None
    tokens_reused: float | None
    branch_depth: float | None
    logprob_per_token: float | None
    total_time: float  # seconds
    metrics: dict[str, float]
    best_reward_interval: list[float] | None  # 95 %; over all seeds only


class Comparison(TypedDict):
    """The search against one other method on the same samples, within the tokens of that method."""

    method: str  # the other one
    logprob_per_token: float | None
    one_answer: bool  # it cannot use more tokens: the search counts with its result
    samples: int
    clusters: int  # of these samples: what is independent
    search_reward: float  # means over samples
    search_tokens: float
    reward: float
    tokens: float
    difference: float
    interval: list[float] | None  # 95 %; None: of a single cluster
    p: float
    better: int  # samples on which the search has the higher reward
    worse: int


class Unaided(TypedDict):
    """The best method without a language model, by the task's headline metric."""

    method: str
    metric: str
    value: float
    search_value: float
    ahead: bool  # not worse than the search


class Verdict(Mark):
    """What the search of a run won on one data set with one model; in words in `dts.evaluation.report.verdict`."""

    model: str
    dataset: str
    method: str  # the search
    logprob_per_token: float | None
    outcome: str  # "won" against all others, "lost" against one of them, or "open"
    others: list[Comparison]  # the closest first
    unaided: Unaided | None
    note: str  # of the task


class Description(TypedDict):
    """Everything that decides the outcome of a run: the content of config.json."""

    config: Record
    models: list[Record]
    methods: list[str]
    datasets: list[Record]
    versions: dict[str, str]


class RunSummary(Description):
    """The content of summary.json, its cells under their names in memory."""

    experiment: str
    partial: bool
    seconds: float
    rollouts: int
    rollouts_of_unfinished_samples: int
    rewards: list[str]
    oracles: list[str]
    runs: list[Cell]
    baselines: dict[str, dict[str, dict[str, float]]]
    verdicts: list[Verdict]
