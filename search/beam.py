"""Beam search: keep the best few prefixes, by log-probability or by log-probability and reward.

One loop for all forms: every kept prefix proposes continuations by one segment, and the best proposals are kept. With
segments of one token the proposals are the most likely tokens, and without a reward this is the beam search of
`transformers`. Longer segments are drawn from p and judged by the reward where they end: step-level beam search (Snell
et al., arXiv 2408.03314), and with groups, diverse verifier tree search (DVTS, Beeching et al. 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch

from dts.errors import UsageError
from dts.search.method import GeneratorRun, Run, Steps, ranked_by
from dts.search.paths import Path
from dts.search.sampling import check_size
from dts.search.segments import Records, Segment, check_segment, evaluate, grow, worth
from dts.settings import Budget, check_real
from dts.tree import ROOT

if TYPE_CHECKING:
    from dts.search.search import Search


class _Group:
    """One independent beam."""

    def __init__(self) -> None:
        self.live = [ROOT]  # prefixes to extend, best first
        self.finished: list[float] = []  # the best scores of complete sequences, best first


@dataclass(frozen=True, slots=True)
class Beam:
    """Beam search by log p(x) / length^length_penalty + reward_weight * r.

    width: paths extended together. reward_weight: >= 0; prefixes count what their reward has earned, or the reward of
    the text so far where it says nothing before the end. groups: independent beams that share the width; they differ
    by their first token, or by their draws. segment: tokens, or a string that ends a step. branch: with segments longer
    than a token, segments drawn after each kept prefix, so width / branch prefixes are kept.
    """

    width: int
    _: KW_ONLY
    length_penalty: float = 1.0
    reward_weight: float = 0.0
    groups: int = 1
    segment: Segment = 1
    branch: int = 4

    def __post_init__(self) -> None:
        for option in ("width", "groups", "branch"):
            check_size(option, getattr(self, option))
        check_segment(self.segment)
        if self.width % self.groups:
            raise UsageError(f"groups={self.groups!r} is not allowed; give a divisor of width={self.width}")
        check_real("length_penalty", self.length_penalty, math.isfinite, "a finite number")
        check_real("reward_weight", self.reward_weight, lambda x: 0 <= x < math.inf, "a number >= 0")

    @property
    def name(self) -> str:
        return "beam-guided" if self.reward_weight > 0 else "beam"

    @property
    def needs_rows(self) -> bool:
        """Tokens are compared, not drawn."""
        return self.segment == 1

    def batch_size(self) -> int:
        return self.width

    def budget(self) -> Budget:
        """None: how many sequences finish before the beam stops is not known."""
        return Budget()

    def start(self, search: Search) -> Run:
        return GeneratorRun(search, self._steps(search), rank=lambda: self._rank(search))

    def _steps(self, search: Search) -> Steps:
        records, indices = Records(search), itertools.count()
        groups = [_Group() for _ in range(self.groups)]
        while groups:
            if self.segment == 1:
                yield from evaluate(search, [node for group in groups for node in group.live])
                proposals = [self._tokens(search, group.live) for group in groups]
                if ROOT in groups[0].live:
                    ranked = [n for n, _ in self._ranked(search, proposals[0])]
                    proposals = [ranked[i :: self.groups] for i in range(self.groups)]
            else:
                paths = [[Path(search.rng(next(indices)), n) for n in self._spread(g.live)] for g in groups]
                yield from grow(search, records, [path for of_group in paths for path in of_group], self.segment)
                if search.exhausted():
                    return True
                proposals = [list(dict.fromkeys(path.node for path in of_group)) for of_group in paths]
            for group, nodes in zip(groups, proposals, strict=True):
                self._select(search, records, group, nodes)
            if search.exhausted():
                return any(group.live for group in groups)
            groups = [group for group in groups if group.live]
        return False

    def _spread(self, live: list[int]) -> list[int]:
        """Kept prefixes, as often as segments are drawn after each."""
        size = self.width // self.groups
        return list(itertools.islice(itertools.cycle(live), size))

    def _tokens(self, search: Search, live: list[int]) -> list[int]:
        """Children of the kept prefixes with their most likely tokens, enough that as many continue as are kept even if
        the best of them end."""
        log_p = search.probabilities(live).log()
        count = max(2, 1 + len(search.lm.eos_ids)) * self.width // self.groups
        if live == [ROOT]:
            count *= self.groups
        if self.reward_weight == 0:  # only the best of all prefixes matter
            path = [search.tree.log_prob(node) for node in live]
            flat = (log_p + torch.tensor(path, dtype=log_p.dtype, device=log_p.device)[:, None]).flatten()
            top = flat.topk(min(count, len(flat)))
            chosen = top.indices
        else:  # an unlikely token of each may be worth it
            top = log_p.topk(min(count, log_p.shape[-1]), dim=-1)
            offsets = torch.arange(len(live), device=log_p.device)[:, None] * log_p.shape[-1]
            chosen = (top.indices + offsets).flatten()
        chosen = chosen[top.values.flatten() > -math.inf]
        rows, tokens = chosen // log_p.shape[-1], chosen % log_p.shape[-1]
        return search.take([live[row] for row in rows.tolist()], tokens.tolist())

    def _ranked(self, search: Search, nodes: Sequence[int]) -> list[tuple[int, float]]:
        """Prefixes with their scores, best first."""
        known = worth(search, nodes) if self.reward_weight > 0 else [0.0] * len(nodes)
        scores = [self._score(search, node, value) for node, value in zip(nodes, known, strict=True)]
        return sorted(zip(nodes, scores, strict=True), key=lambda pair: -pair[1])

    def _score(self, search: Search, node: int, reward: float) -> float:
        likelihood = search.tree.log_prob(node) / search.tree.depth[node] ** self.length_penalty
        return likelihood + (self.reward_weight * reward if self.reward_weight > 0 else 0.0)

    def _select(self, search: Search, records: Records, group: _Group, nodes: Sequence[int]) -> None:
        """Keep the best prefixes and the sequences that ended among the best; stop where neither can improve."""
        tree, size = search.tree, self.width // self.groups
        ranked = self._ranked(search, [node for node in nodes if tree.terminal[node] or not tree.outside[node]])
        ended = [(node, score) for node, score in ranked[:size] if tree.terminal[node]]
        if self.segment == 1:  # drawn ones were recorded when they ended
            records.add([node for node, _ in ended])
        group.finished = sorted([*group.finished, *(score for _, score in ended)], reverse=True)[:size]
        keep = size if self.segment == 1 else max(1, size // self.branch)
        group.live = [node for node, _ in ranked if not tree.terminal[node]][:keep]
        if group.live and len(group.finished) == size:
            hoped = max(self._score(search, node, tree.upper[node]) for node in group.live)
            if hoped <= group.finished[-1]:
                group.live = []

    def _rank(self, search: Search) -> list[int]:
        """By reward; among equal rewards, or without one, by the beam's own score."""
        rewards = search.tree.reward
        return ranked_by(search, lambda leaf: (rewards[leaf], self._score(search, leaf, rewards[leaf])))
