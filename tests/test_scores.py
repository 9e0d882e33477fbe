"""The table of scores: the answers of finished runs, their intervals and their paired differences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from task_data import write_har, write_m4

from dts.errors import UsageError
from dts.evaluation.studies.task_metrics import main, tables
from dts.evaluation.tasks import Task, load_task


def run_folder(
    folder: Path, dataset: str, data: Path, method: str, paths: dict[str, list[tuple[str, float]]], **extra
) -> Path:
    """What a run leaves: `paths` are text and reward of every rollout, by example id."""
    task = load_task(dataset, data_dir=data)
    folder.mkdir()
    head = {"model": "m", "dataset": dataset, "seed": 0, "method": method}
    samples, rollouts = [], []
    for number, example in enumerate(task.examples):
        own = paths.get(example.id)
        if own is None:
            continue
        rollouts += [
            {**head, "sample": number, "rollout_idx": index, "text": text, "rollout_reward": reward,
             "tokens": 10 * number + index, "time": index / 2}
            for index, (text, reward) in enumerate(own)
        ]  # fmt: skip
        best = max(own, key=lambda path: path[1])[0]
        samples.append(
            {**head, "sample": number, "id": example.id, "text": best, "rollouts": len(own), "time": 2.0,
             "best_reward": max(reward for _, reward in own), "shares": None, "forwarded_tokens": 100 + number, **extra}
        )  # fmt: skip
    for name, records in (("samples", samples), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"datasets": [dataset], "data_dir": str(data), "num_samples": None, "data_seed": 0, "reward_scale": 2.0}
    runs = [{"model": "m", "dataset": dataset, "method": method, "color": "#000000"}]
    (folder / "summary.json").write_text(json.dumps({"config": config, "runs": runs}))
    return folder


def cells(table: str) -> dict[str, list[str]]:
    """Lines of a Markdown table by their first cell, the header under "answers"."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def value(cell: str) -> tuple[float, float, float]:
    """Estimate and interval."""
    middle, low, high = cell.replace("[", "").replace("]", "").replace(",", "").split()
    return float(middle), float(low), float(high)


@pytest.fixture
def har(tmp_path) -> tuple[Path, Task]:
    data = write_har(tmp_path / "data")
    return data, load_task("har", data_dir=data)


def said(label: str) -> str:
    return f"Answer: {label.replace('_', ' ')}"


def test_three_answers_with_exact_values(tmp_path, har):
    data, task = har
    right = {name: row["reference"] for name, row in task.baseline_rows()["majority class"].items()}
    wrong = {name: "sitting" if label != "sitting" else "walking" for name, label in right.items()}
    # The best path is wrong. Two of three paths are right, and weigh less than the best one at lambda 2.
    paths = {n: [(said(right[n]), 0.1), (said(wrong[n]), 1.0), (said(right[n]), 0.1)] for n in right}
    (table,) = tables([run_folder(tmp_path / "a", "har", data, "maxent", paths)], resamples=100).values()
    found = cells(table)
    assert value(found["m maxent best"][0]) == value(found["m maxent weighted"][0]) == (0.0, 0.0, 0.0)
    assert value(found["m maxent unweighted"][0]) == (1.0, 1.0, 1.0)
    assert found["m maxent best"][-2:] == ["107", "2.0"]  # tokens 100 to 114, seconds
    assert found["answers"][:4] == ["macro_f1 (max)", "accuracy", "kappa", "parse_failures"]
    baseline = task.baselines()["majority class"]
    assert value(found["majority class"][0])[0] == pytest.approx(baseline["macro_f1"], abs=5e-4)
    assert float(found["majority class"][1]) == pytest.approx(baseline["accuracy"], abs=5e-4)


def test_clusters_are_resampled_whole_and_differences_are_paired(tmp_path, har):
    data, task = har
    right = {name: row["reference"] for name, row in task.baseline_rows()["majority class"].items()}
    subjects = sorted(set(task.clusters.values()))
    assert len(subjects) == 3  # of five windows each
    good = {n: [(said(right[n]) if task.clusters[n] != subjects[0] else "?", 1.0)] for n in right}
    first = run_folder(tmp_path / "a", "har", data, "greedy", good)
    second = run_folder(tmp_path / "b", "har", data, "beam", good)
    (table,) = tables([first, second], ["greedy [A] best"], resamples=100).values()
    found = cells(table)
    middle, low, high = value(found["m greedy [A] best"][0])
    # One of three subjects is never parsed. 8 of 27 draws lack it, 1 of 27 has nothing else; no draw of single windows
    # would be either.
    assert (low, high) == (0.0, 1.0) and 0 < middle < 1
    assert found["m greedy [A] best"][4] == "-"
    assert value(found["m beam [B] best"][4]) == (0.0, 0.0, 0.0)  # the same answers differ in no resample
    assert value(found["verifier alone"][4])[0] == pytest.approx(
        value(found["verifier alone"][0])[0] - middle, abs=2e-3
    )
    assert not any("weighted" in line for line in found)  # there was one path each


