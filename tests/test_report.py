"""The report: trees as records, the page as text, and the page in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from toys import finish

import dts
from dts.errors import UsageError
from dts.evaluation.report import tree_record, write_report
from dts.evaluation.report.__main__ import main
from dts.evaluation.report.summary import NOT_RECORDED
from dts.results import Estimate, Result, Rollout, Usage
from dts.search import BestOfN, MaxEnt
from dts.softvalue import SoftValues
from dts.tree import Tree

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
MODELS = {"red": "#ff6b6b", f"teal{EVIL}": "#4ecdc4"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def rollout(index: int, reward: float, nodes: int, leaf: int) -> Rollout:
    return Rollout(index, reward, reward, nodes, 0.0, 0, 2, 0, leaf, "")


def small_result() -> Result:
    """Letters as tokens: the paths ab, ac and, later, d; rewards 0.25, 1 and 0.5, lambda 2."""
    tree = Tree()
    a = tree.add(0, ord("a"), math.log(0.5), math.log(0.5))
    leaves = [tree.add(a, ord("b"), math.log(0.75), math.log(0.25)), tree.add(a, ord("c"), math.log(0.25), -math.inf)]
    leaves.append(tree.add(0, ord("d"), math.log(0.25), math.log(0.25)))
    values = SoftValues(tree, reward_scale=2.0)
    for leaf, reward in zip(leaves, (0.25, 1.0, 0.5), strict=True):
        tree.terminal[leaf], tree.reward[leaf] = 1, reward
        finish(values, leaf)
    rollouts = [rollout(0, 0.25, 4, leaves[0]), rollout(1, 1.0, 4, leaves[1]), rollout(2, 0.5, 5, leaves[2])]
    return Result([], rollouts, Usage(), tree, "maxent", estimate=Estimate(values=values))


def letters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


# ---- records of trees ----


def test_record_of_a_small_tree() -> None:
    record = tree_record(small_result(), letters)
    assert record["created"] == [0, 1, 2, 3, 4] and record["parent"] == [-1, 0, 1, 1, 0]
    assert record["text"] == ["", "a", "b", "c", "d"] and record["terminal"] == [0, 0, 1, 1, 1]
    assert record["reward"] == [None, None, 0.25, 1.0, 0.5]
    assert record["unexplored"][:2] == [0.25, 0.0] and record["visits"] == [3, 2, 1, 1, 1]
    soft = math.log(0.75 * math.exp(0.5) + 0.25 * math.exp(2.0)) / 2  # all of p below `a` is known
    assert record["value"][1] == pytest.approx(soft, abs=1e-5) and record["reward_scale"] == 2.0
    assert record["earned"] == record["upper"] == [None] * 5  # infinite bounds
    assert [(r["leaf"], r["nodes"]) for r in record["rollouts"]] == [(2, 4), (3, 4), (4, 5)]
    assert record["nodes"] == {"kept": 5, "total": 5}
    json.dumps(record, allow_nan=False)


def test_a_tree_above_the_limit_keeps_the_paths_of_its_best_rollouts() -> None:
    record = tree_record(small_result(), letters, max_nodes=4)
    assert record["created"] == [0, 1, 3, 4] and record["parent"] == [-1, 0, 1, 0]  # without the path ab
    assert [r["leaf"] for r in record["rollouts"]] == [None, 2, 3]
    assert record["nodes"] == {"kept": 4, "total": 5} and record["rollouts_kept"] == 2


@pytest.mark.parametrize("method", [MaxEnt(rollouts=8), BestOfN(6)])
def test_record_of_a_real_search_spells_every_completion(tiny_lm: Any, method: Any) -> None:
    """Byte tokens: characters of several bytes are whole, and bytes that are none show as replacement marks."""
    result = dts.decode(tiny_lm, "é", reward=len, method=method, max_new_tokens=6, seed=3)
    record = tree_record(result, tiny_lm.decode)
    assert all(parent < node for node, parent in enumerate(record["parent"]))
    assert (record["value"] is not None) == isinstance(method, MaxEnt)
    for done, saved in zip(result.rollouts, record["rollouts"], strict=True):
        node, pieces = saved["leaf"], []
        while node > 0:
            assert record["created"][node] < saved["nodes"]
            pieces.append(record["text"][node])
            node = record["parent"][node]
        assert "".join(reversed(pieces)) == done.text


# ---- the page as text ----


def write_run(folder: Path, *, text: str = "an answer", reward: str = "verifier", trees: Sequence[Any] = ()) -> Path:
    """A run of two models, two methods and two samples, as its files."""
    methods = ("maxent", "best-of-n")
    samples: list[Any] = []
    rollouts: list[Any] = []
    for m, model in enumerate(MODELS):
        for sample in range(2):
            for k, method in enumerate(methods):
                head = {"model": model, "dataset": "har", "seed": 0, "sample": sample, "id": f"ex-{sample}{EVIL}",
                        "method": method}  # fmt: skip
                best = 0.5 + 0.1 * m + 0.2 * sample - 0.1 * k
                rollouts += [{**head, "rollout_idx": i, "rollout_reward": best - 0.1 * (2 - i),
                              "best_so_far": best - 0.1 * (2 - i), "output_length": 4, "nodes_explored": 5 * i + 5,
                              "start_depth": i, "tokens": 10 * i + 10, "time": i + 1.0, "text": text}
                             for i in range(3)]  # fmt: skip
                samples.append({**head, "reward": reward, "best_reward": best, "monotonicity": 1.0,
                                "independent_monotonicity": 0.5, "time": 3.0, "rollouts": 3, "forwarded_tokens": 30,
                                "finished_by": "eos", "text": text,
                                "prompt": [{"role": "user", "content": text}]})  # fmt: skip
    summary = {"experiment": f"HAR{EVIL}", "config": {"seeds": [0], "reward_scale": 4.0}, "versions": {"torch": "2"},
               "partial": False, "seconds": 12.0, "baselines": {"har": {"majority": {"accuracy": 0.25}}},
               "runs": [cell(model, method, samples) for model in MODELS for method in methods],
               "verdicts": [won(model) for model in MODELS]}  # fmt: skip
    (folder / "trees").mkdir(parents=True)
    for name, records in (("samples", samples), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps(summary))
    for i, tree in enumerate(trees):
        head = {"model": "red", "dataset": "har", "seed": 0, "sample": i, "id": f"ex-{i}{EVIL}"}
        (folder / "trees" / f"{i}.json").write_text(json.dumps({**tree, **head, "method": "maxent"}))
    return folder


def cell(model: str, method: str, samples: Sequence[Any]) -> Any:
    own = [s["best_reward"] for s in samples if (s["model"], s["method"]) == (model, method)]
    return {"model": model, "dataset": "har", "method": method, "color": MODELS[model], "seeds": [0],
            "samples": len(own), "final/avg_best_reward": sum(own) / len(own),
            "best_reward_interval": [min(own), max(own)],
            "final/avg_monotonicity": 1.0, "independent_monotonicity": 0.5, "final/avg_time_per_sample": 3.0,
            "forwarded_tokens": 30.0, "reward_calls": 3.0, "reward_seconds": 0.5,
            "tokens_reused": 2 / 3, "branch_depth": 0.25, "logprob_per_token": -1.5,
            "metrics": {"accuracy": 0.5}}  # fmt: skip


def won(model: str) -> dict[str, Any]:
    other = {"method": "best-of-n", "logprob_per_token": -2.5, "one_answer": False, "samples": 2, "clusters": 2,
             "search_reward": 0.6, "search_tokens": 30.0, "reward": 0.5, "tokens": 30.0, "difference": 0.1,
             "interval": [0.1, 0.1], "p": 0.5, "better": 2, "worse": 0}  # fmt: skip
    return {"model": model, "dataset": "har", "method": "maxent", "logprob_per_token": -3.25, "outcome": "open",
            "others": [other], "unaided": None, "note": EVIL}  # fmt: skip


def evil_tree() -> dict[str, Any]:
    record = tree_record(small_result(), letters)
    return {**record, "text": ["", f" a\n{EVIL}", "b", "c", "d"]}


def wide_tree() -> dict[str, Any]:
    """2,000 paths of 4 tokens from the prompt, of a method that keeps no soft values."""
    tree = Tree()
    for _ in range(2000):
        node = 0
        for _ in range(4):
            node = tree.add(node, ord("x"), -1.0, 0.0)
        tree.terminal[node], tree.reward[node] = 1, 0.5
    rollouts = [rollout(i, 0.5, 4 * i + 5, 4 * i + 4) for i in range(2000)]
    return tree_record(Result([], rollouts, Usage(), tree, "best-of-n"), letters)


def hashed(script: str) -> str:
    """A script as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


