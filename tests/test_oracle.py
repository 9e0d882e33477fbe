"""A reward that sees the answer is recognised wherever it hides, and every output of a run with one says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import COLORS, FakeTask, OracleTask, fake_backend
from matplotlib.figure import Figure
from matplotlib.text import Text
from task_data import write_har
from test_scores import cells, run_folder, said
from wandb_file import OfflineRun, offline_runs

import dts
from dts.evaluation.cli import main
from dts.evaluation.finetuned import compare as protocol
from dts.evaluation.finetuned import report as comprehensive_report
from dts.evaluation.report import charts
from dts.evaluation.report.__main__ import main as report_main
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.studies import equal_tokens as study
from dts.evaluation.studies import equal_tokens_report as study_report
from dts.evaluation.studies.task_metrics import tables
from dts.evaluation.tasks import load_task
from dts.evaluation.tasks.oracle import OracleReward, is_oracle, sees_reference

NAME = "sum(number, answer key)"


def oracle() -> OracleReward:
    return OracleReward(lambda context, finished: [1.0] * len(finished), "answer key")


def knows_the_answer(text: str) -> float:
    return 1.0


knows_the_answer.oracle = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda one: one,
        lambda one: dts.weighted_sum([(len, 1.0), (one, 0.5)]),
        lambda one: dts.minimum(len, one),
        lambda one: dts.clip(one, 0, 1),
        lambda one: dts.gate(len, one),
        lambda one: dts.CheckMonotone(one),
        lambda one: dts.with_timeout(one, 1.0),
        lambda one: dts.with_timeout(dts.clip(dts.weighted_sum([(dts.minimum(one, len), 1.0)]), 0, 1), 1.0),
    ],
)
def test_an_oracle_is_found_in_every_combination_whatever_its_name(wrap: Callable[[Any], Any]) -> None:
    assert is_oracle(wrap(oracle())) and is_oracle(wrap(dts.as_reward(knows_the_answer)))
    assert not is_oracle(wrap(dts.as_reward(len, "oracle-by-name-only")))


def test_a_function_says_so_itself() -> None:
    assert is_oracle(knows_the_answer) and not is_oracle(len)


# ---- the outputs of a run ----


def run(path: Path, task: FakeTask) -> Path:
    arguments = ["--models", "red", "--methods", "maxent", "greedy", "--num-samples", "2", "--num-rollouts", "3"]
    arguments += ["--wandb-mode", "offline", "--output-dir", str(path)]
    assert main(arguments, backend=fake_backend(task)) == 0
    return next(folder for folder in path.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose reward hides an oracle."""
    return run(tmp_path_factory.mktemp("marked"), OracleTask())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("plain"), FakeTask())


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_records_and_trees_carry_the_mark(marked: Path, plain: Path) -> None:
    assert {(s["reward"], s["oracle"]) for s in read_jsonl(marked / "samples.jsonl")} == {(NAME, True)}
    assert all(r["oracle"] is True for r in read_jsonl(marked / "rollouts.jsonl"))
    assert all(load(tree)["oracle"] is True for tree in (marked / "trees").iterdir())
    assert {s["oracle"] for s in read_jsonl(plain / "samples.jsonl")} == {False}
    assert not any("oracle" in r for r in read_jsonl(plain / "rollouts.jsonl"))


def test_summaries_carry_the_mark(marked: Path, plain: Path) -> None:
    (beside,) = marked.parent.glob("wandb_experiments_*.json")
    for file in (marked / "summary.json", beside):
        assert load(file)["oracles"] == [NAME] and all(one["oracle"] is True for one in load(file)["runs"])
    assert load(plain / "summary.json")["oracles"] == []
    assert not any("oracle" in one for one in load(plain / "summary.json")["runs"])


def test_the_table_in_the_terminal_carries_the_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, OracleTask())
    printed = capsys.readouterr().out
    assert f"**Oracle reward: {NAME}.** It sees the reference answer" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|") and ("maxent" in line or "greedy" in line)]
    said = [line for line in printed.splitlines() if "search (maxent)" in line]
    assert len(said) == 2 and all("(oracle)" in line for line in said)  # in the report and at the end
    assert len(lines) == 4 and all("maxent (oracle)" in line or "greedy (oracle)" in line for line in lines)


def test_report_md_of_a_run_without_one_has_no_mark(plain: Path) -> None:
    assert "oracle" not in (plain / "report.md").read_text().lower()


def test_the_page_carries_the_mark_at_the_top_in_tables_cards_and_charts(marked: Path, plain: Path) -> None:
    page = (marked / "report.html").read_text()
    assert '<body class="oracle">' in page and f"Oracle reward: {NAME}." in page
    for method in ("maxent", "greedy"):
        assert page.count(f'<th scope="row">{method} (oracle)</th>') == 2  # rewards and task metrics
        assert f'<th scope="row">{method}</th>' not in page and f"<h3>{method} (oracle) " in page
    assert page.count('aria-label="Monotonicity (oracle)') == 2  # the frame of the chart and the picture
    assert "oracle" not in (plain / "report.html").read_text().split("</style>")[1].split("<script")[0].lower()


