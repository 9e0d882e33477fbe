"""Under which names trackers, and summary.json after them, know the figures of a run.

The first method of the command logs the bare keys (`rollout_reward`, `sample_0/time`, `final/total_time`); every
further method logs the same keys under its name (`greedy/rollout_reward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from dts.evaluation.records import Cell, Record, RolloutRecord, SampleRecord

ROLLOUT_KEYS = ("rollout_reward", "rollout_idx", "output_length", "nodes_explored", "time", "best_so_far", "tokens")
SAMPLE_KEYS = ("best_reward", "monotonicity", "time", "nodes")
FINAL = {name: f"final/{name}" for name in ("avg_best_reward", "avg_monotonicity", "avg_time_per_sample", "total_time")}
FINAL_KEYS = tuple(FINAL.values())
TIME_KEYS = frozenset(  # wall-clock figures
    {"time", "seconds", "reward_seconds", FINAL["avg_time_per_sample"], FINAL["total_time"]}
)


def rollout_keys(record: RolloutRecord) -> Record:
    """A rollout's figures under their tracked names."""
    values = cast("Mapping[str, Any]", record)
    return {key: values[key] for key in ROLLOUT_KEYS}


def sample_keys(record: SampleRecord) -> Record:
    """A sample's figures under their tracked names, `sample_3/best_reward` and so on."""
    values = cast("Mapping[str, Any]", record)
    return {f"sample_{record['sample']}/{key}": values[key] for key in SAMPLE_KEYS}


def final_keys(cell: Cell) -> Record:
    """A method's aggregates under their tracked names, task metrics as `final/NAME`."""
    values = cast("Mapping[str, Any]", cell)
    own = {key: values[name] for name, key in FINAL.items()}
    return {**own, **{f"final/{name}": value for name, value in cell["metrics"].items()}}


def published(cell: Cell) -> Record:
    """A cell as it stands in summary.json."""
    return {FINAL.get(name, name): value for name, value in cell.items()}


def read_cell(record: Mapping[str, Any]) -> Cell:
    """The cell that an entry of summary.json was written from."""
    names = {key: name for name, key in FINAL.items()}
    return cast("Cell", {names.get(key, key): value for key, value in record.items()})


def named(method: str, primary: str, values: Record) -> Record:
    """The values that are there, under the keys of their method."""
    prefix = "" if method == primary else f"{method}/"
    return {f"{prefix}{key}": value for key, value in values.items() if value is not None}


def own_cells(cells: Sequence[Cell], model: str, of: Record) -> list[Cell]:
    """The cells of one model, and of one data set and seed where `of` names them."""
    return [
        cell
        for cell in cells
        if cell["model"] == model
        and cell.get("dataset") == of.get("dataset", cell.get("dataset"))
        and of.get("seed") in (None, *cell.get("seeds", [of.get("seed")]))
    ]
