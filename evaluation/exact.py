"""The command `python -m dts.evaluation.exact`; it lives in `dts.evaluation.studies.exact`."""

from dts.evaluation.studies.exact import main

if __name__ == "__main__":
    raise SystemExit(main())
