"""What a tracker is: events of runs, one run per model, data set and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dts.evaluation.records import Cell, Record, RolloutRecord, SampleRecord


class RunTracker(Protocol):
    """The events of one tracker run. Records are those of the run folder."""

    def log_rollout(self, record: RolloutRecord) -> None: ...

    def log_sample(self, record: SampleRecord) -> None: ...

    def finish(self, cells: Sequence[Cell], charts: Mapping[str, Path], *, complete: bool) -> None:
        """The run is over, `complete` or cut short; `cells` are its aggregates, `charts` image files by name."""


class Tracker(Protocol):
    """Opens one run per model (and data set and seed)."""

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker: ...


class NullTracker:
    """Tracks nothing; is its own run."""

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker:
        return self

    def log_rollout(self, record: RolloutRecord) -> None:
        pass

    def log_sample(self, record: SampleRecord) -> None:
        pass

    def finish(self, cells: Sequence[Cell], charts: Mapping[str, Path], *, complete: bool) -> None:
        pass


def unit(config: Record) -> Record:
    """`dataset` and `seed` of a tracker run, where its configuration names them."""
    return {name: config[name] for name in ("dataset", "seed") if name in config}


def run_name(experiment: str, model: str, config: Record) -> str:
    """`HAR-smollm2-135m-har-seed0`: model, and data set and seed where the run is of one of them."""
    own = unit(config)
    parts = [experiment, model.replace("/", "-"), *([own["dataset"]] if "dataset" in own else [])]
    return "-".join([*parts, *([f"seed{own['seed']}"] if "seed" in own else [])])
