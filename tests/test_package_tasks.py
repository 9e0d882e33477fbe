"""Tasks of packages, HumanEval and reasoning-gym; and two that bring their own problems, coding and JSON."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from types import SimpleNamespace

import pytest

import dts
from dts.errors import UnavailableError, UsageError
from dts.evaluation.data.files import locate
from dts.evaluation.data.programs import examples, read_human_eval
from dts.evaluation.tasks import TASKS, load_task, oracle, reasoning, schemas
from dts.evaluation.tasks.programs import passes_tests
from dts.evaluation.tasks.reasoning import VERIFIERS
from dts.fetch import cached
from dts.rewards import Context, Finished
from dts.search import Greedy, MaxEnt

HEAD = "import math\n\ndef helper(x):\n    return x + 1\n\n"
DOC = '    """Add one.\n    >>> add(1)\n    2\n    >>> add(-1)\n    0\n    """\n'
PROMPT = f"{HEAD}def add(x):\n{DOC}"
TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"
RIGHT = "```python\ndef add(x):\n    return helper(x)\n```"


def human_eval(folder, *rows, **changes):
    """A file in HumanEval's form."""
    row = {"task_id": "Own/0", "prompt": PROMPT, "entry_point": "add", "test": TEST, "canonical_solution": "    pass\n"}
    path = folder / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in (rows or [row | changes]))
    return path


def rewards(task, *texts):
    reward, example = task.reward(task.examples[0]), task.examples[0]
    if hasattr(reward, "score_text"):
        return [reward.score_text(text) for text in texts]
    states = [reward.start(Context(example.prompt, (1,), str)) for _ in texts]
    return reward.finish(states, [Finished((), text) for text in texts])


# HumanEval ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doc", "found"),
    [
        (">>> f(1)\n2\n>>> f('a b')  # x\n'c'", {"f(1)": 2, "f('a b')": "c"}),
        (">>> round(f([1, 2]), 2) # f(x) = 1 + 2x\n-0.5", {"round(f([1, 2]), 2)": -0.5}),
        (">>> f('x') == 'y'", {"f('x')": "y"}),
        ("f([1,2]) == [3, 4]\nf([]) => []\nf(3) ➞ 5.5, f( 4 ) -> None",
         {"f([1, 2])": [3, 4], "f([])": [], "f(3)": 5.5, "f(4)": None}),
        ("f('(') should return ('a', True).", {"f('(')": ("a", True)}),
        ("f(1) # => 'Yes'", {"f(1)": "Yes"}),
        ("f(7) returns true", {"f(7)": True}),
        ("f([1]) ==> [[1,\n  2],\n  [3]]", {"f([1])": [[1, 2], [3]]}),
        ("f(1) = 1 + 2 = 3; f(n) = 4; f(g(1)) = 5", {}),  # calculations, and names that the docstring alone knows
        ("f(1) == \"\"a\"", {}),
        ("f(1, then nothing; see f(2).", {}),
    ],
)  # fmt: skip
def test_examples_are_read_in_the_forms_that_docstrings_have(doc, found):
    quoted = '"""' if '""' not in doc else "'''"
    lines = "\n".join(f"    {line}" for line in doc.split("\n"))
    assert dict(examples(f"def f(x):\n    {quoted}\n{lines}\n    {quoted}\n", "f")) == found


def test_the_reward_has_steps_for_programs_and_for_the_shown_examples(tmp_path):
    task = load_task("humaneval", data_dir=human_eval(tmp_path))
    half = "```python\ndef add(x):\n    return 2\n```"
    fails = "```python\ndef add(x):\n    return x +\n```"
    stops = "```python\nundefined\ndef add(x):\n    return 2\n```"
    assert rewards(task, RIGHT, half, stops, fails, "no code") == pytest.approx([1.0, 0.6, 0.1, 0.0, 0.0])
    assert not oracle.is_oracle(task.reward(task.examples[0]))