class Page(HTMLParser):
    """Elements and attributes as a browser would find them, and all text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._open != "style":
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text is an attack, with a small tree of attacks, a small plain one and a wide one."""
    trees = [evil_tree(), tree_record(small_result(), letters), wide_tree()]
    folder = write_run(tmp_path_factory.mktemp("runs") / "first", text=EVIL, trees=trees)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return folder / "report.html"


def test_what_a_model_wrote_is_inert(page: Path) -> None:
    parsed = Page(page.read_text())
    (data, trees), (code, script) = parsed.scripts
    assert data == {"type": "application/json", "id": "trees"} and code == {}
    assert json.loads(trees)[0]["text"][1] == f" a\n{EVIL}"  # there as data, and whole
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src {hashed(script)}" in policy and "default-src 'none'" in policy
    assert EVIL in parsed.text and "img" not in {tag for tag, _ in parsed.tags}
    assert not [a for _, attributes in parsed.tags for a in attributes if a.startswith("on")]


def test_the_page_needs_nothing_from_elsewhere_and_is_the_same_each_time(folder: Path, page: Path) -> None:
    text = page.read_text()
    assert write_report(folder).read_text() == text
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and "url(" not in style.group(1) and "@import" not in style.group(1)
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_figures_of_the_tables(page: Path) -> None:
    text = page.read_text()
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL)]
    assert ["red", "best-of-n", "2", "0.500", "[0.400,", "0.600]", "-0.100", "[-0.100,", "-0.100]", "30", "3.00",
            "3", "0.50", "-1.50", "1.00", "(0.50)", "67", "%", "25", "%"] in rows  # fmt: skip
    assert ["no", "language", "model", "majority", "0.250"] in rows
    assert len(re.findall("<svg", text)) == 5
    assert len(re.findall('class="card winner"', text)) == 2 + 2  # one on each example, and for each model on the first
    assert "user:" in text and "#333333" not in text  # the prompt; ink that a dark page would hide


