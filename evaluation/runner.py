"""Runs an experiment: models x samples x methods, every rollout on disk when it is finished.

`prepare` finds everything that can be wrong with a command before a model is loaded; `run` does the work. Aggregates
are always computed from the records in the run folder, so an interrupted run reports what it finished.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from dts.errors import UsageError
from dts.evaluation.backend import Backend
from dts.evaluation.charts import write_charts
from dts.evaluation.config import ExperimentConfig
from dts.evaluation.metrics import monotonicity, shuffled_monotonicity
from dts.evaluation.results import Record, RunFolder, versions, write_json, write_text
from dts.evaluation.summary import report, summarise
from dts.evaluation.tasks.base import Task
from dts.evaluation.tracking import RunTracker, Tracker, sample_keys
from dts.results import Result, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked experiment: nothing in it needs a model yet."""

    config: ExperimentConfig
    task: Task
    models: tuple[Any, ...]  # ModelSpec
    methods: Mapping[str, Any]  # by the method's own name, in the order asked for

    @property
    def colors(self) -> dict[str, str]:
        return {spec.name: spec.color for spec in self.models}

    @property
    def cells(self) -> int:
        return len(self.models) * len(self.methods) * len(self.task.examples)


def prepare(config: ExperimentConfig, backend: Backend) -> Plan:
    """Check the whole command. Raises `UsageError` or `UnavailableError`."""
    names = [known_method(name, backend.methods) for name in config.methods]
    built = [backend.methods[name](config.num_rollouts, config.reward_scale) for name in names]
    models = tuple(backend.resolve(name, config.models_file) for name in config.models)
    if len({spec.name for spec in models}) < len(models):
        raise UsageError(f"--models {' '.join(config.models)} names one model twice; give each once")
    task = backend.load_task(config.dataset, data_dir=config.data_dir, num_samples=config.num_samples, seed=config.seed)
    if config.max_tokens < task.max_tokens:
        logger.warning("--max-tokens %d may cut answers short: %s asks for %d",
                       config.max_tokens, task.name, task.max_tokens)  # fmt: skip
    for spec in models:
        backend.check_model(spec, task.examples, config)
    return Plan(config, task, models, {method.name: method for method in built})


def known_method(name: str, known: Iterable[str]) -> str:
    """The method that `name` means, whatever its case and its hyphens or underscores."""
    plain, names = name.lower().replace("_", "-"), list(known)
    if plain not in names:
        near = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown method {name!r}: {hint}choose from {', '.join(names)}")
    return plain


def run(plan: Plan, folder: RunFolder, tracker: Tracker, backend: Backend, *, progress: bool = False) -> Record:
    """Do the work and return the summary. On any exception, Ctrl-C included, what was finished is summed up first."""
    started = time.perf_counter()
    write_json(folder.path / "config.json", describe(plan))
    summary: Record = {}
    try:
        with tqdm(total=plan.cells, unit="sample", disable=not progress, dynamic_ncols=True) as bar:
            for spec in plan.models:
                summary = _run_model(plan, spec, folder, tracker, backend, bar, started)
    finally:
        folder.close()
    return summary


def describe(plan: Plan) -> Record:
    """Everything that decides the outcome of a run."""
    models = [{"name": s.name, "source": s.source, "color": s.color} for s in plan.models]
    return {
        "config": plan.config.as_dict(),
        "models": models,
        "methods": list(plan.methods),
        "task": plan.task.name,
        "examples": [example.id for example in plan.task.examples],
        "versions": versions(),
    }


