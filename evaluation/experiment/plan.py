"""What a command is going to do, checked before a model is loaded: an ordered list of jobs."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dts.errors import UsageError
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.records import Description, Job
from dts.evaluation.run_folder import to_json, versions
from dts.evaluation.tasks.base import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked experiment: nothing in it needs a model yet."""

    config: ExperimentConfig
    tasks: Mapping[str, Task]  # by the task's own name, in the order asked for
    models: Mapping[str, Any]  # ModelSpec by its name, in the order asked for
    methods: Mapping[str, Any]  # by the method's own name, in the order asked for
    prompt_tokens: Mapping[str, Mapping[str, Sequence[int] | None]]  # model, data set -> per example; None: not known

    def jobs(self) -> list[Job]:
        """All jobs in the order in which one process does them."""
        return [
            Job(model, name, seed, sample, method)
            for model in self.models
            for name, task in self.tasks.items()
            for seed in self.config.seeds
            for sample in range(len(task.examples))
            for method in self.methods
        ]

    @property
    def colors(self) -> dict[str, str]:
        return {name: spec.color for name, spec in self.models.items()}


def prepare(config: ExperimentConfig, backend: Backend) -> Plan:
    """Check the whole command. Raises `UsageError` or `UnavailableError`."""
    from dts.search import aimed  # slow to import

    known = [known_method(name, backend.methods) for name in config.methods]
    built = [
        aimed(backend.methods[name](config.num_rollouts, config.reward_scale), config.power, config.order)
        for name in known
    ]
    specs = [backend.resolve(name, config.models_file) for name in config.models]
    loaded = [_load_task(name, config, backend) for name in config.datasets]
    _require_distinct("--models", config.models, [spec.name for spec in specs])
    _require_distinct("--datasets", config.datasets, [task.name for task in loaded])
    tasks = {task.name: task for task in loaded}
    prompt_tokens = {}
    for spec in specs:
        counts = backend.check_model(spec, [example for task in loaded for example in task.examples], config)
        prompt_tokens[spec.name] = _by_task(counts, tasks)
    models, methods = {spec.name: spec for spec in specs}, {method.name: method for method in built}
    return Plan(config, tasks, models, methods, prompt_tokens)


def _load_task(name: str, config: ExperimentConfig, backend: Backend) -> Task:
    task = backend.load_task(name, data_dir=config.data_dir, num_samples=config.num_samples, seed=config.data_seed)
    if config.max_tokens < task.max_tokens:
        logger.warning("--max-tokens %d may cut answers short: %s asks for %d",
                       config.max_tokens, task.name, task.max_tokens)  # fmt: skip
    return task


def _require_distinct(option: str, asked: Sequence[str], names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UsageError(f"{option} {' '.join(asked)} names one of them twice; give each once")


def _by_task(counts: Sequence[int] | None, tasks: Mapping[str, Task]) -> dict[str, Sequence[int] | None]:
    split: dict[str, Sequence[int] | None] = {}
    start = 0
    for name, task in tasks.items():
        end = start + len(task.examples)
        split[name] = None if counts is None else counts[start:end]
        start = end
    return split


def known_method(name: str, known: Iterable[str]) -> str:
    """The method that `name` means, whatever its case and its hyphens or underscores."""
    plain, names = name.lower().replace("_", "-"), list(known)
    if plain not in names:
        near = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown method {name!r}: {hint}choose from {', '.join(names)}")
    return plain


def describe(plan: Plan) -> Description:
    """The content of config.json."""
    return {
        "config": plan.config.as_dict(),
        "models": [{"name": s.name, "source": s.source, "color": s.color} for s in plan.models.values()],
        "methods": list(plan.methods),
        "datasets": [
            {"name": name, "examples": [e.id for e in task.examples], "prompts": _fingerprint(task)}
            for name, task in plan.tasks.items()
        ],
        "versions": versions(),
    }


def _fingerprint(task: Task) -> str:
    """Changes where the data of the same ids has changed."""
    return hashlib.sha256(to_json([example.prompt for example in task.examples]).encode()).hexdigest()