def test_the_page_opens_with_what_was_won_and_the_first_sample(page: Path) -> None:
    text = page.read_text()
    top = text[text.index("<main>") : text.index('id="results-1"')]
    assert top.count("<h2>We could not show that search (maxent) won on har with ") == 2
    assert "At no more tokens than best-of-n (30 a sample against 30) the mean reward is 0.600 against 0.500" in top
    assert "Log p per token of the texts under the model: maxent -3.25, best-of-n -2.50." in top
    assert "Too few to tell: 2 independent examples" in top and top.count(escape(EVIL, quote=False)) >= 2
    assert [name for name in ("ex-0", "ex-1") if name in top] == ["ex-0"] and top.count("<article") == 2 * 2


def test_an_oracle_is_marked_and_a_run_without_trees_has_no_viewer(tmp_path: Path, page: Path) -> None:
    oracle = write_report(write_run(tmp_path / "run", reward="oracle-label")).read_text()
    assert '<body class="oracle">' in oracle and "Oracle reward: oracle-label" in oracle
    assert 'id="viewer"' not in oracle and "<script" not in oracle
    assert "<body>" in page.read_text() and 'id="viewer"' in page.read_text()


def test_two_runs_on_one_page(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "second", trees=[evil_tree()])
    summary = json.loads((other / "summary.json").read_text())
    summary["config"]["reward_scale"] = 8.0
    for run in summary["runs"]:  # of an older version, which did not count them
        del run["reward_calls"], run["reward_seconds"], run["tokens_reused"], run["branch_depth"]
        run["below_root"] = 0.5
    (other / "summary.json").write_text(json.dumps(summary))
    target = tmp_path / "both.html"
    assert main([str(folder), str(other), "--output", str(target)]) == 0 and capsys.readouterr().out.split() == [
        str(target)
    ]
    text = target.read_text()
    assert "maxent [A]" in text and "maxent [B]" in text
    assert "search (maxent [B]) won" in text and "than best-of-n [B] (30" in text
    assert escape(NOT_RECORDED) in text and escape(NOT_RECORDED) not in write_report(folder).read_text()
    differing = re.findall(r'<tr class="differs"><th scope="row">([^<]*?) <', text)
    assert differing == ["reward scale"]
    assert len(json.loads(Page(text).scripts[0][1])) == 4


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"holds no summary\.json"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_a_run_that_finished_nothing_has_a_page(tmp_path: Path) -> None:
    summary = {"experiment": "HAR", "config": {"seeds": [0]}, "versions": {}, "partial": True, "seconds": 1.0,
               "baselines": {}, "runs": []}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = write_report(tmp_path).read_text()
    assert "partial: interrupted" in text and "no finished sample" in text and "0 searches" in text


