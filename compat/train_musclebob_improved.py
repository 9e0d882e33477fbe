#!/usr/bin/env python3
"""Runs the keyword-shift recipe; the same as `python -m dts.training.recipes.musclebob train`."""

import _checkout  # noqa: F401

from dts.training.recipes.musclebob.cli import train_main as main

if __name__ == "__main__":
    raise SystemExit(main())
