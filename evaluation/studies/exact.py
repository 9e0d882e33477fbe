"""Small models whose every sequence is known, the exact target over them, and how far each method is from it.

    python -m dts.evaluation.exact --scale 4 --budgets 50 200 500 1000 2000

prints total variation to pi* and the error of log Z, for every method at the tokens that MaxEnt forwarded. Every
method knows p(x) of what it has seen and continues with p where it has seen nothing, so that smoothed estimates are
compared with smoothed ones. Rewards lie in [0, 1], stretched where pi* would be nearer to p than `--distance`.

    python -m dts.evaluation.exact --scale 0 --power 2

is power sampling: the target is p^2 exp(lambda r), here without a reward. Metropolis-Hastings draws at temperature
1 / power, as in its paper; samples of p are weighted by their part of the target.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import dts
from dts.evaluation.studies.metropolis import MetropolisHastings
from dts.evaluation.studies.plain_dts import PlainDTS
from dts.models.table import TableModel, random_logits
from dts.results import Result
from dts.search import BestOfN, MaxEnt, Method, ParticleFilter
from dts.settings import Budget
from dts.softvalue import SoftValues
from dts.tree import ROOT

PROMPT = (1,)
CHAINS = 16  # of Metropolis-Hastings, at most


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

    def log_weights(self, scale: float, power: float = 1.0) -> np.ndarray:
        """log of p(x)^power exp(scale r(x)) of each sequence; Z is the sum of these weights."""
        return power * self.log_p + scale * self.rewards

    def cooled(self, power: float) -> Instance:
        """The same with each row of p to this power, and normalised: decoding at temperature 1 / power."""
        table = self.lm.table
        lm = dataclasses.replace(self.lm, table=lambda prefix: power * table(prefix))
        return dataclasses.replace(
            self, lm=lm, log_p=np.array([log_p for _, log_p in lm.sequences(self.horizon, PROMPT)])
        )

    def target(self, scale: float, power: float = 1.0) -> np.ndarray:
        """pi*(x) of each sequence."""
        weights = self.log_weights(scale, power)
        weights = np.exp(weights - weights.max())
        return weights / weights.sum()

    def value(self, scale: float) -> float:
        """V of the empty completion."""
        if scale == 0:
            return float(np.exp(self.log_p) @ self.rewards)
        return float(np.logaddexp.reduce(self.log_p + scale * self.rewards)) / scale

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
        """A tree's estimate of pi* of every sequence, without drawing any; it continues with p where the tree ends. For
        a target with a power ask the instance that is `cooled` by it, since the model continues with such rows."""
        log_prob, tree = np.full(len(self.sequences), -np.inf), values.tree

        def fill(prefix: tuple[int, ...], node: int, log_mass: float) -> None:
            first, last, log_p = self.ranges[prefix]
            if tree.terminal[node]:
                log_prob[first] = log_mass
                return
            children, log_probs, log_rest = values.transitions(node)
            if log_rest > -math.inf:
                scale = log_mass + log_rest - (tree.log_unexplored[node] - tree.log_mass[node]) - log_p
                log_prob[first:last] = scale + self.log_p[first:last]
            for child, log_share in zip(children, log_probs, strict=True):
                fill((*prefix, tree.token[child]), child, log_mass + log_share)

        fill((), ROOT, 0.0)
        return np.exp(log_prob)

    def weighted_samples(self, result: Result, scale: float, power: float = 1.0) -> tuple[np.ndarray, float]:
        """Importance-weighted independent samples: seen sequences at their own weight, the rest of p at the samples'
        mean. Returns the distribution and log Z."""
        known = {c.token_ids: scale * c.reward + (power - 1) * c.logprob for c in result.completions}
        drawn = [known[result.tree.tokens(rollout.leaf)] for rollout in result.rollouts]
        rest = float(np.logaddexp.reduce(drawn)) - math.log(len(drawn))
        weights = np.array([known.get(s, math.nan) for s in self.sequences])
        weights = np.where(np.isnan(weights), rest, weights) + self.log_p
        log_z = float(np.logaddexp.reduce(weights))
        return np.exp(weights - log_z), log_z

    def visited(self, result: Result, scale: float, power: float) -> np.ndarray:
        """A chain's estimate of p^power exp(lambda r): seen sequences at their own weight; the rest is as p^power
        and has the share of the time that the chain was at sequences that it was at only once (Good and Turing)."""
        known = {c.token_ids: c.reward for c in result.completions}
        seen = np.array([s in known for s in self.sequences])
        logs = power * self.log_p + scale * np.array([known.get(s, 0.0) for s in self.sequences])
        weights = np.exp(logs - logs.max())
        least = min(result.shares.values())
        once = sum(share for share in result.shares.values() if share < 1.5 * least)
        inside, outside = np.where(seen, weights, 0.0), np.where(seen, 0.0, np.exp(power * self.log_p))
        if outside.sum() == 0:
            return inside / inside.sum()
        return (1 - once) * inside / inside.sum() + once * outside / outside.sum()

    def with_known(self, result: Result, scale: float, log_z: float, power: float = 1.0) -> np.ndarray:
        """Any estimate of Z turned into a distribution: seen sequences at their own weight, the rest of Z spread as p
        spreads it over what was not seen."""
        known = {c.token_ids: c.reward for c in result.completions}
        seen = np.array([s in known for s in self.sequences])
        exact = np.array(
            [power * self.log_p[i] + scale * known[s] if seen[i] else -np.inf for i, s in enumerate(self.sequences)]
        )
        log_seen = float(np.logaddexp.reduce(exact))
        log_z = max(log_z, log_seen)
        estimate = np.exp(exact - log_z)
        outside = np.where(seen, 0.0, np.exp(power * self.log_p))
        if outside.sum() > 0:
            estimate += (1 - math.exp(log_seen - log_z)) * outside / outside.sum()
        return estimate / estimate.sum()


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
    """Half the L1 distance of two distributions over the same sequences."""
    return float(np.abs(a - b).sum()) / 2


def far_enough(case: Instance, scale: float, distance: float) -> Instance:
    """The instance with rewards multiplied by the least power of 1.05 that puts pi* so far from p."""
    while total_variation(np.exp(case.log_p), case.target(scale)) < distance:
        case = dataclasses.replace(case, rewards=case.rewards * 1.05)
    return case


def decode(case: Instance, method: Method, seed: int, budget: Budget | None = None, temperature: float = 1.0) -> Result:
    return dts.decode(
        case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=case.horizon, seed=seed, budget=budget,
        temperature=temperature,
    )  # fmt: skip


def most_particles(case: Instance, tokens: int, method: ParticleFilter, seed: int) -> Result:
    """A particle filter with as many particles as the tokens allow; or, where these are enough for the whole tree, four
    for each of its sequences."""
    low, high = 1, 2
    while (
        high <= 4 * len(case.sequences)
        and decode(case, dataclasses.replace(method, n=high), seed).usage.forwarded_tokens <= tokens
    ):
        low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        result = decode(case, dataclasses.replace(method, n=middle), seed)
        low, high = (middle, high) if result.usage.forwarded_tokens <= tokens else (low, middle)
    return decode(case, dataclasses.replace(method, n=low), seed)


def distances(
    case: Instance, rollouts: int, scale: float, seed: int, power: float = 1.0
) -> dict[str, tuple[float, float, int]]:
    """Method to (total variation to pi*, error of log Z, forwarded tokens). MaxEnt's tokens are everybody's budget."""
    target, log_z = case.target(scale, power), float(np.logaddexp.reduce(case.log_weights(scale, power)))
    tree = decode(case, MaxEnt(rollouts, reward_scale=scale, power=power), seed)
    assert tree.values is not None
    tokens = tree.usage.forwarded_tokens
    smc = most_particles(case, tokens, ParticleFilter(1, reward_scale=scale, power=power), seed)
    samples = decode(case, BestOfN(20 * rollouts), seed, Budget(tokens=tokens))
    chains = MetropolisHastings(
        20 * rollouts, power=power, reward_scale=scale, chains=min(CHAINS, max(1, rollouts // 10))
    )
    moved = decode(case, chains, seed, Budget(tokens=tokens), 1 / power)
    estimates = {
        "maxent": (tree, case.cooled(power).distribution(tree.values), tree.log_z),
        "particle filter": (smc, case.with_known(smc, scale, smc.log_z, power), smc.log_z),
        "weighted samples": (samples, *case.weighted_samples(samples, scale, power)),
        "metropolis-hastings": (moved, case.visited(moved, scale, power), math.nan),
    }
    if power == 1:
        plain = decode(case, PlainDTS(20 * rollouts, reward_scale=scale), seed, Budget(tokens=tokens))
        estimates["plain dts"] = plain, case.with_known(plain, scale, plain.log_z), plain.log_z
    else:
        cold = case.cooled(power)
        drawn = decode(cold, BestOfN(20 * rollouts), seed, Budget(tokens=tokens))
        estimates["low temperature"] = drawn, cold.weighted_samples(drawn, scale)[0], math.nan
    return {
        name: (total_variation(estimate, target), log_estimate - log_z, result.usage.forwarded_tokens)
        for name, (result, estimate, log_estimate) in estimates.items()
    }


def coverage(case: Instance, rollouts: int, scale: float, seeds: int, power: float = 1.0) -> tuple[int, float, float]:
    """Of so many searches: how many 95 % intervals hold log Z, their mean width, and the root-mean-square error."""
    truth = float(np.logaddexp.reduce(case.log_weights(scale, power)))
    method = MaxEnt(rollouts, reward_scale=scale, power=power)
    found = [decode(case, method, seed).log_z_estimate for seed in range(seeds)]
    estimates = [one for one in found if one is not None]
    held = sum(one.interval[0] <= truth <= one.interval[1] for one in estimates)
    width = float(np.mean([one.interval[1] - one.interval[0] for one in estimates]))
    return held, width, float(np.sqrt(np.mean([(one.value - truth) ** 2 for one in estimates])))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dts.evaluation.exact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=4.0, help="lambda")
    parser.add_argument("--power", type=float, default=1.0, help="of p in the target")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 200, 500, 1000, 2000], help="MaxEnt rollouts")
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=5)
    parser.add_argument("--spread", type=float, default=1.5, help="standard deviation of the model's logits")
    parser.add_argument("--unstructured", action="store_true", help="independent rewards for all sequences")
    parser.add_argument("--distance", type=float, default=0.5, help="least total variation of p to pi*")
    parser.add_argument("--coverage", type=int, metavar="SEEDS", help="only check log Z's intervals")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if min(options.instances, options.horizon, *options.budgets) < 1 or options.vocab_size < 2:
        parser.error("--instances, --horizon and --budgets must be 1 or more, --vocab-size 2 or more")
    if not (options.scale >= 0 and options.power > 0) or (options.scale == 0 and options.power == 1):
        parser.error("--scale must be 0 or more, --power above 0, and not 0 and 1 together: the target would be p")
    cases = [
        instance(seed, vocab_size=options.vocab_size, horizon=options.horizon, structured=not options.unstructured,
                 spread=options.spread)
        for seed in range(options.instances)
    ]  # fmt: skip
    if options.scale > 0:
        cases = [far_enough(case, options.scale, options.distance) for case in cases]
    far = [total_variation(np.exp(case.log_p), case.target(options.scale, options.power)) for case in cases]
    print(f"{len(cases)} instances of {len(cases[0].sequences)} sequences, p to the power {options.power:g}, "
          f"lambda {options.scale:g}, rewards up to",
          ", ".join(f"{case.rewards.max():.2f}" for case in cases))  # fmt: skip
    print("total variation of p to pi*:", ", ".join(f"{x:.2f}" for x in far))
    if options.coverage:
        print("rollouts  instance  intervals that hold log Z  mean width  rms error")
        for rollouts in options.budgets:
            for seed, case in enumerate(cases):
                held, width, rms = coverage(case, rollouts, options.scale, options.coverage, options.power)
                print(f"{rollouts:>8}  {seed:>8}  {held:>10} of {options.coverage:<12}  {width:>10.3f}  {rms:>9.4f}")
        return 0
    print(
        f"{'rollouts':>8}  {'method':<19} {'total variation':>15} {'worst':>6} {'|error of log Z|':>16} {'tokens':>7}"
    )
    for rollouts in options.budgets:
        rows = [distances(case, rollouts, options.scale, seed, options.power) for seed, case in enumerate(cases)]
        for name in rows[0]:
            tv, error, tokens = (np.array([row[name][i] for row in rows]) for i in range(3))
            figures = f"{tv.mean():>15.4f} {tv.max():>6.3f} {np.abs(error).mean():>16.4f} {tokens.mean():>7.0f}"
            print(f"{rollouts:>8}  {name:<19} {figures}".replace(" nan", "   -"), flush=True)
    return 0
