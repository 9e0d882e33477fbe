"""The command `python -m dts.evaluation.exact`; it lives in `dts.evaluation.studies.exact`."""

from dts.spin import limit_spinning

if __name__ == "__main__":
    limit_spinning()
    from dts.evaluation.studies.exact import main

    raise SystemExit(main())
