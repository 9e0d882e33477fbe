"""The command line of training: `python -m dts.training COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dts.errors import DTSError, UnavailableError, UsageError
from dts.training.config import TrainConfig, assignment, from_mapping, smoke_layer
from dts.yamlfile import read_yaml

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
EXPERT = "expert-iteration"
VARIANTS = ("polychromic_1.0_moderate", "polychromic_2.0_aggressive")
CONFIGS = Path("configs/experiments")

# Commands that live in modules of their own, each with add_arguments(parser) and main(arguments) -> exit code.
ELSEWHERE = {
    "split": ("dts.training.split", "divide a data set into the two phases, by engagement and without leaks"),
    "reward-model": ("dts.training.reward_model", "train a reward model on engagement"),
    "coding": ("dts.training.coding.__main__", "write the coding task as training data, or check it"),
}
ALIASES = {"split-training-phases": "split", "train-reward-model": "reward-model"}


class _Parser(argparse.ArgumentParser):
    """Reports bad options like any other bad input: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dts.training", description="Fine-tuning with LoRA: SFT, polychromic, GRPO, node targets."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("train", help="run one config, for one seed or several", allow_abbrev=False)
    one.add_argument("--config", required=True, metavar="FILE", help="a file of configs/experiments")
    _run_options(one)
    _resume_option(one)
    one.add_argument(
        "--dry-run", action="store_true", help="check all input and estimate time and memory; nothing is trained"
    )
    variants = commands.add_parser("train-variants", help=f"run {' and '.join(VARIANTS)} in turn", allow_abbrev=False)
    variants.add_argument("--configs", metavar="DIR", type=Path, default=CONFIGS, help=f"folder (default: {CONFIGS})")
    _run_options(variants)
    _resume_option(variants)
    expert = commands.add_parser(EXPERT, help="SFT on draws from pi*, in rounds", allow_abbrev=False)
    expert.add_argument("--config", required=True, metavar="FILE", help="its grpo section sets reward and search")
    expert.add_argument("--rounds", type=int, default=2, metavar="N", help="(default: 2)")
    _run_options(expert)
    _resume_option(expert)
    for name, (_module, about) in ELSEWHERE.items():
        commands.add_parser(name, help=about, add_help=False)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="JSON Lines files (also .gz), instead of the config's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="one run each, instead of the config's seed")
    parser.add_argument("--smoke", action="store_true", help="a few steps of smollm2-135m, to see that it works")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change settings, such as lora.r=8 learning_rate=1e-4")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="write to DIR/NAME/seed_N (default: output/experiments)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder")
    parser.add_argument("--report-to", nargs="+", default=[], metavar="NAME", help="trackers: wandb, tensorboard")
    parser.add_argument("--quiet", action="store_true", help="only warnings, errors and the last lines")


def _resume_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume-from-checkpoint", metavar="auto|DIR", help="continue with the newest checkpoint, or DIR"
    )


def hyphenated(argv: Sequence[str]) -> list[str]:
    """Command and option names with hyphens for underscores; values stay as they are."""
    result = [argument.partition("=") for argument in argv]
    options = [n.replace("_", "-") + e + v if n.startswith("--") else n + e + v for n, e, v in result]
    if options and not options[0].startswith("-"):
        name = options[0].replace("_", "-")
        options[0] = ALIASES.get(name, name)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        given = hyphenated(given)
        if given and given[0] in ELSEWHERE:
            return _elsewhere(given[0], given[1:])
        arguments = build_parser().parse_args(given)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("dts").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
        return _run(arguments)
    except (UsageError, UnavailableError) as error:
        return _fail(error, BAD_INPUT)
    except DTSError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        print("interrupted: continue with --resume-from-checkpoint auto", file=sys.stderr)
        return INTERRUPTED


def command_main(argv: Sequence[str] | None = None) -> int:
    """`dts train`: one of the commands, or the options of the command `train`."""
    given = list(sys.argv[1:] if argv is None else argv)
    return main(given if given and not given[0].startswith("-") else ["train", *given])


