"""The study that decides: methods x prompts x seeds at equal forwarded tokens, on a real model.

    python -m dts.evaluation.study --datasets keyword har m4 --output DIR

Best-of-N at the largest budget sets the tokens; every other method gets a share of them. Each search is one line of
DIR/study.jsonl, written when it is finished; the same command continues where it was interrupted, and `--report DIR`
prints the tables of `equal_tokens_report` again. Tokens are those forwarded after the prompt, which every method pays
once.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from dts.errors import DTSError, UsageError
from dts.evaluation.experiment.decode_job import sample_seed
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
    share: float = 0.5  # of the reference's tokens that every other method may forward
    reward_scale: float = 16.0
    draws: int = 16  # from the estimate of pi*, by methods that keep one
    data_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("datasets", "methods", "budgets", "seeds"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is empty; give at least one")
        for name in ("prompts", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is not allowed; give 1 or more")
        if not 0 < self.share <= 1:
            raise UsageError(f"--share {self.share} is not allowed; give a number above 0 and up to 1")
        if min(self.budgets) < 1:
            raise UsageError(f"--budgets {min(self.budgets)} is not allowed; give 1 or more")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UsageError(f"--seeds {' '.join(map(str, self.seeds))} is not allowed; give 0 to 4294967295")
        if not 0 <= self.reward_scale < math.inf or self.draws < 0:
            raise UsageError(
                f"--reward-scale {self.reward_scale} --draws {self.draws} is not allowed; give numbers >= 0"
            )


@dataclass(frozen=True, slots=True)
class Cell:
    """One prompt under one seed; all methods of a cell are compared with each other."""

    dataset: str
    index: int
    seed: int


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
    cells = [
        Cell(name, i, seed) for name, task in tasks.items() for i in range(len(task.examples)) for seed in study.seeds
    ]
    folder.keep("study", folder.records("study"))  # without a last line that was cut off
    done = {_key(record): record for record in cast("list[SearchRecord]", folder.records("study"))}
    lm = dts.load(study.model)
    with tqdm(total=len(cells) * (1 + len(study.methods)), unit="search", disable=not progress) as bar:
        for cell in cells:
            for record in _of_cell(study, cell, tasks[cell.dataset], lm, done):
                if _key(record) not in done:
                    folder.append("study", record)
                    folder.sync("study")
                bar.update()


def _key(record: SearchRecord) -> tuple[Any, ...]:
    return record["dataset"], record["id"], record["seed"], record["method"]


def _of_cell(study: Study, cell: Cell, task: Task, lm: Any, done: dict[Any, SearchRecord]) -> Iterator[SearchRecord]:
    """The reference, whose tokens are the budget, then every method."""
    from dts.search import METHODS

    example = task.examples[cell.index]
    head = {"dataset": cell.dataset, "id": example.id, "seed": cell.seed}

    def search(name: str, rollouts: int, budget: Budget | None) -> SearchRecord:
        if (known := done.get((*head.values(), name))) is not None:
            return known
        import dts

        reward = task.reward(example)
        result = dts.decode(
            lm,
            example.prompt,
            reward=reward,
            method=METHODS[name](rollouts, study.reward_scale),
            max_new_tokens=study.max_tokens,
            stop=task.stop,
            batch_size=study.batch_size if name != REFERENCE else None,  # samples learn nothing from each other
            seed=sample_seed(cell.seed, cell.index) + (0 if name == REFERENCE else 1),
            budget=budget,
        )
        mark = {"oracle": True} if is_oracle(reward) else {}
        return outcome({**head, "method": name, **mark}, result, study.draws)

    reference = search(REFERENCE, max(study.budgets), None)
    yield reference
    limit = Budget(tokens=reference["prompt_tokens"] + math.ceil(study.share * reference["tokens"][-1]))
    for name in study.methods:
        yield search(name, ENDLESS, limit)


def outcome(head: Mapping[str, Any], result: Result, draws: int) -> SearchRecord:
    """A search as one record: its rollouts in order, its completions, and draws from its estimate of pi*."""
    usage, prompt, nodes = copy.copy(result.usage), result.usage.prompt_tokens, len(result.tree)  # drawing adds to them
    drawn = result.sample(draws, seed=0) if result.values is not None and draws else []
    return {
        **cast("SearchRecord", head),
        "prompt_tokens": prompt,
        "tokens": [r.tokens - prompt for r in result.rollouts],
        "rewards": [r.reward for r in result.rollouts],
        "start_depths": [r.start_depth for r in result.rollouts],
        "spent": usage.forwarded_tokens - prompt,
        "unique": usage.unique_tokens - prompt,
        "nodes": nodes,
        "model_calls": usage.model_calls,
        "seconds": usage.seconds,
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
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--share", type=float, default=default.share, help="of best-of-N's tokens for the others")
    parser.add_argument("--reward-scale", type=float, default=default.reward_scale, help="lambda")
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
        differ = [k for k in settings if settings[k] != before.get(k) and k not in ("datasets", "methods", "seeds")]
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
