"""A run is a folder: JSON lines written as things happen, and a summary that can be rebuilt from them.

    OUTPUT_DIR/<experiment>_<timestamp>/
        config.json      settings, models and versions
        rollouts.jsonl   one line per rollout, written when the search finished it
        samples.jsonl    one line per finished sample of one model and method
        summary.json     aggregates, from the two files above
        report.md        the same as a table to read
        *.png            charts
    OUTPUT_DIR/wandb_experiments_<timestamp>.json   the summary with the figures of every sample

Wall-clock figures stand only under the keys in `TIME_KEYS`, so that the rest of two runs can be compared.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from dts.errors import UsageError

Record = dict[str, Any]
TIME_KEYS = frozenset({"time", "seconds", "final/avg_time_per_sample", "final/total_time"})


class RunFolder:
    """The files of one run. Appended lines are flushed at once, so a crash loses nothing that was finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: dict[str, TextIO] = {}

    @classmethod
    def create(cls, output_dir: str | Path, experiment: str, now: datetime | None = None) -> RunFolder:
        """A new folder `<experiment>_<timestamp>`. Raises `UsageError` where nothing can be written."""
        stamp = (now or datetime.now()).strftime("%Y%m%d_%H%M%S")
        parent = Path(output_dir)
        for attempt in range(1, 1000):  # two runs may start in the same second
            path = parent / f"{experiment}_{stamp}{'' if attempt == 1 else f'-{attempt}'}"
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError:
                if not parent.is_dir():
                    raise UsageError(f"--output-dir {parent}: a file of that name is in the way") from None
                continue
            except OSError as error:
                reason = error.strerror or str(error)
                raise UsageError(f"--output-dir {parent} cannot be written ({reason}); choose another folder") from None
            return cls(path)
        raise UsageError(f"--output-dir {parent} already holds 999 runs named {experiment}_{stamp}")

    @property
    def stamp(self) -> str:
        """The timestamp in the folder's name, with its counter where there is one."""
        return "_".join(self.path.name.rsplit("_", 2)[-2:])

    def append(self, name: str, record: Mapping[str, Any], *, durable: bool = False) -> None:
        """Adds one line to `name`.jsonl; `durable` also waits until the disk has it."""
        if name not in self._streams:
            self._streams[name] = (self.path / f"{name}.jsonl").open("a", encoding="utf-8")
        stream = self._streams[name]
        stream.write(to_json(record) + "\n")
        stream.flush()
        if durable:
            os.fsync(stream.fileno())

    def records(self, name: str) -> list[Record]:
        """The lines of `name`.jsonl so far."""
        path = self.path / f"{name}.jsonl"
        return read_jsonl(path) if path.exists() else []

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not a finite number becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):  # numpy and torch scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: str | Path) -> list[Record]:
    """The complete lines of a file; a last line without its newline was cut off in writing and is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    return write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Replaces a file as a whole: a reader sees the old text or the new one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    import dts

    found = {"python": platform.python_version(), "dts": str(getattr(dts, "__version__", "unknown"))}
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