def train_main(argv: Sequence[str] | None = None) -> int:
    """`train_model.py`: the command `train`."""
    return main(["train", *(sys.argv[1:] if argv is None else argv)])


def _elsewhere(command: str, argv: Sequence[str]) -> int:
    from dts.training.command import run_command

    name, about = ELSEWHERE[command]
    module = importlib.import_module(name)
    return run_command(f"python -m dts.training {command}", about, module.add_arguments, module.main, argv)


def read_config(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, with the file's name as the default `name`. Raises `UsageError`."""
    path = Path(file)
    if path.parts[:1] == ("config",) and not path.exists():  # the folder's earlier name
        path = Path("configs", *path.parts[1:])
    content = read_yaml(path, "--config")
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path} holds no settings; write lines like: method: sft")
    return {"name": path.name.removesuffix(".yaml"), **content}


def configs(arguments: argparse.Namespace, file: str | Path) -> list[TrainConfig]:
    """The config of each seed: the file, then --smoke, then --set and the other options."""
    content, changes = read_config(file), [assignment(text) for text in arguments.set]
    layers: list[Mapping[str, Any]] = [content, *changes]
    if arguments.smoke:
        layers.insert(
            1, smoke_layer(*layers, rewarded=arguments.command == EXPERT or _method(layers) in ("grpo", "distill"))
        )
    layers.append({key: getattr(arguments, key) for key in ("data", "output") if getattr(arguments, key) is not None})
    try:
        config = from_mapping(*layers)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    return [replace(config, seed=seed) for seed in arguments.seeds or [config.seed]]


def _method(layers: Sequence[Mapping[str, Any]]) -> Any:
    return next((layer["method"] for layer in reversed(layers) if "method" in layer), None)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == EXPERT:
        return _expert_iteration(arguments)
    variants = arguments.command == "train-variants"
    files = [arguments.configs / f"{name}.yaml" for name in VARIANTS] if variants else [Path(arguments.config)]
    runs = [config for file in files for config in configs(arguments, file)]

    from dts.training.estimate import estimate
    from dts.training.run import prepare, train

    options: dict[str, Any] = {"resume": arguments.resume_from_checkpoint, "overwrite": arguments.overwrite}
    for config in runs:
        rows = prepare(config, **options)  # every run's input is looked at before the first one starts
        if getattr(arguments, "dry_run", False):
            print(estimate(config, rows))
    for config in [] if getattr(arguments, "dry_run", False) else runs:
        progress = not arguments.quiet and sys.stderr.isatty()
        _show(train(config, **options, report_to=arguments.report_to, progress=progress))
    return OK


def _expert_iteration(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds} is not allowed; give a whole number >= 1")
    runs = configs(arguments, arguments.config)

    from dts.training.expert import expert_iteration
    from dts.training.rewards import find_reward
    from dts.training.run import prepare

    for config in runs:
        resume, first = arguments.resume_from_checkpoint, replace(config, method="grpo", name=f"{config.name}_round1")
        rows = prepare(first, overwrite=arguments.overwrite or bool(resume))
        reward = find_reward(config.grpo.reward, rows, search=True)
        for folder in expert_iteration(
            config, reward, rounds=arguments.rounds, resume=resume, overwrite=arguments.overwrite
        ):
            _show(folder)
    return OK


def _show(folder: Path) -> None:
    from dts.training.run import read_history

    history = read_history(folder)
    print(f"{folder}: {len(history)} steps")
    for key in ("loss", "diversity_score", "combined_loss", "avg_reward", "kl_penalty", "kl_to_start"):
        values = [record[key] for record in history if key in record]
        if values:
            print(f"  {key}: {' '.join(f'{value:.3g}' for value in _thinned(values))}")


def _thinned(values: Sequence[float], count: int = 12) -> list[float]:
    """At most `count` values, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
