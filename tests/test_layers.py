"""Who may import whom: dts, then models and search, then training, then evaluation, then doors. Nothing imports
upwards, and no modules import each other in a circle, within a folder and between the rooms of one."""

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
    "doors": {"dts", "models", "search", "training", "evaluation", "doors"},
}
# The public entry points of the lowest layer look up, at the call and not at import.
ENTRY_POINTS = {
    ("dts/__init__.py", "models"),
    ("dts/decoding.py", "search"),
    ("dts/generation.py", "search"),
    ("dts/many.py", "search"),
}


def imported(path):
    """What a file imports from `dts`, wherever it does: at the top, in a function, for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "dts")


def imports(path):
    """The layer that each import of `dts.*` in a file goes to."""
    for name in imported(path):
        parts = name.split(".")
        yield parts[1] if len(parts) > 1 and parts[1] in BELOW else "dts"


def folder_of(layer):
    return ROOT / "dts" / layer if layer == "doors" else ROOT / layer


def files_of(layer):
    # dts/ also holds the doors, and links to the four others
    return sorted(folder_of(layer).glob("*.py") if layer == "dts" else folder_of(layer).rglob("*.py"))


@pytest.mark.parametrize("layer", BELOW)
def test_nothing_imports_upwards(layer):
    files = files_of(layer)
    assert files
    found = {(path.relative_to(ROOT).as_posix(), target) for path in files for target in imports(path)}
    assert {(name, target) for name, target in found if target not in BELOW[layer]} - ENTRY_POINTS == set()


def test_every_exception_is_still_needed():
    found = {(name, target) for name, _ in ENTRY_POINTS for target in imports(ROOT / name)}
    assert found >= ENTRY_POINTS


# ---- circles ----


def module_graph(layer):
    """Which modules of its own layer each module imports. The façade of dts is left out: it names modules for type
    checkers, and imports each when it is asked for."""
    root = "dts" if layer == "dts" else f"dts.{layer}"
    paths = {}
    for path in files_of(layer):
        parts = path.relative_to(folder_of(layer)).with_suffix("").parts
        paths[".".join([root, *(part for part in parts if part != "__init__")])] = path

    def targets(name):
        for found in imported(paths[name]) if name != "dts" else ():
            while found and found not in paths:  # `from dts.x.y import function` imports dts.x.y
                found = found.rpartition(".")[0]
            yield found

    return {name: set(targets(name)) - {name, ""} for name in paths}


def room_graph(layer):
    """Which folders and modules at the top of a layer each of them imports."""

    def room(name):
        return ".".join(name.split(".")[:3])

    graph = {}
    for name, targets in module_graph(layer).items():
        graph.setdefault(room(name), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in graph.items()}


def circle_in(graph):
    """The nodes of one circle, the first of them again at the end; [] where there is none."""
    done = set()

    def visit(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for target in sorted(graph[node]):
                if found := visit(target, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert len(module_graph("evaluation")) > 60 and module_graph("evaluation")["dts.evaluation.cli"]


@pytest.mark.parametrize("layer", BELOW)
def test_no_modules_import_each_other_in_a_circle(layer):
    assert circle_in(module_graph(layer)) == []


@pytest.mark.parametrize("layer", BELOW)
def test_no_rooms_import_each_other_in_a_circle(layer):
    assert circle_in(room_graph(layer)) == []
