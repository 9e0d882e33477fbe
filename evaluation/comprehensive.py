"""The command `python -m dts.evaluation.comprehensive`; it lives in `dts.evaluation.finetuned.cli`."""

from dts.spin import limit_spinning

if __name__ == "__main__":
    limit_spinning()
    from dts.evaluation.finetuned.cli import run_script

    raise SystemExit(run_script())
