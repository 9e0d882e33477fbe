"""Live tracking behind a small interface. The run folder always has the same events, whatever the tracker.

One tracker run per model, or per model, data set and seed where the configuration that it is started with names
`dataset` and `seed`: keys of two never meet. The first method of the command logs the bare keys (`rollout_reward`,
`sample_0/time`, `final/total_time`); every further method logs the same keys under its name
(`greedy/rollout_reward`). One step of a run is one rollout.
"""

from __future__ import annotations

import hashlib
import json
import logging
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlparse

from dts.errors import UnavailableError, UsageError
from dts.evaluation.oracle import WARNING, marked
from dts.evaluation.results import Record, reported, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

PROJECT = "maxent-ts-optimized"
TRACKERS = ("wandb", "tensorboard", "none")
ROLLOUT_KEYS = ("rollout_reward", "rollout_idx", "output_length", "nodes_explored", "time", "best_so_far", "tokens")
SAMPLE_KEYS = ("best_reward", "monotonicity", "time", "nodes")
FINAL_KEYS = ("final/avg_best_reward", "final/avg_monotonicity", "final/avg_time_per_sample", "final/total_time")
TABLE_COLUMNS = ("method", "sample", *ROLLOUT_KEYS, "start_depth", "text")


class RunTracker(Protocol):
    """The events of one tracker run. Records are those of the run folder."""

    def log_rollout(self, record: Record) -> None: ...

    def log_sample(self, record: Record) -> None: ...

    def finish(self, summary: Record, charts: Mapping[str, Path], *, complete: bool) -> None:
        """The run is over, `complete` or cut short; `charts` are image files by name."""


class Tracker(Protocol):
    """Opens one run per model (and data set and seed)."""

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


def unit(config: Record) -> Record:
    """`dataset` and `seed` of a tracker run, where its configuration names them."""
    return {name: config[name] for name in ("dataset", "seed") if name in config}


def run_name(experiment: str, model: str, config: Record) -> str:
    """`HAR-smollm2-135m-har-seed0`: model, and data set and seed where the run is of one of them."""
    own = unit(config)
    parts = [experiment, model.replace("/", "-"), *([own["dataset"]] if "dataset" in own else [])]
    return "-".join([*parts, *([f"seed{own['seed']}"] if "seed" in own else [])])


def named(method: str, primary: str, values: Record) -> Record:
    """The values that are there, under the keys of their method."""
    prefix = "" if method == primary else f"{method}/"
    return {f"{prefix}{key}": value for key, value in values.items() if value is not None}


def own_runs(summary: Record, model: str, of: Record) -> list[Record]:
    """The summary's entries of one model, and of one data set and seed where `of` names them."""
    return [
        run
        for run in summary["runs"]
        if run["model"] == model
        and run.get("dataset") == of.get("dataset", run.get("dataset"))
        and of.get("seed") in (None, *run.get("seeds", [of.get("seed")]))
    ]


