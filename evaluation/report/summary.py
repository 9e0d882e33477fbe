"""Aggregates of a run and its table, computed from the records in the run folder."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from dts.evaluation.measures import statistics
from dts.evaluation.records import Cell, RunSummary, SampleRecord, Verdict
from dts.evaluation.report.verdict import figures, headline, remarks
from dts.evaluation.tasks.base import Task
from dts.evaluation.tasks.oracle import WARNING, marked, sees_reference

# Per sample in samples.jsonl -> mean over samples in the summary; None where records of an earlier version lack it.
_MEANS = {
    "avg_best_reward": "best_reward",
    "avg_monotonicity": "monotonicity",
    "avg_time_per_sample": "time",
    "independent_monotonicity": "independent_monotonicity",
    "forwarded_tokens": "forwarded_tokens",
    "unique_tokens": "unique_tokens",
    "generated_tokens": "generated_tokens",
    "reward_calls": "reward_calls",
    "reward_tokens": "reward_tokens",
    "reward_seconds": "reward_seconds",
    "nodes": "nodes",
    "tokens_reused": "tokens_reused",
    "branch_depth": "branch_depth",
    "logprob_per_token": "logprob_per_token",
}


def summarise(
    samples: Sequence[SampleRecord], tasks: Mapping[str, Task], colors: Mapping[str, str], *, by_seed: bool = False
) -> list[Cell]:
    """Aggregates per model, data set and method, in the order of `samples`; or per seed too, without intervals."""
    cells: dict[tuple[str, str, str, int | None], list[SampleRecord]] = {}
    for s in samples:
        cells.setdefault((s["model"], s["dataset"], s["method"], s["seed"] if by_seed else None), []).append(s)
    found = []
    for (model, dataset, method, _), own in cells.items():
        seeds = sorted({s["seed"] for s in own})
        cell: Cell = {"model": model, "dataset": dataset, "method": method, "color": colors[model], "seeds": seeds}
        if any(map(sees_reference, own)):
            cell["oracle"] = True
        cell |= _aggregate(own, tasks[dataset])
        if not by_seed:
            cell["best_reward_interval"] = _reward_interval(own, tasks[dataset])
        found.append(cell)
    return found


def _aggregate(samples: Sequence[SampleRecord], task: Task) -> Cell:
    rows = cast("Sequence[Mapping[str, Any]]", samples)
    known = {key: name for key, name in _MEANS.items() if all(name in row for row in rows)}
    means = {key: mean(row[known[key]] for row in rows) if key in known else None for key in _MEANS}
    return {
        "samples": len(samples),
        **cast("Cell", means),
        "total_time": sum(s["time"] for s in samples),
        "metrics": _metrics(samples, task),
    }


def _reward_interval(samples: Sequence[SampleRecord], task: Task) -> list[float] | None:
    return interval([s["best_reward"] for s in samples], [task.clusters[s["id"]] for s in samples])


def _metrics(samples: Sequence[SampleRecord], task: Task) -> dict[str, float]:
    """The task's metrics of each seed, mean over seeds."""
    texts: dict[int, dict[str, str]] = {}
    for s in samples:
        texts.setdefault(s["seed"], {})[s["id"]] = s["text"]
    scores = [task.score(own) for own in texts.values()]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def interval(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float] | None:
    """95 % bootstrap interval of the mean, drawing whole clusters; None below two of them."""
    if len(set(clusters)) < 2:
        return None
    found = statistics.bootstrap(statistics.mean, values, clusters=clusters)
    return [found.low, found.high]


NOT_RECORDED = "A figure is missing where an earlier version made the records: it did not count it."


def of_earlier_version(cell: Cell) -> bool:
    """Whether figures are missing because some of its records were made before they were counted."""
    return any(cell.get(name) is None for name in ("tokens_reused", "branch_depth", "logprob_per_token"))


def _target(config: Mapping[str, Any]) -> str:
    """What else the target and the order of completions were, where they were not the usual ones."""
    power, order = config.get("power", 1.0), config.get("order", "reward")
    parts = [f"power {power:g} of p"] if power != 1 else []
    parts += [f"completions by {order}"] if order != "reward" else []
    parts += ["only completions that EOS or a stop string ended"] if config.get("require_eos") else []
    return "".join(f", {part}" for part in parts)