def test_a_page_over_several_runs_marks_the_ones_that_used_it(marked: Path, plain: Path, tmp_path: Path) -> None:
    assert report_main([str(marked), str(plain), "-o", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert '<th scope="row">maxent [A] (oracle)</th>' in page and '<th scope="row">maxent [B]</th>' in page


def texts(figure: Figure) -> list[str]:
    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def test_every_chart_names_it_in_title_and_legend(marked: Path, plain: Path) -> None:
    for folder, wanted in ((marked, True), (plain, False)):
        samples, rollouts = (read_jsonl(folder / f"{name}.jsonl") for name in ("samples", "rollouts"))
        for name, figure in charts.figures(samples, rollouts, COLORS).items():
            shown = texts(figure)
            titles = [text for text in shown if text.startswith(("Best reward so", "Reward", "Monoton", "Speed"))]
            assert titles and all(text.endswith(" (oracle)") == wanted for text in titles), name
            assert any("maxent (oracle)" in text for text in shown) == wanted, name


def test_weights_and_biases_has_a_tag_a_setting_and_titles(marked: Path, plain: Path) -> None:
    (run,), (other,) = offline_runs(marked), offline_runs(plain)
    assert "oracle" in run.tags and run.config["oracle"] is True
    assert "oracle" not in other.tags and "oracle" not in other.config
    assert titles(run) == {
        "Best reward so far, red (oracle)",
        "Monotonicity (oracle)",
        "Speed against quality (oracle)",
    }
    assert not any("oracle" in title for title in titles(other))


def titles(run: OfflineRun) -> set[str]:
    charts = run.config["_wandb"]["visualize"].values()
    return {chart["panel_config"]["stringSettings"]["title"] for chart in charts}


def test_tensorboard_has_a_text(tmp_path: Path) -> None:
    read = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--models", "red", "--methods", "maxent", "--tracker", "tensorboard", "--quiet", "--no-wandb"]
    assert main([*arguments, "--output-dir", str(tmp_path)], backend=fake_backend(OracleTask())) == 0
    (folder,) = tmp_path.glob("*/tensorboard/*")
    events = read.EventAccumulator(str(folder))
    events.Reload()
    text = events.Tensors("oracle/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("Oracle reward. It sees the reference answer")


# ---- the other commands ----


def test_scores_mark_their_lines_and_differences(tmp_path: Path) -> None:
    data = write_har(tmp_path / "data")
    task = load_task("har", data_dir=data)
    paths = {example.id: [(said("sitting"), 1.0)] for example in task.examples}
    first = run_folder(tmp_path / "a", "har", data, "greedy", paths, reward=NAME, oracle=True)
    second = run_folder(tmp_path / "b", "har", data, "beam", paths, reward="verifier", oracle=False)
    (table,) = tables([first, second], ["greedy [A] best"], resamples=100).values()
    assert "m greedy [A] best (oracle)" in table and "that of m greedy [A] best (oracle)" in table
    assert "m beam [B] best" in cells(table) and "m greedy [A] best (oracle)" in cells(table)


def test_a_study_marks_its_records_tables_and_panels(
    tmp_path: Path, tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("keyword", num_samples=1)
    monkeypatch.setattr(dts, "load", lambda name: tiny_lm)
    monkeypatch.setattr(task, "reward", lambda example: dts.weighted_sum([(len, 1.0), (oracle(), 1.0)]))
    monkeypatch.setattr(study, "load_task", lambda name, **_: task)
    small = {"budgets": "2", "prompts": "1", "max-tokens": "4", "batch-size": "2", "methods": "maxent", "draws": "0"}
    options = [word for name, value in small.items() for word in (f"--{name}", value)]
    assert study.main(["--datasets", "keyword", *options, "--output", str(tmp_path)]) == 0
    assert all(record["oracle"] is True for record in read_jsonl(tmp_path / "study.jsonl"))
    text = (tmp_path / "report.md").read_text()
    assert "**Oracle reward.** It sees the reference answer" in text
    assert "| keyword (oracle) |" in text and "| keyword |" not in text
    figure = study_report.curves(study_report._cells(read_jsonl(tmp_path / "study.jsonl")))
    assert "keyword (oracle) (1 prompts)" in texts(figure)


def test_a_comparison_of_models_marks_its_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "named", lambda name, *_: knows_the_answer if name == "m:key" else len)
    settings = protocol.CompareSettings(test_data="configs/data/keywords_test.jsonl", checks=("m:key", "m:len"))
    models: Any = {"baseline": [object()], "other": [object()]}
    _, _, about = protocol._prepare(models, settings)
    assert about["oracles"] == ["knows_the_answer"]
    summary = {**about, "settings": {"samples": 2}, "models": {}, "contrasts": {}}
    assert comprehensive_report.facts(summary)[0].startswith("Oracle reward: knows_the_answer. It sees the reference")
    entry = {"value": 1.0, "low": None, "high": None}
    summary["models"] = {"a": {"seeds": ["s"], "measures": {"knows_the_answer": entry, "len": entry}}}
    rows = comprehensive_report.models_table(summary)
    assert [row[0] for row in rows] == ["measure", "knows_the_answer (oracle)", "len"]


def test_a_folder_of_an_older_version_is_marked_by_the_name_of_its_reward() -> None:
    assert sees_reference({"reward": "sum(oracle-accuracy, plausible)"}) and not sees_reference({"reward": "verifier"})
    assert not sees_reference({"reward": "oracle-by-name-only", "oracle": False})