def test_a_forecast_is_the_weighted_median_and_groups_have_tables_of_their_own(tmp_path):
    data = write_m4(tmp_path / "data", frequency="Weekly", seasonal_period="1")
    task = load_task("m4", data_dir=data)
    texts = [("300 300 300", 0.2), ("500 500 500", 1.0), ("310 310 310", 0.9)]
    paths = {example.id: texts for example in task.examples if example.id != "Q3"}
    folder = run_folder(tmp_path / "a", "m4", data, "best-of-n", paths)
    found = tables([folder], resamples=100)
    assert list(found) == ["m4 (3 examples)", "m4, Quarterly (2 examples)", "m4, Weekly (1 examples)"]
    weights = np.exp(2 * (np.array([0.2, 1.0, 0.9]) - 1.0))
    assert weights[0] + weights[2] > weights.sum() / 2 > weights[0]  # so the weighted median is 310
    for kind, text in [("best", "500 500 500"), ("weighted", "310 310 310"), ("unweighted", "310 310 310")]:
        owa = task.score({"Q0": text, "Q2": text})["owa"]
        assert value(cells(found["m4, Quarterly (2 examples)"])[f"m best-of-n {kind}"][0])[0] == pytest.approx(
            owa, abs=5e-4
        )
    assert "nan" not in found["m4, Weekly (1 examples)"]  # one series has no interval


def test_what_a_stopped_search_has_found_and_what_each_group_costs(tmp_path):
    data = write_m4(tmp_path / "data", frequency="Weekly", seasonal_period="1")
    texts = [("300 300 300", 0.2), ("310 310 310", 0.1), ("500 500 500", 1.0)]
    paths = {example.id: texts for example in load_task("m4", data_dir=data).examples}
    folder = run_folder(tmp_path / "a", "m4", data, "maxent", paths)
    found = tables([folder], resamples=100, after=[1, 2, 3])["m4, Quarterly (3 examples)"]
    lines = cells(found)
    assert lines["m maxent after 2"][:-2] == lines["m maxent after 1"][:-2]  # the second rollout is no better
    assert lines["m maxent after 1"][:-2] != lines["m maxent best"][:-2]
    assert "m maxent after 3" not in lines  # that is all of it
    numbers = [n for n, e in enumerate(load_task("m4", data_dir=data).examples) if e.id != "Q1"]
    assert lines["m maxent best"][-2:] == [f"{100 + sum(numbers) / 3:.0f}", "2.0"]
    assert lines["m maxent after 2"][-2:] == [f"{10 * sum(numbers) / 3 + 1:.0f}", "0.5"]
    assert main([str(folder), "--after", "0"]) == 2


def test_a_tree_weighs_its_paths_itself(tmp_path):
    data = write_m4(tmp_path / "data")
    paths = {f"Q{number}": [("500 500 500", 1.0), ("300 300 300", 0.1)] for number in range(4)}
    folder = run_folder(tmp_path / "a", "m4", data, "maxent", paths, shares=[0.2, 0.8])
    (table,) = tables([folder], resamples=100).values()
    texts = dict.fromkeys(paths, "300 300 300")  # the share decides, not the reward
    owa = load_task("m4", data_dir=data).score(texts)["owa"]
    assert value(cells(table)["m maxent weighted"][0])[0] == pytest.approx(owa, abs=5e-4)


def test_what_cannot_be_compared_is_said(tmp_path, har, capsys):
    data, task = har
    ids = [example.id for example in task.examples]
    first = run_folder(tmp_path / "a", "har", data, "greedy", {ids[0]: [("?", 0.0)]})
    second = run_folder(tmp_path / "b", "har", data, "greedy", {ids[1]: [("?", 0.0)]})
    with pytest.raises(UsageError, match="no example is finished in all of these runs"):
        tables([first, second])
    with pytest.raises(
        UsageError, match="--against 'maxent best' names 0 lines; give the end of one of: m greedy best"
    ):
        tables([first], ["maxent best"])
    assert main([str(tmp_path)]) == 2
    assert "holds no summary.json" in capsys.readouterr().err
    assert main([str(first), "--resamples", "5"]) == 2
    assert "--resamples 5 is too few" in capsys.readouterr().err
    assert main([str(first), "--resamples", "100"]) == 0
    assert capsys.readouterr().out.startswith("har (1 examples):\n\n| answers")