def test_hidden_tests_score_and_the_reward_does_not_know_them(tmp_path):
    learnt = "def add(x):\n    return {1: 2, -1: 0}.get(x)"  # the shown examples by heart
    task = load_task("humaneval", data_dir=human_eval(tmp_path))
    assert rewards(task, RIGHT, learnt) == [1.0, 1.0]
    assert [task.score({"Own/0": text})["solved"] for text in (RIGHT, learnt, "")] == [1.0, 0.0, 0.0]
    other = load_task("humaneval", data_dir=human_eval(tmp_path, test="def check(candidate):\n    assert False\n"))
    assert rewards(other, RIGHT, learnt) == [1.0, 1.0]
    assert other.score({"Own/0": RIGHT})["solved"] == 0.0
    assert other.examples[0].prompt == task.examples[0].prompt


CLOSE = "def check(candidate):\n    assert candidate(1) == 2\n    assert abs(candidate(5) - 6) < 1e-6\n"
CHEATS = {
    "equals everything": "class Same:\n    def __eq__(self, other): return True\n"
    "    def __sub__(self, other): return 0\ndef add(x):\n    return Same()",
    "patches what the test calls": "import builtins\nbuiltins.abs = lambda x: 0\ndef add(x):\n    return 2",
    "patches how values are written": "import builtins\nbuiltins.repr = lambda x: '2'\ndef add(x):\n    return x",
    "reads the test": "import sys\ndef add(x):\n    names = sys._getframe(1).f_code.co_consts\n"
    "    return [2, 6][x == 5] if {2, 6} & set(names) else 0",
    "writes that it passed": "import os\nfor file in range(16):\n    try:\n"
    "        os.write(file, b'{\"value\": \"passed\"}\\n{\"value\": true}\\n')\n"
    "    except OSError:\n        pass\nos._exit(0)\ndef add(x):\n    return 0",
    "leaves as it is imported": "import os\nos._exit(0)\ndef add(x):\n    return 0",
    "leaves as it is called": "import os\ndef add(x):\n    os._exit(0)",
    "defines the test": "def check(candidate):\n    pass\n_verdict = check\ndef add(x):\n    return 0",
    "patches the sandbox": "import sys\nsys.modules['__main__'].json.dumps = lambda x: '{\"value\": \"passed\"}'\n"
    "def add(x):\n    return 0",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_an_answer_cannot_cheat_the_hidden_tests(tmp_path, cheat):
    program = read_human_eval(human_eval(tmp_path, test=CLOSE))[0]
    assert not passes_tests(program, f"```python\n{CHEATS[cheat]}\n```")


@pytest.mark.parametrize(
    "test",
    [
        "assert [candidate(x) for x in (1, candidate(1))] == [2, 3]",  # a call that depends on a value
        "assert candidate(x=3) == 4 and abs(add(4) - 5) < 1e-6",
        "import random\n    x = random.randrange(10**9)\n    assert candidate(x) == x + 1",
        "assert not raises(candidate, 1) and raises(candidate, 'a')",
    ],
)
def test_hidden_tests_may_call_as_they_like(tmp_path, test):
    raises = "def raises(f, x):\n    try:\n        f(x)\n    except Exception:\n        return True\n    return False\n"
    program = read_human_eval(human_eval(tmp_path, test=f"{raises}def check(candidate):\n    {test}\n"))[0]
    assert passes_tests(program, RIGHT)
    assert not passes_tests(program, "def add(x):\n    return 0")


def test_a_value_that_equals_a_literal_passes_for_it(tmp_path):
    test = "def check(candidate):\n    assert candidate(1) == [{2: 1}, (3, {4}), set()]\n"
    counts = "from collections import Counter, namedtuple\npair = namedtuple('pair', 'a b')\n"
    answer = "def add(x):\n    return [Counter([x + 1]), pair(3, {4}), set()]"
    assert passes_tests(read_human_eval(human_eval(tmp_path, test=test))[0], f"```python\n{counts}{answer}\n```")


def test_a_hidden_test_that_gives_other_things_than_literals_is_named(tmp_path):
    program = read_human_eval(human_eval(tmp_path, test="def check(candidate):\n    assert candidate(len) == 2\n"))[0]
    with pytest.raises(UsageError, match=r"the test of Own/0 calls add with .* is no literal; give literals"):
        passes_tests(program, RIGHT)


def test_a_problem_without_an_example_is_listed_and_scored(tmp_path):
    task = load_task("humaneval", data_dir=human_eval(tmp_path, prompt=f'{HEAD}def add(x):\n    """Add one."""\n'))
    assert task.without_examples == ["Own/0"]
    assert rewards(task, RIGHT, "") == pytest.approx([0.2, 0.0])
    assert task.score({"Own/0": RIGHT})["solved"] == 1.0


def test_floats_and_types_of_values(tmp_path):
    prompt = 'def add(x):\n    """\n    >>> add(1)\n    0.3\n    >>> add(2)\n    (1, [2])\n    """\n'
    task = load_task("humaneval", data_dir=human_eval(tmp_path, prompt=prompt))
    near = "def add(x):\n    return 0.1 + 0.2 if x == 1 else (1, [2])"
    other = "def add(x):\n    return True if x == 1 else [1, [2]]"
    assert rewards(task, near, other) == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['"a"'], "line 1: expected the texts task_id, prompt"),
        (["{"], "line 1: not JSON"),
        (["", ""], "holds no problem"),
        ([json.dumps({"task_id": "a", "prompt": "x", "entry_point": "f", "test": ""})], "prompt does not define f"),
        ([json.dumps({"task_id": "a", "prompt": "def f(", "entry_point": "f", "test": ""})] * 2, "task_id comes twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named_with_its_line(tmp_path, rows, message):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(UsageError, match=message):
        read_human_eval(path)


def test_the_package_has_164_problems_of_which_24_show_no_example_that_we_can_read():
    try:
        task = load_task("humaneval")
    except UnavailableError as error:
        pytest.skip(str(error))
    assert len(task.examples) == 164
    assert len(task.without_examples) == 24


@pytest.mark.minutes
def test_the_package_s_own_solutions_pass_the_hidden_tests():
    try:
        file = locate(cached("human-eval"), ["HumanEval.jsonl.gz"])
    except UnavailableError as error:
        pytest.skip(str(error))
    with gzip.open(file, "rt") as lines:
        solutions = {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)}
    for program in read_human_eval(file):
        assert passes_tests(program, f"```python\n{solutions[program.id]}\n```"), program.id


