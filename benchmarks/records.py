"""What the runner's records cost in memory and time. One JSON line per case.

    python benchmarks/records.py                         # 10,000 samples x 32 rollouts, made up: no model
    python benchmarks/records.py --samples 1000          # fewer
    python benchmarks/records.py --prompts 1000          # MaxEnt(4) on a tiny Llama, 16 searches in flight

Made-up searches are finished at once, so that what is measured is the runner: records, summary, charts and report. Peak
RSS is that of the whole process, imports included; seconds are those of this process on a CPU. With --prompts a first
process prints its RSS after 100, 500 and 1,000 prompts; a second one is killed (SIGKILL) at 40 %, a third resumes it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


def tiny_backend() -> Backend:
    """The real decoding on a Llama of two layers with random weights, one thread."""
    import torch
    from decode_speed import NoTokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    import dts
    from dts.models.huggingface import HFModel
    from dts.search import METHODS

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = LlamaConfig(vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
    lm = HFModel(LlamaForCausalLM(sizes), NoTokenizer(), "tiny")

    def load_task(name: str, *, num_samples: int, **_: Any) -> Task:
        task = Task(num_samples)
        rng = random.Random(0)
        task.examples = [
            replace(e, prompt=rng.choices(range(2000), k=16 + i % 48)) for i, e in enumerate(task.examples)
        ]
        return task

    return replace(backend(), methods=METHODS, load_task=load_task, load=lambda spec, config: lm, decode=dts.decode,
                   decode_many=dts.decode_many)  # fmt: skip


def do_prompts(folder: Path, count: int) -> None:
    """In a process of its own: start or continue a run, and print its memory on the way."""
    made = tiny_backend()
    config = ExperimentConfig(models=("made-up",), datasets=("made-up",), methods=("maxent",), num_samples=count,
                              num_rollouts=4, max_tokens=12, save_trees=0)  # fmt: skip
    done = [path for path in folder.glob("made-up_*") if path.is_dir()]
    target = RunFolder(done[0]) if done else RunFolder.create(folder, config.name)

    def engine(plan: Any, jobs: Any, backend: Backend, recorder: Any) -> None:
        finish, finished = recorder.finish, 0

        def watched(outcome: Any) -> None:
            nonlocal finished
            finish(outcome)
            finished += 1
            if finished in (100, 500, 1000):
                emit("rss", prompts=finished, mb=rss(), cpu_s=time.process_time())

        recorder.finish = watched
        run_jobs(plan, jobs, backend, recorder)

    run(prepare(config, made), target, NullTracker(), made, engine)


def rss() -> float:
    """Memory that this process holds now, MB."""
    import psutil

    return float(psutil.Process().memory_info().rss / 1e6)


def prompts(options: argparse.Namespace, folder: Path) -> None:
    """Memory of an uninterrupted run; then one that is killed and resumed."""
    command = [sys.executable, __file__, "--prompts", str(options.prompts), "--child"]
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    subprocess.run([*command, str(folder / "whole")], check=True)
    process = subprocess.Popen([*command, str(folder / "killed")], stdout=subprocess.DEVNULL)
    while len(before := finished_lines(folder / "killed")) < 0.4 * options.prompts:
        time.sleep(0.2)
        assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    before = finished_lines(folder / "killed")
    subprocess.run([*command, str(folder / "killed")], check=True)
    after = finished_lines(folder / "killed")
    jobs = {json.loads(line)["sample"] for line in after}
    assert after[: len(before)] == before and len(after) == len(jobs) == options.prompts
    emit("resumed", prompts=len(jobs), before_the_kill=len(before), lost=0)


def finished_lines(folder: Path) -> list[bytes]:
    files = list(folder.glob("*/samples.jsonl"))
    return files[0].read_bytes().split(b"\n")[:-1] if files else []


def emit(case: str, **figures: float) -> None:
    print(json.dumps({"case": case, **{name: float(f"{value:.4g}") for name, value in figures.items()}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rollouts", type=int, default=32, help="per sample")
    parser.add_argument("--prompts", type=int, help="decode so many prompts on a tiny model instead")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        do_prompts(options.child, options.prompts)
        return
    with tempfile.TemporaryDirectory() as folder:
        (prompts if options.prompts else records)(options, Path(folder))


if __name__ == "__main__":
    main()
