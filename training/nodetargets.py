"""Distillation of trees: what a search knows at every node goes into the policy.

With p the model that a run starts from, pi*(x) = p(x) exp(lambda r(x)) / Z is the optimum of
E[r] - KL(policy || p) / lambda, KL-regularised reinforcement learning with beta = 1/lambda. A tree searched with p
estimates pi*(a|s) at each of its nodes (`SoftValues.transitions`), so it teaches every token of every path that was
tried, and fine-tuning on draws teaches one of them at each node. Where the tree has learnt nothing, pi* is p there,
and a draw teaches noise.

The loss of a tree is sum over nodes of w(s) KL(target(.|s) || policy(.|s)). In a complete tree w(s) is pi*(s), the
target is pi*(.|s), and the loss is KL(pi* || policy) of whole sequences. Before that,

- the unexplored rest is divided as p divides it, tilted by the gains that a look-ahead has found;
- w(s) is the share of pi* of the finished sequences below s (`SoftValues.log_shares`): they stand for those near them;
- the less is known of a node, the nearer its target is to p: a value is pooled with pseudo-observations of the parent's
  (`SoftValues.settled`). To shrink the targets further made them worse on enumerable models (docs/log.md).

The trees are searched before training, with p, and kept: the target does not move with the policy. A second run from
the first one's folder has that policy as its p, so K runs with lambda have the optimum of K lambda.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dts
from dts.lm import LanguageModel
from dts.results import Result
from dts.rewards import Reward
from dts.search import MaxEnt
from dts.softvalue import SoftValues
from dts.training.packed import Packed, ancestors_sum

SWEEPS = 200  # at most, until a tree's values agree
NOTHING = 1e-6  # nats; what is left of a difference of equal values


@dataclass(frozen=True, slots=True)
class Taught:
    """What one tree teaches. Rows are those of `packed`."""

    packed: Packed
    weights: list[float]  # by row: w(s)
    nats: list[dict[int, float]]  # by row and token: log target/p, less that of the tokens that are not named
    reward: float  # mean under the tree's estimate of pi*
    start_reward: float  # mean of the tree's finished sequences
    forwarded_tokens: int
    reward_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def taught_from(record: Mapping[str, Any]) -> Taught:
    """What `Taught.as_dict` gave, after JSON."""
    packed = Packed(**{name: tuple(value) for name, value in record["packed"].items()})
    nats = [{int(token): value for token, value in row.items()} for row in record["nats"]]
    return Taught(**{**record, "packed": packed, "nats": nats})


def search_trees(
    lm: LanguageModel, requests: Sequence[dts.Request], *, reward: Reward, method: MaxEnt, max_new_tokens: int,
    temperature: float,
) -> Iterator[Taught]:  # fmt: skip
    """What a search of each request teaches, in order. The searches share a batch."""
    results = dts.decode_many(
        lm, requests, reward=reward, method=method, width=method.batch_size(), max_new_tokens=max_new_tokens,
        temperature=temperature,
    )  # fmt: skip
    for request, result in zip(requests, results, strict=True):
        yield taught_by(result, lm.encode(request.prompt))


def taught_by(result: Result, prompt_ids: Sequence[int]) -> Taught:
    """The targets of a MaxEnt search's nodes: those with finished sequences below."""
    assert result.values is not None
    values, tree = result.values.settled(sweeps=SWEEPS), result.tree
    nodes = [node for node in range(len(tree)) if values.visits.finished[node] and not tree.terminal[node]]
    row_of = {node: row for row, node in enumerate(nodes)}
    parents = tuple(row_of[tree.parent[node]] for node in nodes[1:])
    packed = Packed(tuple(prompt_ids), tuple(tree.token[node] for node in nodes[1:]), parents)
    shares = [0.0] * len(nodes)
    for leaf, share in result.shares.items():
        shares[row_of[tree.parent[leaf]]] += share
    rewards = [tree.reward[leaf] for leaf in result.shares]
    nats = [log_odds(values, node) for node in nodes]
    if len(set(rewards)) == 1 and not any(values.foresight.tilt(node).by_token for node in nodes):
        nats = [{} for _ in nodes]  # equal rewards say nothing; values that do not agree yet would
    mean = math.fsum(share * tree.reward[leaf] for leaf, share in result.shares.items())
    return Taught(
        packed, ancestors_sum(parents, shares), nats, mean, math.fsum(rewards) / len(rewards),
        result.usage.forwarded_tokens, result.usage.reward_seconds,
    )  # fmt: skip


# Targets -------------------------------------------------------------------------------------------------------------


def log_odds(values: SoftValues, node: int) -> dict[int, float]:
    """By token: log pi*/p less that of the tokens of which nothing is known. A token that is missing has 0."""
    tree, tilt = values.tree, values.foresight.tilt(node)
    children, log_probs, log_rest = values.transitions(node)
    known = tree.log_unexplored[node] > -math.inf  # else there are no other tokens, and any zero will do
    others = log_rest - tree.log_unexplored[node] - tilt.log_mean if known else 0.0
    seen = {tree.token[a]: log - tree.log_p[a] - others for a, log in zip(children, log_probs, strict=True)}
    found = {**(tilt.by_token if known else {}), **seen}
    return {token: nat for token, nat in found.items() if abs(nat) > NOTHING}


# Loss ----------------------------------------------------------------------------------------------------------------


def node_losses(logits: torch.Tensor, reference: torch.Tensor, nats: Sequence[Mapping[int, float]]) -> torch.Tensor:
    """KL(target || policy) at each row, [R]. logits, reference: of the policy and of p, [R, V], at the temperature of
    the search; reference has no gradient.

    The gradient by logits is policy - target, and exactly 0 where the policy is p and nothing is known: an optimizer
    that divides by the gradient's size would make steps of rounding errors.
    """
    with torch.no_grad():
        log_target, log_policy = targets(reference, nats), logits.log_softmax(-1)
        losses = (log_target.exp() * (log_target - log_policy)).sum(-1)
        gap = log_policy.exp() - log_target.exp()
    return _with_slope(losses, gap, logits)


def targets(reference: torch.Tensor, nats: Sequence[Mapping[int, float]]) -> torch.Tensor:
    """log target(a|s) = log p(a|s) + nats, normalised, [R, V]."""
    logs = reference.log_softmax(-1)
    known = [row for row, tokens in enumerate(nats) if tokens]
    if not known:
        return logs
    entries = [(row, token, nat) for row in known for token, nat in nats[row].items()]
    rows, tokens, added = (torch.tensor(column, device=logs.device) for column in zip(*entries, strict=True))
    moved = logs.index_put((rows, tokens), added.to(logs.dtype), accumulate=True)
    moved[known] = moved[known].log_softmax(-1)  # the others stay p to the last bit
    return moved


def mean_kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(policy || p) at each row, [R]. The gradient by logits is exactly 0 where the two are the same."""
    with torch.no_grad():
        log_policy = logits.log_softmax(-1)
        ratios = log_policy - reference.log_softmax(-1)
        kl = (log_policy.exp() * ratios).sum(-1)
        slope = log_policy.exp() * (ratios - kl[:, None])
    return _with_slope(kl, slope, logits)


def _with_slope(values: torch.Tensor, slope: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`values` [R] with the gradient `slope` [R, V] by `logits`."""
    moved = (slope * logits).sum(-1)
    return values + moved - moved.detach()