# Our own coding problems --------------------------------------------------------------------------------------------


def test_the_coding_task_rewards_the_shown_examples_and_scores_hidden_tests():
    task = load_task("coding", num_samples=3)
    from dts.training.coding import problems

    problem = next(p for p in problems() if p.name == task.examples[0].id)
    right, broken = f"```python\n{problem.solution}\n```", f"def {problem.name}(:"
    scores = rewards(task, right, broken, f"def {problem.name}(*_):\n    1/0")
    assert scores == pytest.approx([1.0, 0.0, 0.1])
    assert task.score({problem.name: problem.solution})["solved"] == 1.0
    assert task.examples[0].prompt == problem.prompt


# reasoning-gym ------------------------------------------------------------------------------------------------------

CASES = [
    ("number_sorting", {"original_numbers": ["9.0", "3.0", "5.0"], "direction": "ascending"}, "3, 5, 9",
     ["9, 5, 3", "3, 5", "3, 5, 5", "x"]),
    ("number_sorting", {"original_numbers": ["1", "2"], "direction": "descending"}, "2, 1", ["1, 2"]),
    ("number_sorting", {"original_numbers": ["3"], "direction": "ascending"}, "3", ["4", ""]),
    ("word_sorting", {"transformed_words": ["b", "A"], "direction": "ascending"}, "A, b", ["b, A", "a, b"]),
    ("palindrome_generation", {"letters": ["a", "b", "a"]}, "aba", ["aab", "bab", "abba"]),
    ("prime_factorization", {"number": 12}, "2 × 2 × 3", ["4 × 3", "12", "2 × 3", "2 × 2 × 5", "two", "1 × 2 × 2 × 3"]),
    ("prime_factorization", {"number": 6}, "2 × 3", ["0000000023", "6", "2 ×"]),
    ("fraction_simplification", {"numerator": 6, "denominator": 8}, "3/4", ["6/8", "1/2", "3/0", "3"]),
    ("countdown", {"numbers": [5, 4, 10], "target": 11}, "5 + 10 - 4",
     ["5 + 10", "11", "10 + 5 - 4 +", "__import__('os')", "5 / 0", "9" * 400]),
    ("countdown", {"numbers": [3, 5], "target": 2}, "-3 + 5", ["-3 - 5", "~3 + 5", "not 3 + 5", "-3 ** 5", "-"]),
    ("countdown", {"numbers": [3, 5], "target": 2}, "-(+3 - 5)", ["-(3 + 5)"]),
    ("puzzle24", {"numbers": [9, 9, 3, 8]}, "9*3*8/9", ["9*3*8", "24", "(9+9+3+8"]),
    ("spell_backward", {"word": "hay"}, "yah", ["hay", "ya"]),
]  # fmt: skip


