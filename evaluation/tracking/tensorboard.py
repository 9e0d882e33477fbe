"""Event files of TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dts.errors import UnavailableError
from dts.evaluation.records import Cell, Record, RolloutRecord, SampleRecord
from dts.evaluation.tasks.oracle import WARNING
from dts.evaluation.tracking.base import RunTracker, run_name, unit
from dts.evaluation.tracking.keys import final_keys, named, own_cells, rollout_keys, sample_keys

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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

    def log_rollout(self, record: RolloutRecord) -> None:
        self._step += 1
        self._log(record["method"], rollout_keys(record))
        if record.get("oracle") and not self._oracle:
            self._oracle = True
            self._writer.add_text("oracle", f"Oracle reward. {WARNING}", 0)
        self._writer.flush()

    def log_sample(self, record: SampleRecord) -> None:
        self._log(record["method"], sample_keys(record))
        tag = next(iter(named(record["method"], self._primary, {f"sample_{record['sample']}/text": ""})))
        self._writer.add_text(tag, "    " + record["text"].replace("\n", "\n    "), max(self._step, 0))

    def finish(self, cells: Sequence[Cell], charts: Mapping[str, Path], *, complete: bool) -> None:
        import matplotlib.image

        for cell in own_cells(cells, self._model, self._of):
            self._log(cell["method"], final_keys(cell))
        self._writer.add_scalar("partial", float(not complete), max(self._step, 0))
        for name, path in charts.items():
            image = matplotlib.image.imread(path)[..., :3]  # [height, width, 3], 0 to 1
            self._writer.add_image(f"charts/{name}", image, max(self._step, 0), dataformats="HWC")
        self._writer.close()
