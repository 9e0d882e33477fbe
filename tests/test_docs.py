"""What the documents show is true: code runs, options exist, links lead somewhere, public names are explained.

Blocks marked `python` are run, those of one page after each other as one program. A block that cannot be run has a
comment `<!-- not run: reason -->` above it. Examples of the gallery run with the real model, others with a random one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import runpy
import shlex
from collections import Counter
from pathlib import Path

import pytest

import dts
import dts.search

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS]
BLOCK = re.compile(r"^(?P<mark><!-- not run: .+ -->\n)?```(?:python|py)\n(?P<code>.*?)^```", flags=re.S | re.M)
MOST_UNRUN = 3

# Pages with a test of their own, here or elsewhere, which says more than that their code runs.
OWN_TEST = {
    "README.md": ["test_docs.py"],
    "docs/constraints.md": ["test_docs.py"],
    "docs/doors.md": ["test_serve.py", "test_trl_door.py"],
    "docs/performance.md": ["test_docs.py"],
    "docs/rewards.md": ["test_docs.py"],
    "docs/search.md": ["test_docs.py"],
    "docs/training.md": [
        "test_docs.py",
        "test_heuristic_reward.py",
        "test_musclebob_recipe.py",
        "test_training_runs.py",
    ],
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [found["code"] for found in BLOCK.finditer(text) if not found["mark"]]


def run(code: str, **names) -> dict:
    exec(compile(code, "docs", "exec"), names)  # our own pages
    return names


# Code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in DOCS if p.parent.name != "gallery"], ids=name_of)
def test_the_code_of_a_page_runs(page, tiny_lm, monkeypatch, tmp_path):
    name = name_of(page)
    codes = [] if name in OWN_TEST else blocks(name)
    if not codes:
        return
    monkeypatch.setattr(dts, "load", lambda name: tiny_lm, raising=False)
    monkeypatch.setattr(tiny_lm, "context_length", None)  # a byte is a token there
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in codes:
        names = run(code, **names)


@pytest.mark.parametrize("page", [p for p in DOCS if p.parent.name == "gallery"], ids=name_of)
def test_the_examples_run_with_the_real_model(page, request, monkeypatch, capsys):
    codes = blocks(name_of(page))
    if not codes:
        return
    if page.stem == "forecasting":
        request.getfixturevalue("packaged")
    smollm = request.getfixturevalue("smollm")
    monkeypatch.setattr(dts, "load", lambda name: smollm, raising=False)
    names: dict = {}
    for code in codes:
        names = run(code, **names)
    assert names["result"].usage.recomputed_tokens == 0
    assert capsys.readouterr().out


def test_every_python_block_is_run_or_says_why():
    marked = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = list(BLOCK.finditer(text))
        assert len(found) == len(re.findall(r"^ *```[ {.]*i?py", text, flags=re.M)), name_of(page)
        marked += [name_of(page) for block in found if block["mark"]]
    assert len(marked) <= MOST_UNRUN, marked


@pytest.mark.parametrize("page", OWN_TEST)
def test_every_block_of_a_page_with_own_tests_is_read_by_them(page):
    tests = [(ROOT / "tests" / test).read_text(encoding="utf-8") for test in OWN_TEST[page]]
    assert all(f'{Path(page).name}"' in test for test in tests)
    if len(tests) > 1:  # one block for each test
        assert len(blocks(page)) == len(tests)


def test_readme(tiny_lm, monkeypatch):
    monkeypatch.setattr(dts, "load", lambda name: tiny_lm, raising=False)
    (code,) = blocks("README.md")
    result = run(code)["result"]
    assert len(result.rollouts) == 32 and result.usage.forwarded_tokens == result.usage.unique_tokens


def test_search_page_own_algorithm(tiny_lm):
    *examples, code = blocks("docs/search.md")
    names = run("\n".join([*examples, code]))  # asserts its own numbers
    result = dts.decode(tiny_lm, "Once", method=names["Importance"](3), reward=len, max_new_tokens=10)
    assert len(result.rollouts) == 3 and sum(result.shares.values()) == pytest.approx(1)
    assert math.isfinite(result.log_z) and result.usage.forwarded_tokens == result.usage.unique_tokens


def test_the_drawing_of_the_worked_example_is_what_its_script_draws():
    names = runpy.run_path(str(ROOT / "docs/images/worked_tree.py"))
    assert names["drawing"]() == (ROOT / "docs/images/worked_tree.svg").read_text(encoding="utf-8")
    assert {key: round(value, 2) for key, value in names["values"]().items()} == {
        "warm": 4.19,
        "grey": 1.11,
        "root": 2.34,
        "open": 2.1,
    }


def test_rewards_page(tiny_lm, monkeypatch):
    monkeypatch.setattr(dts, "load", lambda name: tiny_lm, raising=False)
    functions, token_level, *costs = blocks("docs/rewards.md")
    assert run("\n".join(costs))["result"].rollouts
    functions, token_level = map(run, (functions, token_level))
    for reward in (functions["sunny"], functions["scores"], functions["trl"]):
        assert dts.decode(tiny_lm, "Once", method=dts.search.BestOfN(2), reward=reward, max_new_tokens=5).best
    reward = dts.CheckMonotone(token_level["CountToken"](range(4, 100)))
    result = dts.decode(tiny_lm, "Once", method=dts.search.MaxEnt(8), reward=reward, max_new_tokens=8)
    assert 0 <= result.best.reward <= 3


def test_performance_page(tiny_lm):
    from dts.search import BestOfN, MaxEnt

    (code,) = blocks("docs/performance.md")
    names = {"dts": dts, "lm": tiny_lm, "prompt": "Once", "reward": len, "MaxEnt": MaxEnt, "BestOfN": BestOfN}
    names = run(code.replace("(32)", "(3)"), **names)
    assert names["result"].usage.cached_tokens == len(names["kept"])


def test_constraints_page(smollm, monkeypatch):
    pytest.importorskip("llguidance")
    monkeypatch.setattr(dts, "load", lambda name: smollm, raising=False)
    (code,) = blocks("docs/constraints.md")
    names = run(code)
    assert set(names["weather"]) == {"city", "cold"} and names["result"].completions


def test_grpo_quick_start(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from training_models import tiny_pair

    for part in tiny_pair():
        part.save_pretrained(tmp_path / "base")
    rows = [json.dumps({"prompt": f"say {a}{b}"}) for a in "abcd" for b in "abcd"]
    (tmp_path / "my_rows.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in blocks("docs/training.md") if '"grpo"' in code]
    names = run(code.replace("smollm2-135m", str(tmp_path / "base")).replace('"epochs": 1', '"max_steps": 1'))
    assert names["lm"].name == str(names["folder"])
    assert (names["folder"] / "adapter_model.safetensors").exists()
    assert [names["short"]("x" * n) for n in (20, 40, 60)] == [1.0, 0.5, 0.0]


def test_the_markov_chain_of_the_gallery_has_the_target_as_its_law():
    from dts.models.table import TableModel, random_logits

    (code,) = blocks("docs/gallery/algorithm.md")
    code = code.split("lm = dts.load")[0]
    watched = code.replace("current = node\n", "current = node\n            states.append(tree.tokens(current))\n")
    assert watched != code
    states: list[tuple[int, ...]] = []
    method = run(watched, states=states)["Metropolis"](4000, reward_scale=3.0)
    lm = TableModel(random_logits(4, 3), 4, eos=0)

    def reward(text: str) -> float:
        return (sum(map(int, text.split())) % 5) / 4

    dts.decode(lm, "1", reward=reward, method=method, max_new_tokens=3, seed=1)
    seen = Counter(states)
    target = {ids: math.exp(log_p + 3 * reward(lm.decode(ids))) for ids, log_p in lm.sequences(3, (1,))}
    z, p = sum(target.values()), {ids: math.exp(log_p) for ids, log_p in lm.sequences(3, (1,))}
    chain = sum(abs(seen[ids] / len(states) - target[ids] / z) for ids in target) / 2
    assert chain < 0.1 < 0.3 < sum(abs(p[ids] - target[ids] / z) for ids in target) / 2


def test_the_json_reward_of_the_gallery_keeps_its_bounds(tiny_lm):
    (code,) = blocks("docs/gallery/structured.md")
    matches = run(code.split("lm = dts.load")[0])["Matches"](r'\{"a": [0-9]+\}')
    assert [matches.score_text(text) for text in ('{"a": 12}', '{"a": 12', '{"b": 1}')] == [1.0, 0.0, 0.0]
    after = {
        text: matches.worth(matches.read(matches.empty(), text)) for text in ('{"a', '{"a": 1}', '{"b', '{"a": 1} ')
    }
    assert list(after.values()) == [(0.0, 1.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    checked = dts.CheckMonotone(matches)
    for method in (dts.search.MaxEnt(16), dts.search.MaxEnt(16, search="best")):
        dts.decode(tiny_lm, "Once", method=method, reward=checked, max_new_tokens=8)


# Commands and links -----------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Lines that start with `python`, with their continuations."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in re.findall(r"^\s*(python [^`|\n]*)$", joined, flags=re.M)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_only_options_that_exist(page):
    from dts.evaluation import cli as evaluation
    from dts.training import cli as training

    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "run_experiments.py":
            evaluation.build_parser().parse_args(evaluation.hyphenated(words[1:]))
        elif words[0] == "compat/train_model.py":
            training.build_parser().parse_args(training.hyphenated(["train", *words[1:]]))
        elif words[:2] == ["-m", "dts.training"] and words[2] in ("train", "train-variants", "expert-iteration"):
            training.build_parser().parse_args(training.hyphenated(words[2:]))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in DOCS} == listed


# Reference --------------------------------------------------------------------------------------------------------


def referenced() -> dict[str, list[str]]:
    """What the pages of the reference are made from: modules or single names, and the members that are shown if not
    all are."""
    found = {}
    for page in DOCS:
        parts = re.split(r"^::: ", page.read_text(encoding="utf-8"), flags=re.M)[1:]
        for name, options in (part.split("\n", 1) for part in parts):
            members = re.search(r"members: \[(.*?)\]", options)
            found[name] = members[1].split(", ") if members else []
    return found


def explained(thing: object) -> bool:
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else inspect.getdoc(thing)
    return bool(own) and not own.startswith(f"{getattr(thing, '__name__', '')}(")  # what `dataclass` writes by itself


@pytest.mark.parametrize("name", sorted(referenced()))
def test_public_names_are_explained(name):
    if name.startswith("dts.training"):
        pytest.importorskip("trl")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, single = name.rpartition(".")
        assert explained(getattr(importlib.import_module(home), single))
        return
    defined = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
    public = referenced()[name] or getattr(module, "__all__", None) or [key for key in defined if key[0] != "_"]
    things = {key: getattr(module, key) for key in public}
    things = {key: thing for key, thing in things.items() if inspect.isclass(thing) or inspect.isroutine(thing)}
    assert things
    assert not [key for key, thing in things.items() if not explained(thing)]


def test_the_public_packages_are_in_the_reference():
    assert {"dts", "dts.search", "dts.evaluation.rewards"} <= set(referenced())