def test_every_verifier_is_tested():
    assert {name for name, *_ in CASES} == set(VERIFIERS)


@pytest.mark.parametrize(("name", "inputs", "right", "wrong"), CASES, ids=lambda case: str(case)[:24])
def test_verifiers_give_one_to_right_answers_only(name, inputs, right, wrong):
    assert VERIFIERS[name](inputs, right) == 1.0
    assert all(0 <= VERIFIERS[name](inputs, answer) < 1 for answer in wrong)


class FakeGym:
    """What the task uses of reasoning-gym: entry i depends on seed + i, and some questions come twice."""

    def __init__(self, answer="{}"):
        self.answer = answer

    def create_dataset(self, name, seed, size, **config):
        return [
            {
                "question": f"q{(seed + i) // 2}", "answer": self.answer.format(2 + (seed + i) // 2),
                "metadata": {"number": 2 + (seed + i) // 2, "factors": "secret"},
            }
            for i in range(size)
        ]  # fmt: skip

    def get_score_answer_fn(self, name):
        return lambda answer, entry: float(answer == entry["answer"])


def test_solved_questions_in_the_prompt_are_none_of_the_test_and_inputs_hold_no_solution(monkeypatch):
    monkeypatch.setattr(reasoning, "_package", FakeGym)
    task = load_task("reasoning-primes")
    questions = [example.prompt[-1]["content"] for example in task.examples]
    assert len(set(questions)) == len(questions) == 80
    shown = {turn["content"] for turn in task.examples[0].prompt[1:-1] if turn["role"] == "user"}
    assert len(shown) == 4 and not shown & set(questions)
    assert set(task.examples[0].inputs) == {"number"}


def test_other_references_change_no_prompt_and_no_reward(monkeypatch):
    seen = []
    for answer in ("{}", "other"):
        monkeypatch.setattr(reasoning, "_package", lambda answer=answer: FakeGym(answer))
        task = load_task("reasoning-primes", num_samples=4)
        seen.append([(e.prompt[-1], task.reward(e).of_text, rewards(task, "2 × 3", "7", "x")) for e in task.examples])
    assert seen[0] == seen[1]


def test_where_only_the_reference_tells_the_reward_is_the_form_of_an_answer(monkeypatch):
    monkeypatch.setattr(reasoning, "_package", FakeGym)
    task = load_task("reasoning-gcd", num_samples=2)
    example = task.examples[0]
    reference = task._references[example.id]["answer"]
    assert rewards(task, "1", reference, "GCD of 4") == [1.0, 1.0, 0.0]
    assert [task.score({example.id: text})["solved"] for text in (reference, "1")] == [1.0, 0.0]
    assert task.combine(example, ["5", "5", "4", "x"], [1, 1, 1.5, 9]) == "5"


@pytest.mark.parametrize("dataset", sorted(reasoning.EVALUATED))
def test_answers_are_never_run_as_code_outside_the_sandbox(monkeypatch, tmp_path, dataset):
    monkeypatch.setattr(reasoning, "_package", FakeGym)
    own = tmp_path / "own.yaml"
    shipped = resources.files("dts.evaluation.tasks") / "reasoning_gcd.yaml"
    own.write_text(shipped.read_text().replace("dataset: gcd", f"dataset: {dataset}"))
    with pytest.raises(UsageError, match=f"'{dataset}': reasoning-gym would run its answers as Python code"):
        load_task(str(own))


def test_without_the_package_the_task_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UnavailableError, match=r"pip install 'maxent-decoding\[tasks\]'"):
        load_task("reasoning-gcd")


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("reasoning")])
def test_the_package_agrees_that_its_answers_are_right(name):
    pytest.importorskip("reasoning_gym")
    task = load_task(name)
    answers = {key: reasoning._shown(str(entry["answer"]), task._options) for key, entry in task._references.items()}
    assert task.score(answers) == {"solved": 1.0, "parse_failures": 0.0}
    for row in task.baselines().values():
        assert row["solved"] == 1.0


