"""Tables and the picture of a study, from its records. Intervals are 95 %, by bootstrap over prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from dts.errors import UsageError
from dts.evaluation.measures.statistics import Interval, bootstrap, mean, paired_difference
from dts.evaluation.records import Mark
from dts.evaluation.report.summary import NOT_RECORDED
from dts.evaluation.run_folder import read_jsonl, write_text
from dts.evaluation.tasks.oracle import WARNING, marked

REFERENCE = "best-of-n"
Row = list[str]


class Found(TypedDict):
    """A completion."""

    text: str
    reward: float
    logprob: float  # nats
    length: int  # tokens


class SearchRecord(Mark):
    """A line of study.jsonl: one search. Tokens are those forwarded after the prompt."""

    dataset: str
    id: str
    seed: int
    method: str
    prompt_tokens: int
    tokens: list[int]  # when each rollout was finished
    rewards: list[float]  # of each rollout
    tokens_reused: float | None  # share of the rollouts' tokens
    branch_depth: float | None  # median, share of the text
    spent: int
    unique: int
    nodes: int
    model_calls: int
    seconds: float  # its share of the batch's
    seconds_at: NotRequired[list[float]]  # when each rollout was finished
    reward_calls: int  # texts that the reward scored
    reward_tokens: int  # that its models forwarded
    reward_seconds: float  # of the clock
    completions: list[Found]  # distinct, best first
    draws: list[Found]  # from the estimate of pi*


Cells = dict[str, list[dict[str, SearchRecord]]]  # data set -> prompts and seeds -> method


def write_report(folder: Path) -> str:
    """The tables as Markdown, also in report.md, with curves.png beside it."""
    if not (folder / "study.jsonl").exists():
        raise UsageError(f"{folder} holds no study.jsonl; run the study first")
    settings = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    records = cast("list[SearchRecord]", read_jsonl(folder / "study.jsonl"))
    cells = _cells(records)
    parts = [
        f"Model {settings['model']}, lambda {settings['reward_scale']:g}, power {settings.get('power', 1.0):g}, "
        f"completions by {settings.get('order', 'reward')}, {settings['max_tokens']} tokens at most."
    ]
    if any(record.get("oracle") for record in records):
        parts.append(f"**Oracle reward.** {WARNING}")
    parts += [
        "## Best reward at equal forwarded tokens\n\n" + _table(*at_equal_tokens(cells, settings["budgets"])),
        "## Tokens and seconds to reach the best reward of best-of-N\n\n"
        + _table(*tokens_to_reach(cells, settings["budgets"])),
        "## The best completion of each search\n\n" + _table(*quality(cells)) + _missing(records),
        "## Completions as good as the best of best-of-N\n\n" + _table(*as_good(cells)),
        "## Draws against best-of-n at the same mean reward\n\n" + _table(*over_optimisation(cells)),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    curves(cells).savefig(folder / "curves.png", dpi=150, facecolor="white")
    return text


def _missing(records: Sequence[SearchRecord]) -> str:
    return "" if all("tokens_reused" in record for record in records) else f"\n\n{NOT_RECORDED}"


def _cells(records: Sequence[SearchRecord]) -> Cells:
    """By data set: the searches of one prompt and seed, by method, where the reference is among them."""
    found: dict[tuple[Any, ...], dict[str, SearchRecord]] = {}
    for record in records:
        found.setdefault((record["dataset"], record["id"], record["seed"]), {})[record["method"]] = record
    cells: Cells = {}
    for (dataset, *_), cell in found.items():
        if REFERENCE in cell:
            oracle = any(record.get("oracle") for record in cell.values())
            cells.setdefault(marked(dataset, oracle), []).append(cell)
    return cells


def _by_method(cells: Sequence[dict[str, SearchRecord]]) -> Iterator[tuple[str, list[dict[str, SearchRecord]]]]:
    """Every method, the reference first, with the cells that have it."""
    names = dict.fromkeys([REFERENCE, *(name for cell in cells for name in cell)])
    return ((name, [cell for cell in cells if name in cell]) for name in names)


def best_at(record: SearchRecord, tokens: float) -> float:
    """The best reward of the rollouts that were finished within so many tokens; 0 before the first."""
    within = [reward for reward, spent in zip(record["rewards"], record["tokens"], strict=True) if spent <= tokens]
    return max(within, default=0.0)


def reached_at(record: SearchRecord, reward: float) -> float:
    """Tokens after which a rollout had at least `reward`; infinite if none had."""
    pairs = zip(record["rewards"], record["tokens"], strict=True)
    return next((tokens for value, tokens in pairs if value >= reward - 1e-12), math.inf)


def at_equal_tokens(cells: Cells, budgets: Sequence[int]) -> tuple[Row, list[Row]]:
    rows = []
    for dataset, every in cells.items():
        for n in budgets:
            for name, own in _by_method(every):
                limits = [cell[REFERENCE]["tokens"][n - 1] for cell in own]
                if any(cell[name]["spent"] < 0.95 * limit for cell, limit in zip(own, limits, strict=True)):
                    continue  # beyond what the method was given
                best, reference = (
                    [best_at(cell[which], limit) for cell, limit in zip(own, limits, strict=True)]
                    for which in (name, REFERENCE)
                )
                difference = "" if name == REFERENCE else _show(paired_difference(best, reference), "+.3f")
                rows.append(
                    [dataset, str(n), f"{np.mean(limits):.0f}", name, str(len(own)),
                     _show(bootstrap(mean, best), ".3f"), difference]
                )  # fmt: skip
    return ["data", "N", "tokens", "method", "prompts", "best reward", "minus best-of-N"], rows


def tokens_to_reach(cells: Cells, budgets: Sequence[int]) -> tuple[Row, list[Row]]:
    """Ratio of best-of-N's tokens, and of its seconds, to those a method needs for the same best reward; a search that
    never gets there counts with all it spent. The last column adds up the seconds of all prompts, of best-of-N and of
    the method."""
    rows = []
    for dataset, every in cells.items():
        for n in budgets:
            for name, own in list(_by_method(every))[1:]:
                ratios, censored = [], 0
                for cell in own:
                    reference = cell[REFERENCE]
                    needed = reached_at(cell[name], max(reference["rewards"][:n]))
                    censored += needed == math.inf
                    ratios.append(reference["tokens"][n - 1] / min(needed, cell[name]["spent"]))
                pairs = [_seconds_to_reach(cell[REFERENCE], cell[name], n) for cell in own]
                rows.append(
                    [dataset, str(n), name, f"{np.median(ratios):.1f}", _geometric(ratios), f"{min(ratios):.2f}",
                     f"{censored} of {len(own)}", *_seconds(pairs)]
                )  # fmt: skip
    header = ["data", "N", "method", "median ratio", "geometric mean", "least", "never reached"]
    return [*header, "seconds, geometric mean", "seconds of all"], rows


def _geometric(ratios: Sequence[float]) -> str:
    found = bootstrap(mean, np.log(ratios))
    low, middle, high = (math.exp(x) for x in (found.low, found.value, found.high))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _seconds_to_reach(reference: SearchRecord, record: SearchRecord, n: int) -> tuple[float, float] | None:
    """Seconds of n samples, and of the method up to their best reward; None where they were not recorded."""
    if "seconds_at" not in reference or "seconds_at" not in record:
        return None
    goal = max(reference["rewards"][:n]) - 1e-12
    needed = next((s for s, r in zip(record["seconds_at"], record["rewards"], strict=True) if r >= goal), None)
    return reference["seconds_at"][n - 1], record["seconds"] if needed is None else needed


def _seconds(pairs: Sequence[tuple[float, float] | None]) -> list[str]:
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return ["-", "-"]
    before, after = (sum(column) for column in zip(*known, strict=True))
    return [_geometric([a / b for a, b in known]), f"{before:.1f} to {after:.1f}"]


def quality(cells: Cells) -> tuple[Row, list[Row]]:
    rows = []
    for dataset, every in cells.items():
        for name, own in _by_method(every):
            own = [cell for cell in own if cell[name]["completions"]]  # a budget may end before the first one
            if not own:
                continue
            best = [cell[name]["completions"][0] for cell in own]
            per_token = [c["logprob"] / c["length"] for c in best]
            records = [cell[name] for cell in own]
            rows.append(
                [dataset, name, f"{np.mean([c['reward'] for c in best]):.3f}", _show(bootstrap(mean, per_token), ".2f"),
                 f"{np.mean([len(r['rewards']) for r in records]):.0f}",
                 _mean_of(records, "tokens_reused", ".0%"), _mean_of(records, "branch_depth", ".0%"),
                 f"{np.mean([r['spent'] for r in records]):.0f}", f"{np.mean([r['seconds'] for r in records]):.1f}",
                 _mean_of(records, "reward_calls", ".0f"), _mean_of(records, "reward_seconds", ".2f")]
            )  # fmt: skip
    header = ["data", "method", "best reward", "log p per token", "rollouts", "tokens reused", "branch depth", "tokens",
              "s", "reward calls", "reward s"]  # fmt: skip
    return header, rows


def _mean_of(records: Sequence[Mapping[str, Any]], field: str, form: str) -> str:
    """A mean for a table; "-" where records of an older version lack the field."""
    values = [record.get(field) for record in records]
    return "-" if None in values else format(np.mean(cast("list[float]", values)), form)


def as_good(cells: Cells) -> tuple[Row, list[Row]]:
    """What each search found with at least the highest reward of best-of-N: how many completions, and log p of the
    likeliest of them, in nats for the whole completion, against the likeliest that best-of-N has there."""
    rows = []
    for dataset, every in cells.items():
        for name, own in list(_by_method(every))[1:]:
            pairs = [_top(cell[REFERENCE], cell[name]) for cell in own]
            found = [(before, after) for before, after in pairs if after]
            if not found:
                continue
            logprob = paired_difference([max(after) for _, after in found], [max(before) for before, _ in found])
            count = paired_difference([len(after) for _, after in found], [len(before) for before, _ in found])
            rows.append([dataset, name, _show(logprob, "+.1f"), _show(count, "+.1f"), f"{len(found)} of {len(own)}"])
    return ["data", "method", "log p of the likeliest, difference", "number, difference", "prompts"], rows


def _top(reference: SearchRecord, record: SearchRecord) -> tuple[list[float], list[float]]:
    """log p of the completions of both whose reward is at least the reference's highest."""
    goal = max(c["reward"] for c in reference["completions"]) - 1e-12
    before, after = ([c["logprob"] for c in r["completions"] if c["reward"] >= goal] for r in (reference, record))
    return before, after


