"""Habits of the code that a reader relies on and no linter checks."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 60  # lines of a function, its signature and docstring included
MEDIAN = 8


def files(folder):
    # dts/ also holds links to the four others
    return sorted((ROOT / folder).glob("*.py") if folder == "dts" else (ROOT / folder).rglob("*.py"))


def lengths(folder):
    """Lines of each function of a folder."""
    assert files(folder)
    return {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in files(folder)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("folder", ["dts", "models", "search", "training", "evaluation", "benchmarks"])
def test_no_function_is_long(folder):
    assert {name: length for name, length in lengths(folder).items() if length > LONGEST} == {}


@pytest.mark.parametrize("folder", ["dts", "models", "search", "training", "evaluation"])
def test_most_functions_are_short(folder):
    assert statistics.median(lengths(folder).values()) <= MEDIAN


@pytest.mark.parametrize("folder", ["dts", "models", "search", "training", "evaluation"])
def test_every_file_says_what_it_is(folder):
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files(folder)}
    silent = [path.relative_to(ROOT).as_posix() for path, tree in trees.items() if not ast.get_docstring(tree)]
    assert [name for name in silent if not name.endswith("__init__.py")] == []
