"""Language models and rewards so small that every sequence is known, and with them the exact target."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dts.errors import UsageError
from dts.evaluation.studies.automata import Automaton, random_automaton
from dts.models.table import TableModel, random_logits
from dts.results import Result
from dts.softvalue import SoftValues
from dts.tree import ROOT

PROMPT = (1,)
TOLERANCE = 1.25  # a language has the mass under p that was asked for up to this factor
TRIES = 20_000


@dataclass(frozen=True)
class Instance:
    """A table model, a reward of its sequences in [0, 1], a language that they must belong to (None: any), and what
    enumeration says about them."""

    lm: TableModel
    horizon: int
    sequences: tuple[tuple[int, ...], ...]
    log_p: np.ndarray  # of each sequence
    rewards: np.ndarray
    language: Automaton | None = None

    def reward(self, text: str) -> float:
        """The reward as a function of decoded text, as a user would write it."""
        return self._by_text[text]

    @functools.cached_property
    def _by_text(self) -> dict[str, float]:
        # "0 3 " with EOS dropped names a sequence uniquely: EOS can only be last, and its absence means full length.
        return {self.lm.decode(s): r for s, r in zip(self.sequences, self.rewards.tolist(), strict=True)}

    @functools.cached_property
    def inside(self) -> np.ndarray:
        """Which sequences belong to the language, bool [N]."""
        if self.language is None:
            return np.ones(len(self.sequences), bool)
        return self.language.members(self._table, self.lm.eos)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        fill = (self.lm.eos or 0,)
        return np.array([s + fill * (self.horizon - len(s)) for s in self.sequences])

    @property
    def mass(self) -> float:
        """Share of p that belongs to the language."""
        return float(np.exp(self.log_p) @ self.inside)

    def among(self, mass: float, seed: int) -> Instance:
        """The same with a random language of about this mass, 10 members or more, and one in 200 of all sequences."""
        rng = np.random.default_rng([seed, round(1e6 * mass)])
        for _ in range(TRIES):
            case = dataclasses.replace(self, language=random_automaton(rng, self.lm.vocab_size))
            enough = case.inside.sum() >= max(10, len(self.sequences) / 200)
            if enough and mass / TOLERANCE <= case.mass <= mass * TOLERANCE:
                return case
        raise UsageError(f"mass={mass:g}: none of {TRIES} random languages has about this share of p; give another")

    def log_weights(self, scale: float, power: float = 1.0) -> np.ndarray:
        """log of p(x)^power 1[x in L] exp(scale r(x)) of each sequence; Z is the sum of these weights."""
        return np.where(self.inside, power * self.log_p + scale * self.rewards, -np.inf)

    def continued(self, power: float = 1.0) -> np.ndarray:
        """Log-probabilities by which every method continues where it has seen nothing: p^power, or p masked."""
        return power * self.log_p if self.language is None else self.masked

    @functools.cached_property
    def masked(self) -> np.ndarray:
        """log q(x) of each member: what is sampled where each row of p is masked by the language and normalised."""
        language, log_q = self.language, np.where(self.inside, self.log_p, -np.inf)
        assert language is not None
        for prefix, (first, last, log_p) in self.ranges.items():
            if prefix[-1:] == (self.lm.eos,) or len(prefix) == self.horizon:
                continue
            state = language.start(self.lm)
            for token in prefix:
                state = language.advance([state], [token])[0]
            allowed = language.allowed([state])[0].numpy().copy()
            allowed[self.lm.eos] = language.accepts([state])[0]
            rows = [self.ranges[(*prefix, token)][2] - log_p for token in np.flatnonzero(allowed).tolist()]
            log_q[first:last] -= np.logaddexp.reduce(rows) if rows else 0.0
        return log_q

    def cooled(self, power: float) -> Instance:
        """The same with each row of p to this power, and normalised: decoding at temperature 1 / power."""
        table = self.lm.table
        lm = dataclasses.replace(self.lm, table=lambda prefix: power * table(prefix))
        return dataclasses.replace(
            self, lm=lm, log_p=np.array([log_p for _, log_p in lm.sequences(self.horizon, PROMPT)])
        )

    def target(self, scale: float, power: float = 1.0) -> np.ndarray:
        """pi*(x) of each sequence."""
        return _normal(self.log_weights(scale, power))

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
        """A tree's estimate of pi* of every sequence, without drawing any. Where the tree ends it continues with p,
        masked by the language. For a target with a power ask the instance that is `cooled` by it, since the model
        continues with such rows."""
        log_prob, tree = np.full(len(self.sequences), -np.inf), values.tree
        log_next = self.continued()

        def fill(prefix: tuple[int, ...], node: int, log_mass: float) -> None:
            first, last, _ = self.ranges[prefix]
            if tree.terminal[node]:
                log_prob[first] = log_mass
                return
            children, log_probs, log_rest = values.transitions(node)
            unseen = log_next[first:last].copy()
            for child in children:
                start, end, _ = self.ranges[(*prefix, tree.token[child])]
                unseen[start - first : end - first] = -np.inf
            log_unseen = np.logaddexp.reduce(unseen)
            if min(log_rest, log_unseen) > -math.inf:
                log_prob[first:last] = log_mass + log_rest - log_unseen + unseen
            for child, log_share in zip(children, log_probs, strict=True):
                fill((*prefix, tree.token[child]), child, log_mass + log_share)

        fill((), ROOT, 0.0)
        return np.exp(log_prob)

    def weighted_samples(self, result: Result, scale: float, power: float = 1.0) -> tuple[np.ndarray, float]:
        """Importance-weighted independent samples of p: seen sequences at their own weight (0 outside the language),
        the rest of p at the samples' mean. Returns the distribution and log Z."""
        tokens = [result.tree.tokens(rollout.leaf) for rollout in result.rollouts]
        place, weights, seen = (
            {s: i for i, s in enumerate(self.sequences)},
            self.log_weights(scale, power),
            self._seen(tokens),
        )
        drawn = [weights[place[s]] - self.log_p[place[s]] for s in tokens]
        if max(drawn, default=-math.inf) == -math.inf:  # no member was drawn
            return self._filled(np.zeros(len(seen)), seen, 1.0), -math.inf
        rest = np.logaddexp.reduce(drawn) - math.log(len(drawn)) + np.logaddexp.reduce(self.log_p[~seen])
        known = np.where(seen, weights, -np.inf)
        log_z = float(np.logaddexp.reduce([rest, *known]))
        return self._filled(np.exp(known - log_z), seen, 1.0), log_z

    def _seen(self, found: Iterable[tuple[int, ...]]) -> np.ndarray:
        known = set(found)
        return np.array([s in known for s in self.sequences])

    def _filled(self, estimate: np.ndarray, seen: np.ndarray, power: float) -> np.ndarray:
        """What the estimate lacks to 1 is spread over members that were not seen, as p^power spreads it, or p masked by
        the language."""
        outside = np.where(seen, 0.0, np.exp(self.continued(power)))
        if outside.sum() > 0:
            estimate = estimate + max(1 - estimate.sum(), 0.0) * outside / outside.sum()
        return estimate / estimate.sum()

    def visited(self, result: Result, scale: float, power: float, *, drawn_by_reward: bool = True) -> np.ndarray:
        """An estimate of p^power exp(lambda r) by the frequencies of `result.shares`: seen sequences at their own
        weight; the rest (`continued`) has the share of the draws that came only once (Good and Turing).
        drawn_by_reward: False where the draws do not know the reward, so that they are weighted by it."""
        shares = {result.tree.tokens(leaf): share for leaf, share in result.shares.items()}
        least, rewards = min(shares.values()), {c.token_ids: c.reward for c in result.completions}
        factors = {s: 1.0 if drawn_by_reward else math.exp(scale * rewards[s]) for s in shares}
        total = sum(share * factors[s] for s, share in shares.items())
        once = sum(share * factors[s] for s, share in shares.items() if share < 1.5 * least) / total
        seen = self._seen(rewards)
        if seen[self.inside].all():
            once = 0.0
        return self._filled((1 - once) * _normal(np.where(seen, self.log_weights(scale, power), -np.inf)), seen, power)

    def with_known(self, result: Result, scale: float, log_z: float, power: float = 1.0) -> np.ndarray:
        """Any estimate of Z turned into a distribution: seen sequences at their own weight, the rest of Z spread as p
        spreads it over what was not seen (`continued`)."""
        seen = self._seen(c.token_ids for c in result.completions)
        known = np.where(seen, self.log_weights(scale, power), -np.inf)
        return self._filled(np.exp(known - max(log_z, float(np.logaddexp.reduce(known)))), seen, power)


def _normal(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


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
