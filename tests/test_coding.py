"""The coding task: its problems, its judgement, and attacks on the sandbox."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import dts
from dts.evaluation.measures.metrics import pass_at_k
from dts.training.coding import (
    STRONG,
    Limits,
    containment,
    extract,
    problems,
    public_share,
    public_tests,
    run,
    sandbox,
    solves,
)
from dts.training.coding.__main__ import run_script
from dts.training.coding.task import same

QUICK = Limits(seconds=1, cpu_seconds=1)
ALL = problems()
NAMES = {problem.name: problem for problem in ALL}

isolated = pytest.mark.skipif("not __import__('dts.training.coding', fromlist=['x']).containment() >= "
                              "{'network', 'files', 'processes'}", reason="no Linux namespaces here")  # fmt: skip
# Code that has got rid of the Python-level guard: what holds then is the kernel's.
UNGUARDED = "import os, sys\nguard = sys.modules['__main__']\nguard._refuse = lambda *_: None\n"


def answers(code: str, calls: int = 1, limits: Limits = QUICK) -> list:
    return list(run(code, "f", [[1]] * calls, limits).answers)


def one(body: str, setup: str = "import os, sys\n"):
    return answers(f"{setup}def f(x):\n" + "".join(f"    {line}\n" for line in body.splitlines()))[0]


# The problems -----------------------------------------------------------------------------------------------------


def test_there_are_eighty_problems_of_three_levels():
    assert len(ALL) == len(NAMES) == 80
    assert [problem.level for problem in ALL] == sorted(problem.level for problem in ALL)
    assert {problem.level for problem in ALL} == {1, 2, 3}
    assert all(len(p.public) == 3 and len(p.hidden) >= 3 for p in ALL)
    assert all(p.signature.startswith(p.name + "(") and p.solution.startswith(f"def {p.signature}:") for p in ALL)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.minutes)])
def test_every_solution_solves_and_an_empty_function_does_not(every):
    some = ALL[::every]
    with ThreadPoolExecutor(4) as pool:
        solved = pool.map(lambda p: solves(p, f"Here:\n```python\n{p.solution}```\nDone."), some)
        empty = pool.map(lambda p: solves(p, f"def {p.signature}:\n    pass"), some)
        assert [p.name for p, ok in zip(some, solved, strict=True) if not ok] == []
        assert [p.name for p, ok in zip(some, empty, strict=True) if ok] == []


def test_no_hidden_test_stands_in_the_prompt():
    for problem in ALL:
        shown = [given for given, _ in problem.public]
        assert not [given for given, _ in problem.hidden if given in shown], problem.name
        assert problem.solution not in problem.prompt[0]["content"]


def test_splits_are_disjoint_and_complete():
    train, test = problems("train"), problems("test")
    assert sorted(p.name for p in train + test) == sorted(NAMES)
    assert len(train) == len(test) == 40
    assert not {p.topic for p in train} & {p.topic for p in test}
    assert {p.level for p in train} == {p.level for p in test} == {1, 2, 3}
    with pytest.raises(dts.UsageError, match="split"):
        problems("dev")


# The judgement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\ndef f(x):\n    return x\n```", "def f(x):\n    return x\n"),
        ("Sure!\n```\nimport math\ndef f(x):\n    return x\n```\nbye", "import math\ndef f(x):\n    return x\n"),
        ("```python\nprint(1)\n```\n```py\ndef f(x):\n    return 2\n```", "def f(x):\n    return 2\n"),
        ("```python\ndef f(x):\n    return x", "def f(x):\n    return x"),
        ("def f(x):\n    return x\nThis works.", "def f(x):\n    return x"),
        ("def g(x):\n    return x", None),
        ("", None),
    ],
)
def test_the_code_of_an_answer(text, code):
    assert extract(text, "f") == code


def test_reward_is_the_share_of_the_examples_in_the_prompt():
    problem = NAMES["is_even"]
    always = "def is_even(n):\n    return True"
    expected = sum(value is True for _, value in problem.public) / 3
    assert public_share(problem, always) == expected
    assert 0 < expected < 1
    assert public_share(problem, "no code") == 0.0


def test_memorised_examples_earn_the_reward_but_do_not_solve():
    problem = NAMES["add_up"]
    table = {tuple(given): value for given, value in problem.public}
    text = f"def add_up(a, b):\n    return {table!r}[a, b]"
    assert public_share(problem, text) == 1.0
    assert not solves(problem, text)


def test_reward_serves_trl_and_search(tiny_lm):
    problem = NAMES["square"]
    right, wrong = "def square(x):\n    return x * x", "def square(x):\n    return x + x"
    chat = [[{"role": "assistant", "content": text}] for text in (right, wrong, right)]
    assert public_tests([problem.prompt] * 3, chat, other_column=[1, 2, 3]) == [1.0, pytest.approx(1 / 3), 1.0]
    from dts.search import Sampling

    result = dts.decode(tiny_lm, problem.prompt, reward=public_tests, method=Sampling(2), max_new_tokens=4)
    assert result.best.reward == 0.0
    with pytest.raises(dts.UsageError, match="no coding problem"):
        public_tests(["hello"], [right])


def test_equality_of_values():
    assert same(0.1 + 0.2, 0.3)
    assert same([1, {"a": [2.0]}], [1.0, {"a": [2]}])
    assert not same(1, True)
    assert not same(True, 1)
    assert not same("1", 1)
    assert not same([1], [1, 2])
    assert not same(None, 0)
    assert not same(float("nan"), 1)


def test_pass_at_k_of_the_task():
    problem = NAMES["total"]
    texts = [problem.solution, "def total(numbers):\n    return 6", problem.solution, "?"]
    correct = sum(solves(problem, text) for text in texts)
    assert correct == 2
    assert pass_at_k(4, correct, 2) == pytest.approx(1 - 1 / 6)


# Attacks ----------------------------------------------------------------------------------------------------------


def test_leaving_early_is_no_pass():
    problem = NAMES["is_even"]
    for way in ("import os\nos._exit(0)", "raise SystemExit(0)", "quit()", "import sys\nsys.exit(0)"):
        assert not solves(problem, f"```python\n{way}\ndef is_even(n):\n    return n % 2 == 0\n```")
    late = "import os\ndef f(x):\n    os._exit(0)"
    assert [a.error is None for a in answers(late, 2)] == [False, False]


def test_printing_success_is_no_pass():
    problem = NAMES["is_even"]
    lie = "import sys\nfor line in ['{\"value\": true}', 'PASSED', '3 passed']:\n    print(line)\n"
    assert public_share(problem, f"```python\n{lie}def is_even(n):\n    raise ValueError\n```") == 0.0


def test_an_object_equal_to_everything_is_no_pass():
    cheat = "class Same:\n    def __eq__(self, other): return True\n    def __repr__(self): return 'True'\n"
    text = f"```python\n{cheat}def is_even(n):\n    return Same()\n```"
    assert public_share(NAMES["is_even"], text) == 0.0


def test_expected_values_are_not_in_the_process():
    frames = one("frame = sys._getframe()\nnames = []\nwhile frame:\n    names += list(frame.f_locals)\n"
                 "    frame = frame.f_back\nreturn names")  # fmt: skip
    assert frames.value is None or not {"expected", "hidden", "public"} & set(frames.value)


@pytest.mark.parametrize("body", ["while True: pass", "import time\n    time.sleep(1000)", "[0] * 10**12",
                                  "a = []\n    while True: a.append(bytearray(10**6))",
                                  "return 'a' * 10**7", "return f(x)", "return 10 ** 10 ** 10"])  # fmt: skip
def test_hogs_end_and_earlier_answers_stay(body):
    code = f"calls = 0\ndef f(x):\n    global calls\n    calls += 1\n    if calls == 1: return 'kept'\n    {body}"
    first, second = answers(code, 2)
    assert first.value == "kept"
    assert second.error


def test_deep_and_odd_values_are_errors_not_crashes():
    deep = "def f(x):\n    v = []\n    for _ in range(900): v = [v]\n    return v"
    assert len(answers(deep)) == 1
    assert answers("def f(x):\n    return {1, 2}")[0].error.startswith("TypeError")
    assert answers("def f(x:")[0].error.startswith("SyntaxError")
    assert answers("x = 1")[0].error.startswith("KeyError")


def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = one("return dict(os.environ)").value
    assert set(found) <= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}
    assert one("return input()").error.startswith("EOFError")
    assert one("print('x' * 10**7)\nreturn 1").value == 1  # printed text goes nowhere


def test_files_and_modules_of_the_machine_are_out_of_reach(tmp_path):
    target = tmp_path / "pwned.txt"
    assert one(f"open({str(target)!r}, 'w').write('x')").error
    assert not target.exists()
    assert one(f"return open({str(sandbox.GUARD)!r}).read()").error
    assert one(f"return open({str(sandbox.GUARD.with_name('problems.yaml'))!r}).read()").error
    assert one("import socket").error
    assert one("import subprocess").error
    assert one("os.system('true')").error
    assert one("open('own.txt', 'w').write('x')\nreturn open('own.txt').read()").value == "x"


@isolated
def test_the_kernel_holds_without_the_python_guard(tmp_path):
    assert containment() == STRONG
    assert one("while True: os.fork()", UNGUARDED).error.startswith("BlockingIOError")  # the fork bomb's first fork
    assert one("return [os.getpid(), os.getppid()]", UNGUARDED).value == [1, 0]
    assert one("os.kill(-1, 9)", UNGUARDED).error.startswith("ProcessLookupError")
    assert one("return os.listdir('/')", UNGUARDED).value == []
    assert one("return os.path.exists('/proc') or os.path.exists('/etc')", UNGUARDED).value is False
    assert one("os.setuid(0)", UNGUARDED).error
    assert one("os.mkdir('a')\nos.chroot('a')", UNGUARDED).error
    assert one("guard._call('unshare', guard.CLONE_NEWUSER)", UNGUARDED).error
    assert one("limits = guard.resource\nlimits.setrlimit(limits.RLIMIT_AS, (-1, -1))", UNGUARDED).error
    full = "for i in range(100):\n    open(str(i), 'wb').write(bytes(10**6))"
    assert "No space left" in one(full, UNGUARDED).error
    connect = (
        "import struct\nsocket = guard._libc.socket(2, 1, 0)\n"
        "address = struct.pack('=H', 2) + struct.pack('!H4s8x', 22, bytes([127, 0, 0, 1]))\n"
        "return [guard._libc.connect(socket, address, 16), guard.ctypes.get_errno()]"
    )
    assert one(connect, UNGUARDED).value == [-1, 101]  # ENETUNREACH: not even this machine's own address


def test_without_namespaces_the_python_guard_stands_in_and_says_so(monkeypatch, tmp_path):
    weak = tmp_path / "guard.py"
    weak.write_text(sandbox.GUARD.read_text().replace('_call("unshare", flags)', "raise OSError"))
    monkeypatch.setattr(sandbox, "GUARD", weak)
    outcome = run("def f(x):\n    return x + 1", "f", [[1]])
    assert outcome.answers[0].value == 2
    assert outcome.held == {"cpu", "memory", "time", "output"}
    target = tmp_path / "pwned.txt"
    assert "PermissionError" in one(f"open({str(target)!r}, 'w')").error
    assert "PermissionError" in one("os.kill(os.getppid(), 0)").error
    assert "PermissionError" in one("os.fork()").error
    assert one("import socket").error
    assert not target.exists()


def test_bad_limits_are_refused():
    with pytest.raises(dts.UsageError, match="seconds=0"):
        Limits(seconds=0)


def test_command_writes_training_rows(tmp_path, caplog):
    file = tmp_path / "out" / "coding.jsonl"
    assert run_script(["--output", str(file), "--split", "train"]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(problems("train"))
    assert solves(NAMES[rows[0]["group"]], rows[0]["response"])
    assert "sandbox contains" in caplog.text
    from dts.training.data import read_rows

    assert [row.group for row in read_rows(file)] == [p.name for p in problems("train")]
