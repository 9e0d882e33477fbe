"""Small models whose every sequence is known, the exact target over them, and how far each method is from it.

    python -m dts.evaluation.exact --scale 4 --budgets 50 200 500 1000 2000

prints total variation to pi* and the error of log Z. Every method knows p(x) of what it has seen and continues with p
where it has seen nothing, so that smoothed estimates are compared with smoothed ones.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import dts
from dts.models.table import TableModel, random_logits
from dts.results import Result
from dts.search import BestOfN, MaxEnt, Method, ParticleFilter
from dts.softvalue import SoftValues
from dts.tree import ROOT

PROMPT = (1,)


@dataclass(frozen=True)
class Instance:
    """A table model, a reward of its sequences in [0, 1], and what enumeration says about both."""

    lm: TableModel
    horizon: int
    sequences: tuple[tuple[int, ...], ...]
    log_p: np.ndarray  # of each sequence
    rewards: np.ndarray

    def reward(self, text: str) -> float:
        """The reward as a function of decoded text, as a user would write it."""
        return self._by_text[text]

    @functools.cached_property
    def _by_text(self) -> dict[str, float]:
        # "0 3 " with EOS dropped names a sequence uniquely: EOS can only be last, and its absence means full length.
        return {self.lm.decode(s): r for s, r in zip(self.sequences, self.rewards.tolist(), strict=True)}

    def target(self, scale: float) -> np.ndarray:
        """pi*(x) of each sequence."""
        weights = self.log_p + scale * self.rewards
        weights = np.exp(weights - weights.max())
        return weights / weights.sum()

    def value(self, scale: float) -> float:
        """V of the empty completion."""
        if scale == 0:
            return float(np.exp(self.log_p) @ self.rewards)
        return float(np.log(np.exp(self.log_p) @ np.exp(scale * self.rewards))) / scale

    @functools.cached_property
    def ranges(self) -> dict[tuple[int, ...], tuple[int, int, float]]:
        """For each prefix the sequences that start with it (they stand together) and its log p."""
        found: dict[tuple[int, ...], tuple[int, int, float]] = {(): (0, len(self.sequences), 0.0)}
        for index, sequence in enumerate(self.sequences):
            for length in range(1, len(sequence) + 1):
                first = found.get(sequence[:length], (index, index, 0.0))[0]
                found[sequence[:length]] = first, index + 1, 0.0
        return {
            prefix: (first, last, float(np.logaddexp.reduce(self.log_p[first:last])))
            for prefix, (first, last, _) in found.items()
        }

    def distribution(self, values: SoftValues) -> np.ndarray:
        """A tree's estimate of pi* of every sequence, without drawing any; it continues with p where the tree ends."""
        log_prob, tree = np.full(len(self.sequences), -np.inf), values.tree

        def fill(prefix: tuple[int, ...], node: int, log_mass: float) -> None:
            first, last, log_p = self.ranges[prefix]
            if tree.terminal[node]:
                log_prob[first] = log_mass
                return
            children, log_probs, log_rest = values.transitions(node)
            if log_rest > -math.inf:
                scale = log_mass + log_rest - tree.log_unexplored[node] - log_p
                log_prob[first:last] = scale + self.log_p[first:last]
            for child, log_share in zip(children, log_probs, strict=True):
                fill((*prefix, tree.token[child]), child, log_mass + log_share)

        fill((), ROOT, 0.0)
        return np.exp(log_prob)

    def weighted_samples(self, result: Result, scale: float) -> tuple[np.ndarray, float]:
        """Importance-weighted independent samples: seen sequences at their own weight, the rest of p at the samples'
        mean. Returns the distribution and log Z."""
        known = {c.token_ids: c.reward for c in result.completions}
        rest = float(np.logaddexp.reduce([scale * r.reward for r in result.rollouts])) - math.log(len(result.rollouts))
        weights = np.array([scale * known.get(s, math.nan) for s in self.sequences])
        weights = np.where(np.isnan(weights), rest, weights) + self.log_p
        log_z = float(np.logaddexp.reduce(weights))
        return np.exp(weights - log_z), log_z

    def particles(self, result: Result, scale: float) -> tuple[np.ndarray, float]:
        """Weighted particles, with the same knowledge of p and the same continuation as `weighted_samples`."""
        assert result.log_weights is not None
        known = {c.token_ids: c.reward for c in result.completions}
        seen = np.array([s in known for s in self.sequences])
        exact = np.array(
            [self.log_p[i] + scale * known[s] if seen[i] else -np.inf for i, s in enumerate(self.sequences)]
        )
        log_seen, log_z = float(np.logaddexp.reduce(exact)), max(result.log_z, float(np.logaddexp.reduce(exact)))
        estimate = np.exp(exact - log_z)
        outside = np.where(seen, 0.0, np.exp(self.log_p))
        if outside.sum() > 0:
            estimate += (1 - math.exp(log_seen - log_z)) * outside / outside.sum()
        return estimate / estimate.sum(), result.log_z


