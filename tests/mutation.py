"""Mutation testing of the core: `python tests/mutation.py --sample 300 --jobs 2`.

One small change at a time is made to a module of `dts/` or `search/`, and the tests of the core are run on it until one
fails. A change that no test notices survives, and is printed. Heavy libraries are imported once; every mutant is a
forked process, which finds the changed module by an import hook. No file is written.

Left out, because no test should fail for them: messages (what `raise` and loggers are given), docstrings, annotations,
`__all__`, code for type checkers, and assertions, `strict=True` among them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BY_HAND = ("tree", "softvalue", "zestimate", "choices", "particles", "settings", "results", "search", "target")
EXACT = ["test_golden", *(f"test_{name}" for name in BY_HAND)]
ALL_METHODS = [*EXACT, "test_decode::test_edges",
               *(f"test_baselines::{name}" for name in ("test_budgets_are_kept", "test_bad_options_are_refused",
                                                        "test_the_tree_stays_consistent"))]  # fmt: skip
VALUES = [*EXACT, "test_maxent::test_a_branch_can_be_closed_before_anything_is_finished",
          "test_exactness::test_log_prob_of_one_sequence_equals_its_place_in_the_distribution",
          "test_exactness::test_zero_reward_scale_gives_p_at_any_budget",
          "test_exactness::test_whole_space_is_finished_once_each"]  # fmt: skip
POWER = ["test_power::test_a_tree_that_is_complete_is_exact", "test_power::test_every_method_keeps_to_a_constraint",
         "test_power::test_an_empty_language_is_named", "test_orders::test_what_is_no_target_is_refused"]  # fmt: skip
# By module, what exercises it and takes seconds: exact numbers first, then properties, which catch what those miss.
# Left out although they would catch a few more: long statistical tests, and files that load `transformers`.
TESTS: dict[str, list[str]] = {
    "dts.constraints.constraint": ["test_constraints"],
    "dts.constraints.guided": ["test_constraints"],
    "dts.constraints.schemas": ["test_constraints"],
    "dts.decoding": [*EXACT, "test_decode::test_budgets_are_never_exceeded"],
    "dts.results": EXACT,
    "dts.rewards": ["test_rewards", *EXACT],
    "dts.rewards.calls": ["test_reward_calls"],
    "dts.rewards.confidence": ["test_confidence"],
    "dts.rewards.functions": ["test_rewards", "test_reward_calls", *EXACT],
    "dts.settings": EXACT,
    "dts.foresight": VALUES,
    "dts.logspace": EXACT,
    "dts.softvalue": [*VALUES, *POWER],
    "dts.target": POWER,
    "dts.text": ["test_text"],
    "dts.timeout": ["test_timeout"],
    "dts.tree": [*EXACT, *POWER],
    "dts.visits": VALUES,
    "dts.search.beam": ALL_METHODS,
    "dts.search.consensus": [*ALL_METHODS, "test_confidence", "test_baselines::test_the_majority_comes_first",
                             "test_baselines::test_weighted_votes_count_rewards"],
    "dts.search.earlyend": ["test_confidence"],
    "dts.search.maxent.descent": [*VALUES, "test_maxent::test_bounds_prove_the_best_sequence_early",
                                  "test_maxent::test_pruned_paths_count_as_rollouts_spent",
                                  "test_maxent::test_without_bounds_every_sequence_is_finished_once"],
    "dts.search.maxent.lookahead": VALUES,
    "dts.search.maxent.order": ["test_orders"],
    "dts.search.maxent.target": [*EXACT, "test_exactness::test_draws_follow_the_analytic_distribution"],
    "dts.search.maxent.zestimate": [*EXACT, "test_maxent::test_z_is_exact_when_every_sequence_is_finished"],
    "dts.search.mcts": ALL_METHODS,
    "dts.search.particles": ALL_METHODS,
    "dts.search.method": EXACT,
    "dts.search.run": EXACT,
    "dts.search.sampling": ALL_METHODS,
    "dts.search.scoring": ["test_costs"],
    "dts.search.search": [*ALL_METHODS, "test_costs",
                          "test_decode::test_independent_samples_follow_p_at_any_batch_size"],
    "dts.search.segments": ALL_METHODS,
    "dts.search.weights": POWER,
    "dts.search.paths": [*ALL_METHODS, "test_maxent::test_pruned_paths_count_as_rollouts_spent",
                           "test_maxent::test_bounds_prove_the_best_sequence_early",
                           "test_exactness::test_whole_space_is_finished_once_each",
                           "test_decode::test_independent_samples_follow_p_at_any_batch_size"],
}  # fmt: skip
MODULES = tuple(TESTS)
HEAVY = ("numpy", "scipy.stats", "torch", "transformers", "hypothesis", "pytest")

MEMORY = 6 * 2**30  # bytes of data allowed to the tests of one mutant

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
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
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


def run_tests(module: str, mutant: Mutant | None, seconds: int) -> None:
    """In a process of its own: exit code 0 where every test passed."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # a change that never ends is noticed too,
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # and one that fills the memory
    signal.alarm(20 * seconds)  # and one that waits for nothing
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if mutant is not None:
        sys.meta_path.insert(0, Hook(mutant))
    tests = [
        str(ROOT / "tests" / (f"{file}.py{sep}{name}"))
        for file, sep, name in (t.partition("::") for t in TESTS[module])
    ]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def limits(modules: Sequence[str]) -> dict[str, int]:
    """Seconds of processor time allowed to a mutant of each module: several times what its tests take without one."""
    found = {}
    for module in modules:
        child = os.fork()
        if child == 0:
            run_tests(module, None, 600)
        _, status, used = os.wait4(child, 0)
        if status != 0:
            raise SystemExit(f"the tests of {module} fail without any change")
        found[module] = 10 + math.ceil(3 * (used.ru_utime + used.ru_stime))
    return found


def run(chosen: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """The mutants that no test noticed."""
    allowed = limits(sorted({mutant.module for mutant in chosen}))
    left, running, survivors, started = list(chosen)[::-1], dict[int, Mutant](), list[Mutant](), time.monotonic()
    while left or running:
        while left and len(running) < jobs:
            mutant = left.pop()
            child = os.fork()
            if child == 0:
                run_tests(mutant.module, mutant, allowed[mutant.module])
            running[child] = mutant
        child, status = os.wait()
        mutant = running.pop(child)
        if status == 0:
            survivors.append(mutant)
            print(f"survived: {mutant}", flush=True)
        done = len(chosen) - len(left) - len(running)
        if done % 20 == 0:
            print(f"{done} of {len(chosen)}, {len(survivors)} survived, {time.monotonic() - started:.0f} s", flush=True)
    return survivors


def part(text: str) -> tuple[int, int]:
    """ "2/5" as (2, 5)."""
    which, _, of = text.partition("/")
    return int(which), int(of)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="only the I-th of N parts of them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    everything = [mutant for module in options.only for mutant in mutants(module)]
    chosen = everything
    if options.sample is not None and options.sample < len(everything):
        chosen = random.Random(options.seed).sample(everything, options.sample)
    which, of = options.part
    chosen = sorted(chosen[which - 1 :: of], key=lambda mutant: (mutant.module, mutant.index))
    survivors = run(chosen, options.jobs)
    caught = len(chosen) - len(survivors)
    print(f"{caught} of {len(chosen)} mutants caught ({caught / len(chosen):.1%}), of {len(everything)} there are")
    return 0


if __name__ == "__main__":
    sys.exit(main())