# ---- the page in a browser ----

WATCH = """
window.problems = [];
window.alert = () => problems.push("alert");
addEventListener("error", (event) => problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
"""


def probed(page: Path, probe: str) -> Path:
    """A copy of the page with two more scripts that its policy admits: one that watches, one that acts at the end.

    `note(name, value)` in `probe` notes what it finds; `later` runs a function half a second after the last.
    """
    act = f"""
const found = {{}}, at_ = (id) => document.getElementById(id);
const note = (name, value) => {{ found[name] = value; }};
const press = (key, more) => at_("rows").dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true, ...more }}));
const rows = () => [...document.querySelectorAll(".row")].map((row) => row.querySelector(".text").textContent);
{probe}
setTimeout(() => {{
  found.problems = problems;
  const output = document.createElement("output");
  output.id = "probe";
  output.textContent = JSON.stringify(found);
  document.body.append(output);
}}, 3000);
"""
    text = page.read_text()
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (WATCH, act)
    )
    text = text.replace("script-src ", f"script-src {hashes} ", 1).replace(
        "<head>", f"<head><script>{WATCH}</script>", 1
    )
    copy = page.with_name("probed.html")
    copy.write_text(text.replace("</body>", f"<script>{act}</script></body>"))
    return copy


def browse(page: Path, profile: Path, link: str = "") -> tuple[str, list[str]]:
    """The page's elements after 4 seconds of the browser's own clock, and what it wrote to the console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
             "--virtual-time-budget=4000", "--window-size=1200,900", "--dump-dom"]  # fmt: skip
    done = subprocess.run([str(CHROMIUM), *flags, page.as_uri() + link], capture_output=True, text=True, timeout=60)
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def found_by(page: Path, probe: str, profile: Path) -> dict[str, Any]:
    dom, console = browse(probed(page, probe), profile)
    assert console == []
    output = re.search(r'<output id="probe">(.*?)</output>', dom, re.DOTALL)
    assert output, "the probe did not end"
    found: dict[str, Any] = json.loads(output.group(1).replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert found.pop("problems") == []
    return found


@in_browser
def test_the_page_opens_at_a_link_without_a_word_on_the_console(tmp_path: Path, page: Path) -> None:
    dom, console = browse(page, tmp_path / "profile", "#tree=1&step=2")
    assert console == []
    assert "Rollout 2 of 3: reward 1.000, best 1.000, 4 nodes" in dom
    assert "<img" not in dom and len(re.findall("<script", dom)) == 2


@in_browser
def test_the_viewer_by_keyboard_and_replay(tmp_path: Path, page: Path) -> None:
    probe = """