def over_optimisation(cells: Cells) -> tuple[Row, list[Row]]:
    """Draws from the estimate of pi*, against best-of-n with the n whose expected reward is the draws' mean reward
    (found on the same prompt's independent samples, between two n by linear interpolation)."""
    rows = []
    for dataset, every in cells.items():
        for name, own in list(_by_method(every))[1:]:
            pairs = [_at_same_reward(cell[REFERENCE]["completions"], cell[name]["draws"]) for cell in own
                     if cell[name]["draws"]]  # fmt: skip
            found = [pair for pair in pairs if pair is not None]
            if not found:
                continue
            logprob, diversity = (paired_difference([p[0][i] for p in found], [p[1][i] for p in found]) for i in (1, 2))
            rows.append(
                [dataset, name, f"{np.mean([p[0][0] for p in found]):.3f}", f"{np.mean([p[2] for p in found]):.1f}",
                 _show(logprob, "+.3f"), _show(diversity, "+.3f"), f"{len(found)} of {len(own)}"]
            )  # fmt: skip
    header = ["data", "method", "mean reward", "n of best-of-n", "log p per token, difference",
              "diversity, difference", "prompts"]  # fmt: skip
    return header, rows


Figures = tuple[float, float, float]  # mean reward, mean log p per token, mean distance of two


