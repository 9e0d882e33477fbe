"""Aggregates of a run and its table, computed from the records in the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dts.evaluation import statistics
from dts.evaluation.results import Record
from dts.evaluation.tasks.base import Task

# Per sample in samples.jsonl -> mean over samples in the summary.
_MEANS = {
    "final/avg_best_reward": "best_reward",
    "final/avg_monotonicity": "monotonicity",
    "final/avg_time_per_sample": "time",
    "independent_monotonicity": "independent_monotonicity",
    "forwarded_tokens": "forwarded_tokens",
    "unique_tokens": "unique_tokens",
    "generated_tokens": "generated_tokens",
    "nodes": "nodes",
    "below_root": "below_root",
}


def summarise(
    samples: Sequence[Record],
    rollouts: Sequence[Record],
    task: Task,
    colors: Mapping[str, str],
    *,
    partial: bool,
    seconds: float,
) -> Record:
    """Aggregates per model and method, task metrics next to their baselines.

    A sample counts once it is finished; rollouts of an unfinished one are on disk and only counted here.
    """
    cells = dict.fromkeys((record["model"], record["method"]) for record in samples)
    finished = {(s["model"], s["method"], s["sample"]) for s in samples}
    unfinished = [r for r in rollouts if (r["model"], r["method"], r["sample"]) not in finished]
    runs = []
    for model, method in cells:
        own = [s for s in samples if (s["model"], s["method"]) == (model, method)]
        runs.append({"model": model, "method": method, "color": colors[model], **_aggregate(own, task)})
    return {
        "partial": partial,
        "seconds": seconds,
        "rollouts": len(rollouts),
        "rollouts_of_unfinished_samples": len(unfinished),
        "rewards": sorted({s["reward"] for s in samples}),
        "runs": runs,
        "baselines": task.baselines(),
    }


def _aggregate(samples: Sequence[Record], task: Task) -> Record:
    means = {key: mean(s[name] for s in samples) for key, name in _MEANS.items()}
    return {
        "samples": len(samples),
        **means,
        "final/total_time": sum(s["time"] for s in samples),
        "best_reward_interval": interval([s["best_reward"] for s in samples]),
        "metrics": task.score({s["id"]: s["text"] for s in samples}),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def interval(values: Sequence[float]) -> list[float] | None:
    """95 % bootstrap interval of the mean; None below two values."""
    if len(values) < 2:
        return None
    found = statistics.bootstrap(statistics.mean, values)
    return [found.low, found.high]


def report(summary: Record) -> str:
    """The run as Markdown that also reads well in a terminal."""
    state = " (partial: the run was interrupted)" if summary["partial"] else ""
    runs, config = summary["runs"], summary["config"]
    lines = [
        f"# {summary['experiment']}{state}",
        "",
        f"{summary['task']}, {len(summary['examples'])} samples, {config['num_rollouts']} rollouts, at most "
        f"{config['max_tokens']} new tokens, reward {', '.join(summary['rewards']) or '-'}, "
        f"lambda {config['reward_scale']:g}, seed {config['seed']}, {summary['seconds']:.1f} s in all.",
        "",
        table(runs),
        "",
        "Best reward: mean over samples, 95 % bootstrap interval. Tokens: forwarded through the model per sample.",
        "Monotonicity: share of rollouts whose reward is not below the one before; in brackets what the same rewards",
        "give in random order. Below root: share of rollouts that continue a path of an earlier one.",
    ]
    metrics = metric_table(runs, summary["baselines"])
    if metrics:
        lines += ["", f"Task metrics ({summary['task']}), with methods that use no language model:", "", metrics]
    known = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return "\n".join([*lines, "", f"Versions: {known}.", ""])


def table(runs: Sequence[Record]) -> str:
    """One row per model and method."""
    header = ["model", "method", "samples", "best reward", "tokens", "s/sample", "monotonicity", "below root"]
    rows = [
        [
            run["model"],
            run["method"],
            str(run["samples"]),
            number(run["final/avg_best_reward"]) + _bracket(run["best_reward_interval"]),
            number(run["forwarded_tokens"], 0),
            number(run["final/avg_time_per_sample"], 2),
            f"{number(run['final/avg_monotonicity'], 2)} ({number(run['independent_monotonicity'], 2)})"
            if run["final/avg_monotonicity"] is not None
            else "-",
            "-" if run["below_root"] is None else f"{run['below_root']:.0%}",
        ]
        for run in runs
    ]
    return markdown(header, rows)


def metric_table(runs: Sequence[Record], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Task metrics of every run, and of the baselines on the same examples; empty where there are none."""
    scored = [([run["model"], run["method"]], run["metrics"]) for run in runs]
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


def _bracket(bounds: Sequence[float] | None) -> str:
    return f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
