"""Renders the page: figures and tables here, their looks in report.html, report.css and the scripts.

Texts of models and data are escaped by the template engine, stand as JSON in a block that is not executed, or are set
as text by the scripts; a content security policy that knows the page's own script lets no other run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dts.evaluation.collected import EXAMPLES, Collected
from dts.evaluation.measures import statistics
from dts.evaluation.records import Cell, Record, SampleRecord, Verdict
from dts.evaluation.report import charts
from dts.evaluation.report.runs import Run, load_run, load_runs
from dts.evaluation.report.summary import NOT_RECORDED, number, of_earlier_version, percent
from dts.evaluation.report.svg import inline_svg
from dts.evaluation.report.verdict import compared, figures, headline, remarks
from dts.evaluation.run_folder import to_json, write_text
from dts.evaluation.tasks.oracle import marked, oracles, sees_reference

SCRIPTS = ("tree.js", "overview.js", "viewer.js")
CHARTS = {
    "reward_over_rollouts": ("Reward over rollouts", "Mean over samples after each rollout. A method with a single "
                             "path is a level. The best so far cannot fall; the reward of each rollout can."),
    "reward_vs_tokens": ("Reward for the tokens spent", "Best reward so far against tokens forwarded through the "
                         "model. Compare methods where they stop: paths decoded side by side end late together."),
    "speed_quality": ("Speed against quality", "Best reward against seconds per sample; bars reach one standard "
                      "error."),
    "monotonicity": ("Monotonicity", "Share of rollouts not below the one before. The dashed line is what the same "
                     "rewards give in random order: only the distance to it says something."),
    "rollout_heatmap": ("Every rollout", "One row per sample, one column per rollout."),
}  # fmt: skip


def write_report(folder: Path, collected: Collected | None = None) -> Path:
    """`report.html` in the run folder, from its files. collected: its records, where they are in memory already."""
    return write_text(Path(folder) / "report.html", render([load_run(Path(folder), collected=collected)]))


def compare(folders: Sequence[Path], target: Path) -> Path:
    """One page over several run folders. Raises `UsageError` where one holds no run."""
    return write_text(target, render(load_runs([Path(folder) for folder in folders])))


def render(runs: Sequence[Run]) -> str:
    """The page as text: the same for the same files."""
    files = resources.files(__package__)
    scripts = "\n".join((files / name).read_text(encoding="utf-8") for name in SCRIPTS)
    samples = [sample for run in runs for sample in run.samples]
    trees = [tree for run in runs for tree in run.trees]
    rewards = sorted({sample["reward"] for sample in samples})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.filters["method"] = lambda record: marked(record["method"], sees_reference(record))
    template = environment.from_string((files / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(dict.fromkeys(run.summary["experiment"] for run in runs)),
        runs=runs,
        colors={model: color for run in runs for model, color in run.colors.items()},
        settings=_settings(runs),
        rewards=rewards,
        not_recorded=NOT_RECORDED,
        oracles=oracles(samples),
        won=[_won(verdict, run) for run in runs for verdict in run.summary.get("verdicts", [])],
        datasets=[_dataset(name, runs) for name in dict.fromkeys(sample["dataset"] for sample in samples)],
        trees=trees,
        data=_inert(trees),
        css=Markup((files / "report.css").read_text(encoding="utf-8")),
        script=Markup(scripts),
        script_hash=base64.b64encode(hashlib.sha256(scripts.encode()).digest()).decode(),
    )


def _inert(value: Any) -> Markup:
    """JSON that cannot end the block it stands in."""
    return Markup(json.dumps(json.loads(to_json(value)), separators=(",", ":")).replace("<", "\\u003c"))


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Settings and versions of every run: name, value by run, whether they differ."""
    columns = [{**run.summary["config"], **{f"version of {k}": v for k, v in run.summary["versions"].items()}}
               for run in runs]  # fmt: skip
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [_plain(column.get(name)) for column in columns]
        if any(value != "–" for value in values):
            rows.append((name.replace("_", " "), values, len(set(values)) > 1))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)


