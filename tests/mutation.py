"""Mutation testing of the core: `python tests/mutation.py --sample 300 --jobs 2`.

One small change at a time is made to a module of `dts/` or `search/`, and the tests of the core are run on it until one
fails. A change that no test notices survives, and is printed. Heavy libraries are imported once; every mutant is a
forked process, which finds the changed module by an import hook. No file is written.

Left out, because no test should fail for them: messages (what `raise` and loggers are given), docstrings, annotations,
`__all__`, and code for type checkers.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODULES = (
    "dts.decoding", "dts.results", "dts.rewards", "dts.settings", "dts.softvalue", "dts.text", "dts.timeout",
    "dts.tree", "dts.search.beam", "dts.search.consensus", "dts.search.lookahead", "dts.search.loop",
    "dts.search.maxent",
    "dts.search.mcts", "dts.search.particles", "dts.search.partition", "dts.search.sampling", "dts.search.segments",
    "dts.search.target", "dts.search.walkers",
)  # fmt: skip
TESTS = ("test_rewards", "test_maxent", "test_exactness", "test_decode", "test_baselines", "test_invariants",
         "test_engine", "test_reward_monotonicity", "test_generate", "test_faults")  # fmt: skip
HEAVY = ("numpy", "scipy.stats", "torch", "transformers", "hypothesis", "pytest")

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
              ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """The `index`-th change of a module."""

    module: str
    index: int
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.what}"


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Other nodes to put in the place of `node`, with what they change."""
    new: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        new.ops[0] = COMPARE[type(node.ops[0])]()
        yield _difference(node, new)
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield _difference(node, new)
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield _difference(node, new)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield _difference(node, new.operand)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield f"not ({ast.unparse(node.test)})", new
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        new.value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield _difference(node, new)
    elif isinstance(node, ast.Return) and node.value is not None:
        new.value = ast.Constant(None)
        yield _difference(node, new)
    elif isinstance(node, ast.Break | ast.Continue):
        new = ast.Continue() if isinstance(node, ast.Break) else ast.Break()
        yield _difference(node, new)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield f"{ast.unparse(node)[:60]} -> pass", ast.Pass()


def _difference(old: ast.AST, new: ast.AST) -> tuple[str, ast.AST]:
    return f"{ast.unparse(old)[:60]} -> {ast.unparse(new)[:60]}", new


def _is_message(node: ast.AST) -> bool:
    """Whether nothing below is to be changed."""
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Assert):
        return True
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Expr):
        call = node.value
        return isinstance(call, ast.Constant) or ast.unparse(call).startswith(("log.", "warnings.", "_require("))
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")


def mutations(tree: ast.Module) -> Iterator[tuple[int, str, ast.AST, str, int | None, ast.AST]]:
    """Line, what, and where to put the new node: parent, field, position in a list."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        parent = waiting.pop()
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list", "slice") and not isinstance(parent, ast.Subscript):
                continue
            several = isinstance(value, list)
            for position, node in enumerate(value if several else [value]):
                if not isinstance(node, ast.AST) or _is_message(node):
                    continue
                for what, new in changes(node):
                    yield getattr(node, "lineno", 0), what, parent, name, position if several else None, new
                waiting.append(node)


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def mutants(module: str) -> list[Mutant]:
    """All changes of a module, in a fixed order."""
    found = mutations(ast.parse(path_of(module).read_text(encoding="utf-8")))
    return [Mutant(module, index, line, what) for index, (line, what, *_) in enumerate(found)]


def mutated(mutant: Mutant) -> ast.Module:
    """The module's tree with the change in it."""
    tree = ast.parse(path_of(mutant.module).read_text(encoding="utf-8"))
    for index, (_, _, parent, name, position, new) in enumerate(mutations(tree)):
        if index == mutant.index:
            if position is None:
                setattr(parent, name, new)
            else:
                getattr(parent, name)[position] = new
            return ast.fix_missing_locations(tree)
    raise IndexError(mutant)


class Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with a change in it."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self._mutant.module else None

    def exec_module(self, module: Any) -> None:
        module.__file__ = str(path_of(self._mutant.module))
        exec(compile(mutated(self._mutant), module.__file__, "exec"), module.__dict__)


def run_tests(mutant: Mutant | None, limit: int) -> None:
    """In a process of its own: exit code 0 where every test passed."""
    import pytest

    signal.alarm(limit)  # a change that never ends is noticed too
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if mutant is not None:
        sys.meta_path.insert(0, Hook(mutant))
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files])))


def run(chosen: Sequence[Mutant], jobs: int, limit: int) -> list[Mutant]:
    """The mutants that no test noticed."""
    left, running, survivors, started = list(chosen)[::-1], dict[int, Mutant](), list[Mutant](), time.monotonic()
    while left or running:
        while left and len(running) < jobs:
            mutant = left.pop()
            child = os.fork()
            if child == 0:
                run_tests(mutant, limit)
            running[child] = mutant
        child, status = os.wait()
        mutant = running.pop(child)
        if os.waitstatus_to_exitcode(status) == 0:
            survivors.append(mutant)
            print(f"survived: {mutant}", flush=True)
        done = len(chosen) - len(left) - len(running)
        if done % 20 == 0:
            print(f"{done} of {len(chosen)}, {len(survivors)} survived, {time.monotonic() - started:.0f} s", flush=True)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=600, help="seconds for the tests of one mutant")
    parser.add_argument("--only", nargs="+", default=MODULES, metavar="MODULE")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    for name in HEAVY:
        importlib.import_module(name)
    everything = [mutant for module in options.only for mutant in mutants(module)]
    chosen = everything
    if options.sample is not None and options.sample < len(everything):
        chosen = random.Random(options.seed).sample(everything, options.sample)
    child = os.fork()
    if child == 0:
        run_tests(None, options.limit)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        print("the tests fail, or take longer than --limit, without any change")
        return 1
    survivors = run(chosen, options.jobs, options.limit)
    caught = len(chosen) - len(survivors)
    print(f"{caught} of {len(chosen)} mutants caught ({caught / len(chosen):.1%}), of {len(everything)} there are")
    return 0


if __name__ == "__main__":
    sys.exit(main())
