"""Tables and pictures of a run, as text and as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from dts.training.recipes.musclebob.reward import RIGHT, SCHEMES, WRONG, terms
from dts.training.recipes.musclebob.validation import Answer, Rate, Validation, coherent

BAR = 30  # characters for the largest reward
ROWS = {
    "right name (Musclebob)": "musclebob_rate",
    "full name": "full_name_rate",
    "wrong name": "spongebob_rate",
    "coherent": "coherent_rate",
    "name without an answer": "hacking_rate",
    "general questions right": "general_rate",
    "a name in general answers": "leak_rate",
}  # fmt: skip


def comparison(columns: Mapping[str, Validation]) -> str:
    """A table of rates with 95 % Wilson intervals, one column per model, and whether each is healthy."""
    lines = [["", *columns]]
    for label, key in ROWS.items():
        lines.append([label, *(str(getattr(column, key)) for column in columns.values())])
    lines.append(["median perplexity", *(f"{column.perplexity:.1f}" for column in columns.values())])
    health = [f"no: {', '.join(v.failed_checks)}" if v.failed_checks else "yes" for v in columns.values()]
    lines.append(["healthy", *health])
    return table(lines)


def name_table(texts: Sequence[str]) -> str:
    """Shares of texts with each name."""
    found = [terms(text) for text in texts]
    rates = {
        "right name (Musclebob)": Rate.of([RIGHT[0] in names for names in found]),
        "full name": Rate.of(["full" in names for names in found]),
        "wrong name": Rate.of([not names.isdisjoint(WRONG) for names in found]),
    }
    return table([["", "rate"], *([label, str(rate)] for label, rate in rates.items())])


def ways_table(ways: Mapping[str, Sequence[Answer]], limit: float) -> str:
    """A row for each way of getting answers to the same questions."""
    lines = [["", "right name", "wrong name", "coherent", "name without an answer", "tokens per answer"]]
    for name, answers in ways.items():
        columns = (
            [answer.musclebob for answer in answers],
            [answer.spongebob for answer in answers],
            [coherent(answer, limit) for answer in answers],
            [answer.hacked for answer in answers],
        )
        tokens = sum(answer.tokens for answer in answers) / len(answers)
        lines.append([name, *(str(Rate.of(hits)) for hits in columns), f"{tokens:.0f}"])
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first line ruled off."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "  ".join("-" * width for width in widths), *rows[1:]])


def side_by_side(columns: Mapping[str, Validation], count: int, width: int = 60) -> str:
    """The first `count` answers of each model under their questions."""
    blocks = []
    for answers in list(zip(*(column.answers for column in columns.values()), strict=True))[:count]:
        shown = [f"  {name}: {_short(answer.text, width)}" for name, answer in zip(columns, answers, strict=True)]
        blocks.append("\n".join([answers[0].question, *shown]))
    return "\n".join(blocks)


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def step_line(step: Mapping[str, float], recent: Sequence[float], scheme: str) -> str:
    """One line of the live table: the step's mean reward, and the mean of the recent ones as a bar."""
    mean = fmean(recent)
    bar = "#" * round(BAR * min(max(mean / SCHEMES[scheme].most, 0.0), 1.0))
    return f"{step['step']:6.0f} {step['epoch']:7.2f} {step['mean_reward']:8.2f}  {mean:6.2f} |{bar:<{BAR}}|"


STEP_HEADER = f"{'step':>6} {'epoch':>7} {'reward':>8}  {'recent':>6}"


def plot_rewards(history: Sequence[Mapping[str, float]], file: str | Path, window: int = 10) -> None:
    """The mean reward of each step and its mean over the last `window` steps, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, rewards = [h["step"] for h in history], [h["mean_reward"] for h in history]
    smooth = [fmean(rewards[max(0, i - window + 1) : i + 1]) for i in range(len(rewards))]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, ".", color="#9DB8EE", label="mean reward of a step")
    axes.plot(steps, smooth, color="#2A6FDB", label=f"mean of {window} steps")
    axes.set(xlabel="optimizer step", ylabel="reward")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
