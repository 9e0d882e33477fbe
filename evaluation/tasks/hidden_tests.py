"""HumanEval's hidden tests, with the answer in another process than the tests.

A test is code that calls the answer's function, so it has to run. Here one sandboxed process runs the test and another
the answer, and only literals go between them: the answer gets arguments and gives values back. It never has the test,
so it can neither read nor patch it, and an object that equals everything does not reach it.

The test is run twice. First with a function that does nothing, and without its assertions, to learn which calls it
makes; the answer makes them, in their order; then with the answer's values. A call that was not foreseen, because it
depends on a value, is added and the test repeated.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from dts.errors import UsageError
from dts.evaluation.data.programs import Program
from dts.training.coding.sandbox import Limits, run

ROUNDS = 100  # of calls that were not foreseen
ANSWER = Limits(output_bytes=1 << 20)
TEST = Limits(seconds=20, cpu_seconds=5, output_bytes=1 << 20)
VALUE = """
def _value_of(source):
    return repr(_plain(eval(source)))

def _plain(value):  # a Counter becomes a dict, a named tuple a tuple
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    return value
"""
DRIVER = """
import random as _random

def _calls():
    made = []
    _tested(lambda *given, **named: made.append(repr((given, named))))
    return made

def _verdict(calls, values):
    place, unforeseen = 0, []
    def answer(*given, **named):
        nonlocal place
        if unforeseen or place == len(calls) or _literal(calls[place]) != (given, named):
            unforeseen.append(repr((given, named)))
            raise KeyboardInterrupt  # a test may catch exceptions
        place += 1
        if values[place - 1] is None:
            raise RuntimeError("the answer failed")
        return _literal(values[place - 1])
    passes = _tested(answer)
    return [place, unforeseen[0]] if unforeseen else passes

def _literal(text):
    return eval(text, {{"__builtins__": {{"set": set}}}})

def _tested({function}):
    globals()["{function}"] = {function}
    _random.seed(0)
    try:
        check({function})
    except BaseException:
        return False
    return True
"""


def passes(program: Program, code: str) -> bool:
    """Whether the function that `code` defines passes the program's test. Raises `UsageError` for a test that gives it
    something else than literals."""
    calls = _foreseen(program)
    values: list[str | None] = []
    for _ in range(ROUNDS):
        values += _values(program, code, calls[len(values) :])
        verdict = _driven(program, program.test, "_verdict", [calls, values])
        if not isinstance(verdict, list):
            return verdict is True
        place, call = verdict
        calls, values = [*calls[:place], call], values[:place]
    return False


def literal(shown: Any) -> Any:
    """The value that this text stands for. Raises `ValueError` where it is no literal."""
    try:
        return ast.literal_eval(shown)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{str(shown)[:80]!r} is no literal") from error


def _foreseen(program: Program) -> list[str]:
    """The calls that the test makes as far as they do not depend on values, each as the text of (arguments, names)."""
    unchecked = ast.unparse(ast.fix_missing_locations(_Unchecked().visit(ast.parse(program.test))))
    calls = _driven(program, unchecked, "_calls", [])
    return calls if isinstance(calls, list) else []


class _Unchecked(ast.NodeTransformer):
    """Evaluates what is asserted, and asserts nothing."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.Try([ast.Expr(node.test)], [handler], [], [])


def _driven(program: Program, test: str, function: str, given: list[Any]) -> Any:
    """What a function of the process with the test returns; None where it fails."""
    code = f"{program.before}\n{test}\n{DRIVER.format(function=program.function)}"
    return run(code, function, [given], TEST).answers[0].value


def _values(program: Program, code: str, calls: Sequence[str]) -> list[str | None]:
    """What the answer returns for each of these calls, as the text of a literal; None where it is none."""
    sources = []
    for call in calls:
        try:
            literal(call)
        except ValueError as error:
            raise UsageError(
                f"the test of {program.id} calls {program.function} with {error}; give literals"
            ) from error
        sources.append(f"(lambda given: {program.function}(*given[0], **given[1]))({call})")
    if not sources:
        return []
    return [_shown(answer.value) for answer in run(code + VALUE, "_value_of", [[s] for s in sources], ANSWER).answers]


def _shown(value: Any) -> str | None:
    try:
        return repr(literal(value))
    except ValueError:
        return None
