"""Task metrics of finished runs, with intervals and paired differences: `python -m dts.evaluation.scores DIR ...`.

Of every search, up to three answers are scored:

    best        the completion that the method ranks first
    weighted    all finished paths together, weighted as a sample of pi* = p exp(lambda reward) / Z: the median of each
                step of a forecast, the label with the most weight (`Task.combine`). The weights are the tree's
                (`Result.shares`) where the method has one, and exp(lambda reward) for independent draws from p
    unweighted  the same with equal weights

`--after K ...` adds the best of the first K rollouts, with the tokens and seconds up to then: what a search that is
stopped there has found.

Intervals are 95 % percentile bootstrap intervals over the task's clusters (series, subjects, prompts), the metric
pooled again from every resample; all lines share the resamples. Several seeds are averaged before that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dts.errors import DTSError, UsageError
from dts.evaluation.measures import statistics
from dts.evaluation.records import Job, RolloutRecord, RunSummary, SampleRecord
from dts.evaluation.report.runs import complete_records, load_runs
from dts.evaluation.report.summary import markdown, number
from dts.evaluation.tasks import load_task
from dts.evaluation.tasks.base import Row, Task
from dts.evaluation.tasks.oracle import marked, sees_reference
from dts.evaluation.tasks.registry import read_task_file

Rows = Mapping[str, Row]  # by example id
Paths = Mapping[Job, list[RolloutRecord]]
Reader = Callable[[SampleRecord], str]  # the answer of a sample


@dataclass(frozen=True, slots=True)
class Answers:
    """One way to answer every example: a line of the table."""

    label: str
    seeds: Sequence[Rows]
    costs: Sequence[Mapping[str, tuple[float, float]]] = ()  # tokens forwarded and seconds; empty without a model
    oracle: bool = False

    @property
    def shown(self) -> str:
        """The label with the mark of an oracle."""
        return marked(self.label, self.oracle)

    def cost(self, ids: Sequence[str]) -> tuple[float | None, float | None]:
        """Mean tokens forwarded and seconds per example."""
        if not self.costs:
            return None, None
        tokens, seconds = np.mean([one[i] for one in self.costs for i in ids], axis=0)
        return float(tokens), float(seconds)

    def metric(self, task: Task, name: str, ids: Sequence[str]) -> float:
        """Mean over seeds of a metric over these examples, repeated ones counted as often as they occur."""
        return float(np.mean([task.pool([rows[i] for i in ids])[name] for rows in self.seeds]))


def tables(
    folders: Sequence[Path], against: Sequence[str] = (), resamples: int = 1000, after: Sequence[int] = ()
) -> dict[str, str]:
    """A Markdown table for every data set, or group within it, of these run folders."""
    runs = load_runs(folders)
    found: dict[str, str] = {}
    for name in dict.fromkeys(run["dataset"] for one in runs for run in one.summary["runs"]):
        parts = [one for one in runs if any(run["dataset"] == name for run in one.summary["runs"])]
        task = _task(parts[0].summary, name)
        answers = [
            answer
            for one in parts
            for answer in _answers(task, name, *complete_records(one), one.summary["config"]["reward_scale"], after)
        ]
        baselines = [Answers(label, [rows]) for label, rows in task.baseline_rows().items()]
        for group, ids in _groups(task, answers).items():
            title = name if group is None else f"{name}, {group}"
            found[f"{title} ({len(ids)} examples)"] = _table(task, [*answers, *baselines], ids, against, resamples)
    return found


def _task(summary: RunSummary, name: str) -> Task:
    """The task as it was in the run."""
    config = summary["config"]
    asked = next(one for one in config["datasets"] if read_task_file(one).name == name)
    return load_task(asked, data_dir=config["data_dir"], num_samples=config["num_samples"], seed=config["data_seed"])


def _answers(
    task: Task,
    dataset: str,
    samples: Sequence[SampleRecord],
    rollouts: Sequence[RolloutRecord],
    reward_scale: float,
    after: Sequence[int] = (),
) -> list[Answers]:
    cells: dict[tuple[str, str], dict[int, list[SampleRecord]]] = {}
    for sample in samples:
        if sample["dataset"] == dataset:
            cells.setdefault((sample["model"], sample["method"]), {}).setdefault(sample["seed"], []).append(sample)
    paths: dict[Job, list[RolloutRecord]] = {}
    for rollout in rollouts:
        paths.setdefault(Job.of(rollout), []).append(rollout)
    for path in paths.values():
        path.sort(key=lambda rollout: int(rollout["rollout_idx"]))
    found = []
    for (model, method), seeds in cells.items():
        own = [sample for samples_of_seed in seeds.values() for sample in samples_of_seed]
        costs = [{s["id"]: (s["forwarded_tokens"], s["time"]) for s in of_seed} for of_seed in seeds.values()]
        for kind, text in _kinds(task, paths, reward_scale, own).items():
            rows = [task.details({s["id"]: text(s) for s in of_seed}) for of_seed in seeds.values()]
            found.append(Answers(f"{model} {method} {kind}", rows, costs, any(map(sees_reference, own))))
        for count in after:
            if all(sample["rollouts"] > count for sample in own):
                found.append(_stopped(task, paths, list(seeds.values()), count, f"{model} {method} after {count}"))
    return found


def _stopped(
    task: Task,
    paths: Paths,
    seeds: Sequence[Sequence[SampleRecord]],
    count: int,
    label: str,
) -> Answers:
    """The best of the first `count` rollouts."""
    first = {Job.of(sample): paths[Job.of(sample)][:count] for of_seed in seeds for sample in of_seed}
    best = {job: max(rollouts, key=lambda rollout: rollout["rollout_reward"]) for job, rollouts in first.items()}
    rows = [task.details({s["id"]: str(best[Job.of(s)]["text"]) for s in of_seed}) for of_seed in seeds]
    last = {job: (rollouts[-1]["tokens"], rollouts[-1]["time"]) for job, rollouts in first.items()}
    costs = [{s["id"]: last[Job.of(s)] for s in of_seed} for of_seed in seeds]
    return Answers(label, rows, costs, any(sees_reference(s) for of_seed in seeds for s in of_seed))


def _kinds(task: Task, paths: Paths, reward_scale: float, samples: Sequence[SampleRecord]) -> dict[str, Reader]:
    """How a sample's answer is read off, by kind; only `best` where there is one path or no way to combine."""
    examples = {example.id: example for example in task.examples}

    def combined(
        weights: Callable[[SampleRecord, Sequence[RolloutRecord]], Sequence[float]],
    ) -> Reader:
        def text(sample: SampleRecord) -> str:
            own = paths[Job.of(sample)]
            texts = [rollout["text"] for rollout in own]
            return task.combine(examples[sample["id"]], texts, weights(sample, own)) or ""

        return text

    def as_target(sample: SampleRecord, own: Sequence[RolloutRecord]) -> Sequence[float]:
        shares = sample["shares"]
        if shares is not None:
            return shares
        rewards = np.array([rollout["rollout_reward"] for rollout in own], float)
        return list(np.exp(reward_scale * (rewards - rewards.max())))

    kinds: dict[str, Reader] = {"best": lambda sample: str(sample["text"])}
    first = samples[0]
    if all(sample["rollouts"] > 1 for sample in samples) and task.combine(examples[first["id"]], [], []) is not None:
        kinds |= {"weighted": combined(as_target), "unweighted": combined(lambda _, own: [1.0] * len(own))}
    return kinds


