"""The command `python -m dts.evaluation.study`; it lives in `dts.evaluation.studies.equal_tokens`."""

from dts.spin import limit_spinning

if __name__ == "__main__":
    limit_spinning()
    from dts.evaluation.studies.equal_tokens import main

    raise SystemExit(main())
