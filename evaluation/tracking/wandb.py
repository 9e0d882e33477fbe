"""Runs of Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dts.evaluation.records import Cell, Record, RolloutRecord, SampleRecord
from dts.evaluation.run_folder import reported, write_text
from dts.evaluation.tasks.oracle import marked
from dts.evaluation.tracking.base import RunTracker, run_name, unit
from dts.evaluation.tracking.keys import ROLLOUT_KEYS, final_keys, named, own_cells, rollout_keys, sample_keys

logger = logging.getLogger(__name__)

PROJECT = "maxent-ts-optimized"
TABLE_COLUMNS = ("method", "sample", *ROLLOUT_KEYS, "start_depth", "text")


class WandbTracker:
    """Weights & Biases, project `maxent-ts-optimized`. Its files go to `folder`/wandb."""

    def __init__(self, folder: Path, mode: str, experiment: str) -> None:
        self._folder, self._mode, self._experiment = folder, mode, experiment

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker:
        import wandb

        settings: dict[str, Any] = {
            "project": PROJECT,
            "dir": str(self._folder),
            "name": run_name(self._experiment, model, config),
            "id": self._run_id(model, config),
            "resume": "allow",  # a run that is tracked again, because it was resumed, is the same run
            "group": self._folder.name,
            "tags": [model[:64], *_tags(config), color, *methods],
            "config": {**config["config"], **config, "model": model, "color": color},
            "reinit": "create_new",  # workers finish jobs of several runs by turns
            "settings": wandb.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True),
        }
        try:
            run = wandb.init(**{**settings, "mode": self._mode})
        except wandb.errors.Error as error:  # logged in, but the network or the server is not there
            if self._mode != "online":
                raise
            logger.warning("W&B is not reachable (%s); logging offline", str(error).splitlines()[0])
            run = wandb.init(**settings, mode="offline")
        logger.info("W&B run %s (%s) in %s", run.name, self._mode, self._folder / "wandb")
        return _WandbRun(run, model, methods[0], unit(config))

    def _run_id(self, model: str, config: Record) -> str:
        """The same for one run folder, model, data set and seed, in every process and wherever the folder lies."""
        key = self._folder / "wandb" / "run-key"
        if not key.exists():
            with reported(key):
                key.parent.mkdir(parents=True, exist_ok=True)
            write_text(key, uuid.uuid4().hex + "\n")
        parts = [key.read_text(encoding="utf-8").strip(), model, unit(config)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _tags(config: Record) -> list[str]:
    own = unit(config)
    task = own.get("dataset", config.get("task"))
    return [*([task] if task else []), *([f"seed {own['seed']}"] if "seed" in own else [])]


class _WandbRun:
    """Figures logged under an explicit step stay open until the next step, so a sample's keys join the row of its
    last rollout and the number of rows is the number of rollouts."""

    def __init__(self, run: Any, model: str, primary: str, of: Record) -> None:
        self._run, self._model, self._primary, self._of = run, model, primary, of
        self._step = -1
        self._rows: list[RolloutRecord] = []
        self._oracle = False

    def _log(self, values: Record) -> None:
        self._run.log(values, step=max(self._step, 0))

    def log_rollout(self, record: RolloutRecord) -> None:
        self._step += 1
        self._rows.append(record)
        if record.get("oracle") and not self._oracle:
            self._oracle = True
            self._run.tags = (*self._run.tags, "oracle")
            self._run.config.update({"oracle": True}, allow_val_change=True)
        self._log(named(record["method"], self._primary, rollout_keys(record)))

    def log_sample(self, record: SampleRecord) -> None:
        self._log(named(record["method"], self._primary, sample_keys(record)))

    def finish(self, cells: Sequence[Cell], charts: Mapping[str, Path], *, complete: bool) -> None:
        own = own_cells(cells, self._model, self._of)
        for cell in own:
            self._log(named(cell["method"], self._primary, final_keys(cell)))
        self._run.summary["partial"] = not complete
        if self._rows:
            self._log({**self._plots(own), **_images(charts)})
        self._run.finish(exit_code=0 if complete else 1)

    def _plots(self, cells: Sequence[Cell]) -> Record:
        """The per-rollout table, and the charts that W&B can draw itself."""
        import wandb

        def table(columns: Sequence[str], rows: list[Any]) -> Any:
            return wandb.Table(columns=list(columns), data=rows)

        def title(text: str) -> str:
            return marked(text, self._oracle)

        methods = list(dict.fromkeys(r["method"] for r in self._rows))
        curves = [_mean_best(self._rows, method) for method in methods]
        bars = [[c["method"], c["avg_monotonicity"]] for c in cells if c["avg_monotonicity"] is not None]
        points = [[c["method"], c["avg_time_per_sample"], c["avg_best_reward"]] for c in cells]
        return {
            "rollouts": table(TABLE_COLUMNS, [[dict(row)[column] for column in TABLE_COLUMNS] for row in self._rows]),
            "reward_over_rollouts": wandb.plot.line_series(
                xs=[list(range(1, len(curve) + 1)) for curve in curves], ys=curves, keys=methods,
                title=title(f"Best reward so far, {self._model}"), xname="rollout"),
            "monotonicity": wandb.plot.bar(
                table(["method", "monotonicity"], bars), "method", "monotonicity", title=title("Monotonicity")),
            "speed_quality": wandb.plot.scatter(
                table(["method", "seconds per sample", "best reward"], points),
                "seconds per sample", "best reward", title=title("Speed against quality")),
        }  # fmt: skip


def _mean_best(rows: Sequence[RolloutRecord], method: str) -> list[float]:
    """Best reward so far after each rollout, mean over the samples that got there."""
    own = [row for row in rows if row["method"] == method]
    length = 1 + max(row["rollout_idx"] for row in own)
    at = [[row["best_so_far"] for row in own if row["rollout_idx"] == k] for k in range(length)]
    return [sum(values) / len(values) for values in at if values]


def _images(charts: Mapping[str, Path]) -> Record:
    import wandb

    return {f"charts/{name}": wandb.Image(str(path)) for name, path in charts.items()}
