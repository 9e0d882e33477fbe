"""Charts of a run, drawn from its records: model is colour, method is line style and marker."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dts.evaluation.records import RolloutRecord, SampleRecord
from dts.evaluation.tasks.oracle import marked, sees_reference

_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1)), "v"))  # line, marker by method
_LONE_MARKER: dict[str, Any] = {"markersize": 10, "markerfacecolor": "white", "markeredgewidth": 2, "zorder": 4}
_INK = "#333333"
MOST_ROWS = 200  # of a heat map: more than that are fewer pixels than rows
Rollouts = Sequence[RolloutRecord] | pd.DataFrame  # one row for each


def write_charts(
    samples: Sequence[SampleRecord], rollouts: Rollouts, colors: Mapping[str, str], folder: Path
) -> dict[str, Path]:
    """All charts as PNG files in `folder`, by name: `NAME.png`, or `NAME_DATASET.png` each where there are several
    datasets. Nothing is drawn before a sample is finished."""
    paths: dict[str, Path] = {}
    every = pd.DataFrame(rollouts)
    datasets = list(dict.fromkeys(record.get("dataset") for record in samples))
    for dataset in datasets:
        suffix = f"_{dataset}" if len(datasets) > 1 else ""
        own = [sample for sample in samples if sample.get("dataset") == dataset]
        for name, figure in figures(own, of_dataset(every, dataset), colors).items():
            paths[name + suffix] = folder / f"{name}{suffix}.png"
            figure.savefig(paths[name + suffix], dpi=150, bbox_inches="tight", facecolor="white")
    return paths


def of_dataset(rollouts: pd.DataFrame, dataset: str | None) -> pd.DataFrame:
    """Those of one dataset, without a copy where there is no other."""
    own = rollouts["dataset"] == dataset if "dataset" in rollouts else None
    return rollouts if own is None or own.all() else rollouts[own]


def together(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of several runs."""
    return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def figures(samples: Sequence[SampleRecord], rollouts: Rollouts, colors: Mapping[str, str]) -> dict[str, Figure]:
    """The charts of one dataset, whose rewards are comparable."""
    s, r = pd.DataFrame(samples), pd.DataFrame(rollouts).copy(deep=False)
    known = {(one["model"], one["method"]) for one in samples if sees_reference(one)}
    for frame in (s, r) if known else ():
        frame["oracle"] = [key in known for key in zip(frame["model"], frame["method"], strict=True)]
        frame["method"] = [marked(*row) for row in zip(frame["method"], frame["oracle"], strict=True)]
    return {
        "reward_over_rollouts": reward_over_rollouts(r, colors),
        "monotonicity": monotonicity_bars(s, colors),
        "speed_quality": speed_quality(s, colors),
        "rollout_heatmap": rollout_heatmap(r),
        "reward_vs_tokens": reward_vs_tokens(r, colors),
    }


def reward_over_rollouts(rollouts: pd.DataFrame, colors: Mapping[str, str]) -> Figure:
    """Mean over samples after each rollout: best so far, and the reward of that rollout."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = _styles(rollouts)
    for (model, method), own in _groups(rollouts):
        style = {**styles[method], "color": colors[model]}
        if own["rollout_idx"].max() == 0:  # a single path is a level, not a curve
            level = own["best_so_far"].mean()
            left.axhline(level, color=style["color"], linestyle=style["linestyle"], linewidth=2)
            right.axhline(level, color=style["color"], linestyle=style["linestyle"], linewidth=2)
            continue
        best = _by_rollout(own, "best_so_far").ffill().mean(axis=1)
        raw = _by_rollout(own, "rollout_reward").mean(axis=1)
        left.plot(best.index + 1, best, linewidth=2, **style)
        right.plot(raw.index + 1, raw, linewidth=1.6, **style)
    finish(left, _title("Best reward so far", rollouts), "rollout", "reward (mean over samples)")
    finish(right, _title("Reward of each rollout", rollouts), "rollout", "")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, rollouts, colors)
    return figure


def monotonicity_bars(samples: pd.DataFrame, colors: Mapping[str, str]) -> Figure:
    """Share of rollouts not below the one before, with what the same rewards give in random order."""
    groups = [(key, own) for key, own in _groups(samples) if own["monotonicity"].notna().any()]
    figure = Figure(figsize=(4.4 + 0.9 * max(len(groups), 2), 4.2), layout="constrained")
    axes = figure.subplots()
    for x, ((model, _), own) in enumerate(groups):
        value, reference = own["monotonicity"].mean(), own["independent_monotonicity"].mean()
        axes.bar(x, value, width=0.62, color=colors[model])
        axes.text(x, max(value, reference) + 0.02, f"{value:.0%}", ha="center", va="bottom", color=_INK)
        axes.hlines(reference, x - 0.4, x + 0.4, color=_INK, linewidth=2, linestyle=(0, (3, 1)))
    axes.set_xticks(range(len(groups)), [method for (_, method), _ in groups])
    axes.set_xlim(-0.6, max(len(groups), 1) - 0.4)
    axes.set_ylim(0, 1.12)
    finish(axes, _title("Monotonicity", samples), "", "share of rollouts not worse than the one before")
    reference_line = Line2D([], [], color=_INK, linewidth=2, linestyle=(0, (3, 1)), label="same rewards, random order")
    handles = [*_model_handles(samples, colors), reference_line]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def speed_quality(samples: pd.DataFrame, colors: Mapping[str, str]) -> Figure:
    """Mean best reward against seconds per sample; bars reach one standard error."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = _styles(samples)
    for (model, method), own in _groups(samples):
        seconds, reward = own["time"], own["best_reward"]
        error: dict[str, Any] = {"xerr": seconds.sem(), "yerr": reward.sem()} if len(own) > 1 else {}
        axes.errorbar(seconds.mean(), reward.mean(), **error, color=colors[model], marker=styles[method]["marker"],
                      markersize=9, capsize=3, elinewidth=1.2, linestyle="none")  # fmt: skip
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    finish(axes, _title("Speed against quality", samples), "seconds per sample", "best reward (mean over samples)")
    _legend(figure, samples, colors, lines=False)
    return figure


