"""Methods at equal cost on tasks of other people: what each returns, for the tokens of a few samples.

    python benchmarks/tasks.py --task instructions --samples 64 --budget 8 --problems 24 --output tasks.jsonl
    python benchmarks/tasks.py --output tasks.jsonl --report --figure tasks.png

Best-of-N draws N samples. Every other method may forward as many tokens as `--budget` of them cost, or has so many
paths; greedy decoding has one. Sampling, smaller best-of-N and votes are read off the same N samples. Each method
returns one answer for each problem, chosen by its reward, which sees no reference; the task then judges it. Power
sampling (arXiv 2510.14901) alone sees no reward: its answer is one draw from p^4, whatever its search found. `--block`
problems are decoded at once, each 4 paths wide; seconds are CPU seconds of the process for each problem, with the
reward's own. One JSON line a problem and method; the same command continues after the blocks that it has finished.

The report compares with DTS*: intervals by bootstrap over problems, paired; p by flipping signs, adjusted by Holm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import dts
from dts.evaluation.measures.metrics import pass_at_k
from dts.evaluation.measures.statistics import holm, mean, paired_difference, percentiles, resamples, sign_flip_test
from dts.evaluation.report.charts import finish
from dts.evaluation.tasks import Task, load_task
from dts.results import Completion, Result
from dts.search import MCTS, Beam, BestOfN, Greedy, MaxEnt, Method, ParticleFilter

SCALE = 16.0
WIDTH = 4  # paths of one search
SEED = 100
ENDLESS = 10**6  # rollouts of a search that its tokens end
SAMPLES = "best-of-n"
SERIES = re.compile(r"sampling|best-of-\d+")  # one draw, and the best of more of them
OURS = "DTS*"
POWER = "power sampling"
ALPHA = 4.0  # of its target p^alpha, as in the paper
METHODS: dict[str, tuple[Callable[[int], Method], bool]] = {  # from the budget in samples; whether tokens end it
    # "constrained": with the constraint that the task gives, and only where it gives one
    "greedy": (lambda n: Greedy(), False),
    "beam": (lambda n: Beam(n), False),
    "beam, guided": (lambda n: Beam(n, reward_weight=SCALE), False),
    "beam, steps of 8": (lambda n: Beam(n, reward_weight=SCALE, segment=8), False),
    "particle filter": (lambda n: ParticleFilter(n, reward_scale=SCALE), False),
    "MCTS": (lambda n: MCTS(ENDLESS), True),
    "DTS": (lambda n: MaxEnt(ENDLESS, reward_scale=SCALE), True),
    OURS: (lambda n: MaxEnt(ENDLESS, reward_scale=SCALE, search="best", order="likelihood"), True),
    POWER: (lambda n: MaxEnt(ENDLESS, reward_scale=0.0, power=ALPHA, lookahead=0), True),
    "best-of-n, constrained": (lambda n: BestOfN(n), False),
    "DTS*, constrained": (lambda n: MaxEnt(ENDLESS, reward_scale=SCALE, search="best", order="likelihood"), True),
}
CONSTRAINED = ", constrained"
PEERS = ("its-hub best-of-n", "its-hub particle filter", "treequest AB-MCTS")  # see task_peers.py
KEY = ("task", "samples", "budget", "max_tokens", "model", "data_dir")
Record = dict[str, Any]
Methods = dict[str, list[Record]]  # the records of each, in the order of the problems


def block(lm: Any, task: Any, name: str, places: Sequence[int], options: argparse.Namespace,
          samples: Sequence[Record]) -> list[Record]:  # fmt: skip
    """One method on some problems. samples: the records of best-of-N on them, which say what the budgets are."""
    make, ended = METHODS[name] if name != SAMPLES else (BestOfN, False)
    examples = [task.examples[place] for place in places]
    budgets = [dts.Budget(tokens=s["prompt_tokens"] + math.ceil(s["tokens"] * options.budget / options.samples))
               if ended else None for s in samples] or [None] * len(places)  # fmt: skip
    begun = time.process_time()
    requests = [
        dts.Request(
            example.prompt, task.reward(example), SEED + 1000 * place + (name != SAMPLES), budget, example.id,
            task.constraint(example) if name.endswith(CONSTRAINED) else None,
        )
        for place, example, budget in zip(places, examples, budgets, strict=True)
    ]  # fmt: skip
    results = list(dts.decode_many(
        lm, requests, method=make(options.samples if name == SAMPLES else options.budget), width=WIDTH,
        batch_size=WIDTH * len(places), max_new_tokens=options.max_tokens or task.max_tokens, stop=task.stop,
    ))  # fmt: skip
    answers = [returned(name, result) for result in results]
    seconds = (time.process_time() - begun) / len(places)
    return [
        record(task, example.id, name, result, best, tokens, seconds, options)
        for example, result, (best, tokens) in zip(examples, results, answers, strict=True)
    ]


def returned(name: str, result: Result) -> tuple[Completion, int]:
    """The answer of a method, an empty one where its tokens ended before its first text; and its tokens after the
    prompt. A draw may need new ones. What it sends again, because the batch's memory is free by then, does not count.
    """
    usage, again = result.usage, result.usage.recomputed_tokens
    if name == POWER:
        best = result.sample(1)[0]
    else:
        best = result.best if result.completions else Completion("", (), 0.0, 0.0, "length")
    resent = usage.recomputed_tokens - again
    return best, usage.forwarded_tokens - resent - (usage.prompt_tokens - usage.cached_tokens)


def peer_block(lm: Any, task: Any, name: str, places: Sequence[int], options: argparse.Namespace) -> list[Record]:
    """A peer's own code on some problems, one after another."""
    from task_peers import answered  # beside this file

    rows, limit = [], options.max_tokens or task.max_tokens
    for place in places:
        example, begun = task.examples[place], time.process_time()
        made = answered(name, lm, example.prompt, task.reward(example), options.budget, limit, task.stop,
                        SEED + 1000 * place + 1)  # fmt: skip
        made["seconds"] = time.process_time() - begun
        text = answer(task, example.id, *(made[key] for key in ("text", "reward", "logprob", "n_tokens")))
        rows.append({**heading(task, example.id, name, options), **made, **text, "drawn": []})
    return rows


