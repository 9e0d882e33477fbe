"""What the runner's records cost in memory and time. One JSON line per case.

    python benchmarks/records.py                         # 10,000 samples x 32 rollouts, made up: no model
    python benchmarks/records.py --samples 1000          # fewer

Searches are made up at once, so that what is measured is the runner: records, summary, charts and report. Peak RSS is
that of the whole process, imports included; seconds are those of this process on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.experiment.engines.local import run_jobs
from dts.evaluation.experiment.plan import prepare
from dts.evaluation.experiment.run import run
from dts.evaluation.run_folder import RunFolder
from dts.evaluation.tasks.base import Example
from dts.evaluation.tracking import NullTracker
from dts.results import Completion, Estimate, Result, Rollout, Usage
from dts.rewards import Context, Finished, Reward, TerminalReward
from dts.settings import Budget
from dts.tree import Tree

WORDS = ["the", "sensor", "shows", "a", "slow", "walk", "with", "short", "steps", "then", "rest", "and", "turns"]
TEXT = 160  # characters of a completion, about


@dataclass(frozen=True)
class Spec:
    """A model that is its own specification."""

    name: str = "made-up"
    source: str = "nowhere/made-up"
    color: str = "#0B7A75"

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


@dataclass(frozen=True)
class Method:
    name: str
    rollouts: int

    def batch_size(self) -> int:
        return 8

    def budget(self) -> Budget:
        return Budget(rollouts=self.rollouts)


class Task:
    """Prompts of a few hundred characters; the reward is a number of the text."""

    name, max_tokens, stop = "made-up", 32, ()

    def __init__(self, count: int) -> None:
        self.examples = [
            Example(f"ex-{i}", [{"role": "user", "content": f"question {i}: {' '.join(WORDS * 4)}"}], None)
            for i in range(count)
        ]
        self.clusters = {example.id: example.id for example in self.examples}

    def reward(self, example: Example) -> Reward:
        def score(context: Context, finished: Sequence[Finished]) -> list[float]:
            return [len(one.text) / 100 for one in finished]

        return TerminalReward(score, "length")

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        return {"words": float(np.mean([text.count(" ") for text in texts.values()]))}

    def baselines(self) -> dict[str, dict[str, float]]:
        return {}


def made_up(
    lm: Spec, prompt: Any, *, method: Method, seed: int, on_rollout: Callable[[Rollout], None], **_: Any
) -> Result:
    """A search with random texts and rewards, finished at once."""
    rng = random.Random(seed)
    rollouts: list[Rollout] = []
    best = 0.0
    for k in range(method.rollouts):
        text = " ".join(rng.choices(WORDS, k=TEXT // 5))
        reward = rng.random()
        best = max(best, reward)
        rollouts.append(Rollout(k, reward, best, 20 * k + 20, 0.1 * k + 0.1, 30 * k + 130, 32, k % 7, k, text))
        on_rollout(rollouts[-1])
    completions = [Completion(r.text, (r.index,), r.reward, -40.0, "length") for r in rollouts]
    completions.sort(key=lambda completion: -completion.reward)
    tokens = rollouts[-1].tokens
    usage = Usage(prompt_tokens=100, generated_tokens=tokens - 100, forwarded_tokens=tokens, unique_tokens=tokens,
                  model_calls=len(rollouts), seconds=0.1 * len(rollouts))  # fmt: skip
    shares = {r.leaf: 1 / len(rollouts) for r in rollouts}
    return Result(completions, rollouts, usage, Tree(), method.name, estimate=Estimate(shares=shares))


def backend() -> Backend:
    return Backend(
        methods={"maxent": lambda rollouts, scale: Method("maxent", rollouts)},
        resolve=lambda name, file: Spec(),
        check_model=lambda spec, examples, config: [100] * len(examples),
        load_task=lambda name, *, num_samples, **_: Task(num_samples),
        load=lambda spec, config: spec,
        decode=made_up,
    )


def peak() -> float:
    """Most memory that this process has held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e6


def records(options: argparse.Namespace, folder: Path) -> None:
    config = ExperimentConfig(models=("made-up",), datasets=("made-up",), methods=("maxent",),
                              num_samples=options.samples, num_rollouts=options.rollouts)  # fmt: skip
    before = {"mb_imports": peak()}
    starts = time.process_time(), time.perf_counter()
    made = backend()
    target = RunFolder.create(folder, config.name)
    run(prepare(config, made), target, NullTracker(), made, run_jobs)
    report = target.path / "report.html"
    emit(
        "records", samples=options.samples, rollouts=options.rollouts, **before, mb_peak=peak(),
        cpu_s=time.process_time() - starts[0], wall_s=time.perf_counter() - starts[1],
        mb_rollouts=(target.path / "rollouts.jsonl").stat().st_size / 1e6, mb_report=report.stat().st_size / 1e6,
    )  # fmt: skip


def emit(case: str, **figures: float) -> None:
    print(json.dumps({"case": case, **{name: float(f"{value:.4g}") for name, value in figures.items()}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rollouts", type=int, default=32, help="per sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records(options, Path(folder))


if __name__ == "__main__":
    main()