def final_keys(run: Record) -> Record:
    """A method's aggregates under their tracked names, task metrics as `final/NAME`."""
    return {**{key: run[key] for key in FINAL_KEYS}, **{f"final/{name}": v for name, v in run["metrics"].items()}}


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
        self._rows: list[Record] = []
        self._oracle = False

    def _log(self, values: Record) -> None:
        self._run.log(values, step=max(self._step, 0))

    def log_rollout(self, record: Record) -> None:
        self._step += 1
        self._rows.append(record)
        if record.get("oracle") and not self._oracle:
            self._oracle = True
            self._run.tags = (*self._run.tags, "oracle")
            self._run.config.update({"oracle": True}, allow_val_change=True)
        self._log(named(record["method"], self._primary, {key: record[key] for key in ROLLOUT_KEYS}))

    def log_sample(self, record: Record) -> None:
        self._log(named(record["method"], self._primary, sample_keys(record)))

    def finish(self, summary: Record, charts: Mapping[str, Path], *, complete: bool) -> None:
        own = own_runs(summary, self._model, self._of)
        for run in own:
            self._log(named(run["method"], self._primary, final_keys(run)))
        self._run.summary["partial"] = not complete
        if self._rows:
            self._log({**self._plots(own), **_images(charts)})
        self._run.finish(exit_code=0 if complete else 1)

    def _plots(self, runs: Sequence[Record]) -> Record:
        """The per-rollout table, and the charts that W&B can draw itself."""
        import wandb

        def table(columns: Sequence[str], rows: list[Any]) -> Any:
            return wandb.Table(columns=list(columns), data=rows)

        def title(text: str) -> str:
            return marked(text, self._oracle)

        methods = list(dict.fromkeys(r["method"] for r in self._rows))
        curves = [_mean_best(self._rows, method) for method in methods]
        bars = [[r["method"], r["final/avg_monotonicity"]] for r in runs if r["final/avg_monotonicity"] is not None]
        points = [[r["method"], r["final/avg_time_per_sample"], r["final/avg_best_reward"]] for r in runs]
        return {
            "rollouts": table(TABLE_COLUMNS, [[row[column] for column in TABLE_COLUMNS] for row in self._rows]),
            "reward_over_rollouts": wandb.plot.line_series(
                xs=[list(range(1, len(curve) + 1)) for curve in curves], ys=curves, keys=methods,
                title=title(f"Best reward so far, {self._model}"), xname="rollout"),
            "monotonicity": wandb.plot.bar(
                table(["method", "monotonicity"], bars), "method", "monotonicity", title=title("Monotonicity")),
            "speed_quality": wandb.plot.scatter(
                table(["method", "seconds per sample", "best reward"], points),
                "seconds per sample", "best reward", title=title("Speed against quality")),
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


class TensorBoardTracker:
    """TensorBoard event files under `folder`/tensorboard, a folder per tracker run."""

    def __init__(self, folder: Path, experiment: str) -> None:
        """Raises `UnavailableError` where the package is missing."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UnavailableError(
                f"--tracker tensorboard needs the package tensorboard ({error}): pip install tensorboard, or give "
                "--tracker none"
            ) from None
        self._folder, self._experiment = folder, experiment

    def start_run(self, model: str, color: str, methods: Sequence[str], config: Record) -> RunTracker:
        from torch.utils.tensorboard import SummaryWriter

        path = self._folder / "tensorboard" / run_name(self._experiment, model, config)
        # A run that is tracked again, because it was resumed, hides what it logged before.
        writer = SummaryWriter(str(path), purge_step=0)
        described = json.dumps({**config, "model": model, "color": color}, indent=2, default=str)
        writer.add_text("config", f"```\n{described}\n```", 0)
        return _TensorBoardRun(writer, model, methods[0], unit(config))


class _TensorBoardRun:
    """The keys of the W&B run as scalars, one step per rollout; texts and charts beside them."""

    def __init__(self, writer: SummaryWriter, model: str, primary: str, of: Record) -> None:
        self._writer, self._model, self._primary, self._of = writer, model, primary, of
        self._step = -1
        self._oracle = False

    def _log(self, method: str, values: Record) -> None:
        for key, value in named(method, self._primary, values).items():
            self._writer.add_scalar(key, value, max(self._step, 0))

    def log_rollout(self, record: Record) -> None:
        self._step += 1
        self._log(record["method"], {key: record[key] for key in ROLLOUT_KEYS})
        if record.get("oracle") and not self._oracle:
            self._oracle = True
            self._writer.add_text("oracle", f"Oracle reward. {WARNING}", 0)
        self._writer.flush()

    def log_sample(self, record: Record) -> None:
        self._log(record["method"], sample_keys(record))
        tag = next(iter(named(record["method"], self._primary, {f"sample_{record['sample']}/text": ""})))
        self._writer.add_text(tag, "    " + record["text"].replace("\n", "\n    "), max(self._step, 0))

    def finish(self, summary: Record, charts: Mapping[str, Path], *, complete: bool) -> None:
        import matplotlib.image

        for run in own_runs(summary, self._model, self._of):
            self._log(run["method"], final_keys(run))
        self._writer.add_scalar("partial", float(not complete), max(self._step, 0))
        for name, path in charts.items():
            image = matplotlib.image.imread(path)[..., :3]  # [height, width, 3], 0 to 1
            self._writer.add_image(f"charts/{name}", image, max(self._step, 0), dataformats="HWC")
        self._writer.close()


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


def make_tracker(mode: str, folder: Path, experiment: str, kind: str = "wandb") -> Tracker:
    """The tracker called `kind`, one of `TRACKERS`; `mode` is W&B's and switches it off where it is "disabled"."""
    if kind not in TRACKERS:
        raise UsageError(f"--tracker {kind!r} is not known; choose from {', '.join(TRACKERS)}")
    if kind == "tensorboard":
        return TensorBoardTracker(folder, experiment)
    return NullTracker() if kind == "none" or mode == "disabled" else WandbTracker(folder, mode, experiment)
