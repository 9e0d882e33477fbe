"""Which checkpoint to continue from, and whether the settings are those that it was made with."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.training.config import TrainConfig, merged

AUTO = "auto"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: its state is its last file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any((checkpoint / name).is_file() for name in WEIGHTS) and (checkpoint / "optimizer.pt").is_file()


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; None where there is none."""
    found = sorted(filter(is_whole, folder.glob("checkpoint-*")), key=lambda p: int(p.name.rpartition("-")[2]))
    return found[-1] if found else None


def to_continue(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that `resume` means: "auto" for the newest of the folder, None where there is none, or a path.
    Raises `UsageError` for a path without a whole checkpoint."""
    if resume is None or resume == AUTO:
        return newest(folder) if resume else None
    if not is_whole(Path(resume)):
        raise UsageError(
            f"--resume-from-checkpoint {resume}: there is no whole checkpoint; give a checkpoint-N folder or auto"
        )
    return Path(resume)


def check_settings(
    file: Path, now: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """Raise `UsageError` for settings other than those in the file, which would bend the schedule or the data order.
    defaults: of settings that an older file does not have."""
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"cannot resume: {file} cannot be read ({error}); start anew with --overwrite") from error
    plain = json.loads(json.dumps(now))
    before = merged(json.loads(json.dumps(defaults)), before)
    changed = [key for key in plain if key not in ignored and plain[key] != before.get(key)]
    if changed:
        key = changed[0]
        raise UsageError(
            f"cannot resume with another {key}: the run has {before.get(key)!r}, now it is {plain[key]!r}; use the "
            "same settings, or start anew with --overwrite"
        )


def check_run(file: Path, config: TrainConfig) -> None:
    """`check_settings` of a training run: those that its method reads, wherever it is written."""
    unread = {"polychromic", "grpo", "distill"} - {config.method}
    usual = TrainConfig(name=config.name, method=config.method).as_dict()
    check_settings(file, config.as_dict(), usual, {"output", "name", "run_folder", *unread})
