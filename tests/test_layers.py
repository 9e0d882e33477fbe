"""Who may import whom: dts, then models and search, then training, then evaluation. Nothing imports upwards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {  # what each package may import, itself and dts included
    "dts": {"dts"},
    "models": {"dts", "models"},
    "search": {"dts", "search"},
    "training": {"dts", "models", "search", "training"},
    "evaluation": {"dts", "models", "search", "training", "evaluation"},
}
# The public entry points of the lowest layer look up, at the call and not at import.
ENTRY_POINTS = {
    ("dts/__init__.py", "models"),
    ("dts/decoding.py", "search"),
    ("dts/generation.py", "search"),
    ("dts/many.py", "search"),
}


def imports(path):
    """The layer that each import of `dts.*` in a file goes to."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dts":
                yield parts[1] if len(parts) > 1 and parts[1] in BELOW else "dts"


@pytest.mark.parametrize("layer", BELOW)
def test_nothing_imports_upwards(layer):
    # dts/ also holds links to the four others
    files = sorted((ROOT / layer).glob("*.py") if layer == "dts" else (ROOT / layer).rglob("*.py"))
    assert files
    found = {(path.relative_to(ROOT).as_posix(), target) for path in files for target in imports(path)}
    assert {(name, target) for name, target in found if target not in BELOW[layer]} - ENTRY_POINTS == set()


def test_every_exception_is_still_needed():
    found = {(name, target) for name, _ in ENTRY_POINTS for target in imports(ROOT / name)}
    assert found >= ENTRY_POINTS
