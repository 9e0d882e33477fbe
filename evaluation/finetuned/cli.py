"""Compares fine-tuned models on held-out prompts: four-way (`evaluate_comprehensive`), or a baseline against two
polychromic strengths (`evaluate_three_models`).

python -m dts.evaluation.comprehensive --baseline-lora DIR [DIR ...] --polychromic-lora DIR ... --test-data FILE
    --output DIR
python -m dts.evaluation.comprehensive evaluate_three_models --baseline-lora DIR --moderate-lora DIR
    --aggressive-lora DIR --test-data FILE

Every option takes one folder per training seed, in the same order everywhere.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.evaluation.finetuned.compare import (
    FOUR_WAY,
    SCREEN,
    THREE,
    CompareSettings,
    compare_models,
    compare_three,
)
from dts.evaluation.finetuned.judge import ANTHROPIC_MODEL, ANTHROPIC_URL, Judge
from dts.evaluation.finetuned.replies import CODING, CODING_ALL
from dts.training.command import run_command

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate_comprehensive`."""
    for name, title in FOUR_WAY.items():
        option = f"--{name.replace('_', '-')}" + ("" if name in ("grpo_baseline", "grpo_polychromic") else "-lora")
        parser.add_argument(option, dest=name, nargs="+", metavar="DIR", default=[], help=f"{title}, a folder per seed")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR[,DIR]",
                        help="another model, compared with the baseline; may be repeated")  # fmt: skip
    _add_protocol(parser, output="output/evaluation/comprehensive")
    parser.add_argument("--dashboard", action="store_true", help="write a page on reward hacking: dashboard.html")
    parser.add_argument("--tokens", nargs="+", type=int, default=[], metavar="N",
                        help="also compare each model's checkpoint nearest to N drawn tokens")  # fmt: skip
    parser.add_argument("--checks", nargs="+", default=[], metavar="MODULE:FUNCTION",
                        help="rewards in [0, 1] as measures, for prompts without human replies")  # fmt: skip
    parser.add_argument("--screen", metavar="MODEL",
                        help="only the prompts whose pass@10 by this model, on samples of their own, is "
                             f"{SCREEN[0]:g} to {SCREEN[1]:g}")  # fmt: skip
    judge = parser.add_argument_group("judge (off unless one of these is given)")
    judge.add_argument("--judge-url", metavar="URL", help="chat-completions or Anthropic messages endpoint")
    judge.add_argument("--judge-model", metavar="NAME", help="model at that endpoint")
    judge.add_argument(
        "--anthropic-key", nargs="?", const="", metavar="KEY",
        help="key of the judge; without a value, from ANTHROPIC_API_KEY, which keeps it out of the process list",
    )  # fmt: skip
    judge.add_argument("--judge-items", type=int, default=50, metavar="N", help="prompts per pair")


def _add_protocol(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument(
        "--test-data",
        required=True,
        metavar="FILE",
        help=f"held-out JSON Lines file, or {CODING} (its test problems), or {CODING_ALL}",
    )
    parser.add_argument("--train-data", metavar="FILE", help="rows on which GRPO's heuristic reward was fitted")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help=f"default: {output}")
    parser.add_argument("--resume", action="store_true", help="continue with the replies that the output folder has")
    for name, default in (("max_examples", 50), ("samples", 10), ("max_tokens", 48), ("temperature", 1.0), ("seed", 0)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N",
                            help=f"default: {default}")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """`evaluate_comprehensive`."""
    models = {name: getattr(args, name) for name in FOUR_WAY if getattr(args, name)}
    models |= _others(args.model)
    settings = _protocol(args, judge_items=args.judge_items, checks=tuple(args.checks),
                         dashboard=args.dashboard, tokens=tuple(args.tokens), screen=args.screen)  # fmt: skip
    summary = compare_models(models, settings, args.output, _make_judge(args), resume=args.resume)
    for entry in summary["questions"]:
        log.info("%s %s", entry["question"], entry["answer"])
    log.info("results: %s", args.output)
    return 1 if summary["judge"] and summary["judge"]["error"] else 0


def _others(given: Sequence[str]) -> dict[str, list[str]]:
    found = {}
    for text in given:
        name, equals, sources = text.partition("=")
        if not (name and equals and all(sources.split(","))) or name in FOUR_WAY or name in found:
            raise UsageError(f"--model {text} is not allowed; give a new name and folders, such as other=DIR,DIR")
        found[name] = sources.split(",")
    return found


def _protocol(args: argparse.Namespace, **more: Any) -> CompareSettings:
    names = ("test_data", "train_data", "max_examples", "samples", "max_tokens", "temperature", "seed")
    return CompareSettings(**{name: getattr(args, name) for name in names}, **more)


def _make_judge(args: argparse.Namespace) -> Judge | None:
    if args.judge_url is None and args.anthropic_key is None:
        return None
    if args.judge_url and not args.judge_model:
        raise UsageError("--judge-url needs --judge-model, the model's name at that endpoint")
    key = args.anthropic_key or os.environ.get("ANTHROPIC_API_KEY")
    if not args.judge_url and not key:
        raise UsageError("--anthropic-key has no value and ANTHROPIC_API_KEY is not set; give one of them")
    return Judge(
        args.judge_url or ANTHROPIC_URL, args.judge_model or ANTHROPIC_MODEL, args.output / "judge_cache.jsonl", key
    )


def add_three_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate_three_models`."""
    for name, title in THREE.items():
        parser.add_argument(f"--{name}-lora", dest=name, nargs="+", metavar="DIR", default=[],
                            help=f"{title}, a folder per seed")  # fmt: skip
    _add_protocol(parser, output="output/evaluation")


def main_three(args: argparse.Namespace) -> int:
    """`evaluate_three_models`."""
    models = {name: getattr(args, name) for name in THREE if getattr(args, name)}
    for name, summary in compare_three(models, _protocol(args), args.output, resume=args.resume).items():
        found = next(iter(summary["verdicts"].values()))
        gain = found["improvement"]
        log.info("%s: diversity %+.1f %% [%+.1f, %+.1f], band %s, quality kept: %s", name, 100 * gain["value"],
                 100 * gain["low"], 100 * gain["high"], found["band"], found["quality_kept"])  # fmt: skip
    log.info("results: %s", args.output)
    return 0


def run_script(argv: Sequence[str] | None = None) -> int:
    """Either command, with its exit code; `evaluate_three_models` as the first word chooses the second."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["evaluate_three_models"]:
        return run_command("evaluate_three_models", __doc__, add_three_arguments, main_three, words[1:])
    return run_command("evaluate_comprehensive", __doc__, add_arguments, main, words)