def test_the_package_agrees_on_signs_of_countdown():
    gym = pytest.importorskip("reasoning_gym")
    inputs, score = {"numbers": [3, 5], "target": 2}, gym.get_score_answer_fn("countdown")
    for answer in ("-3 + 5", "+5 - 3", "5 + -3", "--5-3", "-(3-5)", "5 - 3", "-3 - 5", "05 - 3", "5 - 3.0", "5 3"):
        assert (VERIFIERS["countdown"](inputs, answer) == 1) == (score(answer, {"metadata": inputs}) == 1), answer


# JSON ---------------------------------------------------------------------------------------------------------------


def test_json_answers_are_judged_by_their_schema():
    task = load_task("json")
    items = {example.id: example for example in task.examples}
    options = schemas.Options(**schemas_file().options)
    assert len(items) == 20 == len(options.items)
    valid = {f"json-{i}": json.dumps(item["valid"]) for i, item in enumerate(options.items)}
    invalid = {f"json-{i}": json.dumps(item["invalid"]) for i, item in enumerate(options.items)}
    assert task.score(valid)["valid"] == 1.0 and task.score(invalid)["valid"] == 0.0
    assert 0.3 <= task.score(invalid)["share"] < 0.7
    assert task.score(dict.fromkeys(valid, "{")) == {"valid": 0.0, "share": 0.0, "parse_failures": 1.0}


def schemas_file():
    from dts.evaluation.tasks.registry import read_task_file

    return read_task_file("json")


def test_schemas_of_ones_own(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"ask": "A number.", "schema": {"type": "integer"}, "valid": 1}]))
    task = load_task("json", data_dir=path)
    assert task.score({"json-0": "7"})["valid"] == 1.0
    assert [turn["role"] for turn in task.examples[0].prompt] == ["user"]  # its answer is in no solved question


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_question_stands_solved_before_itself(tmp_path, count):
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"ask": f"q{i}", "schema": {"type": "integer"}, "valid": i} for i in range(count)]))
    for example in load_task("json", data_dir=path).examples:
        *solved, asked = [turn["content"] for turn in example.prompt if turn["role"] == "user"]
        assert asked not in solved and len(solved) == min(2, count - 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"ask": "x"}]', "list of objects with ask, schema and valid"),
        ("[]", "list of objects with ask, schema and valid"),
        ('[{"ask": "x", "schema": true, "valid": 1}]', "schema 0 cannot be used .it is no object"),
        ('[{"ask": "x", "schema": {"type": "intger"}, "valid": 1}]', "schema 0 cannot be used .'intger' is not valid"),
    ],
)
def test_files_without_usable_schemas_are_refused(tmp_path, content, message):
    path = tmp_path / "own.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_task("json", data_dir=path)


