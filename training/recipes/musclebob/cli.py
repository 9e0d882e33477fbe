"""The commands of the recipe: `train`, and `test` with a side-by-side table and a chat."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import dts
from dts.errors import UsageError
from dts.training.command import run_command
from dts.training.extra import require_train_extra
from dts.training.recipes.musclebob.questions import choose_questions, prompt
from dts.training.recipes.musclebob.reward import SCHEMES
from dts.training.recipes.musclebob.settings import (
    DEFAULTS,
    MODEL,
    OFFLINE_MODEL,
    OUTPUT,
    PRESETS,
    Settings,
    from_options,
)

if TYPE_CHECKING:
    from dts.models.huggingface import HFModel

PROG = "python -m dts.training.recipes.musclebob"
SHOWN_ROWS = 50  # lines of the live table
SHOWN_ANSWERS = 8

log = logging.getLogger(__name__)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `train`. None means: as the preset says."""

    def option(name: str, kind: type, about: str) -> None:
        key = name[2:].replace("-", "_")
        parser.add_argument(name, type=kind, metavar="N" if kind is not str else "NAME",
                            help=f"{about} (default: {DEFAULTS[key]})")  # fmt: skip

    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}; other options come on top")
    parser.add_argument("--model", metavar="NAME", help=f"registry name, hub id or folder (default: {MODEL} where "
                        f"it is in the hub's local cache, otherwise {OFFLINE_MODEL})")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help=f"folder of the run (default: {OUTPUT}/)")
    option("--seed", int, "of everything random")
    option("--epochs", int, "passes of --num-samples prompts, with a checkpoint after each")
    option("--learning-rate", float, "of the LoRA adapter")
    option("--num-samples", int, "training prompts per epoch")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="completions per forward and backward pass (default: --num-generations)")  # fmt: skip
    option("--num-generations", int, "completions per prompt, the group")
    option("--fewshot-ratio", float, "share of training prompts that hold examples")
    parser.add_argument("--no-fewshot", action="store_true", help="the same as --fewshot-ratio 0")
    option("--fewshot-anneal", float, "let that share fall to 0 at this share of the training; 0: it stays")
    option("--fewshot-examples", int, "examples in such a prompt")
    option("--other-ratio", float, "share of training prompts about something else, where either name costs points")
    parser.add_argument("--hide-examples", action=argparse.BooleanOptionalAction, default=None,
                        help="half of a group is drawn with examples, the loss is of the bare question")  # fmt: skip
    option("--max-new-tokens", int, "longest completion")
    option("--temperature", float, "of the draws, in training and validation")
    option("--kl-coeff", float, "weight of the KL divergence from the base model")
    option("--reward", str, f"points: {', '.join(SCHEMES)}")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="validation questions (default: all)")
    parser.add_argument(
        "--resume-from-checkpoint", metavar="auto|DIR", help="continue with the newest checkpoint, or DIR"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the folder")


def train_command(arguments: argparse.Namespace) -> int:
    """Train, with a line for each step, and print the comparison."""
    require_train_extra()
    given = vars(arguments)
    if arguments.no_fewshot:
        given = {**given, "fewshot_ratio": 0.0}
    settings = from_options(arguments.preset, given)
    choose_questions(arguments.num_prompts)

    from dts.training.recipes.musclebob.report import comparison, plot_rewards
    from dts.training.recipes.musclebob.training import HISTORY, run_recipe

    logging.getLogger("dts.training.health").setLevel(logging.WARNING)  # the table has the figures of each step
    try:
        before, after = run_recipe(
            settings,
            resume=arguments.resume_from_checkpoint,
            overwrite=arguments.overwrite,
            num_prompts=arguments.num_prompts,
            on_step=StepTable(settings),
        )
    except KeyboardInterrupt:
        log.warning("continue with the same command and --resume-from-checkpoint auto")
        raise
    history = json.loads((settings.folder / HISTORY).read_text(encoding="utf-8"))
    plot_rewards(history, settings.folder / "reward_history.png")
    print(f"\n{comparison({'base': before, 'trained': after})}\n")
    print(f"files: {settings.folder}\nchat:  {PROG} test --model {settings.folder} --interactive")
    return 0


class StepTable:
    """The live table: prints steps as they come, at most about SHOWN_ROWS of a run."""

    def __init__(self, settings: Settings) -> None:
        self._total, self._scheme = settings.epochs * settings.steps.per_epoch, settings.reward
        self._every = max(1, self._total // SHOWN_ROWS)
        self._rewards: list[float] = []

    def __call__(self, step: dict[str, float]) -> None:
        from dts.training.recipes.musclebob.report import STEP_HEADER, step_line

        if not self._rewards:
            print(STEP_HEADER)
        self._rewards.append(step["mean_reward"])
        if step["step"] % self._every == 0 or step["step"] in (1, self._total):
            print(step_line(step, self._rewards[-10:], self._scheme), flush=True)


def test_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `test`."""
    parser.add_argument("--model", metavar="NAME", default=OUTPUT, help=f"a trained folder or any model ({OUTPUT})")
    parser.add_argument("--base-model", metavar="NAME", help="what to compare with (default: what the adapter names)")
    parser.add_argument("--compare-base", action="store_true", help="the base model beside it, with health checks")
    parser.add_argument("--ways", action="store_true", help="compare prompting, search and training (slow)")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="validation questions (default: all)")
    parser.add_argument("--interactive", action="store_true", help="chat; an empty line or the end of input ends it")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: as in training)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of the draws (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def test_command(arguments: argparse.Namespace) -> int:
    """Answer the validation questions, or chat."""
    questions = choose_questions(arguments.num_prompts)
    recipe = _read(Path(arguments.model) / "training_config.json").get("recipe", {})
    options: dict[str, Any] = {
        key: given if (given := getattr(arguments, key)) is not None else recipe.get(key, DEFAULTS[key])
        for key in ("max_new_tokens", "temperature")
    }
    base_name = _base_name(arguments) if arguments.compare_base or arguments.ways else None
    model = dts.load(arguments.model)
    if arguments.interactive:
        return chat(model, sys.stdin, seed=arguments.seed, **options)
    base = dts.load(base_name) if base_name is not None else None
    if arguments.ways:
        assert base is not None
        return _print_ways(model, base, questions, arguments.seed, options)
    return _print_test(model, base, questions, arguments.seed, options)


def _print_test(model: HFModel, base: HFModel | None, questions: list[Any], seed: int, options: dict[str, Any]) -> int:
    from dts.training.recipes.musclebob.report import comparison, name_table, side_by_side
    from dts.training.recipes.musclebob.validation import draw_texts, validate

    if base is None:
        texts = draw_texts(model, questions, seed=seed, **options)
        print("\n".join(f"{q.text}\n  {' '.join(text.split())}" for q, text in zip(questions, texts, strict=True)))
        print(f"\n{name_table(texts)}")
        return 0
    before = validate(base, base, questions, seed=seed, **options)
    columns = {"base": before, "trained": validate(model, base, questions, reference=before, seed=seed, **options)}
    print(f"{side_by_side(columns, SHOWN_ANSWERS)}\n\n{comparison(columns)}")
    return 0


def _print_ways(model: HFModel, base: HFModel, questions: list[Any], seed: int, options: dict[str, Any]) -> int:
    from dts.training.recipes.musclebob.report import ways_table
    from dts.training.recipes.musclebob.validation import surprise_limit
    from dts.training.recipes.musclebob.ways import compare_ways

    answers = compare_ways(model, base, questions, seed=seed, **options)
    print(ways_table(answers, surprise_limit(base, questions, options["max_new_tokens"], seed=seed)))
    return 0


def _base_name(arguments: argparse.Namespace) -> str:
    if arguments.base_model is not None:
        return str(arguments.base_model)
    named = _read(Path(arguments.model) / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise UsageError(f"--model {arguments.model} is no LoRA folder that names its base: give --base-model NAME")
    return str(named)


def _read(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def chat(model: HFModel, lines: TextIO, *, max_new_tokens: int, temperature: float, seed: int = 0) -> int:
    """Answer line by line; each is a question of its own. An empty line or the end of the input ends it."""
    from dts.training.recipes.musclebob.validation import sampler

    draw = sampler(model, max_new_tokens=max_new_tokens, temperature=temperature)
    terminal = lines.isatty()
    print("ask something; an empty line ends the chat", flush=True)
    while True:
        if terminal:
            print("you> ", end="", flush=True)
        line = lines.readline().strip()
        if not line:
            return 0
        if not terminal:
            print(f"you> {line}")  # what was piped in is not on the screen
        print(f"bob> {draw(prompt(line), seed).text.strip()}", flush=True)
        seed += 1


def train_main(argv: Sequence[str] | None = None) -> int:
    """`train_musclebob_improved.py`."""
    return run_command(f"{PROG} train", "Train a model to use the new name.", train_arguments, train_command, argv)


def test_main(argv: Sequence[str] | None = None) -> int:
    """`test_musclebob.py`."""
    return run_command(f"{PROG} test", "Ask a trained model.", test_arguments, test_command, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train` or `test` and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train_main, "test": test_main}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    print(f"usage: {PROG} {{train,test}} [options]; --help after the command lists them", file=sys.stderr)
    return 0 if words and words[0] in ("-h", "--help") else 2
