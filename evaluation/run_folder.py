"""A run is a folder: JSON lines written as things happen, and a summary that can be rebuilt from them.

    OUTPUT_DIR/<experiment>_<timestamp>/
        config.json      settings, models, data and versions
        rollouts.jsonl   one line per rollout, written when the search finished it
        samples.jsonl    one line per finished job (one sample of one model, data set, seed and method)
        tracked.jsonl    one line per model, data set and seed whose tracker run is complete
        trees/*.json     search trees of the first samples
        summary.json     aggregates, from rollouts.jsonl and samples.jsonl
        report.md        the same as a table to read; report.html the same with charts and trees
        *.png            charts
    OUTPUT_DIR/wandb_experiments_<timestamp>.json   the summary with the figures of every sample

A line in samples.jsonl is what makes a job finished: its rollouts are on the disk before it. Wall-clock figures stand
only under the keys in `dts.evaluation.tracking.keys.TIME_KEYS` and `sample_N/time`, so that the rest of two runs can
be compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, cast

import filelock

from dts.errors import UnavailableError, UsageError
from dts.evaluation.records import Record, RolloutRecord, SampleRecord


class RunFolder:
    """The files of one run, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Takes the folder's lock, which the system drops when this process ends, however it ends."""
        self.path = path
        self._streams: dict[str, BinaryIO] = {}
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UsageError(f"{path} is in use by another process; wait for it or stop it") from None
        except (OSError, NotImplementedError) as error:
            raise UsageError(f"{path} cannot be locked ({error}); use a folder on a disk that you may write") from None

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

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds one line to `name`.jsonl in one write: a process that is killed leaves all of it or none, and so does a
        disk that is full: the next line, of another job, may find room."""
        path = self.path / f"{name}.jsonl"
        line = _encoded(to_json(record) + "\n")
        with reported(path):
            if name not in self._streams:
                self._streams[name] = path.open("ab", buffering=0)
                _sync(self.path)
            stream = self._streams[name]
            if (written := stream.write(line)) < len(line):
                stream.truncate(stream.tell() - written)
                raise OSError("the disk took a part of a line")

    def sync(self, name: str) -> None:
        """Waits until the disk has every line of `name`.jsonl."""
        if name in self._streams:
            with reported(self.path / f"{name}.jsonl"):
                os.fsync(self._streams[name].fileno())

    def stream(self, name: str) -> Iterator[Record]:
        """The lines of `name`.jsonl so far, one by one."""
        path = self.path / f"{name}.jsonl"
        return stream_jsonl(path) if path.exists() else iter(())

    def records(self, name: str) -> list[Record]:
        """The lines of `name`.jsonl so far."""
        return list(self.stream(name))

    def samples(self) -> Iterator[SampleRecord]:
        """The lines of samples.jsonl so far, one by one."""
        return cast("Iterator[SampleRecord]", self.stream("samples"))

    def rollouts(self) -> Iterator[RolloutRecord]:
        """The lines of rollouts.jsonl so far, one by one."""
        return cast("Iterator[RolloutRecord]", self.stream("rollouts"))

    def keep(self, name: str, wanted: Callable[[Record], bool]) -> None:
        """Drops the lines of `name`.jsonl that are not wanted."""
        path = self.path / f"{name}.jsonl"
        if path.exists():
            _replace(path, (line for line, record in _lines(path) if wanted(record)))

    def trim(self, name: str) -> None:
        """Drops the end of `name`.jsonl where its last line was cut off."""
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            return
        with reported(path), path.open("r+b") as stream:
            end = _end_of_lines(stream)
            if end < stream.seek(0, os.SEEK_END):
                stream.truncate(end)
                os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._lock.release()


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not a finite number becomes null."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except (ValueError, TypeError):  # numbers of other libraries, or not finite: seldom, and slow to look for
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
    return list(stream_jsonl(path))


def stream_jsonl(path: str | Path) -> Iterator[Record]:
    """The same, one by one."""
    return (record for _, record in _lines(path))


def _lines(path: str | Path) -> Iterator[tuple[bytes, Record]]:
    """The complete lines, as they are and parsed."""
    with Path(path).open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.endswith(b"\n"):
                yield line, _parsed(path, number, line)


def _end_of_lines(stream: BinaryIO) -> int:
    """Where the last newline ends; 0 where there is none."""
    position = stream.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - 65536)
        stream.seek(start)
        found = stream.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _parsed(path: str | Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:  # also bytes that are not UTF-8
        record = None
    if not isinstance(record, dict):
        raise UsageError(f"{path}, line {number} is damaged: no JSON object; restore the file, or delete the line")
    return record


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    return write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Replaces a file as a whole: a reader sees the old text or the new one, also after a power failure."""
    return _replace(path, [_encoded(text)])


def _replace(path: Path, parts: Iterable[bytes]) -> Path:
    partial = path.with_name(path.name + ".tmp")
    with reported(path):
        try:
            with partial.open("wb") as stream:
                for part in parts:
                    stream.write(part)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    return path


def _encoded(text: str) -> bytes:
    """UTF-8; half of a surrogate pair, which has no UTF-8, becomes the escape that JSON has for it."""
    return text.encode(errors="backslashreplace")


def _sync(folder: Path) -> None:
    """Waits until the disk has the names in a folder, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """A disk that takes nothing more becomes `UnavailableError` with the way out."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be written ({error.strerror or error}); what was finished is kept: free the disk and "
            "continue with --resume"
        ) from error


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
