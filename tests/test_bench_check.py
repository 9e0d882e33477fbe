"""The verdict on a speed ratio: worse only where the rounds agree."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHECK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "check.py"))
LIMIT = {"test": {"ratio": 1.0, "limit": 1.3}}


def verdict(first, *later):
    """The number of failures, what was said, and how often the test was measured again."""
    said, left = [], list(later)

    def again(name):
        assert name == "test"
        return left.pop(0)

    return CHECK["check"](LIMIT, {"test": first}, again, said.append), said, len(later) - len(left)


def test_rounds_that_agree_on_a_slower_ratio_are_a_regression():
    failed, (line,), repeats = verdict([1.4, 1.45, 1.5, 1.42, 1.38, 1.41, 1.2])
    assert (failed, repeats) == (1, 0) and line.endswith("limit 1.3: REGRESSION")


def test_rounds_that_disagree_are_measured_again():
    noisy, quiet = [1.0, 1.1, 1.9, 2.0, 1.35, 1.05, 1.4], [1.01, 1.02, 1.0, 1.03, 1.05, 1.0, 1.01]
    assert verdict([1.0, *quiet])[::2] == (0, 0)
    failed, (line,), repeats = verdict(noisy, quiet)
    assert (failed, repeats) == (0, 1) and line.endswith(": ok")


def test_a_machine_that_stays_noisy_is_named_and_fails_nothing():
    noisy = [1.0, 1.1, 1.9, 2.0, 1.35, 1.05, 1.4]
    failed, (line,), repeats = verdict(noisy, noisy, noisy)
    assert (failed, repeats) == (0, 2) and line.endswith("too noisy to tell")


@pytest.mark.parametrize(("measured", "message"), [
    ({}, "test: not measured"), ({"new": [1.0]}, "new: 1.000, no baseline"),
])  # fmt: skip
def test_a_test_without_its_counterpart_is_named(measured, message):
    said = []
    failed = CHECK["check"](LIMIT, measured, None, said.append)
    assert message in said and failed == 1  # "test" was not measured in either case
