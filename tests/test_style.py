"""Habits of the code that a reader relies on and no linter checks."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 60  # lines of a function, its signature and docstring included
MEDIAN = 8


def files(folder):
    # dts/ also holds links to the four others, which rglob does not follow
    return sorted((ROOT / folder).rglob("*.py"))


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


def test_nobody_sets_an_attribute_of_a_search():
    """It grows and scores a tree. What an algorithm knows belongs to its run."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {target.attr}"
        for folder in ("search", "training", "evaluation", "benchmarks")
        for path in files(folder)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and names_a_search(target.value)
    ]
    assert found == []


def names_a_search(node):
    return (isinstance(node, ast.Name) and node.id in ("search", "fork")) or (
        isinstance(node, ast.Attribute) and node.attr in ("search", "_search")
    )


def test_the_loop_and_the_search_know_no_algorithm():
    """They import nothing of `dts.search` but each other's and the protocol of a method."""
    names = ("run", "search", "readings", "scoring", "method", "weights")
    allowed = {f"dts.search.{name}" for name in names}
    for name in names:
        tree = ast.parse((ROOT / "search" / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module for module in imported if module.startswith("dts.search")} <= allowed
        assert "dts.softvalue" not in imported
