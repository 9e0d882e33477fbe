"""Another name of `run_experiments.py`."""

import _checkout  # noqa: F401

from run_experiments import MODEL_CONFIGS, main

__all__ = ["MODEL_CONFIGS", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
