"""The study: equal tokens by construction, resumable records, and figures that a hand can check."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

import dts
from dts.errors import UsageError
from dts.evaluation.run_folder import RunFolder, read_jsonl
from dts.evaluation.studies import equal_tokens_report as study_report
from dts.evaluation.studies.equal_tokens import Study, main, run


def small(**changes):
    settings = {
        "datasets": ("keyword",), "methods": ("maxent-star", "maxent"), "budgets": (2, 8), "prompts": 2,
        "max_tokens": 6, "batch_size": 2, "share": 1.0, "draws": 3,
    }  # fmt: skip
    return Study(**{**settings, **changes})


@pytest.fixture
def folder(tmp_path, tiny_lm, monkeypatch):
    monkeypatch.setattr(dts, "load", lambda name: tiny_lm)
    (tmp_path / "study.json").write_text(
        json.dumps({"model": "tiny", "reward_scale": 16.0, "max_tokens": 6, "budgets": [2, 8]})
    )
    made = RunFolder(tmp_path)
    yield made
    made.close()


def test_every_method_gets_the_tokens_of_best_of_n(folder):
    run(small(), folder)
    records = folder.records("study")
    assert len(records) == 2 * 3
    for _, cell in itertools.groupby(records, key=lambda r: r["id"]):
        reference, *others = cell
        assert reference["method"] == "best-of-n" and len(reference["rewards"]) == 8
        for record in [reference, *others]:
            assert record["spent"] == record["unique"] <= reference["tokens"][-1]
            assert record["tokens"] == sorted(record["tokens"])
            assert max(record["rewards"]) == record["completions"][0]["reward"]
        assert [len(record["draws"]) for record in others] == [3, 3]


def test_an_interrupted_study_goes_on_to_the_same_records(folder, tmp_path_factory):
    run(small(), folder)
    whole = folder.records("study")
    path = tmp_path_factory.mktemp("cut") / "study.jsonl"
    lines = (folder.path / "study.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    again = RunFolder(path.parent)
    run(small(), again)
    again.close()
    timeless = {"seconds": 0, "seconds_at": 0, "reward_seconds": 0}
    assert [{**r, **timeless} for r in read_jsonl(path)] == [{**r, **timeless} for r in whole]


def test_all_prompts_in_flight_get_the_tokens_of_best_of_n_and_their_share_of_the_seconds(folder):
    run(small(width=2), folder)
    records = folder.records("study")
    assert [r["method"] for r in records] == ["best-of-n"] * 2 + ["maxent-star"] * 2 + ["maxent"] * 2
    limits = {r["id"]: r["tokens"][-1] for r in records if r["method"] == "best-of-n"}
    for record in records:
        assert record["tokens"][0] > 0 and record["spent"] == record["unique"] <= limits[record["id"]]
        assert record["spent"] > limits[record["id"]] - 3  # a step of two paths more would be beyond it
        assert len(record["seconds_at"]) == len(record["rewards"])
        assert record["seconds_at"] == sorted(record["seconds_at"])
        assert record["seconds_at"][0] > 0 and record["seconds_at"][-1] <= record["seconds"]


def test_a_group_that_was_cut_off_is_repeated_as_a_whole(folder, tmp_path_factory):
    study = small(width=2, methods=("maxent",), draws=0)
    run(study, folder)
    whole = folder.records("study")
    path = tmp_path_factory.mktemp("cut") / "study.jsonl"
    path.write_text("".join((folder.path / "study.jsonl").read_text().splitlines(keepends=True)[:3]))
    again = RunFolder(path.parent)
    run(study, again)
    again.close()
    keys = [(r["id"], r["method"], r["rewards"]) for r in whole]
    assert [(r["id"], r["method"], r["rewards"]) for r in read_jsonl(path)] == keys


def test_report_is_written_from_the_records_alone(folder, capsys):
    run(small(), folder)
    assert main(["--report", "--output", str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (folder.path / "report.md").read_text().strip()
    assert "| keyword | 8 |" in printed and "maxent-star" in printed
    assert (folder.path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"budgets": (0,)}, "--budgets 0"), ({"prompts": 0}, "--prompts 0"), ({"share": 2.0}, "--share 2.0"),
     ({"datasets": ()}, "--datasets is empty")],
)  # fmt: skip
def test_bad_settings_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        small(**changes)


def test_another_study_in_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "study.json").write_text(json.dumps({"model": "other", "datasets": [], "methods": [], "seeds": []}))
    assert main(["--output", str(tmp_path), "--datasets", "keyword"]) == 2
    assert "'other' -> 'smollm2-135m'" in capsys.readouterr().err


def test_the_costs_of_the_reward_have_a_column(folder):
    run(small(), folder)
    header, rows = study_report.quality(study_report._cells(folder.records("study")))
    own = [r for r in folder.records("study") if r["method"] == "maxent"]
    row = dict(zip(header, next(row for row in rows if row[1] == "maxent"), strict=True))
    assert row["reward calls"] == f"{np.mean([r['reward_calls'] for r in own]):.0f}" != "0"
    assert row["reward s"] == f"{np.mean([r['reward_seconds'] for r in own]):.2f}"
    assert all(0 < r["reward_calls"] <= len(r["rewards"]) and r["reward_seconds"] > 0 for r in own)
    for r in own:
        del r["reward_calls"]  # a record of an older version
    assert study_report._mean_of(own, "reward_calls", ".0f") == "-"


def test_how_far_a_search_shared_its_tokens_has_columns(folder):
    run(small(), folder)
    records = folder.records("study")
    header, rows = study_report.quality(study_report._cells(records))
    shown = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    for method, row in shown.items():
        own = [r for r in records if r["method"] == method]
        assert row["tokens reused"] == f"{np.mean([r['tokens_reused'] for r in own]):.0%}"
        assert row["branch depth"] == f"{np.mean([r['branch_depth'] for r in own]):.0%}"
    assert shown["maxent"]["tokens reused"] != "0%"


def test_a_study_of_an_earlier_version_says_that_it_did_not_count_them(folder):
    run(small(), folder)
    assert study_report.NOT_RECORDED not in study_report.write_report(folder.path)
    old = folder.records("study")
    for r in old:
        del r["tokens_reused"], r["branch_depth"]
        r["start_depths"] = [0] * len(r["rewards"])
    (folder.path / "study.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    assert study_report.NOT_RECORDED in study_report.write_report(folder.path)
    header, rows = study_report.quality(study_report._cells(old))
    assert {row[header.index("tokens reused")] for row in rows} == {"-"}


def record(rewards, tokens):
    return {"rewards": rewards, "tokens": tokens, "spent": tokens[-1]}


def test_curves_count_only_what_was_finished_in_time():
    one = record([0.1, 0.5, 0.3], [10, 20, 30])
    assert [study_report.best_at(one, t) for t in (5, 10, 29, 30)] == [0.0, 0.1, 0.5, 0.5]
    assert study_report.reached_at(one, 0.3) == 20 and study_report.reached_at(one, 0.6) == math.inf


def test_ratio_of_tokens_and_its_censoring():
    cell = {"best-of-n": record([0.2, 0.4], [50, 100]), "m": record([0.4, 0.9], [25, 90])}
    never = {"best-of-n": record([0.2, 0.8], [50, 100]), "m": record([0.3], [80])}
    header, rows = study_report.tokens_to_reach({"d": [cell, never]}, [2])
    row = dict(zip(header, rows[0], strict=True))
    assert row["never reached"] == "1 of 2" and row["least"] == "1.25"
    assert row["geometric mean"].startswith(f"{math.sqrt(4 * 1.25):.1f} ")
    assert row["seconds, geometric mean"] == row["seconds of all"] == "-"  # of a study without them


def test_ratio_of_seconds_stands_beside_that_of_tokens():
    def timed(rewards, tokens, seconds, whole):
        return {**record(rewards, tokens), "seconds_at": seconds, "seconds": whole}

    cells = [
        {"best-of-n": timed([0.2, 0.4], [50, 100], [3.0, 6.0], 6.0), "m": timed([0.4, 0.9], [25, 90], [2.0, 8.0], 9.0)},
        {"best-of-n": timed([0.2, 0.8], [50, 100], [3.0, 6.0], 6.0), "m": timed([0.3], [80], [4.0], 5.0)},
    ]
    header, rows = study_report.tokens_to_reach({"d": cells}, [2])
    row = dict(zip(header, rows[0], strict=True))
    assert row["seconds, geometric mean"].startswith(f"{math.sqrt(6 / 2 * 6 / 5):.1f} ")  # the second never got there
    assert row["seconds of all"] == "12.0 to 7.0"


def test_completions_as_good_as_the_best_of_best_of_n():
    def record(*pairs):
        return {"completions": [{"reward": reward, "logprob": logprob} for reward, logprob in pairs]}

    cells = [
        {
            "best-of-n": record((0.5, -9.0), (0.5, -7.0), (0.1, -1.0)),
            "maxent": record((0.9, -8.0), (0.5, -3.0), (0.4, 0.0)),
        },
        {"best-of-n": record((1.0, -4.0)), "maxent": record((1.0, -2.0))},
        {"best-of-n": record((1.0, -4.0)), "maxent": record((0.9, -1.0))},  # never as good: counted, not compared
    ]
    _, (row,) = study_report.as_good({"d": cells})
    assert row[:2] == ["d", "maxent"] and row[-1] == "2 of 3"
    assert row[2].startswith("+3.0 [") and row[3].startswith("+0.0 [")  # -3 against -7 and -2 against -4; 2-2 and 1-1


def test_rank_weights_are_the_probabilities_of_being_the_best():
    rewards = [0.1, 0.7, 0.7, 0.3]
    samples = [{"reward": r} for r in rewards]
    expected = np.zeros(4)
    for draw in itertools.product(range(4), repeat=3):
        best = max(rewards[i] for i in draw)
        winners = [i for i in range(4) if rewards[i] == best]
        expected[winners] += 1 / len(winners) / 4**3
    assert study_report._rank_weights(samples, 3) == pytest.approx(expected)
