"""The study that decides: methods x prompts x seeds at equal forwarded tokens, on a real model.

    python -m dts.evaluation.study --datasets keyword har m4 --output DIR

Best-of-N at the largest budget sets the tokens; every other method gets a share of them. Each search is one line of
DIR/study.jsonl; the same command continues where it was interrupted, and `--report` prints the tables of
`equal_tokens_report` again. Tokens are those forwarded after the prompt, which every method pays once.

    python -m dts.evaluation.study --width 4 --output DIR

has all prompts of a data set in flight, each search 4 paths wide, best-of-N too. Each moment is then divided equally
among the searches under way: the seconds of a search are its share of a batch that all of them fill.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from dts.errors import DTSError, UsageError
from dts.evaluation.experiment.config import LARGEST_POWER, ORDERS
from dts.evaluation.experiment.decode_job import sample_seed
from dts.evaluation.experiment.together import SharedClock
from dts.evaluation.measures.metrics import branch_depth, tokens_reused
from dts.evaluation.run_folder import RunFolder, reported, write_json
from dts.evaluation.studies.equal_tokens_report import REFERENCE, Found, SearchRecord, write_report
from dts.evaluation.tasks import load_task
from dts.evaluation.tasks.base import Task
from dts.evaluation.tasks.oracle import is_oracle
from dts.results import Completion, Result
from dts.settings import Budget

ENDLESS = 10**6  # rollouts of a method that the token budget ends


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared. `budgets` are numbers of best-of-N samples; the largest sets the tokens."""

    model: str = "smollm2-135m"
    datasets: tuple[str, ...] = ("keyword", "har", "m4")
    methods: tuple[str, ...] = ("maxent-star", "maxent")
    budgets: tuple[int, ...] = (16, 64, 128)
    prompts: int = 12
    seeds: tuple[int, ...] = (0,)
    max_tokens: int = 32
    batch_size: int = 8
    width: int | None = None  # paths of each search with all prompts of a data set in flight; None: one by one
    share: float = 0.5  # of the reference's tokens that every other method may forward
    reward_scale: float = 16.0
    power: float = 1.0  # of p in the target
    order: str = "reward"  # what the best completion is, for methods that know several orders
    draws: int = 16  # from the estimate of pi*, by methods that keep one
    data_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("datasets", "methods", "budgets", "seeds"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is empty; give at least one")
        for name in ("prompts", "max_tokens", "batch_size", "width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is not allowed; give 1 or more")
        if not 0 < self.share <= 1:
            raise UsageError(f"--share {self.share} is not allowed; give a number above 0 and up to 1")
        if min(self.budgets) < 1:
            raise UsageError(f"--budgets {min(self.budgets)} is not allowed; give 1 or more")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UsageError(f"--seeds {' '.join(map(str, self.seeds))} is not allowed; give 0 to 4294967295")
        if not 0 < self.power <= LARGEST_POWER:
            raise UsageError(f"--power {self.power} is not allowed; give a number > 0, up to {LARGEST_POWER:g}")
        if self.order not in ORDERS:
            raise UsageError(f"--order {self.order} is not known; choose from {', '.join(ORDERS)}")
        if not 0 <= self.reward_scale < math.inf or self.draws < 0:
            raise UsageError(
                f"--reward-scale {self.reward_scale} --draws {self.draws} is not allowed; give numbers >= 0"
            )


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of a data set under one seed that are decoded together: all of them, or one where there is no width."""

    dataset: str
    seed: int
    indices: tuple[int, ...]


def load_tasks(study: Study) -> dict[str, Task]:
    """The data sets by name. Raises `UsageError` for them and for methods that are not known."""
    from dts.search import METHODS

    unknown = [name for name in study.methods if name not in METHODS]
    if unknown:
        raise UsageError(f"--methods {unknown[0]} is not known; choose from {', '.join(METHODS)}")
    return {name: load_task(name, num_samples=study.prompts, data_dir=study.data_dir) for name in study.datasets}


def run(study: Study, folder: RunFolder, *, progress: bool = False) -> None:
    """Do what is not in the folder yet."""
    import dts

    tasks = load_tasks(study)
    folder.trim("study")
    done = {_key(record): record for record in cast("list[SearchRecord]", folder.records("study"))}
    lm = dts.load(study.model)
    groups = [
        group for name, task in tasks.items() for seed in study.seeds for group in _groups(study, name, seed, task)
    ]
    total = sum(len(group.indices) for group in groups) * (1 + len(study.methods))
    with tqdm(total=total, unit="search", disable=not progress) as bar:
        for group in groups:
            _compare(study, group, tasks[group.dataset], lm, done, folder, bar)


def _groups(study: Study, name: str, seed: int, task: Task) -> list[Group]:
    every = range(len(task.examples))
    return [Group(name, seed, tuple(every))] if study.width else [Group(name, seed, (i,)) for i in every]


def _key(record: SearchRecord) -> tuple[Any, ...]:
    return record["dataset"], record["id"], record["seed"], record["method"]


def _compare(
    study: Study, group: Group, task: Task, lm: Any, done: dict[Any, SearchRecord], folder: RunFolder, bar: Any
) -> None:
    """The reference, whose tokens are the budgets, then every method. A group is recorded as a whole: seconds mean
    something only beside as many neighbours as the others had."""
    limits: list[Budget | None] = [None] * len(group.indices)
    for name in (REFERENCE, *study.methods):
        ids = [task.examples[i].id for i in group.indices]
        known = [done.get((group.dataset, one, group.seed, name)) for one in ids]
        records = [record for record in known if record is not None]
        if len(records) < len(ids):
            rollouts = max(study.budgets) if name == REFERENCE else ENDLESS
            records = _searches(study, group, task, lm, name, rollouts, limits, bar)
            for record in records:
                if _key(record) not in done:
                    folder.append("study", record)
            folder.sync("study")
        else:
            bar.update(len(records))
        if name == REFERENCE:
            limits = [Budget(tokens=r["prompt_tokens"] + math.ceil(study.share * r["tokens"][-1])) for r in records]


def _searches(
    study: Study, group: Group, task: Task, lm: Any, name: str, rollouts: int, limits: Sequence[Budget | None], bar: Any
) -> list[SearchRecord]:
    """One method on every prompt of the group, all in flight.

    Seconds are shared: each moment is divided equally among the searches under way, which are equally wide. They are
    CPU seconds where the model is on the CPU, else of the wall clock.
    """
    import dts
    from dts.search import METHODS, aimed

    method = aimed(METHODS[name](rollouts, study.reward_scale), study.power, study.order)
    # Samples learn nothing from each other: alone, best-of-N is as wide as it can be.
    width = study.width or (method.batch_size() if name == REFERENCE else study.batch_size)
    rewards = [task.reward(task.examples[i]) for i in group.indices]
    clock = SharedClock(time.process_time if _on_cpu(lm) else time.perf_counter)
    seconds: list[list[float]] = [[] for _ in rewards]
    found: dict[int, tuple[Result, float]] = {}

    def requests() -> Iterator[dts.Request]:
        for place, index in enumerate(group.indices):
            clock.start(place)
            seed = sample_seed(group.seed, index) + (0 if name == REFERENCE else 1)
            example = task.examples[index]
            yield dts.Request(
                example.prompt, rewards[place], seed, limits[place], f"{group.dataset} {example.id} {name}"
            )

    for place, result in dts.decode_many(
        lm, requests(), method=method, batch_size=width * len(rewards), width=width, max_new_tokens=study.max_tokens,
        stop=task.stop, as_completed=True, on_rollout=lambda place, _: seconds[place].append(clock.read(place)),
    ):  # fmt: skip
        found[place] = result, clock.stop(place)
        bar.update()
    records = []
    for place, index in enumerate(group.indices):  # draws are made when all clocks have stopped
        mark = {"oracle": True} if is_oracle(rewards[place]) else {}
        head = {"dataset": group.dataset, "id": task.examples[index].id, "seed": group.seed, "method": name, **mark}
        result, spent = found[place]
        records.append(outcome(head, result, study.draws, spent, seconds[place]))
    return records


def _on_cpu(lm: Any) -> bool:
    return getattr(getattr(lm, "device", None), "type", "cpu") == "cpu"


def outcome(
    head: Mapping[str, Any], result: Result, draws: int, seconds: float, reached: Sequence[float]
) -> SearchRecord:
    """A search as one record: its rollouts in order, its completions, and draws from its estimate of pi*.
    seconds: of the whole search. reached: when each rollout was finished."""
    usage, nodes = copy.copy(result.usage), len(result.tree)  # drawing adds to them
    prompt = usage.prompt_tokens - usage.cached_tokens  # what went through the model for this search
    drawn = result.sample(draws, seed=0) if result.values is not None and draws else []
    return {
        **cast("SearchRecord", head),
        "prompt_tokens": usage.prompt_tokens,
        "tokens": [r.tokens - prompt for r in result.rollouts],
        "rewards": [r.reward for r in result.rollouts],
        "tokens_reused": tokens_reused(result.tree, result.rollouts),
        "branch_depth": branch_depth(result.rollouts),
        "spent": usage.forwarded_tokens - prompt,
        "unique": usage.unique_tokens - prompt,
        "nodes": nodes,
        "model_calls": usage.model_calls,
        "seconds": seconds,
        "seconds_at": list(reached),
        "reward_calls": usage.reward_calls,
        "reward_tokens": usage.reward_tokens,
        "reward_seconds": usage.reward_seconds,
        "completions": [_completion(c) for c in result.completions],
        "draws": [_completion(c) for c in drawn],
    }


def _completion(completion: Completion) -> Found:
    return {
        "text": completion.text,
        "reward": completion.reward,
        "logprob": completion.logprob,
        "length": len(completion.token_ids),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dts.evaluation.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Study()
    parser.add_argument("--model", default=default.model, help="registry name, hub id or local folder")
    parser.add_argument("--datasets", nargs="+", default=default.datasets)
    parser.add_argument("--methods", nargs="+", default=default.methods, help="compared with best-of-n")
    parser.add_argument("--budgets", nargs="+", type=int, default=default.budgets, help="in best-of-N samples")
    parser.add_argument("--prompts", type=int, default=default.prompts, help="for each data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=default.seeds)
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, help="of a completion")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="paths of a search, one by one")
    parser.add_argument("--width", type=int, help="all prompts of a data set in flight, so many paths for each search, "
                        "of best-of-n too")  # fmt: skip
    parser.add_argument("--share", type=float, default=default.share, help="of best-of-N's tokens for the others")
    parser.add_argument("--reward-scale", type=float, default=default.reward_scale, help="lambda")
    parser.add_argument("--power", type=float, default=default.power, help="of p in the target")
    parser.add_argument("--order", default=default.order, help=f"{', '.join(ORDERS)}: of completions")
    parser.add_argument("--draws", type=int, default=default.draws, help="from the estimate of pi*")
    parser.add_argument("--data-dir", help="folder or file with data, instead of the built-in data")
    parser.add_argument("--output", type=Path, default=Path("evaluation/results/study"))
    parser.add_argument("--report", action="store_true", help="only print the tables of what --output holds")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    output, report_only = options.pop("output"), options.pop("report")
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        study = Study(**values)
        if not report_only:
            load_tasks(study)  # what is wrong with the command is known before there is a folder
            _open(study, output)
            folder = RunFolder(output)
            try:
                run(study, folder, progress=sys.stderr.isatty())
            finally:
                folder.close()
        print(write_report(output))
    except DTSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues in {output}", file=sys.stderr)
        return 130
    return 0


def _open(study: Study, output: Path) -> None:
    """Make the folder, or check that it holds the same study (other data sets and methods may join it)."""
    with reported(output):
        output.mkdir(parents=True, exist_ok=True)
    settings, path = json.loads(json.dumps(asdict(study))), output / "study.json"
    if path.exists():
        before = _read(path)
        usual = asdict(Study())  # of a folder that is older than a setting
        differ = [
            k for k in settings
            if settings[k] != before.get(k, usual[k]) and k not in ("datasets", "methods", "seeds")
        ]  # fmt: skip
        if differ:
            shown = ", ".join(f"{k} {before.get(k)!r} -> {settings[k]!r}" for k in differ)
            raise UsageError(f"--output {output} holds another study ({shown}); choose another folder")
        for key in ("datasets", "methods", "seeds"):
            settings[key] = list(dict.fromkeys([*before[key], *settings[key]]))
    write_json(path, settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        _ = [list(before[key]) for key in ("datasets", "methods", "seeds")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); restore it, or choose another --output") from error
    return dict(before)
