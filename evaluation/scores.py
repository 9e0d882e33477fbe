"""The command `python -m dts.evaluation.scores`; it lives in `dts.evaluation.studies.task_metrics`."""

from dts.spin import limit_spinning

if __name__ == "__main__":
    limit_spinning()
    from dts.evaluation.studies.task_metrics import main

    raise SystemExit(main())
