"""Compares the ratios of the last `make bench` with `baseline.json`; exit 1 where one is too high.

A baseline is a ratio measured once plus the room that noise needs: `{"test": {"ratio": 0.4, "limit": 0.6}}`. A ratio is
the median over rounds. It is a regression only if the rounds agree: the second lowest is above the limit, too. A median
above the limit without that agreement is measured again, twice at most. If the rounds still disagree, the check says
that the machine is too noisy to tell, and does not fail.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
REPEATS = 2
OK, WORSE, NOISY = "ok", "REGRESSION", "too noisy to tell"


def verdict(ratios: list[float], limit: float) -> str:
    """What the rounds say together."""
    if statistics.median(ratios) <= limit:
        return OK
    return WORSE if sorted(ratios)[min(1, len(ratios) - 1)] > limit else NOISY


def check(
    baseline: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, list[float]],
    again: Callable[[str], list[float]],
    say: Callable[[str], None] = print,
) -> int:
    """The number of tests that are worse, or were not measured. `again` measures one test anew."""
    failed = 0
    for name in sorted(set(baseline) - set(measured)):
        say(f"{name}: not measured")
        failed += 1
    for name, ratios in measured.items():
        if name not in baseline:
            say(f"{name}: {statistics.median(ratios):.3f}, no baseline")
            continue
        limit, rounds = baseline[name]["limit"], list(ratios)
        for _ in range(REPEATS):
            if verdict(rounds, limit) == NOISY:
                rounds += again(name)
        found = verdict(rounds, limit)
        failed += found == WORSE
        spread = f"{min(rounds):.3f} to {max(rounds):.3f} in {len(rounds)} rounds"
        known = f"baseline {baseline[name]['ratio']}, limit {limit}"
        say(f"{name}: {statistics.median(rounds):.3f} ({spread}), {known}: {found}")
    return failed


def read(path: Path) -> dict[str, list[float]]:
    """The ratios of all rounds by test, from what pytest-benchmark wrote."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return {b["name"]: b["extra_info"]["ratios"] for b in benchmarks if "ratios" in b["extra_info"]}


def run_again(name: str) -> list[float]:
    """One more measurement of a test, in a process of its own."""
    path = FOLDER / "again.json"
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-k", name, f"--benchmark-json={path}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    try:
        return read(path)[name]
    finally:
        path.unlink()


def main() -> int:
    baseline = json.loads((FOLDER / "baseline.json").read_text())
    return 1 if check(baseline, read(FOLDER / "latest.json"), run_again) else 0


if __name__ == "__main__":
    sys.exit(main())
