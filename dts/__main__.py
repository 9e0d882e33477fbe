"""The console command `dts`, also `python -m dts`: every subcommand is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from dts.spin import limit_spinning

COMMANDS = {
    "run": ("dts.evaluation.cli:main", "compare methods on a data set, as run_experiments.py does"),
    "decode": ("dts.evaluation.decode:main", "search for the best completion of one prompt"),
    "fetch": ("dts.fetch_command:main", "download the embedded model and data into the cache"),
    "study": ("dts.evaluation.studies.equal_tokens:main", "methods against best-of-N at equal forwarded tokens"),
    "train": ("dts.training.cli:command_main", "fine-tune: SFT, polychromic, GRPO, and their data"),
    "evaluate": ("dts.evaluation.finetuned.cli:run_script", "compare fine-tuned models on held-out prompts"),
    "report": ("dts.evaluation.report.__main__:main", "one HTML page for a run folder, or several side by side"),
    "serve": ("dts.doors.serve:main", "an OpenAI-compatible server that searches"),
    "lm-eval": ("dts.doors.harness_command:main", "lm-evaluation-harness with --model dts"),
}
USAGE = "usage: dts COMMAND [options]"


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the options over to a subcommand and returns its exit code."""
    limit_spinning()
    command, *options = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        import dts

        print(dts.__version__)
        return 0
    if not command:
        print(f"error: no command was given: choose from {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    if command not in COMMANDS:
        print(f"error: {_unknown(command)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[command][0].partition(":")
    return int(getattr(importlib.import_module(module), function)(options))


def _help() -> str:
    lines = [f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines, "", "`dts COMMAND --help` lists the options of a command."])


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown command {command!r}: {hint}choose from {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
