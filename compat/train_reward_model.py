"""Another name of `python -m dts.training.reward_model`."""

import _checkout  # noqa: F401

from dts.training.reward_model import run_script

if __name__ == "__main__":
    raise SystemExit(run_script())