def test_members_may_refer_to_the_definitions_of_their_schema():
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"type": "integer"}},
              "required": ["a", "b"], "$defs": {"n": {"type": "integer"}}}  # fmt: skip
    texts = ['{"a": 1, "b": 2}', '{"a": 1}', '{"a": "x"}']
    assert [schemas.share_valid(schema, text) for text in texts] == pytest.approx([1.0, 0.45, 0.3])


# The comparison -----------------------------------------------------------------------------------------------------


def test_votes_and_smaller_samples_are_read_off_the_same_draws(bench):
    drawn = [
        {"text": t, "reward": r, "logprob": -1.0, "n_tokens": 3, "metrics": {"solved": s}, "vote": v}
        for t, r, s, v in [("a", 0.1, 0.0, "a"), ("b", 0.5, 1.0, "b"), ("a", 0.1, 0.0, "a"), ("c", 0.9, 0.0, None)]
    ]
    record = {"samples": 4, "budget": 3, "tokens": 40, "seconds": 4.0, "drawn": drawn, "method": "best-of-n"}
    found = {one["method"]: one for one in bench.read_off(record, votes=True)}
    assert {name: one["text"] for name, one in found.items() if name != "sampling"} == {
        "best-of-3": "b", "best-of-4": "c", "self-consistency of 3": "a", "weighted best-of-3": "b",
    }  # fmt: skip
    assert found["sampling"]["metrics"] == {"solved": 0.25} and found["sampling"]["tokens"] == 10
    assert found["best-of-3"]["tokens"] == 30


def test_problems_without_an_answer_to_vote_for_stay_in_the_table(bench):
    def record(name, vote):
        one = {"text": "t", "reward": 0.0, "logprob": -1.0, "n_tokens": 1, "metrics": {"solved": 0.0}, "vote": vote}
        head = {"task": "x", "samples": 2, "budget": 2, "max_tokens": 4, "model": "tiny", "id": name, "seconds": 1.0}
        return {**head, **one, "method": "best-of-n", "tokens": 4, "drawn": [one, one]}

    table = bench.report([record("a", "7"), record("b", None)])
    assert "2 problems" in table and "self-consistency of 2" in table
    assert "self-consistency" not in bench.report([record("a", None), record("b", None)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "4", "--budget", "8"], "--budget 8 is more than --samples 4"),
        (["--block", "0"], "must be 1 or more"),
        (["--report", "--output", "nowhere.jsonl"], "--output nowhere.jsonl does not exist"),
        (["--report", "--figure", "chart"], "--figure chart: give a name that ends in .png, .svg or .pdf"),
        (["--task", "keywords"], "error: unknown dataset 'keywords': did you mean keyword?"),
        (["--task", "keyword", "--data-dir", "nowhere"], "error: --data-dir nowhere"),
        (["--task", "keyword", "--model", "smollm3"], "error: unknown model 'smollm3'"),
    ],
)
def test_the_comparison_refuses_bad_options_in_one_line(bench, monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["tasks.py", *words])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