def instance(seed: int, *, vocab_size: int = 6, horizon: int = 5, structured: bool = True, eos: int | None = 0,
             spread: float = 1.5) -> Instance:  # fmt: skip
    """Random logits; a reward summed over adjacent token pairs (structured) or independent for every sequence."""
    lm = TableModel(random_logits(vocab_size, seed, spread), vocab_size, eos)
    pairs = list(lm.sequences(horizon, PROMPT))
    sequences = tuple(s for s, _ in pairs)
    rng = np.random.default_rng(seed)
    if structured:
        table = rng.normal(size=(horizon, vocab_size, vocab_size))
        raw = np.array([sum(table[i, s[i - 1] if i else 0, a] for i, a in enumerate(s)) for s in sequences])
    else:
        raw = rng.uniform(size=len(sequences))
    rewards = (raw - raw.min()) / (raw.max() - raw.min() or 1.0)
    return Instance(lm, horizon, sequences, np.array([lp for _, lp in pairs]), rewards)


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum()) / 2


def distances(case: Instance, rollouts: int, scale: float, seed: int) -> dict[str, tuple[float, float, int]]:
    """Method to (total variation to pi*, error of log Z, forwarded tokens)."""
    target, log_z = case.target(scale), float(np.logaddexp.reduce(case.log_p + scale * case.rewards))

    def search(method: Method) -> Result:
        return dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=case.horizon, seed=seed)

    tree = search(MaxEnt(rollouts, reward_scale=scale))
    assert tree.values is not None
    smc, samples = search(ParticleFilter(rollouts, reward_scale=scale)), search(BestOfN(rollouts))
    estimates = {
        "maxent": (tree, case.distribution(tree.values), tree.log_z),
        "particle filter": (smc, *case.particles(smc, scale)),
        "weighted samples": (samples, *case.weighted_samples(samples, scale)),
    }
    return {
        name: (total_variation(estimate, target), log_estimate - log_z, result.usage.forwarded_tokens)
        for name, (result, estimate, log_estimate) in estimates.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=4.0, help="lambda")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 200, 500, 1000, 2000], help="rollouts")
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=5)
    parser.add_argument("--spread", type=float, default=1.5, help="standard deviation of the model's logits")
    parser.add_argument("--unstructured", action="store_true", help="independent rewards for all sequences")
    options = parser.parse_args(argv)
    cases = [
        instance(seed, vocab_size=options.vocab_size, horizon=options.horizon, structured=not options.unstructured,
                 spread=options.spread)
        for seed in range(options.instances)
    ]  # fmt: skip
    far = [total_variation(np.exp(case.log_p), case.target(options.scale)) for case in cases]
    shown = ", ".join(f"{x:.2f}" for x in far)
    print(f"{len(cases)} instances of {len(cases[0].sequences)} sequences, lambda {options.scale:g}")
    print(f"total variation of p to pi*: {shown}")
    print(
        f"{'rollouts':>8}  {'method':<17} {'total variation':>15} {'worst':>6} {'|error of log Z|':>16} {'tokens':>7}"
    )
    for rollouts in options.budgets:
        rows = [distances(case, rollouts, options.scale, seed) for seed, case in enumerate(cases)]
        for name in rows[0]:
            tv, error, tokens = (np.array([row[name][i] for row in rows]) for i in range(3))
            figures = f"{tv.mean():>15.4f} {tv.max():>6.3f} {np.abs(error).mean():>16.4f} {tokens.mean():>7.0f}"
            print(f"{rollouts:>8}  {name:<17} {figures}")


if __name__ == "__main__":
    main()
