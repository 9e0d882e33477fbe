"""What a run says its search won: at no more tokens than the others, over samples that both have, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
from fakes import FakeTask, fake_backend

from dts.evaluation.cli import main
from dts.evaluation.collected import Collected
from dts.evaluation.experiment.config import ExperimentConfig, read_config_file
from dts.evaluation.records import Verdict
from dts.evaluation.report.verdict import ENOUGH, SEARCHES, compared, headline, remarks, sentence, verdicts

ROOT = Path(__file__).resolve().parent.parent
Curve = Sequence[tuple[int, float]]  # tokens and reward of each rollout


def run(searches: Sequence[Curve], *, method: str = "maxent-star", best: float | None = None, seeds: int = 1,
        **others: Sequence[Curve]) -> tuple[list[Any], Callable[[], pd.DataFrame]]:  # fmt: skip
    """Samples and rollouts; sample i of seed s is curve i * seeds + s. best: reward of the search's answer, where it is
    not the best one."""
    collected = Collected()
    for name, curves in {method: searches, **others}.items():
        for i, curve in enumerate(curves):
            rewards = [reward for _, reward in curve]
            head = {"model": "red", "dataset": "fake", "seed": i % seeds, "sample": i // seeds, "method": name,
                    "id": f"ex-{i // seeds}"}  # fmt: skip
            for k, (tokens, reward) in enumerate(curve):
                collected.add_rollout({**head, "rollout_idx": k, "tokens": tokens, "rollout_reward": reward,
                                       "best_so_far": max(rewards[: k + 1])})  # type: ignore[typeddict-item]  # fmt: skip
            found = best if best is not None and name == method else max(rewards)
            collected.add_sample({**head, "best_reward": found, "rollouts": len(curve), "reward": "number",
                                  "forwarded_tokens": curve[-1][0], "text": ""})  # fmt: skip
    return collected.samples, collected.rollouts


def cell(method: str, accuracy: float, **more: Any) -> Any:
    head = {"model": "red", "dataset": "fake", "method": method, "logprob_per_token": None}
    return {**head, "metrics": {"accuracy": accuracy}, **more}


def judged(
    samples: Sequence[Any],
    rollouts: Callable[[], pd.DataFrame],
    *,
    rows: Mapping[str, float] | None = None,
    accuracy: float = 0.5,
    task: FakeTask | None = None,
) -> Verdict:
    """The one verdict. rows: methods without a language model. accuracy: of the search."""
    task = task or FakeTask(count=len({s["id"] for s in samples}))
    cells: Any = [cell(name, accuracy) for name in dict.fromkeys(s["method"] for s in samples)]
    baselines = {name: {"accuracy": value} for name, value in (rows or {}).items()}
    (verdict,) = verdicts(samples, cells, {"fake": baselines}, {"fake": task}, rollouts)  # type: ignore[dict-item]
    return verdict


def test_a_win_says_rewards_tokens_interval_and_samples() -> None:
    records = run(
        [[(50, 0.5), (90, 1.0)]] * 8, **{"best-of-n": [[(60, 0.25), (120, 0.5)]] * 8, "greedy": [[(40, 0.25)]] * 8}
    )
    verdict = judged(*records)
    assert verdict["outcome"] == "won" and [one["method"] for one in verdict["others"]] == ["best-of-n", "greedy"]
    assert sentence(verdict) == (
        "Search (maxent-star) won on fake with red: "
        "at no more tokens than best-of-n (90 a sample against 120) the mean reward is 1.000 against 0.500, "
        "+0.500 [+0.500, +0.500], p 0.008, better on 8 of 8 samples and worse on 0; "
        "against the one answer of greedy (40 tokens, maxent-star 90) the mean reward is 1.000 against 0.250, "
        "+0.750 [+0.750, +0.750], p 0.008, better on 8 of 8 samples and worse on 0."
    )
    assert compared(verdict) == ["maxent-star", "best-of-n", "greedy"] and remarks(verdict) == []


@pytest.mark.parametrize(
    ("other", "reward", "tokens"),
    [(100, 0.75, 100), (79, 0.5, 79), (80, 0.75, 80), (40, 0.5, 40), (39, 0.25, 39), (400, 1.0, 120)],
)
def test_the_search_counts_with_what_it_had_for_the_tokens_of_the_other(other: int, reward: float, tokens: int) -> None:
    """Before its first text, at 40 tokens, with the lowest reward of the two."""
    records = run([[(40, 0.5), (80, 0.75), (120, 1.0)]], **{"best-of-n": [[(other // 2, 0.25), (other, 0.25)]]})
    (one,) = judged(*records)["others"]
    assert (one["search_reward"], one["search_tokens"], one["tokens"]) == (reward, tokens, other)


def test_an_answer_that_is_not_the_one_of_most_reward_counts_with_the_least_that_it_may_have_been() -> None:
    records = run([[(40, 0.5), (80, 0.75), (120, 1.0)]], best=0.75, **{"best-of-n": [[(50, 0.0), (100, 0.0)]]})
    assert judged(*records)["others"][0]["search_reward"] == 0.5
    records = run([[(40, 0.5), (80, 1.0)]], best=0.5, **{"best-of-n": [[(50, 0.0), (100, 0.0)]]})
    assert judged(*records)["others"][0]["search_reward"] == 0.5  # it ended within 100 tokens: its own answer


def test_one_method_that_is_better_is_a_loss_and_one_that_may_be_is_no_win() -> None:
    search = [[(50, 0.5), (100, 0.5)]] * 8
    worse, better, even = ([[(50, reward), (100, reward)]] * 8 for reward in (0.25, 0.75, 0.5))
    lost = judged(*run(search, beam=worse, **{"best-of-n": better}))
    assert lost["outcome"] == "lost" and headline(lost) == "Search (maxent-star) lost on fake with red"
    assert "0.500 against 0.750, -0.250" in sentence(lost) and "beam" not in sentence(lost)
    tied = judged(*run(search, beam=worse, **{"best-of-n": even}))
    assert (
        tied["outcome"] == "open"
        and headline(tied) == "We could not show that search (maxent-star) won on fake with red"
    )
    assert "better on 0 of 8 samples and worse on 0" in sentence(tied) and remarks(tied) == []


def test_five_samples_are_never_enough_and_the_run_says_so() -> None:
    records = run([[(50, 1.0), (90, 1.0)]] * 5, **{"best-of-n": [[(60, 0.0), (120, 0.0)]] * 5})
    verdict = judged(*records)
    assert verdict["outcome"] == "open" and verdict["others"][0]["p"] == 2 / 2**5
    assert remarks(verdict) == ["Too few to tell: 5 independent examples; from 6 on a difference can be shown."]
    more = judged(*run([[(50, 1.0), (90, 1.0)]] * 6, **{"best-of-n": [[(60, 0.0), (120, 0.0)]] * 6}))
    assert more["outcome"] == "won"


def test_seeds_of_one_example_are_not_independent() -> None:
    records = run([[(50, 1.0), (90, 1.0)]] * 8, seeds=4, **{"best-of-n": [[(60, 0.0), (120, 0.0)]] * 8})
    (one,) = judged(*records)["others"]
    assert (one["samples"], one["clusters"], one["p"]) == (8, 2, 0.5)


def test_only_samples_of_both_count_and_without_any_nothing_is_said() -> None:
    samples, rollouts = run([[(50, 1.0), (90, 1.0)]] * 3, **{"best-of-n": [[(60, 0.0), (120, 0.0)]] * 2})
    assert judged(samples, rollouts)["others"][0]["samples"] == 2
    task: Any = FakeTask(count=3)
    alone = [s for s in samples if s["method"] == "maxent-star"]
    assert verdicts(alone, [], {"fake": {}}, {"fake": task}, rollouts) == []
    assert verdicts([s for s in samples if s not in alone], [], {"fake": {}}, {"fake": task}, rollouts) == []


def test_the_search_is_dts_star_where_a_run_has_both() -> None:
    star, plain = [[(50, 1.0), (90, 1.0)]] * 6, [[(50, 0.0), (90, 0.0)]] * 6
    verdict = judged(*run(star, maxent=plain, greedy=[[(40, 0.5)]] * 6))
    assert verdict["method"] == "maxent-star" and [one["method"] for one in verdict["others"]] == ["greedy"]
    assert judged(*run(plain, method="maxent", greedy=[[(40, 0.5)]] * 6))["outcome"] == "lost"


@pytest.mark.parametrize(
    ("direction", "value", "said"),
    [
        ("max", 0.5, "does as well or better"),
        ("max", 0.4, "does worse, even the best"),
        ("min", 0.1, "does as well or better"),
    ],
)
def test_the_best_row_without_a_language_model_is_named(direction: str, value: float, said: str) -> None:
    task = replace(FakeTask(), metrics={"accuracy": direction}, note="Read the texts.")
    other = -9.0 if direction == "max" else 9.0
    records = run([[(50, 1.0), (90, 1.0)]] * 6, greedy=[[(40, 0.5)]] * 6)
    verdict = judged(
        *records, rows={"poor": other, "rules": value, "nothing": float("nan")}, task=replace(task, count=6)
    )
    assert remarks(verdict) == [
        f"Without a language model, rules {said}: accuracy {value:.3f}, maxent-star 0.500.",
        "Read the texts.",
    ]


def test_a_row_without_the_headline_metric_is_not_compared() -> None:
    samples, rollouts = run([[(50, 1.0), (90, 1.0)]] * 6, greedy=[[(40, 0.5)]] * 6)
    cells, task = [cell("maxent-star", 0.5), cell("greedy", 0.5)], cast("Any", FakeTask(count=6))
    (verdict,) = verdicts(samples, cells, {"fake": {"rules": {"length": 1.0}}}, {"fake": task}, rollouts)
    assert verdict["unaided"] is None
    cells[0]["metrics"] = {"length": 1.0}
    (verdict,) = verdicts(samples, cells, {"fake": {"rules": {"accuracy": 1.0}}}, {"fake": task}, rollouts)
    assert verdict["unaided"] is None


def test_an_oracle_is_marked_and_likelihoods_stand_beside_where_all_are_known() -> None:
    samples, rollouts = run([[(50, 1.0), (90, 1.0)]] * 6, greedy=[[(40, 0.5)]] * 6)
    cells = [cell("maxent-star", 1.0, oracle=True, logprob_per_token=-3.0), cell("greedy", 1.0, logprob_per_token=-1.0)]
    task: Any = FakeTask(count=6)
    (verdict,) = verdicts(samples, cells, {"fake": {}}, {"fake": task}, rollouts)
    assert headline(verdict).endswith(" with red (oracle)")
    assert remarks(verdict) == ["Log p per token of the texts under the model: maxent-star -3.00, greedy -1.00."]


def test_the_main_job_has_a_search_a_baseline_and_examples_enough_to_tell_them_apart() -> None:
    assert "run_experiments.py --config configs/main.yaml $(ARGS)" in (ROOT / "Makefile").read_text()
    config = ExperimentConfig(**read_config_file(ROOT / "configs" / "main.yaml"))
    assert config.methods[0] in SEARCHES and "best-of-n" in config.methods and config.num_samples >= ENOUGH


def test_a_run_ends_with_the_sentence_and_its_report_begins_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
    options = [
        "--models",
        "red",
        "--num-samples",
        "6",
        "--num-rollouts",
        "3",
        "--no-wandb",
        "--output-dir",
        str(tmp_path),
    ]
    assert main(options, fake_backend()) == 0
    out = capsys.readouterr().out
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    last = out.rstrip("\n").splitlines()[-1]
    assert last.startswith("Search ") or last.startswith("We could not show")
    said = last.split(": ", 1)
    assert f"**{said[0]}**: {said[1]}" in report and report.index(said[1]) < report.index("| model")
    assert page.index(said[1][1:]) < page.index('id="results-1"') and f"<h2>{said[0]}</h2>" in page
    first = page[page.index('id="won"') : page.index('id="results-1"')]
    assert first.count('<article class="card') == 3 and "question 0" in first  # every method on the first example