@pytest.fixture
def bench():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("tasks_bench", Path(__file__).parents[1] / "benchmarks" / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_comparison_continues_after_what_it_has(bench, tiny_lm, tmp_path, capsys):
    options = SimpleNamespace(
        task="keyword", model="tiny", methods=["greedy", "DTS*"], samples=16, budget=8, problems=3, max_tokens=4,
        block=2, data_dir=None, output=tmp_path / "tasks.jsonl",
    )  # fmt: skip
    task = load_task("keyword", num_samples=3)
    bench.run(tiny_lm, task, options, [])
    whole = options.output.read_text().splitlines()
    assert len(whole) == 3 * 3
    options.output.write_text("\n".join(whole[:5]) + "\n" + whole[5][:40])  # killed while it wrote
    bench.run(tiny_lm, task, options, bench.read(options.output))
    again = [json.loads(line) for line in options.output.read_text().splitlines()]
    cells = [(row["method"], row["id"]) for row in again]
    assert len(cells) == len(set(cells)) == 9
    limits = {row["id"]: row["prompt_tokens"] + row["tokens"] / 2 for row in again if row["method"] == "best-of-n"}
    assert all(row["tokens"] <= limits[row["id"]] + 1 for row in again if row["method"] == "DTS*")
    table = bench.report(again)
    assert "3 problems" in table and "| best-of-16 |" in table and "DTS* minus" in table
    options.data_dir = "mine"
    bench.run(tiny_lm, task, options, again)
    both = bench.read(options.output)
    assert len(both) == 18 and bench.report(both).count("3 problems, up to") == 2  # other data are another table
    assert "**keyword** from mine, tiny" in bench.report(both)


def test_power_sampling_returns_one_draw_from_p_to_the_fourth_that_no_reward_changes(bench, tiny_lm, tmp_path):
    """By hand: the same search alone, its draw, and what that took."""
    options = options_of(tmp_path / "tasks.jsonl", "power sampling")
    task, blind = (load_task("keyword", num_samples=2) for _ in range(2))
    blind.reward = lambda example: lambda text: 0.0
    bench.run(tiny_lm, task, options, [])
    bench.run(tiny_lm, blind, options_of(tmp_path / "blind.jsonl", "power sampling"), [])
    rows, others = (
        [row for row in bench.read(path) if row["method"] == "power sampling"]
        for path in (options.output, tmp_path / "blind.jsonl")
    )
    assert [row["text"] for row in rows] == [row["text"] for row in others]
    samples = [row for row in bench.read(options.output) if row["method"] == "best-of-n"]
    for place, (row, drawn) in enumerate(zip(rows, samples, strict=True)):
        limit = drawn["prompt_tokens"] + -(-drawn["tokens"] * options.budget // options.samples)
        alone = dts.decode(
            tiny_lm, task.examples[place].prompt, method=MaxEnt(10**6, reward_scale=0.0, power=4.0, lookahead=0),
            seed=100 + 1000 * place + 1, budget=dts.Budget(tokens=limit), batch_size=4, max_new_tokens=20,
        )  # fmt: skip
        assert str(alone.target) == "p(x)^4 exp(0 r(x))"
        searched, resent = alone.usage.forwarded_tokens, alone.usage.recomputed_tokens
        best = alone.sample(1)[0]
        drawing = alone.usage.forwarded_tokens - searched - (alone.usage.recomputed_tokens - resent)
        assert (row["text"], row["logprob"]) == (best.text, pytest.approx(best.logprob, abs=1e-4))
        assert row["tokens"] == searched + drawing - row["prompt_tokens"]
        assert row["tokens"] <= limit - row["prompt_tokens"] + drawing and drawing <= 20


@pytest.fixture
def peers(bench, monkeypatch):
    """The module with the peers' own code, as tasks.py finds it."""
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(bench.__file__).parent))
    import task_peers

    yield task_peers
    sys.modules.pop("task_peers"), sys.modules.pop("peers")


def options_of(path, *methods):
    return SimpleNamespace(
        model="tiny", methods=methods, samples=4, budget=3, max_tokens=20, block=2, data_dir=None, output=path
    )


