"""The command line of the experiment runner: options in, files and a table out."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dts.errors import DTSError, UnavailableError, UsageError
from dts.evaluation.config import WANDB_MODES, ExperimentConfig

if TYPE_CHECKING:
    from dts.evaluation.backend import Backend

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Help(argparse.HelpFormatter):
    """Shows a default where it is a value, and lists as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = " ".join(action.default) if isinstance(action.default, tuple) else action.default
        if shown is None or isinstance(shown, bool) or shown == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: {shown})"


class _Parser(argparse.ArgumentParser):
    """Reports bad options like any other bad input: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run_experiments.py",
        description="Decode a data set with tree search and its baselines, and compare what they find and cost.",
        epilog="Options may be written with hyphens or underscores.",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,  # the defaults are ExperimentConfig's
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--models", nargs="+", metavar="NAME", help="registry names, hub ids or local folders")
    what.add_argument("--dataset", metavar="NAME", help="HAR, M4 or another of --list-datasets")
    what.add_argument(
        "--methods", nargs="+", metavar="NAME", help="decoding methods; the first has the plain names in W&B"
    )
    what.add_argument("--num-samples", type=int, metavar="N", help="examples to decode")
    what.add_argument("--num-rollouts", type=int, metavar="N", help="finished completions per example and method")
    what.add_argument("--max-tokens", type=int, metavar="N", help="new tokens per completion")
    what.add_argument("--seed", type=int, metavar="N", help="seed of data choice and decoding")
    how = parser.add_argument_group("how to decode")
    how.add_argument("--reward-scale", type=float, metavar="X", help="lambda of the target p(x) exp(lambda r(x))")
    how.add_argument("--temperature", type=float, metavar="X", help="of the model's distribution p")
    how.add_argument("--top-k", type=int, metavar="N", help="keep the k likeliest tokens in p")
    how.add_argument("--top-p", type=float, metavar="X", help="keep the likeliest tokens that hold this share of p")
    how.add_argument("--rollout-batch", type=int, metavar="N", help="paths decoded together")
    how.add_argument("--device", help="cpu, cuda, mps, ...; the best one at hand if not given")
    how.add_argument("--dtype", help="float32, bfloat16 or float16; if not given, float32 on the CPU")
    where = parser.add_argument_group("files and tracking")
    where.add_argument("--output-dir", metavar="DIR", help="folder for results")
    where.add_argument("--experiment-name", metavar="NAME", help="first part of the run folder's name")
    where.add_argument("--data-dir", metavar="DIR", help="folder with data files, instead of the built-in data")
    where.add_argument("--models-file", metavar="FILE", help="YAML file: more models, other sources for known names")
    where.add_argument("--wandb-mode", metavar="MODE", help=f"{', '.join(WANDB_MODES)}; default: online if logged in")
    where.add_argument("--no-wandb", dest="wandb_mode", action="store_const", const="disabled", help="no W&B")
    shown = parser.add_argument_group("output")
    shown.add_argument("--list-models", action="store_true", help="print the known models and stop")
    shown.add_argument("--list-methods", action="store_true", help="print the known methods and stop")
    shown.add_argument("--list-datasets", action="store_true", help="print the known data sets and stop")
    loud = shown.add_mutually_exclusive_group()
    loud.add_argument("--verbose", action="store_true", help="log what happens")
    loud.add_argument("--quiet", action="store_true", help="no progress bar, only the table and errors")
    defaults: dict[str, Any] = {f.name: f.default for f in fields(ExperimentConfig)}
    flags = ("list_models", "list_methods", "list_datasets", "verbose", "quiet")
    parser.set_defaults(**defaults, **dict.fromkeys(flags, False))
    return parser


def hyphenated(argv: Sequence[str]) -> list[str]:
    """Option names with hyphens for underscores; values, also those after `=`, stay as they are."""
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return result


def main(argv: Sequence[str] | None = None, backend: Backend | None = None) -> int:
    """Run the command and return its exit code. `backend` replaces models, data and decoding in tests."""
    try:
        arguments = build_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv))
        if _print_lists(arguments):
            return OK
        _set_up_logging(arguments)
        return _run(_config(arguments), arguments.quiet, backend)
    except (UsageError, UnavailableError) as error:
        return _fail(error, BAD_INPUT)
    except DTSError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _config(arguments: argparse.Namespace) -> ExperimentConfig:
    values: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in fields(ExperimentConfig)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ExperimentConfig(**values)


def _run(config: ExperimentConfig, quiet: bool, backend: Backend | None) -> int:
    from dts.evaluation.backend import default_backend  # slow imports, once the options are known to be good
    from dts.evaluation.results import RunFolder
    from dts.evaluation.runner import prepare, run
    from dts.evaluation.tracking import choose_mode, make_tracker

    if backend is None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # it would tear up ours, and litter a log file
        backend = default_backend()
    plan = prepare(config, backend)
    folder = RunFolder.create(config.output_dir, config.name)
    mode = choose_mode(config.wandb_mode)
    tracker = make_tracker(mode, folder.path, config.name)
    try:
        run(plan, folder, tracker, backend, progress=not quiet and sys.stderr.isatty())
    except KeyboardInterrupt:
        _show(folder.path, mode, quiet)
        print(f"interrupted: partial results are in {folder.path}", file=sys.stderr)
        return INTERRUPTED
    except DTSError as error:
        print(f"finished rollouts are in {folder.path}", file=sys.stderr)
        return _fail(error, FAILED)
    _show(folder.path, mode, quiet)
    return OK


def _show(path: Path, mode: str, quiet: bool) -> None:
    report = path / "report.md"
    if report.exists():
        print(report.read_text(encoding="utf-8"))
    if quiet:
        return
    print(f"Results: {path}")
    if mode == "offline":
        print(f"W&B: offline; upload with: wandb sync {path}/wandb/offline-run-*")


def _print_lists(arguments: argparse.Namespace) -> bool:
    if arguments.list_models:
        from dts.models.registry import list_models

        print(list_models(arguments.models_file))
    if arguments.list_methods:
        from dts.search import METHODS

        print("\n".join(METHODS))
    if arguments.list_datasets:
        from dts.evaluation.tasks import TASKS

        print("\n".join(f"{name:<12}{about}" for name, about in TASKS.items()))
    return bool(arguments.list_models or arguments.list_methods or arguments.list_datasets)


def _set_up_logging(arguments: argparse.Namespace) -> None:
    level = logging.INFO if arguments.verbose else logging.ERROR if arguments.quiet else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dts").setLevel(level)
    if not arguments.quiet:
        logging.getLogger("dts.fetch").setLevel(logging.INFO)  # a first run downloads: say so


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
