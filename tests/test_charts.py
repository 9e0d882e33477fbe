"""Charts: the numbers that are drawn, and a picture for every shape of run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dts.evaluation.report import charts

COLORS = {"red": "#ff6b6b", "teal": "#4ecdc4"}


def records(models: list[str], counts: dict[str, int], samples: int) -> tuple[list[Any], list[Any]]:
    """Rollout k of sample s has reward 0.1 (k mod 3) + s and cost 10 (k + 1) + s tokens."""
    done, rollouts = [], []
    for model in models:
        for method, count in counts.items():
            for s in range(samples):
                rewards = [0.1 * (k % 3) + s for k in range(count)]
                head = {"model": model, "method": method, "sample": s}
                for k, reward in enumerate(rewards):
                    best = max(rewards[: k + 1])
                    rollouts.append({**head, "rollout_idx": k, "rollout_reward": reward, "best_so_far": best,
                                     "tokens": 10 * (k + 1) + s})  # fmt: skip
                order = {"monotonicity": 0.7, "independent_monotonicity": 0.55} if count > 1 else {}
                done.append({**head, "best_reward": max(rewards), "time": 2.0 + s,
                             "monotonicity": None, "independent_monotonicity": None, **order})  # fmt: skip
    return done, rollouts


def test_reward_over_rollouts_draws_means_over_samples() -> None:
    _, rollouts = records(["red"], {"maxent": 4}, 2)
    left, right = charts.reward_over_rollouts(pd.DataFrame(rollouts), COLORS).axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[1, 0.5], [2, 0.6], [3, 0.7], [4, 0.7]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[1, 0.5], [2, 0.6], [3, 0.7], [4, 0.5]])
    assert left.lines[0].get_color() == COLORS["red"]


def test_a_sample_that_ended_early_keeps_its_best() -> None:
    _, rollouts = records(["red"], {"maxent": 3}, 2)
    frame = pd.DataFrame([r for r in rollouts if (r["sample"], r["rollout_idx"]) != (1, 2)])
    best = charts.reward_over_rollouts(frame, COLORS).axes[0].lines[0].get_ydata()
    assert best == pytest.approx([0.5, 0.6, (0.2 + 1.1) / 2])


def test_reward_vs_tokens_uses_tokens_of_the_search() -> None:
    _, rollouts = records(["teal"], {"maxent": 3, "greedy": 1}, 2)
    axes = charts.reward_vs_tokens(pd.DataFrame(rollouts), COLORS).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[10.5, 0.5], [20.5, 0.6], [30.5, 0.7]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[10.5, 0.5]])
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()


def test_monotonicity_bars_have_their_reference_and_skip_single_rollouts() -> None:
    samples, _ = records(["red", "teal"], {"maxent": 4, "greedy": 1}, 2)
    axes = charts.monotonicity_bars(pd.DataFrame(samples), COLORS).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.7, 0.7])
    assert [lines.get_segments()[0][0, 1] for lines in axes.collections] == pytest.approx([0.55, 0.55])


@pytest.mark.parametrize("models", [["red"], ["red", "teal"]])
@pytest.mark.parametrize("counts", [{"maxent": 5, "best-of-n": 5, "greedy": 1}, {"greedy": 1}, {"maxent": 2}])
@pytest.mark.parametrize("samples", [1, 30])
def test_every_shape_of_run_has_five_pictures(
    tmp_path: Path, models: list[str], counts: dict[str, int], samples: int
) -> None:
    paths = charts.write_charts(*records(models, counts, samples), COLORS, tmp_path)
    assert len(paths) == 5
    for path in paths.values():
        width, height = struct.unpack(">II", path.read_bytes()[16:24])  # of the PNG header
        assert 500 < width < 3000 and 300 < height < 3000


def test_nothing_is_drawn_before_a_sample_is_finished(tmp_path: Path) -> None:
    _, rollouts = records(["red"], {"maxent": 2}, 1)
    assert charts.write_charts([], rollouts, COLORS, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_data_sets_have_charts_of_their_own_and_seeds_are_further_samples(tmp_path: Path) -> None:
    samples, rollouts = [
        [{**r, "dataset": dataset, "seed": seed} for dataset in ("har", "m4") for seed in (0, 1) for r in rows]
        for rows in records(["red"], {"maxent": 3}, 2)
    ]
    paths = charts.write_charts(samples, rollouts, COLORS, tmp_path)
    assert len(paths) == 10 and paths["monotonicity_m4"] == tmp_path / "monotonicity_m4.png"
    own = [r for r in rollouts if r["dataset"] == "har"]
    image = charts.rollout_heatmap(pd.DataFrame(own)).axes[0].images[0]
    assert image.get_array().shape == (4, 3)  # two samples under two seeds, three rollouts
