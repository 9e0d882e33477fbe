"""The command `python -m dts.evaluation.comprehensive`; it lives in `dts.evaluation.finetuned.cli`."""

from dts.evaluation.finetuned.cli import run_script

if __name__ == "__main__":
    raise SystemExit(run_script())