def rollout_heatmap(rollouts: pd.DataFrame) -> Figure:
    """Reward of every rollout, at most `MOST_ROWS` samples: a panel per model and method with several rollouts."""
    groups = list(_groups(rollouts))
    groups = [(key, own) for key, own in groups if own["rollout_idx"].max() > 0] or groups
    methods = len({method for (_, method), _ in groups})
    columns = methods if len(groups) % methods == 0 else min(len(groups), 3)  # a row per model where that is even
    rows = -(-len(groups) // columns)
    samples = max(_by_rollout(own, "rollout_reward").shape[1] for _, own in groups)
    height = 1.2 + 0.28 * min(max(samples, 4), 20)
    figure = Figure(figsize=(1.4 + 3.4 * columns, 0.4 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    low, high = rollouts["rollout_reward"].min(), rollouts["rollout_reward"].max()
    for axes, ((model, method), own) in zip(grid, groups, strict=False):
        values = _spread(_by_rollout(own, "rollout_reward").T)  # [samples, rollouts]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(f"{model}\n{method}", fontsize=10, color=_INK)
        axes.set_xticks(*_ticks([int(c) + 1 for c in values.columns]))
        axes.set_yticks(*_ticks([int(i) for i in values.index.get_level_values("sample")]))
        axes.set_xlabel("rollout")
        axes.set_ylabel("sample")
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    some = f", {MOST_ROWS} of {samples:,} samples" if samples > MOST_ROWS else ""
    figure.suptitle(_title(f"Reward of every rollout{some}", rollouts), x=0.01, ha="left", fontsize=12, color=_INK)
    figure.colorbar(image, ax=grid[: len(groups)], label="reward", fraction=0.05)
    return figure


def _spread(rows: pd.DataFrame) -> pd.DataFrame:
    """At most `MOST_ROWS` rows, evenly spaced."""
    if len(rows) <= MOST_ROWS:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, MOST_ROWS).round().astype(int)]


def reward_vs_tokens(rollouts: pd.DataFrame, colors: Mapping[str, str]) -> Figure:
    """Best reward so far against the tokens forwarded for it, both means over samples after each rollout."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = _styles(rollouts)
    for (model, method), own in _groups(rollouts):
        tokens = _by_rollout(own, "tokens").ffill().mean(axis=1)
        best = _by_rollout(own, "best_so_far").ffill().mean(axis=1)
        marker = _LONE_MARKER if len(best) == 1 else {"markersize": 6}
        axes.plot(tokens, best, color=colors[model], linewidth=2, **marker, **styles[method])
    axes.margins(y=0.12)
    finish(axes, _title("Reward for the tokens spent", rollouts), "tokens forwarded through the model, per sample",
            "best reward so far (mean over samples)")  # fmt: skip
    _legend(figure, rollouts, colors)
    return figure


def _groups(frame: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    grouped = frame.groupby(["model", "method"], sort=False, observed=True)
    return [((str(key[0]), str(key[1])), own) for key, own in grouped]


def _by_rollout(own: pd.DataFrame, column: str) -> pd.DataFrame:
    """[rollouts, samples]; empty where a sample has fewer rollouts. A sample under another seed is another sample."""
    names = [name for name in ("seed", "sample") if name in own]
    unit = own.groupby(names, sort=True).ngroup().to_numpy()
    units = own[names].drop_duplicates().sort_values(names)
    last = int(own["rollout_idx"].max())
    table = np.full((last + 1, len(units)), np.nan)
    table[own["rollout_idx"], unit] = own[column]
    return pd.DataFrame(table, columns=pd.MultiIndex.from_frame(units))


def _styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    methods = frame["method"].unique()
    styles = itertools.cycle({"linestyle": line, "marker": marker} for line, marker in _STYLES)
    return dict(zip(methods, styles, strict=False))


def _ticks(labels: Sequence[int], most: int = 10) -> tuple[list[int], list[int]]:
    """At most about `most` tick positions with their labels."""
    step = max(1, int(np.ceil(len(labels) / most)))
    return list(range(0, len(labels), step)), list(labels[::step])


def _title(text: str, frame: pd.DataFrame) -> str:
    return marked(text, "oracle" in frame and bool(frame["oracle"].any()))


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and the grid that all charts have."""
    axes.set_title(title, loc="left", fontsize=12, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _model_handles(frame: pd.DataFrame, colors: Mapping[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=colors[m], linewidth=6, label=m) for m in frame["model"].unique()]


def _legend(figure: Figure, frame: pd.DataFrame, colors: Mapping[str, str], *, lines: bool = True) -> None:
    """Outside the axes: colours name the models, styles the methods."""
    handles = _model_handles(frame, colors)
    for method, style in _styles(frame).items():
        shown = style if lines else {**style, "linestyle": "none"}
        handles.append(Line2D([], [], color=_INK, linewidth=1.6, label=method, **shown))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