def report(summary: RunSummary) -> str:
    """The run as Markdown that also reads well in a terminal."""
    state = " (partial: the run was interrupted)" if summary["partial"] else ""
    runs, config = summary["runs"], summary["config"]
    data = ", ".join(f"{data['name']} ({len(data['examples'])} samples)" for data in summary["datasets"])
    lines = [
        f"# {summary['experiment']}{state}",
        "",
        f"{data}, {config['num_rollouts']} rollouts, at most {config['max_tokens']} new tokens, reward "
        f"{', '.join(summary['rewards']) or '-'}, lambda {config['reward_scale']:g}{_target(config)}, "
        f"{_seeds(config['seeds'])}, {summary['seconds']:.1f} s in all.",
        "",
        *([f"**Oracle reward: {', '.join(summary['oracles'])}.** {WARNING}", ""] if summary.get("oracles") else []),
        *(line for verdict in summary.get("verdicts", []) for line in (*_said(verdict), "")),
        table(runs),
        "",
        "Best reward: mean over samples, 95 % bootstrap interval. Tokens: forwarded through the model per sample.",
        "Reward calls: texts that the reward scored per sample; reward s: its part of the seconds. Log p/token: of the",
        "best completion under the model, in nats; a text that only pleases the reward is an unlikely one.",
        "Monotonicity: share of rollouts whose reward is not below the one before; in brackets what the same rewards",
        "give in random order. Tokens reused: share of the rollouts' tokens that another rollout has, too. Branch",
        "depth: share of its text after which a rollout leaves the tree of earlier ones (median; mean over samples).",
    ]
    if any(map(of_earlier_version, runs)):
        lines.append(NOT_RECORDED)
    for dataset, baselines in summary["baselines"].items():
        metrics = metric_table([run for run in runs if run["dataset"] == dataset], baselines)
        if metrics:
            lines += ["", f"Task metrics ({dataset}), with methods that use no language model:", "", metrics]
    known = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return "\n".join([*lines, "", f"Versions: {known}.", ""])


def _said(verdict: Verdict) -> list[str]:
    return [f"**{headline(verdict)}**: {figures(verdict)}", *remarks(verdict)]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {' '.join(map(str, seeds))} (samples and means over all)"


def table(runs: Sequence[Cell]) -> str:
    """One row per model, data set and method."""
    header = ["model", "data", "method", "samples", "best reward", "tokens", "s/sample", "reward calls", "reward s",
              "log p/token", "monotonicity", "tokens reused", "branch depth"]  # fmt: skip
    rows = [
        [
            run["model"],
            run["dataset"],
            marked(run["method"], sees_reference(run)),
            str(run["samples"]),
            number(run["avg_best_reward"]) + _bracket(run["best_reward_interval"]),
            number(run["forwarded_tokens"], 0),
            number(run["avg_time_per_sample"], 2),
            number(run.get("reward_calls"), 0),
            number(run.get("reward_seconds"), 2),
            number(run.get("logprob_per_token"), 2),
            f"{number(run['avg_monotonicity'], 2)} ({number(run['independent_monotonicity'], 2)})"
            if run["avg_monotonicity"] is not None
            else "-",
            percent(run.get("tokens_reused")),
            percent(run.get("branch_depth")),
        ]
        for run in runs
    ]
    return markdown(header, rows)


def metric_table(runs: Sequence[Cell], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Task metrics of every run, and of the baselines on the same examples; empty where there are none."""
    scored: list[tuple[list[str], Mapping[str, float]]]
    scored = [([run["model"], marked(run["method"], sees_reference(run))], run["metrics"]) for run in runs]
    scored += [(["-", name], metrics) for name, metrics in baselines.items()]
    names = list(dict.fromkeys(name for _, metrics in scored for name in metrics))
    if not names:
        return ""
    rows = [[*label, *(number(metrics.get(name)) for name in names)] for label, metrics in scored]
    return markdown(["model", "method", *names], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def number(value: Any, digits: int = 3) -> str:
    """A figure for a table, `-` where there is none."""
    return "-" if value is None or not np.isfinite(value) else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share for a table, `-` where there is none."""
    return "-" if value is None else f"{100 * value:.0f} %"


def _bracket(bounds: Sequence[float] | None) -> str:
    return f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