def heading(task: Task, name: str, method: str, options: argparse.Namespace) -> Record:
    """What tells a record from others."""
    return {"task": task.name, "model": options.model, "samples": options.samples, "budget": options.budget,
            "max_tokens": options.max_tokens or task.max_tokens, "data_dir": options.data_dir, "method": method,
            "id": name}  # fmt: skip


def record(task: Task, name: str, method: str, result: Result, best: Completion, tokens: int, seconds: float,
           options: argparse.Namespace) -> Record:  # fmt: skip
    by_ids = {one.token_ids: one for one in result.completions}
    drawn = [by_ids[result.tree.tokens(rollout.leaf)] for rollout in result.rollouts] if method == SAMPLES else []
    return {
        **heading(task, name, method, options),
        "prompt_tokens": result.usage.prompt_tokens,
        "tokens": tokens,
        "seconds": seconds,
        "rollouts": len(result.rollouts),
        **answer(task, name, best.text, best.reward, best.logprob, len(best.token_ids)),
        "drawn": [answer(task, name, one.text, one.reward, one.logprob, len(one.token_ids)) for one in drawn],
    }


def answer(task: Task, name: str, text: str, reward: float, logprob: float, length: int) -> Record:
    metrics = task.score({name: text})
    vote = getattr(task, "answer", lambda text: None)(text)
    return {"text": text, "reward": reward, "logprob": logprob, "n_tokens": length, "metrics": metrics, "vote": vote}


def voted(drawn: Sequence[Record], *, weighted: bool) -> Record:
    """The answer of most votes, in its best sample."""
    votes: dict[Any, float] = {}
    for one in drawn:
        if one["vote"] is not None:
            votes[one["vote"]] = votes.get(one["vote"], 0.0) + (one["reward"] if weighted else 1.0)
    if not votes:
        return drawn[0]
    winner = max(votes, key=lambda vote: votes[vote])
    return max((one for one in drawn if one["vote"] == winner), key=lambda one: (one["reward"], one["logprob"]))


def read_off(record: Record, *, votes: bool) -> Iterator[Record]:
    """What the N samples give other methods. votes: whether the task's answers can be counted; a problem without any
    such answer has its first sample, so that it stays in the table."""
    n, budget, drawn = record["samples"], record["budget"], record["drawn"]

    def made(name: str, chosen: Record, count: int) -> Record:
        return {**record, **chosen, "method": name, "tokens": record["tokens"] * count / n,
                "seconds": record["seconds"] * count / n, "rollouts": count}  # fmt: skip

    average = {key: float(np.mean([one["metrics"][key] for one in drawn])) for key in drawn[0]["metrics"]}
    means = {key: float(np.mean([one[key] for one in drawn])) for key in ("reward", "logprob", "n_tokens")}
    yield made("sampling", {**drawn[0], **means, "metrics": average}, 1)
    for count in sorted({budget, n}):
        best = max(drawn[:count], key=lambda one: (one["reward"], one["logprob"]))
        yield made(f"best-of-{count}", best, count)
    if votes:
        yield made(f"self-consistency of {budget}", voted(drawn[:budget], weighted=False), budget)
        yield made(f"weighted best-of-{budget}", voted(drawn[:budget], weighted=True), budget)