note("first", rows());
at_("choice").value = "1"; at_("choice").dispatchEvent(new Event("change"));
note("second", rows());
note("edges", [...document.querySelectorAll("#rows .prob")].map((p) => p.textContent).slice(1));
at_("collapse").click(); note("collapsed", rows());
at_("rows").focus(); press("ArrowDown"); press("ArrowRight"); note("opened", rows());
press("ArrowRight"); note("chosen", document.querySelector(".tok.chosen").textContent);
note("details", at_("node").innerText); note("active", at_("rows").getAttribute("aria-activedescendant"));
press("ArrowLeft"); press("ArrowLeft"); note("closed", rows());
const shade = () => document.querySelector(".score i").parentElement.textContent;
note("by reward", shade());
at_("metric").value = "value"; at_("metric").dispatchEvent(new Event("change")); note("by value", shade());
at_("step").value = 1; at_("step").dispatchEvent(new Event("input"));
note("step 1", rows()); note("path 1", [...document.querySelectorAll(".tok.path")].map((t) => t.textContent));
note("state 1", at_("state").textContent);
press("."); press("."); note("step 3", rows()); note("end", at_("next").disabled);
at_("play").click(); note("playing", at_("state").textContent);
setTimeout(() => { note("played", at_("state").textContent); note("stopped", at_("play").textContent); }, 2950);
"""
    found = found_by(page, probe, tmp_path / "profile")
    assert found["first"][1].startswith("·a↵") and EVIL.split()[0] in found["first"][1]
    assert found["second"] == ["prompt", "a", "bend", "cend", "dend"]
    assert found["edges"] == ["50 %", "75 %", "25 %", "25 %"]
    assert found["collapsed"] == found["closed"] == ["prompt", "a", "dend"]
    assert found["opened"] == found["second"] and found["chosen"] == "bend" and found["active"] == "row-2"
    assert "75 %" in found["details"] and f"{math.log(0.5 * 0.75):.3f}" in found["details"]
    assert (
        found["by reward"] == "1.000" and found["by value"] == f"{tree_record(small_result(), letters)['value'][0]:.3f}"
    )
    assert found["state 1"] == "Rollout 1 of 3: reward 0.250, best 0.250, 4 nodes"
    assert found["step 1"] == ["prompt", "a", "bend", "cend"] and found["path 1"] == ["prompt", "a", "bend"]
    assert found["step 3"] == found["second"] and found["end"] is True
    assert found["playing"].startswith("Rollout 1 of 3") and found["played"].startswith("Rollout 3 of 3")
    assert found["stopped"] == "Play"


@in_browser
def test_thousands_of_nodes_are_a_few_elements(tmp_path: Path, page: Path) -> None:
    probe = """
at_("choice").value = "2"; at_("choice").dispatchEvent(new Event("change"));
note("rows", document.querySelectorAll(".row").length);
at_("step").value = 1999; at_("step").dispatchEvent(new Event("input"));
note("after", document.querySelectorAll(".row").length);
note("chosen", document.querySelectorAll(".tok.chosen").length);
note("height", at_("spacer").offsetHeight); note("metric", at_("metric").disabled);
"""
    found = found_by(page, probe, tmp_path / "profile")
    assert 10 < found["rows"] < 100 and 10 < found["after"] < 100 and found["chosen"] == 1
    assert found["height"] == 30 * 2000  # the prompt and 1,999 paths
    assert found["metric"] is True  # best-of-n keeps no soft values
