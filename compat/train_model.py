#!/usr/bin/env python3
"""Trains one config of configs/experiments; `--help` lists the options. The same as `python -m dts.training train`."""

import _checkout  # noqa: F401

from dts.training.cli import train_main as main

if __name__ == "__main__":
    raise SystemExit(main())
