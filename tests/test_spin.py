"""Commands keep idle threads from spinning, before torch is there and unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dts.spin import limit_spinning

ROOT = Path(__file__).parent.parent
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
KEPT = ("PATH", "HOME", "TMPDIR", "DTS_CACHE", "LANG")


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {"OMP_WAIT_POLICY": "PASSIVE"}), ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ({"GOMP_SPINCOUNT": "1000"}, {"GOMP_SPINCOUNT": "1000"}),
])  # fmt: skip
def test_what_the_user_has_set_stays(given, expected, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limit_spinning()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected


COMMANDS = [
    ["run_experiments.py", "--list-models"], ["-m", "dts", "--version"], ["-m", "dts.evaluation.exact", "--help"],
    ["-m", "dts.evaluation.study", "--help"], ["-m", "dts.evaluation.scores", "--help"],
    ["-m", "dts.training", "--help"], ["-m", "dts.evaluation.comprehensive", "--help"],
    ["-m", "dts.evaluation.forecast_check", "--help"],
    ["-m", "dts.training.recipes.musclebob", "--help"], ["compat/train_model.py", "--help"],
]  # fmt: skip
# Says what is in the environment when torch's package is first looked for, or at the end.
SPY = """
import os, sys, atexit
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            say()
def say():
    print("SPIN", os.environ.get("OMP_WAIT_POLICY"), file=sys.stderr)
sys.meta_path.insert(0, Spy())
atexit.register(say)
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_sets_it_before_torch_is_imported(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SPY)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}  # not what trainers leave there
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment | {"PYTHONPATH": path},
                          capture_output=True, text=True, check=True)  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("SPIN")]
    assert said and set(said) == {"SPIN PASSIVE"}
