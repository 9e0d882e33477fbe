"""The command `python -m dts.evaluation.forecast_check`; it lives in `dts.evaluation.studies.forecast_reward`."""

from dts.evaluation.studies.forecast_reward import main

if __name__ == "__main__":
    raise SystemExit(main())
