"""Another name of `python -m dts.evaluation.comprehensive`."""

import _checkout  # noqa: F401

from dts.evaluation.finetuned.cli import run_script

if __name__ == "__main__":
    raise SystemExit(run_script())
