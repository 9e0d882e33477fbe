"""Beam, MCTS, particle filter and voting against references: enumeration, and `transformers`' own beam search."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import dts
from dts.evaluation.studies.instances import PROMPT, instance, total_variation
from dts.models.table import TableModel, random_logits
from dts.rewards import Context
from dts.search import MCTS, Beam, BestOfN, Budget, Greedy, ParticleFilter, Sampling, Search, SelfConsistency
from dts.search.particles import _Particles
from dts.search.readings import Reading, answer
from dts.settings import Decoding
from dts.tree import ROOT


class PairReward:
    """The structured reward of `instance`, token by token: what the pairs so far gave, and no less than that to come.

    Every step gains between 0 and 1, so what was earned never falls.
    """

    name, monotone = "pairs", True

    def __init__(self, vocab_size, horizon, seed):
        self.table = np.random.default_rng(seed).uniform(size=(horizon, vocab_size + 1, vocab_size)) / horizon
        self.horizon = horizon

    def start(self, context):
        return (-1, 0, 0.0)  # last token, length, sum

    def extend(self, states, tokens):
        return [(t, n + 1, s + float(self.table[n, last, t])) for (last, n, s), t in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [s for _, _, s in states]

    def upper(self, states):
        return [s + (self.horizon - n) / self.horizon for _, n, s in states]

    def finish(self, states, finished):
        return self.earned(states)

    def of(self, sequence):
        state = self.start(None)
        for token in sequence:
            (state,) = self.extend([state], [token])
        return state[2]


def log_target(case, reward, scale):
    return case.log_p + scale * np.array([reward.of(s) for s in case.sequences])


# -- beam --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_lm():
    """A random Llama over few bytes that often ends early."""
    from families import ByteTokenizer, random_model

    from dts.models.huggingface import HFModel

    model = random_model("llama", seed=4)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[0] = head[100:105].sum(0)
    return HFModel(model, ByteTokenizer(), name="short")


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("prompt", ["Once", "Time flies", "q", "a b c"])
def test_beam_search_equals_transformers(short_lm, width, length_penalty, prompt):
    method = Beam(width, length_penalty=length_penalty)
    result = dts.decode(short_lm, prompt, method=method, max_new_tokens=10)
    ids = short_lm.encode(prompt)
    expected = short_lm.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), num_beams=width, length_penalty=length_penalty,
        do_sample=False, max_new_tokens=10, eos_token_id=0, pad_token_id=0, num_return_sequences=width,
    )[:, len(ids) :].tolist()  # fmt: skip
    if width == 1:  # generate falls back to greedy search
        greedy = dts.decode(short_lm, prompt, method=Greedy(), max_new_tokens=10)
        assert list(greedy.best.token_ids) == _until_eos(expected[0])
        return
    found = [list(c.token_ids) for c in result.completions[:width]]
    assert found == [_until_eos(e) for e in expected]


def _until_eos(ids):
    return ids[: ids.index(0) + 1] if 0 in ids else ids


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_space_finds_the_best_sequence(length_penalty):
    case = instance(3, vocab_size=4, horizon=4)  # 121 sequences
    method = Beam(len(case.sequences), length_penalty=length_penalty)
    result = dts.decode(case.lm, PROMPT, method=method, max_new_tokens=4)
    scores = case.log_p / np.array([len(s) for s in case.sequences]) ** length_penalty
    assert result.best.token_ids == case.sequences[int(scores.argmax())]
    guided = Beam(len(case.sequences), length_penalty=length_penalty, reward_weight=5.0)
    result = dts.decode(case.lm, PROMPT, reward=case.reward, method=guided, max_new_tokens=4)
    assert result.best.reward == 1.0


def test_a_guided_beam_earns_more_at_the_same_width():
    plain, guided = [], []
    for seed in range(6):
        lm, reward = TableModel(random_logits(8, seed), 8), PairReward(8, 6, seed)
        for weight, rewards in ((0.0, plain), (4.0, guided)):
            result = dts.decode(lm, PROMPT, reward=reward, method=Beam(3, reward_weight=weight), max_new_tokens=6)
            rewards.append(result.best.reward)
            assert len(result.rollouts) == 3
    assert all(g >= p for g, p in zip(guided, plain, strict=True)) and np.mean(guided) > np.mean(plain) + 0.1


def test_groups_are_independent_subtrees():
    case = instance(2, vocab_size=6, horizon=4, eos=None)
    result = dts.decode(case.lm, PROMPT, method=Beam(6, groups=3), max_new_tokens=4)
    first = Counter(c.token_ids[0] for c in result.completions)
    ranked = torch.from_numpy(case.lm.table(PROMPT)).argsort(descending=True).tolist()
    assert len(result.completions) == 6
    # The most likely first tokens are dealt out; each group keeps two paths after its own tokens.
    groups = [{ranked[0], ranked[3]}, {ranked[1], ranked[4]}, {ranked[2], ranked[5]}]
    assert [sum(n for token, n in first.items() if token in group) for group in groups] == [2, 2, 2]


@pytest.mark.parametrize("segment", [2, 3, "2 "])
@pytest.mark.parametrize("groups", [1, 2])
def test_step_level_beam_keeps_what_the_reward_likes(segment, groups):
    """Text rewards are asked at the ends of segments; the beam beats samples at no more forwarded tokens."""
    beam, best_of_n = [], []
    for seed in range(10):
        lm = TableModel(random_logits(8, seed), 8)

        def reward(text):
            return text.count("3") - text.count("1")

        method = Beam(8, reward_weight=4.0, segment=segment, groups=groups)
        result = dts.decode(lm, PROMPT, reward=reward, method=method, max_new_tokens=12, seed=seed)
        budget = Budget(tokens=result.usage.forwarded_tokens)
        sampled = dts.decode(
            lm, PROMPT, reward=reward, method=BestOfN(100), max_new_tokens=12, budget=budget, seed=seed, batch_size=1
        )
        beam.append(result.best.reward)
        best_of_n.append(sampled.best.reward)
    assert np.mean(beam) > np.mean(best_of_n)


# -- particle filter ---------------------------------------------------------------------------------------------------

FILTERS = {
    "plain": {},
    "always resample": {"ess_threshold": 1.0},
    "entropic": {"ess_threshold": 0.9, "entropic": True},
    "never resample": {"ess_threshold": 0.0},
    "segments": {"segment": 2, "ess_threshold": 1.0},
    "moves": {"ess_threshold": 1.0, "moves": 2},
    "moves, entropic, segments": {"ess_threshold": 1.0, "moves": 1, "entropic": True, "segment": 2},
}


@pytest.mark.parametrize("kind", FILTERS)
def test_z_is_unbiased(kind):
    """The mean of 400 estimates is within 3.5 of its standard errors of Z, and that error is small."""
    case, reward, scale = instance(0, vocab_size=4, horizon=4), PairReward(4, 4, 0), 6.0
    z = math.exp(np.logaddexp.reduce(log_target(case, reward, scale)))
    estimates = []
    for seed in range(400):
        method = ParticleFilter(4, reward_scale=scale, **FILTERS[kind])
        result = dts.decode(case.lm, PROMPT, reward=reward, method=method, max_new_tokens=4, seed=seed)
        estimates.append(sum(math.exp(w) for w in result.log_weights.values()))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert error < 0.05 * z
    assert abs(np.mean(estimates) - z) < 3.5 * error


@pytest.mark.parametrize("entropic", [False, True])
def test_z_is_unbiased_where_a_gain_announces_another(entropic):
    """Token 1 first (p = 1/4) gains 1/2 at once and 1/2 with the next token: who is resampled decides the estimate."""
    lm, reward, scale = TableModel(lambda prefix: np.zeros(4), 4), PairReward(4, 4, 0), 8.0
    reward.table[:] = 0.0
    reward.table[0, :, 1] = reward.table[1, 1, :] = 0.5
    z = (math.exp(scale) + 3) / 4
    estimates = []
    for seed in range(600):
        method = ParticleFilter(8, reward_scale=scale, ess_threshold=1.0, entropic=entropic)
        result = dts.decode(lm, PROMPT, reward=reward, method=method, max_new_tokens=4, seed=seed)
        estimates.append(sum(math.exp(w) for w in result.log_weights.values()))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert error < 0.05 * z and abs(np.mean(estimates) - z) < 3.5 * error


@pytest.mark.parametrize("moves", [0, 2])
def test_text_rewards_at_segments_are_unbiased_too(moves):
    case, scale = instance(1, vocab_size=3, horizon=4), 3.0
    z = math.exp(scale * case.value(scale))
    estimates = []
    for seed in range(300):
        method = ParticleFilter(4, reward_scale=scale, segment="2 ", ess_threshold=1.0, moves=moves)
        result = dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=4, seed=seed)
        estimates.append(sum(math.exp(w) for w in result.log_weights.values()))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert error < 0.05 * z and abs(np.mean(estimates) - z) < 3.5 * error


@pytest.mark.parametrize("kind", FILTERS)
def test_weighted_particles_approach_the_target(kind):
    case, reward, scale = instance(0, vocab_size=4, horizon=4), PairReward(4, 4, 0), 6.0
    target = log_target(case, reward, scale)
    target = np.exp(target - np.logaddexp.reduce(target))
    distances = []
    for n in (30, 300, 3000):
        method = ParticleFilter(n, reward_scale=scale, **FILTERS[kind])
        result = dts.decode(case.lm, PROMPT, reward=reward, method=method, max_new_tokens=4, seed=1)
        weights = {result.tree.tokens(leaf): math.exp(w) for leaf, w in result.log_weights.items()}
        estimate = np.array([weights.get(s, 0.0) for s in case.sequences]) / sum(weights.values())
        distances.append(total_variation(estimate, target))
        assert len(result.rollouts) == n
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.08


class Ones(PairReward):
    """How often token 1 was drawn."""

    def __init__(self, vocab_size, horizon):
        self.table, self.horizon = np.zeros((horizon, vocab_size + 1, vocab_size)), horizon
        self.table[:, :, 1] = 1.0


def test_resampling_pays_on_a_reward_that_is_earned_along_the_way():
    """24 uniform draws of 4 tokens: Z = ((3 + e^lambda) / 4)^24, most of it where hardly any sample lands."""
    lm, scale = TableModel(lambda prefix: np.zeros(4), 4), 2.0
    log_z = 24 * math.log((3 + math.exp(scale)) / 4)
    errors = {}
    for kind, options in {"never": {"ess_threshold": 0.0}, "plain": {}, "entropic": {"entropic": True}}.items():
        errors[kind] = []
        for seed in range(6):
            method = ParticleFilter(256, reward_scale=scale, **options)
            result = dts.decode(lm, PROMPT, reward=Ones(4, 24), method=method, max_new_tokens=24, seed=seed)
            errors[kind].append(abs(np.logaddexp.reduce(list(result.log_weights.values())) - log_z))
    assert np.mean(errors["never"]) > 3.0
    # Resampled: about sqrt(24 steps * relative variance 1.1 / 256) = 0.33.
    assert np.mean(errors["plain"]) < 0.45 and np.mean(errors["entropic"]) < 0.45


def test_moves_leave_the_target_of_the_prefixes_under_way_as_it_is():
    """Two tokens; uneven p; token 2 ends a text. Particles that are exact before a move are exact after it, and one
    that begins at one prefix has after a move what the Metropolis-Hastings kernel says."""
    lm = TableModel(lambda prefix: np.log([0.5, 0.3, 0.2]), 3, eos=2)
    reward, scale = PairReward(3, 3, 5), 5.0
    prefixes = [(a, b) for a in (0, 1) for b in (0, 1)]
    p = {(a, b): (0.5, 0.3)[a] * (0.5, 0.3)[b] for a, b in prefixes}
    g = {prefix: scale * reward.of(prefix) for prefix in prefixes}
    kernel = np.zeros((4, 4))
    for i, old in enumerate(prefixes):
        for j, new in enumerate(prefixes):
            if i != j:
                drawn = p[new] / 2 + (p[new] / (0.5, 0.3)[new[0]] / 2 if new[0] == old[0] else 0.0)
                kernel[i, j] = drawn * min(1.0, math.exp(g[new] - g[old]))
        kernel[i, i] = 1 - kernel[i].sum()
    target = np.array([p[prefix] * math.exp(g[prefix]) for prefix in prefixes])
    assert target @ kernel == pytest.approx(target)  # the kernel written down here does leave it as it is
    for row, old in enumerate(prefixes):
        counts = Counter(moved_from(lm, reward, scale, old, 4000))
        assert sum(counts.values()) == 4000
        seen = np.array([counts[prefix] / 4000 for prefix in prefixes])
        assert total_variation(seen, kernel[row]) < 0.03


def moved_from(lm, reward, scale, prefix, count):
    """Where particles that all stand at `prefix` are after one move."""
    context = Context(PROMPT, PROMPT, lm.decode)
    session = lm.open(PROMPT, batch_size=count, max_new_tokens=3)
    search = Search(lm, session, context, reward, Decoding(max_new_tokens=3), Budget(), count)
    particles = _Particles(search, ParticleFilter(count, reward_scale=scale, moves=1))
    node, steps = ROOT, [ROOT]
    for token in prefix:
        (node,) = search.take([node], [token])
        search.evaluate([node])
        steps.append(node)
    for path in particles._paths:
        path.node = node
    particles._steps = [list(steps) for _ in range(count)]
    particles._log_twist[:] = scale * reward.of(prefix)
    for wanted in particles._move():
        answer([wanted]) if isinstance(wanted, Reading) else search.evaluate(wanted)
    assert particles._log_twist == pytest.approx(
        [scale * reward.of(search.tree.tokens(p.node)) for p in particles._paths]
    )
    assert all(s[-1] == p.node and len(s) == 3 for s, p in zip(particles._steps, particles._paths, strict=True))
    return [search.tree.tokens(path.node) for path in particles._paths]


def test_moves_make_copies_differ_and_their_tokens_are_counted():
    """The sixth token decides: the few particles that have the right one are copied."""
    lm, distinct, results = TableModel(lambda prefix: np.zeros(6), 6), {}, {}
    reward = Ones(6, 12)
    reward.table[:] = 0.0
    reward.table[5, :, 1] = 1.0
    for moves in (0, 3):
        method = ParticleFilter(40, reward_scale=20.0, moves=moves)
        results[moves] = result = dts.decode(lm, PROMPT, reward=reward, method=method, max_new_tokens=12, seed=0)
        distinct[moves] = len({c.token_ids[:5] for c in result.completions})
        assert all(c.token_ids[5] == 1 for c in result.completions) and len(result.rollouts) == 40
        assert result.usage.forwarded_tokens == result.usage.unique_tokens
        assert result.usage.generated_tokens == len(result.tree) - 1
    assert distinct[0] <= 10 and distinct[3] > 2 * distinct[0]
    assert results[3].usage.forwarded_tokens > results[0].usage.forwarded_tokens


def test_draws_follow_the_weights():
    case = instance(1, vocab_size=3, horizon=3)
    method = ParticleFilter(20, reward_scale=2.0)
    result = dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=3)
    draws = Counter(c.token_ids for c in result.sample(4000, seed=1))
    weights = {result.tree.tokens(leaf): math.exp(w) for leaf, w in result.log_weights.items()}
    total = sum(weights.values())
    assert sum(abs(draws[t] / 4000 - w / total) for t, w in weights.items()) / 2 < 0.04


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("moves", [0, 1])
def test_particles_do_not_depend_on_the_batch(batch_size, moves):
    case = instance(2)

    def run(**options):
        method = ParticleFilter(24, reward_scale=5.0, ess_threshold=1.0, moves=moves)
        return dts.decode(case.lm, PROMPT, reward=PairReward(6, 5, 2), method=method, max_new_tokens=5, **options)

    assert run(batch_size=batch_size).completions == run().completions


# -- MCTS --------------------------------------------------------------------------------------------------------------

SEARCHES = [MCTS(300), MCTS(300, puct=False), MCTS(300, value="max")]


@pytest.mark.parametrize("method", SEARCHES, ids=["puct", "uct", "max"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_mcts_concentrates_on_the_best_arm(method, batch_size):
    """Five arms of unequal p; after the unlikeliest come the best rewards."""
    case = instance(0, vocab_size=5, horizon=2, eos=None, spread=0.7)
    arms = np.argsort(case.lm.table(PROMPT))
    worth = {str(arm): 1.0 - 0.2 * place for place, arm in enumerate(arms.tolist())}

    def reward(text):
        first, second = text.split()
        return worth[first] + 0.01 * int(second)

    result = dts.decode(case.lm, PROMPT, reward=reward, method=method, max_new_tokens=2, batch_size=batch_size)
    chosen = Counter(r.text.split()[0] for r in result.rollouts)
    assert chosen.most_common(1)[0][0] == str(arms[0])
    assert chosen[str(arms[0])] > 120 and set(chosen) == set(worth)
    assert result.best.reward == pytest.approx(1.04)


@pytest.mark.parametrize("method", [MCTS(150), MCTS(150, puct=False)], ids=["puct", "uct"])
def test_mcts_finds_more_than_samples(method):
    found, sampled = [], []
    for seed in range(10):
        case = instance(seed)  # 3,906 sequences
        for chosen, rewards in ((method, found), (BestOfN(150), sampled)):
            result = dts.decode(case.lm, PROMPT, reward=case.reward, method=chosen, max_new_tokens=5, seed=seed)
            rewards.append(result.best.reward)
    assert np.mean(found) > np.mean(sampled)


# -- voting ------------------------------------------------------------------------------------------------------------


def test_the_majority_comes_first():
    case = instance(5, vocab_size=4, horizon=3)
    likely = str(int(case.lm.table(PROMPT)[1:].argmax()) + 1)

    def answer(text):
        return text.split()[0] if text.split() else None

    def reward(text):
        return len(text.split()) + (0.0 if answer(text) == likely else 10.0)

    result = dts.decode(case.lm, PROMPT, reward=reward, method=SelfConsistency(60, answer), max_new_tokens=3)
    votes = Counter(answer(r.text) for r in result.rollouts)
    del votes[None]
    assert votes.most_common(1)[0][0] == likely
    winners = [c for c in result.completions if answer(c.text) == likely]
    assert result.completions[: len(winners)] == winners and result.best.reward == 3.0 == max(c.reward for c in winners)
    assert max(c.reward for c in result.completions) >= 10.0
    same_draws = dts.decode(case.lm, PROMPT, method=Sampling(60), max_new_tokens=3)
    assert [r.text for r in same_draws.rollouts] == [r.text for r in result.rollouts]


def test_weighted_votes_count_rewards():
    case = instance(5, vocab_size=4, horizon=1, eos=None)
    worth = dict(zip(map(str, np.argsort(-case.lm.table(PROMPT)).tolist()), (0.01, 1.0, 0.02, 0.0), strict=True))
    method = SelfConsistency(60, weighted=True)
    result = dts.decode(case.lm, PROMPT, reward=lambda t: worth[t.strip()] - 5, method=method, max_new_tokens=1)
    votes = Counter(r.text for r in result.rollouts)
    assert result.best.reward == -4.0 and votes[result.best.text] < votes.most_common(1)[0][1]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: Beam(0), lambda: Beam(4, groups=3), lambda: Beam(4, segment=0), lambda: Beam(4, segment=""),
    lambda: Beam(4, length_penalty=math.inf), lambda: Beam(4, reward_weight=-1.0), lambda: Beam(4, branch=0),
    lambda: MCTS(0), lambda: MCTS(4, value="median"), lambda: MCTS(4, bonus=-1.0),
    lambda: ParticleFilter(0), lambda: ParticleFilter(4, ess_threshold=1.5), lambda: ParticleFilter(4, segment=True),
    lambda: ParticleFilter(4, moves=-1), lambda: ParticleFilter(4, moves=1.5),
    lambda: ParticleFilter(4, reward_scale=-1.0), lambda: SelfConsistency(0),
])  # fmt: skip
def test_bad_options_are_refused(make):
    with pytest.raises(dts.UsageError, match="is not"):
        make()


@pytest.mark.parametrize("method", [
    Beam(40), Beam(40, reward_weight=2.0), Beam(40, segment=2), MCTS(40), MCTS(40, puct=False), ParticleFilter(40),
    ParticleFilter(40, segment=2), ParticleFilter(40, segment=2, ess_threshold=1.0, moves=2), SelfConsistency(40),
], ids=lambda m: f"{m.name}-{getattr(m, 'segment', '')}-{getattr(m, 'moves', '')}")  # fmt: skip
@pytest.mark.parametrize("budget", [Budget(tokens=20), Budget(rollouts=5), Budget(tokens=90, rollouts=3),
                                    Budget(seconds=1e-9)])  # fmt: skip
def test_budgets_are_kept(method, budget):
    case = instance(0)
    result = dts.decode(case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=5, budget=budget)
    assert budget.tokens is None or result.usage.forwarded_tokens <= budget.tokens
    assert budget.rollouts is None or len(result.rollouts) <= budget.rollouts
    assert budget.seconds is None or all(r.length == 1 for r in result.rollouts)


@pytest.mark.parametrize("method", [Beam(12), Beam(12, reward_weight=1.0, segment=2), Beam(12, groups=4), MCTS(40),
                                    MCTS(40, puct=False), ParticleFilter(40),
                                    ParticleFilter(40, segment=2, ess_threshold=1.0, moves=2)])  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_the_tree_stays_consistent(method, batch_size):
    """Children's log p and the mass outside them are the model's; each evaluated node was forwarded once."""
    case = instance(6, vocab_size=5, horizon=4)
    result = dts.decode(
        case.lm, PROMPT, reward=case.reward, method=method, max_new_tokens=4, batch_size=batch_size, seed=3
    )
    tree = result.tree
    for node in range(len(tree)):
        children = list(tree.children(node))
        p = torch.from_numpy(case.lm.table(PROMPT + tree.tokens(node))).double().softmax(-1)
        tokens = [tree.token[child] for child in children]
        assert len(set(tokens)) == len(tokens)
        assert [tree.log_p[c] for c in children] == pytest.approx(p.log()[tokens].tolist(), abs=1e-12)
        p[tokens] = 0.0
        assert math.exp(tree.log_unexplored[node]) == pytest.approx(float(p.sum()), abs=1e-12)
    assert result.usage.forwarded_tokens == result.usage.unique_tokens == sum(slot >= 0 for slot in tree.slot)
