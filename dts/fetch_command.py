"""`dts fetch`: brings the embedded model and the offline data sets into the cache."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dts.errors import DTSError
from dts.fetch import ITEMS, cache_dir, fetch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    about = "; ".join(f"{item.name}: {item.about}" for item in ITEMS.values())
    parser = argparse.ArgumentParser(prog="dts fetch", description=__doc__, epilog=about)
    parser.add_argument("names", nargs="*", help=f"what to fetch; default: {' '.join(ITEMS)}")
    parser.add_argument("--cache", type=Path, help=f"the cache folder; default: {cache_dir()}".replace("%", "%%"))
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for folder in fetch(options.names or None, cache=options.cache):
            print(folder)
    except DTSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-made was left in the cache", file=sys.stderr)
        return 130
    return 0
