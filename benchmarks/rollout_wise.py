"""What does a search lose when its unit is a tail and not a token? No engine is needed: the tree cache draws the tails.

    python benchmarks/rollout_wise.py --output rollout_wise.jsonl
    python benchmarks/rollout_wise.py --output rollout_wise.jsonl --report

Best-of-N sets the goal, its best reward, and the budget, its tokens. Each arm searches until it has reached the goal or
spent the budget; the ratio is best-of-N's tokens over its own, 1 where the goal was not reached. Tokens of tails are
all that the engine computed, those that no path walked on included.

`steps` is the search as it is. `tails` asks an engine for whole tails (`of 16`: of 16 tokens at most; `adaptive`: as
many as are walked on, the default); its draws have
the distribution that the search wants, at the price of tails that are left. `plain`: without look-ahead, so a tail is
always taken as it was drawn. Rewards are those of the study (`keyword`, `har`, `m4`) and of finished texts. One JSON
line a prompt and arm; the same command continues after the groups (reward, method and arm) that it has finished.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import finished_texts
import torch
from finished_texts import PROMPTS, SEED, WIDTH, Goal, Watched, interval, own_prompt

import dts
from dts.evaluation.tasks import load_task
from dts.models.engines.steps import Stepwise
from dts.models.engines.tails import EngineModel
from dts.search import BestOfN

STUDY = ("keyword", "har", "m4")
PLAIN = {"lookahead": 0}
ARMS: dict[str, tuple[int | None, dict[str, Any]]] = {  # tokens of a tail; 0: steps
    "steps": (0, {}),
    "steps, plain": (0, PLAIN),
    "tails": (1000, {}),
    "tails, adaptive": (None, {}),
    "tails of 16": (16, {}),
    "tails of 8": (8, {}),
    "tails, plain": (1000, PLAIN),
    "tails of 16, plain": (16, PLAIN),
    "tails of 8, plain": (8, PLAIN),
}
KEY = ("n", "tokens", "top", "reward", "method", "arm")


def requests(reward: str, count: int, lm: Any) -> tuple[list[dts.Request], tuple[str, ...]]:
    """Prompts with their rewards and seeds, and stop strings."""
    if reward in STUDY:
        task = load_task(reward, num_samples=count)
        made = [dts.Request(one.prompt, task.reward(one), SEED + i) for i, one in enumerate(task.examples)]
        return made, tuple(task.stop)
    scorer = finished_texts.reward_of(reward, lm, Path("."))
    return [dts.Request(prompt, scorer, SEED + i) for i, prompt in enumerate(PROMPTS[:count])], ()


def goals(lm: Any, reward: str, options: argparse.Namespace) -> list[Goal]:
    """Best-of-N's best and its tokens by prompt; drawn once. -inf where all samples have the same reward."""
    kept = options.output.with_suffix(f".{reward}_{options.samples}_{options.tokens}_{options.prompts}.json")
    if not kept.exists():
        asked, stop = requests(reward, options.prompts, lm)
        drawn = dts.decode_many(
            lm, asked, method=BestOfN(options.samples), max_new_tokens=options.tokens, stop=stop, width=WIDTH,
            batch_size=WIDTH * len(asked),
        )  # fmt: skip
        found = [(max(r.reward for r in one.rollouts), min(r.reward for r in one.rollouts),
                  one.usage.forwarded_tokens - own_prompt(one.usage)) for one in drawn]  # fmt: skip
        kept.write_text(json.dumps([[best if best > least else None, cost] for best, least, cost in found]))
    return [Goal(-math.inf if best is None else best, cost) for best, cost in json.loads(kept.read_text())]


def group(lm: Any, reward: str, search: str, arm: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All prompts searched at once."""
    wanted = goals(lm, reward, options)
    asked, stop = requests(reward, options.prompts, lm)
    segment, settings = ARMS[arm]
    runs_on = lm
    if segment != 0:
        engine = Stepwise(lm, max_new_tokens=options.tokens, width=WIDTH, prompts=len(asked))
        runs_on = EngineModel(engine, lm, lm.name, top=options.top, segment=segment)
    watched = Watched({"search": search, **settings}, wanted, target=False)
    for _ in dts.decode_many(
        runs_on, asked, method=watched, max_new_tokens=options.tokens, stop=stop, width=WIDTH,
        batch_size=WIDTH * len(asked),
    ):  # fmt: skip
        pass
    rows = []
    for index, goal in enumerate(wanted):
        if goal.score == -math.inf:
            continue
        run = watched.runs[index]
        usage = run.search.usage
        rows.append({
            "prompt": index, "reward": reward, "method": search, "arm": arm, "n": options.samples,
            "tokens": options.tokens, "top": options.top, "full": goal.tokens,
            "ratio": goal.tokens / min(run.reached or goal.tokens, goal.tokens), "reached": run.reached is not None,
            "rollouts": len(run.search.rollouts), "walked": usage.generated_tokens / max(1, run.tokens(
                usage.forwarded_tokens)), "requests": usage.model_calls,
        })  # fmt: skip
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Ratios to best-of-N and to `steps`, geometric means with 95 % bootstrap intervals over prompts."""
    head = ("N", "tokens", "listed", "reward", "method", "arm", "prompts", "best-of-N / arm", "steps / arm",
            "not reached", "walked", "requests a rollout")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for key in dict.fromkeys(tuple(row[k] for k in KEY) for row in rows):
        own = [row for row in rows if tuple(row[k] for k in KEY) == key]
        steps = {row["prompt"]: row for row in rows if tuple(row[k] for k in KEY) == (*key[:-1], "steps")}
        logs = [math.log(row["ratio"]) for row in own]
        beside = [math.log(row["ratio"] / steps[row["prompt"]]["ratio"]) for row in own if row["prompt"] in steps]
        shown = [
            " ".join(f"{math.exp(x):.2f}" for x in interval(values)) if values else "" for values in (logs, beside)
        ]
        walked = sum(row["walked"] for row in own) / len(own)
        asked = sum(row["requests"] for row in own) / max(1, sum(row["rollouts"] for row in own))
        lines.append(
            f"| {' | '.join(map(str, key))} | {len(own)} | {shown[0]} | {shown[1]} | "
            f"{sum(not row['reached'] for row in own)} | {walked:.2f} | {asked:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("rollout_wise.jsonl"))
    parser.add_argument("--rewards", nargs="+", default=[*STUDY, "sentiment", "readability"])
    parser.add_argument("--methods", nargs="+", choices=["best", "sample"], default=["best"], help="DTS* and DTS")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--samples", type=int, default=32, help="N")
    parser.add_argument("--tokens", type=int, default=24, help="of a text")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--top", type=int, default=64, help="tokens that a row of a tail lists")
    parser.add_argument("--report", action="store_true", help="only print the table of what --output holds")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    if not options.report:
        torch.set_num_threads(1)
        lm = dts.load("smollm2-135m")
        done = {tuple(row[k] for k in KEY) for row in rows}
        for reward in options.rewards:
            for search in options.methods:
                for arm in options.arms:
                    if (options.samples, options.tokens, options.top, reward, search, arm) in done:
                        continue
                    new = group(lm, reward, search, arm, options)
                    rows += new
                    with options.output.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in new)
                    print(report(new).splitlines()[-1] if new else f"{reward}: all samples are equal", flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
