"""What a comparison of fine-tuned models looks like: summary.json, a Markdown report, pictures, an HTML section."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dts.evaluation.tasks.oracle import WARNING, marked

Entry = Mapping[str, Any]
SHOWN = ("diversity", "distinct_2", "self_bleu", "rouge_l", "valid", "engagement", "judge", "train_reward", "pass@1",
         "pass@5", "pass@10", "words", "repetition", "fluency", "kl")  # fmt: skip
COLORS = ("#7F7F7F", "#2A6FDB", "#F9A03F", "#0B7A75", "#AA96DA")
CAUTION = (
    "Intervals are 95 % BCa over prompts (threads whole) for the models at hand; values are means over training seeds. "
    "p: paired sign-flip test, Holm-adjusted over all contrasts and measures but the descriptive ones."
)


def write_report(summary: Entry, folder: Path) -> None:
    """Write `summary.json`, `report.md`, the pictures and `section.html` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    measures_picture(summary).savefig(folder / "measures.png", dpi=120)
    contrasts_picture(summary).savefig(folder / "contrasts.png", dpi=120)
    (folder / "report.md").write_text(markdown(summary), encoding="utf-8")
    (folder / "section.html").write_text(section(summary, folder), encoding="utf-8")


def measures_of(summary: Entry) -> list[str]:
    """Measures in the order of the report: the checks first."""
    return [*summary.get("checks", ()), *SHOWN]


def _shown(summary: Entry, name: str) -> str:
    """A measure's name, with the mark where it is a check that sees the reference."""
    return marked(name, name in summary.get("oracles", ()))


# Tables, as lists of rows with the header first ----------------------------------------------------------------------


def models_table(summary: Entry) -> list[list[str]]:
    models = summary["models"]
    names = [name for name in measures_of(summary) if any(name in model["measures"] for model in models.values())]
    rows = [["measure", *(f"{name} ({len(model['seeds'])} seed{'s'[: len(model['seeds']) > 1]})"
                          for name, model in models.items())]]  # fmt: skip
    for name in names:
        rows.append([_shown(summary, name), *(interval(model["measures"].get(name)) for model in models.values())])
    return rows


def contrasts_table(summary: Entry) -> list[list[str]]:
    rows = [["contrast", "measure", "difference", "over seeds too", "p", "Holm", "Wilcoxon p", "d", "d_z", "by seed"]]
    for pair, found in summary["contrasts"].items():
        for name in (name for name in measures_of(summary) if name in found):
            entry = found[name]
            numbers = [*(_number(entry.get(key), 4) for key in ("p", "p_holm", "p_wilcoxon")),
                       *(_number(entry.get(key)) for key in ("d", "d_z"))]  # fmt: skip
            by_seed = " ".join(f"{value:+.3f}" for value in entry.get("by_seed", []))
            both = entry.get("with_seeds")
            seeds = f"[{both[0]:+.3f}, {both[1]:+.3f}]" if both and len(entry["by_seed"]) > 1 else "-"
            rows.append([pair, _shown(summary, name), interval(entry, sign=True), seeds, *numbers, by_seed or "-"])
    return rows


def verdict_table(summary: Entry) -> list[list[str]]:
    rows = [["contrast", "diversity", "band", "bands of the interval", "most possible", "quality kept"]]
    for pair, found in summary["verdicts"].items():
        gain = found["improvement"]
        shown = "-" if gain["value"] is None else (
            f"{gain['value']:+.1%}" + ("" if gain["low"] is None else f" [{gain['low']:+.1%}, {gain['high']:+.1%}]")
        )  # fmt: skip
        bands = " to ".join(dict.fromkeys(found["band_of_interval"]))
        most = "-" if found["ceiling"] is None else f"{found['ceiling']:+.1%}"
        rows.append([pair, shown, found["band"], bands, most, found["quality_kept"]])
    return rows


def failures_table(summary: Entry) -> list[list[str]]:
    modes = list(dict.fromkeys(mode for found in summary["failures"].values() for mode in found))
    rows = [["failure mode", *summary["failures"]]]
    for mode in modes:
        rows.append([mode, *(f"{found.get(mode, {'share': 0.0})['share']:.1%}"
                             for found in summary["failures"].values())])  # fmt: skip
    return rows


def interval(entry: Entry | None, sign: bool = False) -> str:
    """A value with its interval."""
    if entry is None or entry["value"] is None:
        return "-"
    form = "+.3f" if sign else ".3f"
    ends = "" if entry["low"] is None else f" [{entry['low']:{form}}, {entry['high']:{form}}]"
    return f"{entry['value']:{form}}{ends}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# Sentences -----------------------------------------------------------------------------------------------------------


def facts(summary: Entry) -> list[str]:
    """What a reader must know beside the numbers."""
    lines = [
        f"{summary['items']} prompts in {summary['clusters']} clusters, {summary['settings']['samples']} replies each.",
        f"Success in pass@k: {summary['success']}.",
        f"train_reward: {summary['train_reward']}.",
        CAUTION,
    ]
    if summary.get("oracles"):
        lines.insert(0, f"Oracle reward: {', '.join(summary['oracles'])}. {WARNING}")
    if "scorer" in summary:
        found = summary["scorer"]["rank_correlation_with_engagement"]
        lines.append(
            f"Engagement is scored by: {summary['scorer']['kind']}. Its rank correlation with real engagement is "
            f"{interval(found, sign=True)}: where this is near 0, engagement and pass@k say little."
        )
    else:
        lines.append("No engagement in the test data: not scored.")
    judge = summary.get("judge")
    if judge is None:
        lines.append("No judge was asked.")
    else:
        lines.append(
            f"Judge {judge['model']}: {judge['asked']} answers needed, {judge['requests']} fetched, "
            f"{judge['parse_failures']} not readable, {judge['inconsistent']} pairs judged differently in the other "
            f"order, first place won {judge['first_wins']} and second place {judge['second_wins']} times."
            + (f" It failed: {judge['error']}" if judge["error"] else "")
        )
    return lines


