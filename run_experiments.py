#!/usr/bin/env python3
"""Front door of the experiment runner; `--help` lists the options."""

from dts.evaluation.cli import main
from dts.models.registry import MODEL_CONFIGS
from dts.spin import limit_spinning

__all__ = ["MODEL_CONFIGS", "main"]

if __name__ == "__main__":
    limit_spinning()
    raise SystemExit(main())
