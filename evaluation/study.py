"""The command `python -m dts.evaluation.study`; it lives in `dts.evaluation.studies.equal_tokens`."""

from dts.evaluation.studies.equal_tokens import main

if __name__ == "__main__":
    raise SystemExit(main())