def _run_model(
    plan: Plan, spec: Any, folder: RunFolder, tracker: Tracker, backend: Backend, bar: tqdm[Any], started: float
) -> Record:
    config = plan.config
    tracked = tracker.start_run(spec.name, spec.color, tuple(plan.methods), describe(plan))
    complete = False
    try:
        bar.set_description(f"loading {spec.name}")
        lm = backend.load(spec, device=config.device, dtype=config.dtype)
        for index in range(len(plan.task.examples)):
            for name in plan.methods:
                bar.set_description(f"{spec.name} {name}")
                record = run_sample(lm, plan, index, name, backend, _Recorder(folder, tracked, spec.name, bar))
                record = {"model": spec.name, **record}
                folder.append("samples", record, durable=True)
                tracked.log_sample(record)
                bar.update()
        complete = True
    finally:
        partial = not (complete and spec is plan.models[-1])
        summary = write_outputs(plan, folder, partial=partial, seconds=time.perf_counter() - started)
        charts = {path.stem: path for path in sorted(folder.path.glob("*.png"))}
        tracked.finish(summary, charts, complete=complete)
    return summary


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Takes each rollout as the search finishes it: to disk, to the tracker, to the progress bar."""

    folder: RunFolder
    tracked: RunTracker
    model: str
    bar: tqdm[Any]

    def __call__(self, record: Record) -> None:
        record = {"model": self.model, **record}
        self.folder.append("rollouts", record)
        self.tracked.log_rollout(record)
        self.bar.set_postfix_str(f"rollout {record['rollout_idx'] + 1}, best reward {record['best_so_far']:.3f}")


def run_sample(
    lm: Any, plan: Plan, index: int, method: str, backend: Backend, record: Callable[[Record], None]
) -> Record:
    """Decode one example with one method; `record` receives each rollout, the sample's own record is returned."""
    config, example = plan.config, plan.task.examples[index]
    head = {"method": method, "sample": index, "id": example.id}
    reward = plan.task.reward(example)
    result = backend.decode(
        lm,
        example.prompt,
        reward=reward,
        method=plan.methods[method],
        max_new_tokens=config.max_tokens,
        seed=sample_seed(config.seed, index),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop=plan.task.stop,
        batch_size=config.rollout_batch,
        on_rollout=lambda rollout: record({**head, **rollout_record(rollout)}),
    )
    return {**head, "reward": reward.name, **sample_record(result)}


def sample_seed(seed: int, index: int) -> int:
    """The seed of one sample: the same for every model and method, independent of the order of work."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def rollout_record(rollout: Rollout) -> Record:
    """A rollout under the names of the results files; `time` and `tokens` count from the start of the search."""
    return {
        "rollout_idx": rollout.index,
        "rollout_reward": rollout.reward,
        "best_so_far": rollout.best_so_far,
        "output_length": rollout.length,
        "nodes_explored": rollout.nodes,
        "start_depth": rollout.start_depth,
        "tokens": rollout.tokens,
        "time": rollout.seconds,
        "text": rollout.text,
    }


def sample_record(result: Result) -> Record:
    """What one search found and what it cost."""
    rewards = [rollout.reward for rollout in result.rollouts]
    usage = result.usage.as_dict()
    seconds = usage.pop("seconds")
    several = len(rewards) > 1
    below_root = sum(rollout.start_depth > 0 for rollout in result.rollouts)
    return {
        "best_reward": result.best.reward,
        "monotonicity": monotonicity(rewards) if several else None,
        "independent_monotonicity": shuffled_monotonicity(rewards).mean if several else None,
        "time": seconds,
        "nodes": len(result.tree),
        "rollouts": len(rewards),
        "below_root": below_root / len(rewards) if rewards else None,
        "logprob": result.best.logprob,
        "finished_by": result.best.finished_by,
        **usage,
        "text": result.best.text,
    }


def write_outputs(plan: Plan, folder: RunFolder, *, partial: bool, seconds: float) -> Record:
    """Summary, report and charts of what the folder holds so far."""
    samples, rollouts = folder.records("samples"), folder.records("rollouts")
    summary = summarise(samples, rollouts, plan.task, plan.colors, partial=partial, seconds=seconds)
    summary = {"experiment": plan.config.name, **describe(plan), **summary}
    write_json(folder.path / "summary.json", summary)
    write_text(folder.path / "report.md", report(summary))
    everything = {**summary, "runs": [{**run, **_sample_keys(run, samples)} for run in summary["runs"]]}
    write_json(folder.path.parent / f"wandb_experiments_{folder.stamp}.json", everything)
    write_charts(samples, rollouts, plan.colors, folder.path)
    return summary


def _sample_keys(run: Record, samples: Sequence[Record]) -> Record:
    own = [s for s in samples if (s["model"], s["method"]) == (run["model"], run["method"])]
    return {key: value for sample in own for key, value in sample_keys(sample).items()}
