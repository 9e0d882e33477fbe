"""The command `python -m dts.evaluation.scores`; it lives in `dts.evaluation.studies.task_metrics`."""

from dts.evaluation.studies.task_metrics import main

if __name__ == "__main__":
    raise SystemExit(main())