def test_answers_of_peers_are_rows_like_the_others_and_all_their_tokens_count(
    bench, peers, tiny_lm, monkeypatch, tmp_path
):
    def twice(model, reward, n, limit):
        first = model.complete([""], 4)[0]
        return max([first, *model.complete([first, "ab"], 2)], key=reward)

    positions = []  # of each request of the peer, padding apart
    follow = peers.Model.follow

    def followed(model, prompts, limit):
        before, texts = model.tokens, follow(model, prompts, limit)
        positions.append(model.tokens - before - sum(map(len, prompts)))
        return texts

    monkeypatch.setitem(peers.PEERS, "its-hub best-of-n", twice)
    monkeypatch.setattr(peers.Model, "follow", followed)
    options, task = options_of(tmp_path / "tasks.jsonl", "its-hub best-of-n"), load_task("keyword", num_samples=2)
    bench.run(tiny_lm, task, options, [])
    rows = bench.read(options.output)
    ours, theirs = (next(row for row in rows if row["method"] == name) for name in ("best-of-n", "its-hub best-of-n"))
    assert set(theirs) == set(ours)
    assert theirs["prompt_tokens"] == ours["prompt_tokens"] and theirs["tokens"] > 2 * ours["prompt_tokens"]
    assert all(0 <= new <= 3 for new in positions)  # the last token of each text is not read
    assert "its-hub best-of-n" in bench.report(rows)
    best = dts.decode(tiny_lm, "ab", method=Greedy(), max_new_tokens=5).best
    assert peers.log_prob(tiny_lm, tiny_lm.encode("ab"), list(best.token_ids)) == pytest.approx(best.logprob, abs=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["its-hub best-of-n", "its-hub particle filter", "treequest AB-MCTS"])
def test_peers_answer_with_their_own_code(bench, peers, tiny_lm, tmp_path, name):
    pytest.importorskip("its_hub" if name.startswith("its") else "treequest")
    task, rows = load_task("keyword", num_samples=2), []
    for _ in range(2):
        options = options_of(tmp_path / f"{len(rows)}.jsonl", name)
        bench.run(tiny_lm, task, options, [])
        rows.append([{**row, "seconds": 0} for row in bench.read(options.output) if row["method"] == name])
    assert rows[0] == rows[1] and len(rows[0]) == 2  # the seed decides
    for row in rows[0]:
        assert row["rollouts"] == 3 and row["n_tokens"] <= 20 and row["tokens"] >= 2 * row["prompt_tokens"]


def test_the_figure_has_each_method_at_its_tokens_with_the_interval_of_the_table(bench, monkeypatch, tmp_path):
    head = {"task": "x", "samples": 2, "budget": 2, "max_tokens": 4, "model": "tiny", "seconds": 1.0, "vote": None}

    def record(name, method, reward, solved, tokens):
        one = {
            "text": "t",
            "reward": reward,
            "logprob": -1.0,
            "n_tokens": 1,
            "metrics": {"solved": solved},
            "vote": None,
        }
        return {**head, **one, "method": method, "id": name, "tokens": tokens,
                "drawn": [one, one] if method == "best-of-n" else []}  # fmt: skip

    rows = [record("a", "best-of-n", 0.2, 0.0, 40), record("b", "best-of-n", 0.4, 1.0, 60),
            record("a", "DTS*", 0.6, 1.0, 30), record("b", "DTS*", 0.8, 1.0, 50)]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        "sys.argv", ["tasks.py", "--output", str(path), "--report", "--figure", str(tmp_path / "a.png")]
    )
    bench.main()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    upper, lower = bench.figure(rows).axes
    assert upper.get_title(loc="left") == "x: reward" and lower.get_title(loc="left") == "x: solved"
    points = {bars.get_label(): bars for bars in upper.containers}
    assert set(points) == {"sampling", "best-of-2", "DTS*"}
    x, y = (values[0] for values in points["DTS*"].lines[0].get_data())
    assert x == pytest.approx(40, rel=0.05) and y == pytest.approx(0.7)
    (low, high) = points["DTS*"].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.6, 0.8))
    assert upper.lines[0].get_xydata().tolist() == [[25.0, pytest.approx(0.3)], [50.0, pytest.approx(0.3)]]
