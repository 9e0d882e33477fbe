"""Live tracking behind a small interface. The run folder always has the same events, whatever the tracker.

One tracker run per model. The first method of the command logs the bare keys (`rollout_reward`, `sample_0/time`,
`final/total_time`); every further method logs the same keys under its name (`greedy/rollout_reward`). One step of a
run is one rollout.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from dts.evaluation.results import Record

logger = logging.getLogger(__name__)

PROJECT = "maxent-ts-optimized"
ROLLOUT_KEYS = ("rollout_reward", "rollout_idx", "output_length", "nodes_explored", "time", "best_so_far", "tokens")
SAMPLE_KEYS = ("best_reward", "monotonicity", "time", "nodes")
FINAL_KEYS = ("final/avg_best_reward", "final/avg_monotonicity", "final/avg_time_per_sample", "final/total_time")
TABLE_COLUMNS = ("method", "sample", *ROLLOUT_KEYS, "start_depth", "text")


class RunTracker(Protocol):
    """The events of one model's run. Records are those of the run folder."""

    def log_rollout(self, record: Record) -> None: ...

    def log_sample(self, record: Record) -> None: ...

    def finish(self, summary: Record, charts: Mapping[str, Path], *, complete: bool) -> None:
        """The model's run is over, `complete` or cut short; `charts` are image files by name."""


class Tracker(Protocol):
    """Opens one run per model."""

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker: ...


class NullTracker:
    """Tracks nothing; is its own run."""

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker:
        return self

    def log_rollout(self, record: Record) -> None:
        pass

    def log_sample(self, record: Record) -> None:
        pass

    def finish(self, summary: Record, charts: Mapping[str, Path], *, complete: bool) -> None:
        pass


def sample_keys(record: Record) -> Record:
    """A sample's figures under their tracked names, `sample_3/best_reward` and so on."""
    return {f"sample_{record['sample']}/{key}": record[key] for key in SAMPLE_KEYS}


class WandbTracker:
    """Weights & Biases, project `maxent-ts-optimized`. Its files go to `folder`/wandb."""

    def __init__(self, folder: Path, mode: str, experiment: str) -> None:
        self._folder, self._mode, self._experiment = folder, mode, experiment

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker:
        import wandb

        settings: dict[str, Any] = {
            "project": PROJECT,
            "dir": str(self._folder),
            "name": f"{self._experiment}-{model.replace('/', '-')}",
            "group": self._folder.name,
            "tags": [model[:64], config["task"], color, *methods],
            "config": {**config["config"], **config, "model": model, "color": color},
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
        return _WandbRun(run, model, methods[0])


class _WandbRun:
    """Figures logged under an explicit step stay open until the next step, so a sample's keys join the row of its
    last rollout and the number of rows is the number of rollouts."""

    def __init__(self, run: Any, model: str, primary: str) -> None:
        self._run, self._model, self._primary = run, model, primary
        self._step = -1
        self._rows: list[Record] = []

    def _named(self, method: str, values: Record) -> Record:
        prefix = "" if method == self._primary else f"{method}/"
        return {f"{prefix}{key}": value for key, value in values.items() if value is not None}

    def _log(self, values: Record) -> None:
        self._run.log(values, step=max(self._step, 0))

    def log_rollout(self, record: Record) -> None:
        self._step += 1
        self._rows.append(record)
        self._log(self._named(record["method"], {key: record[key] for key in ROLLOUT_KEYS}))

    def log_sample(self, record: Record) -> None:
        self._log(self._named(record["method"], sample_keys(record)))

    def finish(self, summary: Record, charts: Mapping[str, Path], *, complete: bool) -> None:
        own = [run for run in summary["runs"] if run["model"] == self._model]
        for run in own:
            extra = {f"final/{name}": value for name, value in run["metrics"].items()}
            final = self._named(run["method"], {**{key: run[key] for key in FINAL_KEYS}, **extra})
            self._log(final)
        self._run.summary["partial"] = not complete
        if self._rows:
            self._log({**self._plots(own), **_images(charts)})
        self._run.finish(exit_code=0 if complete else 1)

    def _plots(self, runs: Sequence[Record]) -> Record:
        """The per-rollout table, and the charts that W&B can draw itself."""
        import wandb

        def table(columns: Sequence[str], rows: list[Any]) -> Any:
            return wandb.Table(columns=list(columns), data=rows)

        methods = list(dict.fromkeys(r["method"] for r in self._rows))
        curves = [_mean_best(self._rows, method) for method in methods]
        bars = [[r["method"], r["final/avg_monotonicity"]] for r in runs if r["final/avg_monotonicity"] is not None]
        points = [[r["method"], r["final/avg_time_per_sample"], r["final/avg_best_reward"]] for r in runs]
        return {
            "rollouts": table(TABLE_COLUMNS, [[row[column] for column in TABLE_COLUMNS] for row in self._rows]),
            "reward_over_rollouts": wandb.plot.line_series(
                xs=[list(range(1, len(curve) + 1)) for curve in curves], ys=curves, keys=methods,
                title=f"Best reward so far, {self._model}", xname="rollout"),
            "monotonicity": wandb.plot.bar(
                table(["method", "monotonicity"], bars), "method", "monotonicity", title="Monotonicity"),
            "speed_quality": wandb.plot.scatter(
                table(["method", "seconds per sample", "best reward"], points),
                "seconds per sample", "best reward", title="Speed against quality"),
        }  # fmt: skip


def _mean_best(rows: Sequence[Record], method: str) -> list[float]:
    """Best reward so far after each rollout, mean over the samples that got there."""
    own = [row for row in rows if row["method"] == method]
    length = 1 + max(row["rollout_idx"] for row in own)
    at = [[row["best_so_far"] for row in own if row["rollout_idx"] == k] for k in range(length)]
    return [sum(values) / len(values) for values in at if values]


def _images(charts: Mapping[str, Path]) -> Record:
    import wandb

    return {f"charts/{name}": wandb.Image(str(path)) for name, path in charts.items()}


def choose_mode(asked: str | None) -> str:
    """The asked mode, else `WANDB_MODE`, else online where a login is found and offline where not. Never asks."""
    if asked:
        return asked
    from_environment = os.environ.get("WANDB_MODE", "").lower()
    if from_environment in ("online", "offline", "disabled"):
        return from_environment
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether a W&B key is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_tracker(mode: str, folder: Path, experiment: str) -> Tracker:
    return NullTracker() if mode == "disabled" else WandbTracker(folder, mode, experiment)