def _at_same_reward(samples: Sequence[Found], draws: Sequence[Found]) -> tuple[Figures, Figures, float] | None:
    """Figures of the draws, of best-of-n at the same reward, and n; None where no n up to a quarter of the samples
    comes that far."""
    distance = _distances([*samples, *draws])
    count = len(samples)
    own = _figures(draws, np.full(len(draws), 1 / len(draws)), distance[count:, count:])
    before, before_n = None, 1
    for n in range(1, count // 4 + 1):
        now = _figures(samples, _rank_weights(samples, n), distance[:count, :count])
        if now[0] >= own[0]:
            if before is None:
                return own, now, float(n)
            share = (own[0] - before[0]) / (now[0] - before[0])
            mixed = tuple(a + share * (b - a) for a, b in zip(before, now, strict=True))
            return own, mixed, before_n + share  # type: ignore[return-value]
        before, before_n = now, n
    return None


def _rank_weights(samples: Sequence[Found], n: int) -> np.ndarray:
    """The probability that each sample is the best of n drawn with replacement; equal rewards share theirs."""
    rewards = np.array([s["reward"] for s in samples])
    below = np.array([(rewards < r).sum() for r in rewards]) / len(rewards)
    up_to = np.array([(rewards <= r).sum() for r in rewards]) / len(rewards)
    return (up_to**n - below**n) / ((up_to - below) * len(rewards))


def _figures(items: Sequence[Found], weights: np.ndarray, distance: np.ndarray) -> Figures:
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0.0)  # two different draws; equal texts among them still count with distance 0
    apart = float((pairs * distance).sum() / pairs.sum()) if pairs.sum() > 0 else 0.0
    reward = float(weights @ np.array([i["reward"] for i in items]))
    return reward, float(weights @ np.array([i["logprob"] / i["length"] for i in items])), apart


