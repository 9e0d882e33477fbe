"""What a search returns: completions, rollouts as they happened, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dts.softvalue import SoftValues
from dts.tree import Tree

if TYPE_CHECKING:
    from dts.target import Target  # imports torch, which commands do later


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sequence."""

    text: str  # without EOS and without the stop string
    token_ids: tuple[int, ...]  # with the EOS token where one was generated
    reward: float
    logprob: float  # log p(token_ids | prompt) in nats, under the p that was sampled from
    finished_by: str  # "eos", "stop" or "length"
    token_logprobs: tuple[float, ...] = ()  # of each token, in nats; their sum is `logprob`


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished path, recorded by the search at the moment it finished."""

    index: int
    reward: float
    best_so_far: float
    nodes: int  # tree nodes that existed when it finished
    seconds: float  # since the search started
    tokens: int  # tokens forwarded since the search started, prompt included
    length: int  # tokens of the completion
    start_depth: int  # depth of the node where it left the tree that earlier rollouts had built
    leaf: int  # its last node in the tree
    text: str


@dataclass(slots=True)
class Usage:
    """What a search cost. Counted where the model is called, not derived."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were in the cache before, because the caller kept them there
    generated_tokens: int = 0  # new tokens drawn from the model
    forwarded_tokens: int = 0  # token positions that entered the model, prompt and recomputed ones included
    unique_tokens: int = 0  # prompt tokens (not the cached ones) plus distinct prefixes that were extended
    recomputed_tokens: int = 0  # forwarded again because their cache entry had been given up
    model_calls: int = 0
    seconds: float = 0.0
    kv_tokens: int = 0  # peak token positions in use after the prompt, in lanes and archive
    kv_bytes: int = 0  # peak bytes held for keys, values and hidden states, unused capacity included
    reward_calls: int = 0  # texts that the reward was asked about, finished or not; each once, unless a batch failed
    reward_tokens: int = 0  # token positions that entered the models of the reward (see `dts.Reward`)
    reward_seconds: float = 0.0  # in the reward, all its methods together
    constraint_seconds: float = 0.0  # in the constraint, masks included

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LogZ:
    """An estimate of log Z, the log of the sum of p(x)^power 1[x in L] exp(lambda r(x)), mostly E_p exp(lambda r)."""

    value: float  # log of the estimate of Z, which is unbiased; its log is biased downwards (Jensen)
    error: float = math.nan  # standard error of `value` (delta method); inf: too few draws, nan: not estimated
    interval: tuple[float, float] = (-math.inf, math.inf)  # 95 %


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a search says of the target pi* = p exp(lambda r) / Z (`dts.target`). A method fills in what it knows."""

    log_z: LogZ | None = None
    shares: Mapping[int, float] | None = None  # weights of the finished sequences as a sample of pi*, by leaf; sum 1
    sample: Callable[[int, int], list[Completion]] | None = None  # (k, seed) -> k independent draws
    values: SoftValues | None = None  # the soft values on the tree, where they are the estimate
    log_weights: Mapping[int, float] | None = None  # of weighted samples: log weight by leaf; their sum estimates Z


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one search over one prompt."""

    completions: list[Completion]  # distinct, best first
    rollouts: list[Rollout]  # in the order they finished
    usage: Usage
    tree: Tree
    method: str
    partial: bool = False  # the budget ended the search with paths still under way
    estimate: Estimate | None = None  # of the target distribution, where the method has one
    cut: tuple[int, ...] = ()  # nodes of the tree at which a path was given up (`EarlyEnd`), one for each such path
    target: Target | None = None  # what was sampled from or searched, where the method has a target; str() writes it

    @property
    def best(self) -> Completion:
        """The first completion: the highest reward (the likeliest of several), or what the method ranks first."""
        if not self.completions:
            raise RuntimeError(
                "no rollout finished: raise the budget, or max_new_tokens if a constraint needs longer texts, or look "
                "at result.usage"
            )
        return self.completions[0]

    @property
    def values(self) -> SoftValues | None:
        """The soft values on the tree; None for methods without them."""
        return self.estimate.values if self.estimate else None

    @property
    def log_weights(self) -> Mapping[int, float] | None:
        """Log weights of weighted samples by leaf, not normalised; None for methods without them."""
        return self.estimate.log_weights if self.estimate else None

    @property
    def log_z_estimate(self) -> LogZ | None:
        """The estimate of log Z with its error; None for methods that estimate no error."""
        log_z = self.estimate.log_z if self.estimate else None
        return log_z if log_z is not None and not math.isnan(log_z.error) else None

    @property
    def log_z(self) -> float:
        """log of an unbiased estimate of Z = E_p exp(lambda r); `log_z_estimate` has its error where one is known."""
        if self.estimate is None or self.estimate.log_z is None:
            raise RuntimeError(f"{self.method} estimates no Z; use MaxEnt or ParticleFilter")
        return self.estimate.log_z.value

    @property
    def shares(self) -> Mapping[int, float]:
        """Weights of the finished sequences as a sample of pi*, by leaf (`Rollout.leaf`); their sum is 1.

        For a weighted median or vote, without another token. A sequence also counts for unfinished ones near it
        (`SoftValues.log_shares`)."""
        if self.estimate is None or self.estimate.shares is None:
            raise RuntimeError(f"{self.method} keeps no estimate of the target distribution; use MaxEnt")
        if not self.estimate.shares:
            raise RuntimeError(f"no completion in the target {self.target} was found; raise the budget")
        return self.estimate.shares

    @property
    def effective_sample_size(self) -> float:
        """1 / sum w^2 over the finished sequences, w their `shares`: how many equal ones would be as diverse."""
        return 1 / math.fsum(share * share for share in self.shares.values())

    def sample(self, k: int, seed: int = 0) -> list[Completion]:
        """k draws from the tree's estimate of pi*; unexplored parts are continued with the model, and counted in
        `usage`. The result's tree stays as it is."""
        if self.estimate is None or self.estimate.sample is None:
            raise RuntimeError(f"{self.method} keeps no estimate of the target distribution; use MaxEnt")
        return self.estimate.sample(k, seed)
