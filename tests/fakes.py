"""A task, models and a decoder without a language model, for tests of the experiment runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dts.errors import RewardError, UsageError
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.tasks.base import Example
from dts.evaluation.tasks.oracle import OracleReward
from dts.results import Completion, Result, Rollout, Usage
from dts.rewards import Context, Finished, Reward, TerminalReward, weighted_sum
from dts.settings import Budget
from dts.tree import ROOT, Tree

COLORS = {"red": "#FF6B6B", "teal": "#4ECDC4"}


@dataclass(frozen=True)
class FakeSpec:
    name: str
    color: str
    source: str = "nowhere/fake"
    kind: str = "hub"

    def decode(self, token_ids: Sequence[int]) -> str:
        """A loaded fake is its own model."""
        return " ".join(map(str, token_ids))


@dataclass(frozen=True)
class FakeMethod:
    name: str
    rollouts: int

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)


@dataclass(frozen=True)
class FakeTask:
    """Rewards a text by the number in it; `fail` is called before each score and may raise."""

    count: int = 2
    fail: Callable[[], None] = lambda: None
    name: str = "FAKE"
    max_tokens: int = 8
    stop: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=lambda: {"accuracy": "max"})
    note: str = ""

    @property
    def clusters(self) -> Mapping[str, str]:
        return {example.id: example.id for example in self.examples}

    @property
    def examples(self) -> Sequence[Example]:
        return [Example(f"ex-{i}", [{"role": "user", "content": f"question {i}"}], i) for i in range(self.count)]

    def reward(self, example: Example) -> Reward:
        def score(context: Context, finished: Sequence[Finished]) -> list[float]:
            self.fail()
            return [float(done.text) for done in finished]

        return TerminalReward(score, "number")

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        return {"accuracy": float(np.mean([float(text) > 0.5 for text in texts.values()]))} if texts else {}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {"majority": {"accuracy": 0.25}}


@dataclass(frozen=True)
class OracleTask(FakeTask):
    """Its reward hides an oracle in a sum, under a name that does not say so."""

    def reward(self, example: Example) -> Reward:
        plain = super().reward(example)
        seen = OracleReward(lambda context, finished: [0.5] * len(finished), "answer key")
        return weighted_sum([(plain, 1.0), (seen, 1.0)])


def fake_decode(
    lm: FakeSpec,
    prompt: Any,
    *,
    reward: Reward,
    method: FakeMethod,
    seed: int,
    on_rollout: Callable[[Rollout], None],
    **_: Any,
) -> Result:
    """Rollouts with random numbers as texts, 10 forwarded tokens and 5 nodes each, all with the same first token."""
    rng = np.random.default_rng([seed, len(lm.name), len(method.name)])
    state = reward.start(Context(prompt, (1, 2), lambda ids: ""))
    rollouts: list[Rollout] = []
    best, tree = -np.inf, Tree()
    for k in range(method.rollouts):
        text = f"{rng.random():.6f}"
        value = reward.finish([state], [Finished((k,), text)])[0]
        best = max(best, value)
        leaf = grow_path(tree, tree.first_child[ROOT] if k else ROOT, 5, value)
        rollouts.append(Rollout(k, value, best, 5 * k + 5, 0.25 * k + 0.25, 10 * k + 10, 5, min(k, 1), leaf, text))
        on_rollout(rollouts[-1])
    completions = [Completion(r.text, (r.index,), r.reward, -1.0, "eos") for r in rollouts]
    completions.sort(key=lambda c: -c.reward)
    tokens = 10 * len(rollouts)
    usage = Usage(
        prompt_tokens=2,
        generated_tokens=tokens,
        forwarded_tokens=tokens,
        unique_tokens=tokens,
        model_calls=len(rollouts),
        seconds=0.25 * len(rollouts),
    )
    return Result(completions, rollouts, usage, tree, method.name)


def grow_path(tree: Tree, node: int, depth: int, reward: float) -> int:
    """New nodes from `node` down to a leaf at this depth, which is returned."""
    while tree.depth[node] < depth:
        node = tree.add(node, tree.n_children[node], -1.0, -1.0)
    tree.terminal[node], tree.reward[node] = 1, reward
    return node


@dataclass
class Calls:
    """What a run asked the backend for."""

    loaded: list[str] = field(default_factory=list)
    scored: int = 0


def raise_after(calls: Calls, count: int, error: BaseException) -> Callable[[], None]:
    """A reward's `fail` that raises `error` instead of the score number `count` + 1."""

    def fail() -> None:
        if calls.scored == count:
            raise error
        calls.scored += 1

    return fail


def fake_backend(task: FakeTask | None = None, calls: Calls | None = None) -> Backend:
    task, calls = task or FakeTask(), calls or Calls()

    def resolve(name: str, models_file: str | None = None) -> FakeSpec:
        if name not in COLORS:
            raise UsageError(f"--models {name!r} is not known; did you mean 'red'?")
        return FakeSpec(name, COLORS[name])

    def load(spec: FakeSpec, config: ExperimentConfig) -> FakeSpec:
        calls.loaded.append(spec.name)
        return spec

    def load_task(name: str, *, num_samples: int, **_: Any) -> FakeTask:
        if name.upper() not in ("HAR", "M4"):
            raise UsageError(f"unknown dataset {name!r}: did you mean har?")
        return replace(task, count=num_samples, name=name.lower())

    return Backend(
        methods={
            "maxent": lambda rollouts, scale: FakeMethod("maxent", rollouts),
            "best-of-n": lambda rollouts, scale: FakeMethod("best-of-n", rollouts),
            "greedy": lambda rollouts, scale: FakeMethod("greedy", 1),
        },
        resolve=resolve,
        check_model=lambda spec, examples, config: [len(example.prompt[0]["content"]) for example in examples],
        load_task=load_task,
        load=load,
        decode=fake_decode,
    )


@dataclass
class RecordingRun:
    """One tracker run with everything it was told."""

    unit: tuple[str, str, int]
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    complete: bool | None = None

    def log_rollout(self, record: dict[str, Any]) -> None:
        self.rollouts.append(record)

    def log_sample(self, record: dict[str, Any]) -> None:
        self.samples.append(record)

    def finish(self, cells: Sequence[Any], charts: Mapping[str, Any], *, complete: bool) -> None:
        assert self.complete is None, "finished twice"
        self.summary, self.complete = {"runs": list(cells)}, complete


@dataclass
class RecordingTracker:
    """Keeps the runs it opened."""

    runs: list[RecordingRun] = field(default_factory=list)

    def start_run(self, model: str, color: str, methods: Sequence[str], config: dict[str, Any]) -> RecordingRun:
        self.runs.append(RecordingRun((model, config["dataset"], config["seed"])))
        return self.runs[-1]


def reward_failure() -> RewardError:
    return RewardError("reward 'number' raised ZeroDivisionError: division by zero on completion '0.1'")
