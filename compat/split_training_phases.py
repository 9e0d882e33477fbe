"""Another name of `python -m dts.training.split`."""

import _checkout  # noqa: F401

from dts.training.split import run_script

if __name__ == "__main__":
    raise SystemExit(run_script())
