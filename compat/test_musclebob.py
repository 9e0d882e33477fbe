#!/usr/bin/env python3
"""Asks a model of the recipe; the same as `python -m dts.training.recipes.musclebob test`. No test of pytest's."""

import _checkout  # noqa: F401

from dts.training.recipes.musclebob.cli import test_main as main

if __name__ == "__main__":
    raise SystemExit(main())
