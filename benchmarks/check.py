"""Compares the ratios of the last `make bench` with `baseline.json`; exit 1 where one is too high.

A baseline is a ratio measured once plus the room that noise needs: `{"test": {"ratio": 0.4, "limit": 0.6}}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    baseline = json.loads((FOLDER / "baseline.json").read_text())
    latest = json.loads((FOLDER / "latest.json").read_text())
    measured = {b["name"]: b["extra_info"]["ratio"] for b in latest["benchmarks"] if "ratio" in b["extra_info"]}
    failed = sorted(set(baseline) - set(measured))
    for name in failed:
        print(f"{name}: not measured")
    for name, ratio in measured.items():
        if name not in baseline:
            print(f"{name}: {ratio:.3f}, no baseline")
            continue
        worse = ratio > baseline[name]["limit"]
        failed += [name] * worse
        print(f"{name}: {ratio:.3f}, baseline {baseline[name]['ratio']}, limit {baseline[name]['limit']}"
              + (" REGRESSION" if worse else ""))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