def _distances(items: Sequence[Found]) -> np.ndarray:
    """1 - Jaccard overlap of the word sets of two texts, [n, n]."""
    words = [frozenset(item["text"].lower().split()) for item in items]

    def distance(a: frozenset[str], b: frozenset[str]) -> float:
        return 1 - len(a & b) / len(a | b) if a or b else 0.0

    return np.array([[distance(a, b) for b in words] for a in words])


def curves(cells: Cells) -> Any:
    """Mean best reward against tokens, one panel for each data set, with a band of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(cells), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(cells)))
    colors = {REFERENCE: "#777777", "maxent-star": "#d1495b", "maxent": "#00798c"}
    for panel, (dataset, own) in zip(panels, cells.items(), strict=True):
        grid = np.linspace(0, np.mean([cell[REFERENCE]["tokens"][-1] for cell in own]), 200)[1:]
        for name, with_it in _by_method(own):
            values = np.array([[best_at(cell[name], tokens) for tokens in grid] for cell in with_it])
            middle, error = values.mean(0), values.std(0) / math.sqrt(len(values))
            line = panel.plot(grid, middle, label=name, color=colors.get(name))[0]
            panel.fill_between(grid, middle - error, middle + error, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set(title=f"{dataset} ({len(own)} prompts)", xlabel="tokens forwarded after the prompt")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("best reward")
    panels[-1].legend(loc="lower right", frameon=False)
    return figure


def _show(interval: Interval, form: str) -> str:
    show: Callable[[float], str] = lambda x: format(x, form)  # noqa: E731
    if math.isnan(interval.low):
        return show(interval.value)
    return f"{show(interval.value)} [{show(interval.low)}, {show(interval.high)}]"


def _table(header: Row, rows: Sequence[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