def run(lm: Any, task: Task, options: argparse.Namespace, rows: list[Record]) -> None:
    """Do the blocks that are not in the file yet."""
    tokens = options.max_tokens or task.max_tokens
    wanted = (task.name, options.samples, options.budget, tokens, options.model, options.data_dir)
    done = {(r["method"], r["id"]): r for r in rows if setting(r) == wanted}
    named = [name for name in options.methods if hasattr(task, "constraint") or not name.endswith(CONSTRAINED)]
    for first in range(0, len(task.examples), options.block):
        places = range(first, min(first + options.block, len(task.examples)))
        ids = [task.examples[place].id for place in places]
        for name in (SAMPLES, *named):
            if all((name, one) in done for one in ids):
                continue
            samples = [done[SAMPLES, one] for one in ids] if name != SAMPLES else []
            new = (peer_block(lm, task, name, places, options) if name in PEERS else
                   block(lm, task, name, places, options, samples))  # fmt: skip
            new = [row for row in new if (row["method"], row["id"]) not in done]
            done |= {(r["method"], r["id"]): r for r in new}
            with options.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            print(f"{task.name} {name}: problems {first + 1} to {first + len(ids)}, "
                  f"{sum(r['seconds'] for r in new):.0f} s", flush=True)  # fmt: skip


def setting(row: Record) -> tuple[Any, ...]:
    """What has to agree between records of one table."""
    return tuple(row.get(key) for key in KEY)  # `data_dir` came later


def read(path: Path) -> list[Record]:
    """The records so far. A last line that a kill cut off is dropped, from the file too."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def compared(rows: Sequence[Record]) -> list[tuple[tuple[Any, ...], Methods]]:
    """For each task and setting, the records of the problems that every method has done."""
    found = []
    for of in dict.fromkeys(map(setting, rows)):
        own = [r for r in rows if setting(r) == of]
        methods: dict[str, dict[str, Record]] = {}
        votes = any(sample["vote"] is not None for one in own for sample in one["drawn"])
        for one in own:
            for made in read_off(one, votes=votes) if one["method"] == SAMPLES else [one]:
                methods.setdefault(made["method"], {})[made["id"]] = made
        shared = sorted(set.intersection(*map(set, methods.values())))
        if shared:
            found.append((of, {name: [by_id[i] for i in shared] for name, by_id in methods.items()}))
    return found


def report(rows: Sequence[Record]) -> str:
    """One table for each task and setting."""
    return "\n\n".join(table(of, methods) for of, methods in compared(rows))


def table(of: tuple[Any, ...], methods: Methods) -> str:
    name, samples, budget, tokens, model, data_dir = of
    keys = list(next(iter(methods.values()))[0]["metrics"])
    head, count = keys[0], len(next(iter(methods.values())))
    ours = [r["metrics"][head] for r in methods.get(OURS, [])]
    others = {m: [r["metrics"][head] for r in rows] for m, rows in methods.items() if m != OURS and ours}
    p_values = holm({m: sign_flip_test(ours, values) for m, values in others.items()})
    name += f"** from {data_dir}" if data_dir else "**"
    lines = [
        f"**{name}, {model}, {count} problems, up to {tokens} tokens, a budget of {budget} of {samples} samples",
        "",
        f"| method | tokens | CPU s | reward | {' | '.join(keys)} | {OURS} minus | p (Holm) | nats a token |",
        "| --- " * (7 + len(keys)) + "|",
    ]
    for method, rows in methods.items():
        difference = ["", ""]
        if method in others:
            gap = paired_difference(ours, others[method])
            difference = [f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]", f"{p_values[method]:.3f}"]
        values = [np.array([r["metrics"][key] for r in rows]) for key in keys]
        nats = np.mean([r["logprob"] / max(r["n_tokens"], 1) for r in rows])
        cells = [
            method, f"{np.mean([r['tokens'] for r in rows]):.0f}", f"{np.mean([r['seconds'] for r in rows]):.1f}",
            f"{np.mean([r['reward'] for r in rows]):.3f}", with_interval(values[0]),
            *(f"{mean(value):.3f}" for value in values[1:]), *difference, f"{nats:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *samples_say(head, next(iter(methods.values())))])


def samples_say(head: str, rows: Sequence[Record]) -> list[str]:
    """pass@k of the samples, and where answers are lost; for outcomes that are right or wrong."""
    right = [[one["metrics"][head] for one in row["drawn"]] for row in rows if row.get("drawn")]
    if not right or any(value not in (0.0, 1.0) for row in right for value in row):
        return []
    n, solved = len(right[0]), [sum(map(int, row)) for row in right]
    shares = [f"pass@{k} {np.mean([pass_at_k(n, count, k) for count in solved]):.3f}"
              for k in sorted({1, min(8, n), n})]  # fmt: skip
    some = sum(count > 0 for count in solved)
    return ["", f"Samples: {', '.join(shares)}. {some} of {len(solved)} problems have a sample that is right."]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean, by bootstrap over problems."""
    return percentiles([float(values[chosen].mean()) for chosen in resamples(len(values))])


