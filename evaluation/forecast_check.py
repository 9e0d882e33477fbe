"""The command `python -m dts.evaluation.forecast_check`; it lives in `dts.evaluation.studies.forecast_reward`."""

from dts.spin import limit_spinning

if __name__ == "__main__":
    limit_spinning()
    from dts.evaluation.studies.forecast_reward import main

    raise SystemExit(main())