def _groups(task: Task, answers: Sequence[Answers]) -> dict[Hashable, list[str]]:
    """Ids that every seed of every line has, by group (None for all); one entry where the task has no groups."""
    shared = set.intersection(*(set(rows) for answer in answers for rows in answer.seeds))
    ids = [example.id for example in task.examples if example.id in shared]
    if not ids:
        raise UsageError("no example is finished in all of these runs; give runs over the same examples")
    groups: dict[Hashable, list[str]] = {None: ids}
    names = getattr(task, "groups", {})
    for name in ids if len(set(names.values())) > 1 else ():
        groups.setdefault(names[name], []).append(name)
    return groups


def _table(task: Task, answers: Sequence[Answers], ids: Sequence[str], against: Sequence[str], resamples: int) -> str:
    head, *others = task.metrics
    references = [_named(answers, label) for label in against]
    clusters = [task.clusters[name] for name in ids]
    # One set of resamples for all lines: each is pooled once, and differences are paired.
    drawn = [np.array(ids)[rows].tolist() for rows in statistics.resamples(len(ids), clusters, count=resamples)]
    values = {one.label: np.array([one.metric(task, head, chosen) for chosen in drawn]) for one in answers}
    exact = {one.label: one.metric(task, head, ids) for one in answers}

    def cell(value: float, resampled: np.ndarray) -> str:
        if len(set(clusters)) < 2:
            return number(value)
        low, high = statistics.percentiles(resampled)
        return f"{number(value)} [{number(low)}, {number(high)}]"

    def minus(one: str, other: str) -> str:
        return "-" if one == other else cell(exact[one] - exact[other], values[one] - values[other])

    lines = [
        [
            one.shown,
            cell(exact[one.label], values[one.label]),
            *(number(one.metric(task, name, ids)) for name in others),
            *(minus(one.label, other.label) for other in references),
            *(number(mean, digits) for mean, digits in zip(one.cost(ids), (0, 1), strict=True)),
        ]
        for one in answers
    ]
    minuses = [f"{head} - that of {other.shown}" for other in references]
    return markdown(["answers", f"{head} ({task.metrics[head]})", *others, *minuses, "tokens", "s"], lines)


def _named(answers: Sequence[Answers], label: str) -> Answers:
    found = [answer for answer in answers if answer.label.endswith(label)]
    if len(found) != 1:
        known = ", ".join(answer.label for answer in answers)
        raise UsageError(f"--against {label!r} names {len(found)} lines; give the end of one of: {known}")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m dts.evaluation.scores", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="run folder")
    parser.add_argument("--against", metavar="LINE", nargs="+", default=[],
                        help="end of the name of a line: adds the difference to it, paired by example")  # fmt: skip
    parser.add_argument("--after", metavar="K", nargs="+", type=int, default=[],
                        help="adds the best of the first K rollouts")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.resamples < 100:
            raise UsageError(f"--resamples {options.resamples} is too few for an interval; give 100 or more")
        if any(count < 1 for count in options.after):
            raise UsageError(f"--after {' '.join(map(str, options.after))}: give numbers of rollouts, 1 or more")
        for title, table in tables(options.folders, options.against, options.resamples, options.after).items():
            print(f"{title}:\n\n{table}\n")
    except DTSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