def _dataset(name: str, runs: Sequence[Run]) -> Record:
    """Everything the page says about one data set; rewards of two are not comparable."""
    samples = [s for run in runs for s in run.samples if s["dataset"] == name]
    rollouts = charts.together([charts.of_dataset(run.rollouts, name) for run in runs])
    colors = {model: color for run in runs for model, color in run.colors.items()}
    drawn = charts.figures(samples, rollouts, colors)
    cells = [cell for run in runs for cell in run.summary["runs"] if cell["dataset"] == name]
    baselines = {label: metrics for run in runs for label, metrics in run.summary["baselines"].get(name, {}).items()}
    return {
        "name": name,
        "charts": [
            {"name": key, "title": marked(title, bool(oracles(samples))), "caption": caption,
             "svg": Markup(inline_svg(drawn[key], f"{_slug(name)}-{key}", marked(title, bool(oracles(samples)))))}
            for key, (title, caption) in CHARTS.items()
        ],
        "rows": [{**cell, "difference": _difference(cell, cells[0], samples)} for cell in cells],
        "of_earlier_version": any(map(of_earlier_version, cells)),
        "reference": f"{cells[0]['model']}, {cells[0]['method']}",
        "metrics": list(dict.fromkeys(key for found in (*(c["metrics"] for c in cells), *baselines.values())
                                      for key in found)),
        "baselines": baselines,
        "examples": _examples(samples),
        "distinct": len({s["id"] for s in samples}),
    }  # fmt: skip


def _won(verdict: Verdict, run: Run) -> Record:
    """What the search won, in words, and the first example as every method that the sentence compares answered it."""
    key = (verdict["model"], verdict["dataset"])
    own = [s for s in run.samples if (s["model"], s["dataset"]) == key and s["method"] in compared(verdict)]
    return {
        "headline": headline(verdict),
        "figures": figures(verdict),
        "remarks": remarks(verdict),
        "example": next(iter(_examples(own)), None),
    }


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _difference(cell: Cell, reference: Cell, samples: Sequence[SampleRecord]) -> statistics.Interval | None:
    """Best reward less that of the reference on the same samples, with its 95 % interval over clusters of examples."""

    def own(run: Cell) -> dict[tuple[str, int], SampleRecord]:
        chosen = [s for s in samples if (s["model"], s["method"]) == (run["model"], run["method"])]
        return {(s["id"], s["seed"]): s for s in chosen}

    first, second = own(cell), own(reference)
    pairs = [(first[key], second[key]) for key in first if key in second]
    if cell is reference or not pairs:
        return None
    # Percentiles: BCa's jackknife costs a pass per example, too much for a page over thousands.
    found = statistics.paired_difference(
        [pair[0]["best_reward"] for pair in pairs],
        [pair[1]["best_reward"] for pair in pairs],
        clusters=[pair[0].get("cluster", pair[0]["id"]) for pair in pairs],
        method="percentile",
    )
    return found if math.isfinite(found.low) else None


def _examples(samples: Sequence[SampleRecord]) -> list[Record]:
    """The first examples, with the answers of every model and method to the same prompt and seed."""
    groups: dict[tuple[str, int], list[SampleRecord]] = {}
    seeds: dict[str, int] = {}
    for sample in samples:
        seed = seeds.setdefault(sample["id"], sample["seed"])
        if seed == sample["seed"] and sample["sample"] < EXAMPLES:
            groups.setdefault((sample["id"], seed), []).append(sample)
    examples = []
    for (name, seed), answers in list(groups.items())[:EXAMPLES]:
        best = max(answer["best_reward"] for answer in answers)
        prompt = next((answer["prompt"] for answer in answers if "prompt" in answer), None)
        examples.append({"id": name, "seed": seed, "prompt": _prompt(prompt), "asked": _asked(prompt), "best": best,
                         "answers": answers})  # fmt: skip
    return examples


def _prompt(prompt: Any) -> str | None:
    """A prompt to read: text, or the turns of a chat."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    turns = (f"{turn['role']}:\n{turn['content']}" if isinstance(turn, dict) else str(turn) for turn in prompt)
    return "\n\n".join(turns)


def _asked(prompt: Any) -> str | None:
    """The last turn of a prompt: what was asked for."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    return _prompt(last["content"] if isinstance(last, dict) else last)
