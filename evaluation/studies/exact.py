"""How far each method is from the exact target, on small models whose every sequence is known.

    python -m dts.evaluation.exact --scale 4 --budgets 50 200 500 1000 2000

prints total variation to pi* and the error of log Z, for every method at the tokens that MaxEnt forwarded. Every
method knows p(x) of what it has seen and continues with p where it has seen nothing, so that smoothed estimates are
compared with smoothed ones. Rewards lie in [0, 1], stretched where pi* would be nearer to p than `--distance`.

    python -m dts.evaluation.exact --scale 0 --power 2

is power sampling: the target is p^2 exp(lambda r), here without a reward. Metropolis-Hastings draws at temperature
1 / power, as in its paper; samples of p are weighted by their part of the target.

    python -m dts.evaluation.exact --scale 0 --mass 0.03

is p among the members of a random regular language that has about 3 % of p. Every method continues with masked rows of
p where it has seen nothing; "mask" is what these sample from alone, if the number of samples has no limit. Weighted
samples are rejection.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

import dts
from dts.errors import UsageError
from dts.evaluation.studies.asap import ASAp
from dts.evaluation.studies.instances import PROMPT, Instance, far_enough, instance, total_variation
from dts.evaluation.studies.metropolis import MetropolisHastings
from dts.evaluation.studies.plain_dts import PlainDTS
from dts.results import Result
from dts.search import BestOfN, MaxEnt, Method, ParticleFilter
from dts.settings import Budget

CHAINS = 16  # of Metropolis-Hastings, at most
MOST = 20  # samples, particles, proposals of chains for each rollout of MaxEnt: those that end in known texts are free


def decode(
    case: Instance, method: Method, seed: int, budget: Budget | None = None, *, temperature: float = 1.0,
    constrained: bool = True,
) -> Result:  # fmt: skip
    return dts.decode(
        case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=case.horizon, seed=seed, budget=budget,
        temperature=temperature, constraint=case.language if constrained else None,
    )  # fmt: skip


def most_particles(case: Instance, tokens: int, method: ParticleFilter, seed: int, most: int) -> Result:
    """A particle filter with as many particles as the tokens allow, up to `most`: particles at known prefixes cost no
    token, so that tokens alone would not end it."""
    low, high = 1, 2
    while high <= most and decode(case, dataclasses.replace(method, n=high), seed).usage.forwarded_tokens <= tokens:
        low, high = high, 2 * high
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        result = decode(case, dataclasses.replace(method, n=middle), seed)
        low, high = (middle, high) if result.usage.forwarded_tokens <= tokens else (low, middle)
    return decode(case, dataclasses.replace(method, n=low), seed)


Estimated = tuple[Result, np.ndarray, float]  # with the distribution over the sequences, and log Z (NaN: none)


def estimates(case: Instance, rollouts: int, scale: float, seed: int, power: float = 1.0) -> dict[str, Estimated]:
    """What each method makes of the target, at the tokens that MaxEnt forwarded."""
    tree = decode(case, MaxEnt(rollouts, reward_scale=scale, power=power), seed)
    assert tree.values is not None
    tokens = tree.usage.forwarded_tokens
    smc = most_particles(case, tokens, ParticleFilter(1, reward_scale=scale, power=power), seed, MOST * rollouts)
    samples = decode(case, BestOfN(MOST * rollouts), seed, Budget(tokens=tokens), constrained=False)
    found = {
        "maxent": (tree, case.cooled(power).distribution(tree.values), tree.log_z),
        "particle filter": (smc, case.with_known(smc, scale, smc.log_z, power), smc.log_z),
        "weighted samples": (samples, *case.weighted_samples(samples, scale, power)),
    }
    if case.language is not None:
        return {**found, **_asap(case, MOST * rollouts, scale, seed, tokens)} if power == 1 else found
    chains = MetropolisHastings(
        MOST * rollouts, power=power, reward_scale=scale, chains=min(CHAINS, max(1, rollouts // 10))
    )
    moved = decode(case, chains, seed, Budget(tokens=tokens), temperature=1 / power)
    found["metropolis-hastings"] = moved, case.visited(moved, scale, power), math.nan
    if power == 1:
        plain = decode(case, PlainDTS(MOST * rollouts, reward_scale=scale), seed, Budget(tokens=tokens))
        found["plain dts"] = plain, case.with_known(plain, scale, plain.log_z), plain.log_z
    else:
        cold = case.cooled(power)
        drawn = decode(cold, BestOfN(MOST * rollouts), seed, Budget(tokens=tokens))
        found["low temperature"] = drawn, cold.weighted_samples(drawn, scale)[0], math.nan
    return found


def _asap(case: Instance, rollouts: int, scale: float, seed: int, tokens: int) -> dict[str, Estimated]:
    """ASAp, and what the masks alone come to, both weighted by the reward."""
    drawn = decode(case, ASAp(rollouts, case.language), seed, Budget(tokens=tokens), constrained=False)
    learnt = (
        case.visited(drawn, scale, 1.0, drawn_by_reward=False)
        if drawn.estimate is not None
        else np.exp(case.masked - np.logaddexp.reduce(case.masked))  # no member was drawn
    )
    masked = case.masked + scale * case.rewards
    masked = np.exp(masked - np.logaddexp.reduce(masked))
    return {"asap": (drawn, learnt, math.nan), "mask": (drawn, masked, math.nan)}


def distances(
    case: Instance, rollouts: int, scale: float, seed: int, power: float = 1.0
) -> dict[str, tuple[float, float, int]]:
    """Method to (total variation to pi*, error of log Z, forwarded tokens). MaxEnt's tokens are everybody's budget."""
    target, log_z = case.target(scale, power), float(np.logaddexp.reduce(case.log_weights(scale, power)))
    return {
        name: (total_variation(estimate, target), log_estimate - log_z, result.usage.forwarded_tokens)
        for name, (result, estimate, log_estimate) in estimates(case, rollouts, scale, seed, power).items()
    }


def coverage(
    case: Instance, rollouts: int, scale: float, seeds: Sequence[int], power: float = 1.0
) -> tuple[int, float, float]:
    """Of the searches with these seeds: how many 95 % intervals hold log Z, their mean width, and the RMS error."""
    truth = float(np.logaddexp.reduce(case.log_weights(scale, power)))
    method = MaxEnt(rollouts, reward_scale=scale, power=power)
    found = [decode(case, method, seed).log_z_estimate for seed in seeds]
    estimates = [one for one in found if one is not None]
    held = sum(one.interval[0] - 1e-9 <= truth <= one.interval[1] + 1e-9 for one in estimates)
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
    parser.add_argument("--mass", type=float, help="only the members of a random language with this share of p")
    parser.add_argument("--first-seed", type=int, default=0, help="of the searches for --coverage")
    parser.add_argument("--coverage", type=int, metavar="SEEDS", help="only check log Z's intervals")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if min(options.instances, options.horizon, *options.budgets) < 1 or options.vocab_size < 2:
        parser.error("--instances, --horizon and --budgets must be 1 or more, --vocab-size 2 or more")
    if options.mass is not None and not 0 < options.mass < 1:
        parser.error(f"--mass {options.mass:g} must be above 0 and below 1")
    if not (options.scale >= 0 and options.power > 0):
        parser.error("--scale must be 0 or more, --power above 0")
    if options.scale == 0 and options.power == 1 and options.mass is None:
        parser.error("--scale 0 with --power 1 needs --mass: the target would be p")
    cases = [
        instance(seed, vocab_size=options.vocab_size, horizon=options.horizon, structured=not options.unstructured,
                 spread=options.spread)
        for seed in range(options.instances)
    ]  # fmt: skip
    if options.mass is not None:
        try:
            cases = [case.among(options.mass, seed) for seed, case in enumerate(cases)]
        except UsageError as fault:
            parser.error(str(fault))
    if options.scale > 0:
        cases = [far_enough(case, options.scale, options.distance) for case in cases]
    far = [total_variation(np.exp(case.log_p), case.target(options.scale, options.power)) for case in cases]
    print(f"{len(cases)} instances of {len(cases[0].sequences)} sequences, p to the power {options.power:g}, "
          f"lambda {options.scale:g}, rewards up to",
          ", ".join(f"{case.rewards.max():.2f}" for case in cases))  # fmt: skip
    if options.mass is not None:
        print("share of p, members:", ", ".join(f"{case.mass:.4f}, {case.inside.sum()}" for case in cases))
    print("total variation of p to pi*:", ", ".join(f"{x:.2f}" for x in far))
    if options.coverage:
        seeds = range(options.first_seed, options.first_seed + options.coverage)
        print("rollouts  instance  intervals that hold log Z  mean width  rms error")
        for rollouts in options.budgets:
            for seed, case in enumerate(cases):
                held, width, rms = coverage(case, rollouts, options.scale, seeds, options.power)
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