def hacking_lines(summary: Entry) -> list[str]:
    lines = []
    for pair, found in summary["reward_hacking"].items():
        if found is None:
            continue
        held_out = ", ".join(f"{name} {interval(entry, sign=True)}" for name, entry in found["held_out"].items())
        lines.append(
            f"{pair}: {'SUSPECTED' if found['suspected'] else 'not suspected'}; training reward "
            f"{interval(found['train_reward'], sign=True)}; held out: {held_out or 'nothing'}; length drift: "
            f"{'YES' if found['length_drift'] else 'no'} ({interval(found['words_relative'], sign=True)} relative)."
        )
    return lines


def markdown(summary: Entry) -> str:
    """The report as Markdown."""
    parts = ["# Comparison of fine-tuned models", *facts(summary)]
    for entry in summary.get("questions", []):
        parts += [f"**{entry['question']}** {entry['answer']} ({entry['why']}).", *map(_bullet, entry["evidence"])]
    for title, rows in _tables(summary):
        parts += [f"## {title}", _markdown_table(rows)]
    if lines := hacking_lines(summary):
        parts += ["## Reward hacking", *lines]
    parts += ["## Examples of failures", *_example_lines(summary)]
    return "\n\n".join(parts) + "\n"


def _tables(summary: Entry) -> list[tuple[str, list[list[str]]]]:
    return [
        ("Verdict", verdict_table(summary)),
        ("Measures", models_table(summary)),
        ("Contrasts", contrasts_table(summary)),
        ("Failure modes", failures_table(summary)),
    ]


def _bullet(entry: Entry) -> str:
    mark = "" if entry["decides"] else " (beside)"
    return (
        f"- {entry['contrast']}, {entry['measure']}{mark}: {interval(entry, sign=True)}, p {_number(entry['p'], 4)}, "
        f"Holm {_number(entry['p_holm'], 4)}, d_z {_number(entry['d_z'])}"
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _example_lines(summary: Entry) -> list[str]:
    lines = []
    for model, found in summary["failures"].items():
        for mode, entry in found.items():
            shown = "; ".join(json.dumps(example["reply"], ensure_ascii=False) for example in entry["examples"])
            lines.append(f"- {model}, {mode}: {shown}")
    return lines or ["None."]


def section(summary: Entry, folder: Path) -> str:
    """The report as an HTML fragment that stands alone: pictures from `folder` inside, all text escaped."""
    parts = ['<section class="comparison">', "<h2>Comparison of fine-tuned models</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in facts(summary)]
    if summary.get("questions"):
        answers = "".join(f"<dt>{escape(entry['question'])}</dt><dd>{escape(entry['answer'])} "
                          f"<small>{escape(entry['why'])}</small></dd>" for entry in summary["questions"])  # fmt: skip
        parts.append(f"<dl>{answers}</dl>")
    for title, rows in _tables(summary):
        parts += [f"<h3>{title}</h3>", html_table(rows)]
    for name in ("measures.png", "contrasts.png"):
        if (folder / name).is_file():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<img alt="{name[:-4]} with intervals" src="data:image/png;base64,{data}">')
    parts += [f"<p>{escape(line)}</p>" for line in hacking_lines(summary)]
    shown = "".join(f"<li>{escape(line[2:])}</li>" for line in _example_lines(summary))
    parts += [f"<details><summary>Examples of failures</summary><ul>{shown}</ul></details>", "</section>"]
    return "\n".join(parts) + "\n"


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header; all text is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# Pictures ------------------------------------------------------------------------------------------------------------


def measures_picture(summary: Entry, asked: Sequence[str] | None = None) -> Figure:
    """A panel per measure: each model's mean, its interval, and its training seeds as dots."""
    models = summary["models"]
    wanted = measures_of(summary) if asked is None else asked
    names = [name for name in wanted if all(name in model["measures"] for model in models.values())]
    columns = min(4, max(1, len(names)))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        for x, (model, color) in enumerate(zip(models.values(), cycle(COLORS), strict=False)):
            _point(axes, x, model["measures"][name], color)
            seeds = model["measures"][name]["seed_means"]
            axes.plot([x + 0.15] * len(seeds), seeds, ".", color=color, markersize=4)
        axes.set_title(_shown(summary, name), loc="left", fontsize=10)
        axes.set_xticks(range(len(models)), [name.replace("_", "\n") for name in models], fontsize=7)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return figure


def _point(axes: Any, x: float, entry: Entry, color: str) -> None:
    if entry["low"] is not None:
        axes.vlines(x, entry["low"], entry["high"], color=color, linewidth=2)
    axes.plot([x], [entry["value"]], "o", color=color)


def contrasts_picture(summary: Entry) -> Figure:
    """d_z of every contrast and measure: how large a paired difference is against its spread."""
    rows = [(f"{pair}: {_shown(summary, name)}", found[name]["d_z"], (found[name].get("p_holm") or 1) < 0.05)
            for pair, found in summary["contrasts"].items() for name in measures_of(summary)
            if name in found and found[name]["d_z"] is not None]  # fmt: skip
    figure = Figure(figsize=(8, 1 + 0.24 * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    for y, (_, value, clear) in enumerate(reversed(rows)):
        axes.hlines(y, 0, value, color="#2A6FDB" if clear else "#BBBBBB", linewidth=3)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)], fontsize=7)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel("d_z of the paired difference (blue: Holm-adjusted p < 0.05)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
