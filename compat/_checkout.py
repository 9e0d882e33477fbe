"""Puts the checkout on the import path, so that these scripts run in one that was not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dts.spin import limit_spinning  # found by the line above

limit_spinning()
