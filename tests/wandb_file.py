"""Reads the records of a W&B offline run: LevelDB's log format after a header of 7 bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """`wandb_internal_pb2.Record` messages in the order they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B", "not a W&B run file"
    at, message = 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # a header never spans two blocks
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(message)
            message = b""
            yield record


def _values(items: Any) -> dict[str, Any]:
    """Items as nested dictionaries; an item's place is a key or a path of keys."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return values


class OfflineRun:
    """One run as W&B would upload it."""

    def __init__(self, path: Path) -> None:
        self.id = path.stem.removeprefix("run-")
        self.history: list[dict[str, Any]] = []  # one row per step
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        config: list[Any] = []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.project, self.name, self.tags = record.run.project, record.run.display_name, list(record.run.tags)
                assert record.run.run_id == self.id
                config += record.run.config.update
            elif kind == "config":
                config += record.config.update
            elif kind == "history":
                self.history.append(_values(record.history.item))
            elif kind == "summary":
                self.summary |= _values(record.summary.update)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code
        self.config = _values(config)


def set_aside(folder: Path) -> None:
    """Dates the offline runs of `folder` back, so that a run of the same id in the same second has its own folder."""
    for path in folder.glob("wandb/offline-run-*"):
        path.rename(path.with_name(f"offline-run-20200101_000000-{path.name.rpartition('-')[2]}"))


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All offline runs under `folder`, oldest first."""
    import wandb

    wandb.teardown()  # the writing process may still hold the end of a file that `finish` has handed over
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [OfflineRun(path) for path in files]
