"""`dts decode`: the best completion of one prompt, in a terminal.

    dts decode "Use the words: rain, window." --reward prompt-keywords
    echo "Once upon a time" | dts decode --reward rewards.py:mine --method maxent-star --json
    dts decode "A colour as JSON:" --json-schema colour.json

A reward is a function of the text (a file of yours, or a module) or one of the names below.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts.constraints import Constraint, JsonSchema, Regex
from dts.errors import DTSError, UsageError
from dts.results import Result
from dts.rewards import Reward

# Rewards that need nothing but the text and the prompt.
NAMES: Mapping[str, str] = {
    "prompt-keywords": "dts.evaluation.rewards.prompted:prompt_keywords",
    "prose": "dts.evaluation.rewards.prompted:prose",
}


def build_parser() -> argparse.ArgumentParser:
    from dts.search import METHODS

    parser = argparse.ArgumentParser(
        prog="dts decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", help="text; read from standard input if not given")
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME",
                        help="registry name, hub id or local folder (default: smollm2-135m)")  # fmt: skip
    parser.add_argument("--reward", metavar="REWARD", help=f"{', '.join(NAMES)}, FILE.py:FUNCTION or MODULE:FUNCTION; "
                        "if not given, every completion has 0")  # fmt: skip
    parser.add_argument("--method", default="maxent", metavar="NAME", help=f"{', '.join(METHODS)} (default: maxent)")
    parser.add_argument("--rollouts", type=int, metavar="N", help="finished completions (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="of a completion (default: 48)")
    parser.add_argument("--reward-scale", type=float, metavar="X", help="lambda (default: 4)")
    parser.add_argument("--power", type=float, metavar="X",
                        help="of p in the target; above 1 it sharpens the model (default: 1)")  # fmt: skip
    parser.add_argument("--order", metavar="NAME",
                        help="reward, likelihood or target: what the best completion is (default: reward)")  # fmt: skip
    parser.add_argument("--require-eos", action="store_true", help="texts that the length limit cut rank last")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="every completion is JSON that is valid under this schema")
    form.add_argument("--regex", metavar="PATTERN", help="every completion matches this as a whole (syntax of Rust)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        result = _decode(options)
    except DTSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(as_json(result), ensure_ascii=False) if options.json else as_text(result))
    return 0


def _decode(options: argparse.Namespace) -> Result:
    """What can be checked is checked before the model is loaded."""
    import dts

    given = Settings(options.rollouts, options.reward_scale, options.power, options.order)
    method = make_method(options.method, given, _as_option)
    reward = None if options.reward is None else find_reward(options.reward)
    constraint = find_constraint(options.json_schema, options.regex)
    prompt = read_prompt(options.prompt)
    lm = dts.load(options.model)
    return dts.decode(
        lm, prompt, reward=reward, method=method, max_new_tokens=options.max_new_tokens, seed=options.seed,
        require_eos=options.require_eos, constraint=constraint,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a method that is chosen by name. None: not given."""

    rollouts: Any = None  # 16
    reward_scale: Any = None  # 4
    power: Any = None  # 1
    order: Any = None  # "reward"


def _as_option(name: str, value: object) -> str:
    return f"--{name.replace('_', '-')} {value}"


def make_method(name: str, given: Settings, option: Callable[[str, object], str]) -> Any:
    """The method with this name and these settings. Raises `UsageError` for a setting that it does not read.

    option: how a setting and its value are written in messages.
    """
    from dts.search import aimed
    from dts.settings import check_real, check_whole

    make = find_method(name, option("method", ""))
    for setting in _unread(make, given):
        shown = option(setting, getattr(given, setting))
        raise UsageError(f"{shown} has no effect with {option('method', name)}; leave it out, or use maxent")
    rollouts = check_whole("rollouts", _or(given.rollouts, 16), 1, allowed="a whole number >= 1")
    scale = _or(given.reward_scale, 4.0)
    check_real("reward_scale", scale, lambda value: 0 <= value < 1e300, "a number >= 0")
    return aimed(make(rollouts, float(scale)), _or(given.power, 1.0), _or(given.order, "reward"))


def _unread(make: Callable[[int, float], Any], given: Settings) -> list[str]:
    """The given settings that change nothing. Power 1 and the order "reward" are what every method has."""
    some = make(2, 2.0)
    reads = {
        "rollouts": make(1, 2.0) != some,
        "reward_scale": make(2, 1.0) != some,
        "power": hasattr(some, "power") or given.power == 1,
        "order": hasattr(some, "order") or given.order == "reward",
    }
    return [name for name, read in reads.items() if not read and getattr(given, name) is not None]


def _or(value: Any, usual: Any) -> Any:
    return usual if value is None else value


def find_method(name: str, option: str = "--method ") -> Callable[[int, float], Any]:
    """What makes the method with this name. option: what stands before the name in messages."""
    from dts.search import METHODS

    plain = name.lower().replace("_", "-")
    if plain not in METHODS:
        raise UsageError(f"{option}{name} is not known: {_nearest(plain, METHODS)}choose from {', '.join(METHODS)}")
    return METHODS[plain]


def find_constraint(json_schema: str | None, regex: str | None) -> Constraint | None:
    """The constraint of a file with a JSON schema, or of a regular expression."""
    if regex is not None:
        return Regex(regex)
    if json_schema is None:
        return None
    try:
        return JsonSchema(Path(json_schema).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--json-schema {json_schema} cannot be read: {error}") from error


def find_reward(name: str, option: str = "--reward ") -> Reward | Callable[..., Any]:
    """The reward that a name, `FILE.py:FUNCTION` or `MODULE:FUNCTION` stands for. option: as of `find_method`."""
    home, colon, attribute = NAMES.get(name, name).rpartition(":")
    if not colon:
        hint = _nearest(name, NAMES)
        raise UsageError(f"{option}{name} is not known: {hint}give {', '.join(NAMES)} or FILE.py:FUNCTION")
    try:
        module = module_of(Path(home)) if home.endswith(".py") else importlib.import_module(home)
        found = getattr(module, attribute)
    except Exception as error:  # code of the user's: it may do anything
        raise UsageError(f"{option}{name} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found) and not isinstance(found, Reward):
        raise UsageError(f"{option}{name} is {type(found).__name__}; give a function of the text, or a dts.Reward")
    return found


def module_of(path: Path) -> Any:
    """What a Python file of the user's defines."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def read_prompt(given: str | None) -> str:
    """The argument, or standard input without its last line end."""
    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt was given; write it after `dts decode`, or pipe it in")
    try:
        text = given if given is not None else sys.stdin.read().removesuffix("\n")
        text.encode()
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text; convert it first") from error
    if not text.strip():
        raise UsageError("the prompt is empty; give some text")
    return text


def as_json(result: Result) -> dict[str, Any]:
    best = result.best
    return {
        "text": best.text, "reward": best.reward, "logprob": best.logprob, "finished_by": best.finished_by,
        "method": result.method, "target": None if result.target is None else str(result.target),
        "rollouts": len(result.rollouts), "usage": result.usage.as_dict(),
    }  # fmt: skip


def as_text(result: Result) -> str:
    """The best text, its reward, and what the search cost."""
    usage = result.usage
    judged = f", of it {usage.reward_seconds:.1f} s for {usage.reward_calls} rewards" if usage.reward_calls else ""
    return (
        f"{result.best.text}\n\nreward {result.best.reward:g}\n{result.method}: {len(result.rollouts)} rollouts, "
        f"{usage.generated_tokens} tokens generated, {usage.forwarded_tokens} forwarded, {usage.seconds:.1f} s{judged}"
    )
