"""The command line of the experiment runner: options in, files and a table out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from dts.errors import DTSError, UnavailableError, UsageError
from dts.evaluation.experiment.config import (
    ENGINES,
    ORDERS,
    QUANTIZATIONS,
    WANDB_MODES,
    ExperimentConfig,
    named,
    read_config_file,
)
from dts.evaluation.experiment.engine import find_engine
from dts.evaluation.experiment.plan import prepare
from dts.evaluation.experiment.resume import FREE, check_same, stored_config
from dts.evaluation.tracking import TRACKERS, choose_mode, make_tracker

if TYPE_CHECKING:
    from dts.evaluation.experiment.backend import Backend
    from dts.evaluation.experiment.plan import Plan
    from dts.evaluation.records import SampleRecord

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Reports bad options like any other bad input: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """Options that are not given are absent from what it parses: the defaults are `ExperimentConfig`'s."""
    parser = _Parser(
        prog="run_experiments.py",
        description="Decode data sets with tree search and its baselines, and compare what they find and cost.",
        epilog="Options may be written with hyphens or underscores; those given win over those of --config.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = {f.name: f.default for f in fields(ExperimentConfig)}
    _add_what(parser.add_argument_group("what to run"), defaults)
    _add_how(parser.add_argument_group("how to decode"), defaults)
    _add_where(parser.add_argument_group("files and tracking"), defaults)
    _add_shown(parser.add_argument_group("output"))
    return parser


def _adder(group: Any, defaults: dict[str, Any]) -> Callable[..., None]:
    """Adds the option of a field, with its default in the help."""

    def add(name: str, *others: str, help: str, **more: Any) -> None:
        default = defaults[name.removeprefix("--").replace("-", "_")]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        group.add_argument(name, *others, help=help if shown is None else f"{help} (default: {shown})", **more)

    return add


def _add_what(group: Any, defaults: dict[str, Any]) -> None:
    add = _adder(group, defaults)
    add("--models", nargs="+", metavar="NAME", help="registry names, hub ids or local folders")
    add("--datasets", "--dataset", nargs="+", metavar="NAME", help="HAR, M4 or others of --list-datasets")
    add("--methods", nargs="+", metavar="NAME", help="decoding methods; the first has the plain names in W&B")
    add("--seeds", "--seed", nargs="+", type=int, metavar="N", help="seeds of decoding; each decodes every example")
    add("--num-samples", type=int, metavar="N", help="examples to decode of each data set")
    add("--num-rollouts", type=int, metavar="N", help="finished completions per example and method")
    add("--max-tokens", type=int, metavar="N", help="new tokens per completion")
    add("--data-seed", type=int, metavar="N", help="seed of the choice of examples")
    group.add_argument("--config", metavar="FILE", help="YAML file of options, see configs/")
    group.add_argument("--resume", metavar="DIR", help="continue with the run in this folder; needs no other option")
    group.add_argument("--dry-run", action="store_true", help="print what would be done and its cost, and stop")
    group.add_argument("--tokens-per-second", type=float, metavar="X", help="rate for the times of --dry-run")


def _add_how(group: Any, defaults: dict[str, Any]) -> None:
    add = _adder(group, defaults)
    add("--reward-scale", type=float, metavar="X", help="lambda of the target p(x)^power exp(lambda r(x))")
    add("--power", type=float, metavar="X", help="of p in the target; above 1 it sharpens the model")
    add("--order", metavar="NAME", help=f"{', '.join(ORDERS)}: what maxent and maxent-star rank completions by")
    add("--require-eos", action="store_true", help="texts that --max-tokens cut are not in the target, and rank last")
    add("--temperature", type=float, metavar="X", help="of the model's distribution p")
    add("--top-k", type=int, metavar="N", help="keep the k likeliest tokens in p")
    add("--top-p", type=float, metavar="X", help="keep the likeliest tokens that hold this share of p")
    add("--rollout-batch", type=int, metavar="N", help="paths of one search; if not given, as memory allows")
    add("--prompts-at-once", type=int, metavar="N",
        help="searches in one batch; if not given, as many as make 64 paths, or 1 with --max-kv-bytes")  # fmt: skip
    add("--reward-timeout", type=float, metavar="SECONDS", help="stop where a reward takes longer for a completion")
    add("--max-kv-bytes", metavar="SIZE", help="bound on keys and values of the searches under way, such as 2GiB")
    add("--device", help="cpu, cuda, mps, ...; the best one at hand if not given")
    add("--device-map", metavar="MAP", help="auto: spread each model over the devices there are")
    add("--dtype", help="float32, bfloat16 or float16; if not given, float32 on the CPU")
    add("--quantization", metavar="KIND", help=f"{' or '.join(QUANTIZATIONS)}, with bitsandbytes")
    add("--engine", metavar="NAME", help=f"{' or '.join(ENGINES)}: this process, or the workers of a Ray cluster")
    add("--workers", type=int, metavar="N", help="of --engine ray, a model each; one per GPU, or machine, if not given")


def _add_where(group: Any, defaults: dict[str, Any]) -> None:
    add = _adder(group, defaults)
    add("--output-dir", metavar="DIR", help="folder for results")
    add("--experiment-name", metavar="NAME", help="first part of the run folder's name")
    add("--data-dir", metavar="DIR", help="folder with data files, instead of the built-in data")
    add("--models-file", metavar="FILE", help="YAML file: more models, other sources for known names")
    add("--save-trees", type=int, metavar="N", help="keep the search trees of the first N samples for the report")
    add("--tracker", metavar="NAME", help=", ".join(TRACKERS))
    add("--wandb-mode", metavar="MODE", help=f"{', '.join(WANDB_MODES)}; online if logged in where not given")
    group.add_argument("--no-wandb", dest="wandb_mode", action="store_const", const="disabled", help="no W&B")


def _add_shown(group: Any) -> None:
    group.add_argument("--list-models", action="store_true", help="print the known models and stop")
    group.add_argument("--list-methods", action="store_true", help="print the known methods and stop")
    group.add_argument("--list-datasets", action="store_true", help="print the known data sets and stop")
    loud = group.add_mutually_exclusive_group()
    loud.add_argument("--verbose", action="store_true", help="log what happens")
    loud.add_argument("--quiet", action="store_true", help="no progress bar, only the table and errors")


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
        options = vars(build_parser().parse_args(hyphenated(sys.argv[1:] if argv is None else argv)))
        if _print_lists(options):
            return OK
        _set_up_logging(options)
        return _run(options, backend, quiet="quiet" in options)
    except (UsageError, UnavailableError) as error:
        return _fail(error, BAD_INPUT)
    except (DTSError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, by field name: those of the file, and over them those of the command line."""
    given = read_config_file(options["config"]) if "config" in options else {}
    names = {f.name for f in fields(ExperimentConfig)}
    return given | named({name: value for name, value in options.items() if name in names})


def _default_backend() -> Backend:
    from transformers.utils import logging as transformers_logging

    from dts.evaluation.experiment.backend import default_backend

    transformers_logging.disable_progress_bar()  # it would tear up ours, and litter a log file
    return default_backend()


def _run(options: Mapping[str, Any], backend: Backend | None, *, quiet: bool) -> int:
    given, resumed = settings(options), Path(options["resume"]) if "resume" in options else None
    config = stored_config(resumed, given) if resumed else ExperimentConfig(**given)
    here = replace(config, **{name: given[name] for name in FREE if name in given})
    config = replace(config, reward_timeout=here.reward_timeout, prompts_at_once=here.prompts_at_once)
    mode = choose_mode(here.wandb_mode) if here.tracker == "wandb" else "disabled"
    make_tracker(mode, Path(), config.name, here.tracker)  # raises, before there is a folder, if it lacks a package
    if "workers" in given and here.engine == "local":
        raise UsageError(f"--workers {here.workers} has no use with --engine local; add --engine ray")
    engine = find_engine(here.engine, here.workers)  # slow imports from here on: the options are known to be good

    from dts.evaluation.experiment.run import run
    from dts.evaluation.run_folder import RunFolder

    backend = backend or _default_backend()
    plan = prepare(config, backend)
    if resumed:
        check_same(resumed, plan)
    if "dry_run" in options:
        return _print_plan(plan, resumed, options.get("tokens_per_second"))
    folder = RunFolder(resumed) if resumed else RunFolder.create(config.output_dir, config.name)
    tracker = make_tracker(mode, folder.path, config.name, here.tracker)
    try:
        with _terminated_like_interrupted():
            summary = run(plan, folder, tracker, backend, engine, progress=not quiet and sys.stderr.isatty())
    except KeyboardInterrupt:
        _show(folder.path, mode, quiet)
        print(
            f"interrupted: partial results are in {folder.path}; continue with --resume {folder.path}", file=sys.stderr
        )
        return INTERRUPTED
    except UsageError:
        raise
    except (DTSError, OSError) as error:
        print(f"finished rollouts are in {folder.path}; continue with --resume {folder.path}", file=sys.stderr)
        return _fail(error, FAILED)
    _show(folder.path, mode, quiet)
    if not quiet:
        _show_won(summary)
    return OK


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A batch system ends a job by SIGTERM and leaves it some seconds: enough to sum up what is there."""
    if threading.current_thread() is not threading.main_thread():  # only that one may choose what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plan(plan: Plan, resumed: Path | None, tokens_per_second: float | None) -> int:
    from dts.evaluation.experiment.estimate import estimate
    from dts.evaluation.run_folder import read_jsonl

    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise UsageError(f"--tokens-per-second {tokens_per_second} is not allowed: it must be a number > 0")
    file = resumed / "samples.jsonl" if resumed else None
    done = cast("list[SampleRecord]", read_jsonl(file) if file and file.exists() else [])
    print(estimate(plan, done, tokens_per_second))
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


def _show_won(summary: Mapping[str, Any]) -> None:
    """The last lines, where the eye is when a run ends: what the search won."""
    from dts.evaluation.report.verdict import sentence

    for verdict in summary["verdicts"]:
        print(f"\n{sentence(verdict)}")


def _print_lists(options: Mapping[str, Any]) -> bool:
    if "list_models" in options:
        from dts.models.registry import list_models

        print(list_models(options.get("models_file")))
    if "list_methods" in options:
        from dts.search import METHODS

        print("\n".join(METHODS))
    if "list_datasets" in options:
        from dts.evaluation.tasks import TASKS

        print("\n".join(f"{name:<21}{about}" for name, about in TASKS.items()))
    return not {"list_models", "list_methods", "list_datasets"}.isdisjoint(options)


def _set_up_logging(options: Mapping[str, Any]) -> None:
    level = logging.INFO if "verbose" in options else logging.ERROR if "quiet" in options else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dts").setLevel(level)
    if "quiet" not in options:
        logging.getLogger("dts.fetch").setLevel(logging.INFO)  # a first run downloads: say so


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
