"""What idle threads that spin cost on a quiet and on a busy machine: one table.

    python benchmarks/busy.py --rounds 3

Each cell is the median over rounds of the seconds of one search (DTS*, the embedded model, about 100 tokens) in a
process of its own; the settings take turns within a round. "Beside one busy core": a process that computes all the time
runs on the machine, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def measure() -> None:
    """One process: load, warm up, search, print the seconds of each."""
    import dts
    from dts.search import MaxEnt

    lm = dts.load("smollm2-135m")

    def search() -> float:
        start = time.perf_counter()
        method = MaxEnt(4, search="best")
        dts.decode(lm, "The weather today is", reward=lambda text: text.count("e"), method=method, max_new_tokens=24)
        return time.perf_counter() - start

    search()
    print(json.dumps([search() for _ in range(2)]))


def seconds(setting: dict[str, str]) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | setting
    command = [sys.executable, __file__, "--one"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return measure()
    found: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in SETTINGS for busy in (False, True)}
    for _ in range(options.rounds):
        for busy in (False, True):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for name, setting in SETTINGS.items():
                    found[name, busy].append(seconds(setting))
            finally:
                if other:
                    other.kill()
    print(f"{os.cpu_count()} cores; seconds, median of {options.rounds} rounds\n")
    print("| setting | quiet machine | beside one busy core |\n| --- | --- | --- |")
    for name in SETTINGS:
        quiet, busy = (statistics.median(found[name, state]) for state in (False, True))
        print(f"| {name} | {quiet:.1f} | {busy:.1f} |")


if __name__ == "__main__":
    main()