def with_interval(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def figure(rows: Sequence[Record]) -> Figure:
    """Reward and outcome against tokens, with intervals: a column for each task and setting."""
    parts = compared(rows)
    drawn = Figure(figsize=(7.2 * len(parts), 7.4), layout="constrained")
    panels = drawn.subplots(2, len(parts), squeeze=False)
    for (of, methods), upper, lower in zip(parts, *panels, strict=True):
        first = next(iter(methods.values()))
        for axes, what, value in ((upper, "reward", reward), (lower, next(iter(first[0]["metrics"])), outcome)):
            panel(axes, methods, value)
            finish(axes, f"{of[0]}: {what}", "tokens after the prompt (close points are moved apart)",
                   f"mean of {len(first)} problems")  # fmt: skip
        lower.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, fontsize=8)
    return drawn


def reward(record: Record) -> float:
    return float(record["reward"])


def outcome(record: Record) -> float:
    """By the first metric of the task."""
    return float(next(iter(record["metrics"].values())))


def panel(axes: Axes, methods: Methods, value: Callable[[Record], float]) -> None:
    """A point with its interval for each method; a line through what the same samples give."""
    points = {name: (float(np.mean([r["tokens"] for r in rows])), np.array([value(r) for r in rows]))
              for name, rows in methods.items()}  # fmt: skip
    line = sorted((tokens, values.mean()) for name, (tokens, values) in points.items() if SERIES.fullmatch(name))
    axes.plot(*zip(*line, strict=True), color="#999999", zorder=1)
    looks = itertools.product("osD^vP", [f"C{number}" for number in range(10)])
    for place, ((name, (tokens, values)), (marker, color)) in enumerate(zip(points.items(), looks, strict=False)):
        (low, high), mine = interval(values), name == OURS
        axes.errorbar(
            tokens * 1.012 ** (place % 7 - 3), values.mean(), [[values.mean() - low], [high - values.mean()]],
            label=name, color="black" if mine else color, marker=marker, markersize=9 if mine else 6, capsize=2,
            linestyle="none", elinewidth=1,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="instructions", help="a listed task, or the path of a task file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PEERS], default=list(METHODS),
                        help="default: all but the peers' own code, which needs their packages")  # fmt: skip
    parser.add_argument("--samples", type=int, default=16, help="N of best-of-N")
    parser.add_argument("--budget", type=int, default=16, help="of the other methods, in samples")
    parser.add_argument("--problems", type=int, help="of the task; default: all")
    parser.add_argument("--max-tokens", type=int, help="of an answer; default: the task's")
    parser.add_argument("--block", type=int, default=8, help="problems decoded at once")
    parser.add_argument("--data-dir", help="folder or file with data, instead of the task's own")
    parser.add_argument("--output", type=Path, default=Path("tasks.jsonl"))
    parser.add_argument("--report", action="store_true", help="only print the tables of what --output holds")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw reward and outcome against tokens: .png or .svg"
    )
    options = parser.parse_args()
    if options.figure and options.figure.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--figure {options.figure}: give a name that ends in .png, .svg or .pdf")
    if min(options.samples, options.budget, options.block, options.max_tokens or 1) < 1:
        parser.error("--samples, --budget, --block and --max-tokens must be 1 or more")
    if options.budget > options.samples:
        parser.error(f"--budget {options.budget} is more than --samples {options.samples}; raise --samples")
    if options.report and not options.output.exists():
        parser.error(f"--output {options.output} does not exist: run without --report first")
    try:
        rows = read(options.output)
        if not options.report:
            torch.set_num_threads(1)
            task = load_task(options.task, num_samples=options.problems, data_dir=options.data_dir)
            run(dts.load(options.model), task, options, rows)
    except (dts.DTSError, ImportError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    rows = read(options.output)
    print(report(rows))
    if options.figure:
        figure(rows).savefig(options.figure, dpi=150, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
