"""Small searches, step by step as they were when somebody last looked at them (`golden.json`).

A search that takes another path than before fails here, and says where. Where that is meant, write the file anew and
read the difference: `python tests/test_golden.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import dts
from dts.models.table import TableModel, random_logits
from dts.results import Result
from dts.search import MCTS, Beam, BestOfN, Budget, Greedy, MaxEnt, ParticleFilter, Sampling, SelfConsistency

FILE = Path(__file__).with_name("golden.json")
VOCAB, HORIZON, PROMPT = 5, 4, (1, 2)


class Pairs:
    """Monotone, in [0, 1]: what a table gives for each token and the one before it; nothing more after EOS (0)."""

    name, monotone = "pairs", True

    def __init__(self, vocab=VOCAB):
        self.table = np.random.default_rng(7).uniform(size=(vocab, vocab)) ** 3 / HORIZON
        self.table[:, 0] = 0.0

    def start(self, context):
        return -1, 0, 0.0

    def extend(self, states, tokens):
        return [(t, n + 1, s + float(self.table[last, t])) for (last, n, s), t in zip(states, tokens, strict=True)]

    def earned(self, states):
        return [s for _, _, s in states]

    def upper(self, states):
        most = float(self.table.max())
        return [s + (0.0 if last == 0 else (HORIZON - n) * most) for last, n, s in states]

    def finish(self, states, finished):
        return self.earned(states)


def words(text: str) -> float:
    """Of the finished text only; ties are common."""
    return (text.count("3") - text.count("1")) / HORIZON


CASES = {
    "maxent": (MaxEnt(14, reward_scale=6.0), Pairs(), {"batch_size": 4}),
    "maxent alone": (MaxEnt(14, reward_scale=6.0, widening=0.5), Pairs(), {"batch_size": 1}),
    "maxent blind": (MaxEnt(14, reward_scale=3.0, lookahead=0, explore=0.5), Pairs(), {}),
    "maxent text": (MaxEnt(14, reward_scale=3.0), words, {"stop": "3 2 ", "batch_size": 3}),
    "maxent at zero": (MaxEnt(10, reward_scale=0.0), words, {"top_k": 3}),
    "maxent tokens": (MaxEnt(40, reward_scale=6.0), Pairs(), {"budget": Budget(tokens=25)}),
    "best": (MaxEnt(14, reward_scale=3.0, search="best"), Pairs(), {"batch_size": 4}),
    "best, side by side": (MaxEnt(40, search="best"), Pairs(), {"batch_size": 8}),
    "best by bound": (MaxEnt(14, search="best", bonus=1.0, sharpness=2.0), Pairs(), {"batch_size": 2}),
    "maxent, many tokens": (MaxEnt(16, reward_scale=6.0, lookahead=6), Pairs(20), {"vocab": 20, "batch_size": 3}),
    "best text by bound": (MaxEnt(14, search="best", bonus=1.0), words, {"batch_size": 2}),
    "best, many tokens": (MaxEnt(16, search="best", lookahead=6), Pairs(20), {"vocab": 20}),
    "best text": (MaxEnt(14, search="best"), words, {"batch_size": 4}),
    "samples": (Sampling(9), words, {"temperature": 0.7}),
    "best of n": (BestOfN(20), Pairs(), {"min_new_tokens": 2}),
    "greedy": (Greedy(), Pairs(), {}),
    "votes": (SelfConsistency(14, lambda text: text[:1] or None), words, {}),
    "weighted votes": (SelfConsistency(14, lambda text: text[:1] or None, weighted=True), words, {}),
    "beam": (Beam(3), words, {}),
    "beam guided": (Beam(4, reward_weight=2.0, length_penalty=0.5), Pairs(), {}),
    "beam guided, many tokens": (Beam(3, reward_weight=6.0), Pairs(20), {"vocab": 20}),
    "beam, many tokens": (Beam(4, groups=2), None, {"vocab": 20}),
    "beam groups": (Beam(4, groups=2, reward_weight=1.0), Pairs(), {}),
    "beam steps": (Beam(8, reward_weight=3.0, segment=2), Pairs(), {}),
    "beam strings": (Beam(8, reward_weight=3.0, segment="3 ", groups=2, branch=2), words, {}),
    "beam groups of steps": (Beam(12, reward_weight=3.0, segment=2, groups=2, branch=3), Pairs(20), {"vocab": 20}),
    "mcts": (MCTS(14), words, {"batch_size": 2}),
    "mcts by maximum": (MCTS(14, value="max", bonus=0.6), Pairs(), {"batch_size": 1}),
    "mcts, many tokens": (MCTS(20), Pairs(20), {"vocab": 20}),
    "uct, many tokens": (MCTS(20, puct=False, value="max"), Pairs(20), {"vocab": 20}),
    "uct": (MCTS(14, puct=False), words, {"batch_size": 3}),
    "particles": (ParticleFilter(12, reward_scale=6.0), Pairs(), {"batch_size": 5}),
    "particles by segments": (ParticleFilter(12, reward_scale=4.0, segment=2, ess_threshold=0.9), words, {}),
    "particles, entropic": (ParticleFilter(12, reward_scale=8.0, entropic=True, ess_threshold=0.9), Pairs(), {}),
}


def search(name: str) -> Result:
    method, reward, options = CASES[name]
    vocab = options.get("vocab", VOCAB)
    rest = {option: value for option, value in options.items() if option != "vocab"}
    lm = TableModel(random_logits(vocab, seed=3), vocab, eos=0)
    return dts.decode(lm, PROMPT, method=method, reward=reward, max_new_tokens=HORIZON, seed=11, **rest)


def steps(result: Result) -> list[str]:
    """Each rollout: tokens, where it left the tree, nodes and forwarded tokens by then."""
    return [
        f"{' '.join(map(str, result.tree.tokens(r.leaf)))} | {r.start_depth} {r.nodes} {r.tokens}"
        for r in result.rollouts
    ]


def numbers(result: Result) -> dict[str, float]:
    """What the search makes of it."""
    usage, tree = result.usage, result.tree
    found = {
        "generated": usage.generated_tokens, "calls": usage.model_calls, "partial": float(result.partial),
        "best reward": result.best.reward, "best log p": result.best.logprob,
        "log p outside the root's children": tree.log_unexplored[0],
    }  # fmt: skip
    if result.values is not None:
        values = result.values
        found |= {"value": values.value(), "mean": values.mean[0], "open": values.log_open[0]}
        found |= {f"entered {node}": values.visits.entered[node] for node in list(tree.children(0))[:3]}
        found["weighted values"] = math.fsum(node * values.value(node) for node in range(len(tree)))
    if result.values is not None or result.log_weights is not None:
        found["effective"] = result.effective_sample_size
    if result.log_weights is not None:
        found["log z"] = result.log_z
    if result.log_z_estimate is not None:
        found |= {"log z": result.log_z, "error": result.log_z_estimate.error}
        found |= dict(zip(("low", "high"), result.log_z_estimate.interval, strict=True))
    return found


def order(result: Result) -> list[str]:
    """Completions, the first of them, as the method ranks them."""
    return [f"{' '.join(map(str, c.token_ids))} {c.finished_by}" for c in result.completions[:6]]


def draws(result: Result) -> list[str]:
    if result.values is None and result.log_weights is None:
        return []
    return [" ".join(map(str, c.token_ids)) for c in result.sample(5, seed=2)]


@pytest.mark.parametrize("name", CASES)
def test_a_search_takes_the_known_path(name):
    expected, result = json.loads(FILE.read_text(encoding="utf-8"))[name], search(name)
    assert steps(result) == expected["steps"]
    assert order(result) == expected["order"]
    known = {key: math.inf if value is None else value for key, value in expected["numbers"].items()}
    found = {key: math.inf if value == -math.inf else value for key, value in numbers(result).items()}
    assert found == pytest.approx(known, rel=1e-9, abs=1e-12)
    assert draws(result) == expected["draws"]


def write() -> None:
    everything = {}
    for name in CASES:
        result = search(name)
        found = {key: value if math.isfinite(value) else None for key, value in numbers(result).items()}
        everything[name] = {"steps": steps(result), "order": order(result), "numbers": found, "draws": draws(result)}
    FILE.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
