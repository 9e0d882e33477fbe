"""Continues a run folder: its own config.json says what to do, and anything that would change it is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dts.errors import UsageError
from dts.evaluation.experiment.config import ExperimentConfig, named, option
from dts.evaluation.experiment.plan import Plan, describe
from dts.evaluation.records import Record

logger = logging.getLogger(__name__)

# May change from one process to the next: no record depends on it. See `_is_free` for `prompts_at_once`.
FREE = ("engine", "workers", "tracker", "wandb_mode", "reward_timeout", "prompts_at_once")


def stored_config(path: Path, given: Mapping[str, Any]) -> ExperimentConfig:
    """The settings of the run in `path`. `given` are settings of this command: those that differ raise `UsageError`,
    except the `FREE` ones."""
    stored = _stored(path)
    try:
        config = ExperimentConfig(**named(stored["config"]))
    except UsageError as error:
        raise UsageError(f"--resume {path}: its config.json is of another version: {error}") from None
    wanted = replace(config, **given)
    different = [
        f"{option(name)} is {_shown(getattr(config, name))} there and {_shown(getattr(wanted, name))} here"
        for name in (f.name for f in fields(config))
        if not _is_free(name, config) and getattr(config, name) != getattr(wanted, name)
    ]
    if different:
        raise UsageError(f"--resume {path} continues with its own settings, and {'; '.join(different)}: leave them out")
    return config


def _is_free(name: str, config: ExperimentConfig) -> bool:
    """Whether a setting may change. Searches in one batch divide a bound on memory, so what each recomputes depends on
    how many they are."""
    return name in FREE and (name != "prompts_at_once" or config.max_kv_bytes is None)


def check_same(path: Path, plan: Plan) -> None:
    """The models and the data are still those of the run in `path`. Other versions of libraries give a warning."""
    stored, now = _stored(path), describe(plan)
    for part in ("models", "methods", "datasets"):
        if stored[part] != now[part]:
            was, becomes = _first_difference(stored[part], now[part])
            raise UsageError(f"--resume {path}: {part} have changed since: {was} then, {becomes} now; start a new run")
    changed = [
        f"{name} {stored['versions'].get(name)} then, {version} now"
        for name, version in now["versions"].items()
        if version != stored["versions"].get(name)
    ]
    if changed:
        logger.warning(
            "versions have changed since this run began (%s): what is decoded from here on may differ from an "
            "uninterrupted run",
            "; ".join(changed),
        )


def _stored(path: Path) -> Record:
    file = path / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        _ = [stored[part] for part in ("config", "models", "methods", "datasets", "versions")]
    except OSError as error:
        raise UsageError(f"--resume {path}: {file} cannot be read ({error.strerror}); give a run folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume {path}: {file} is damaged or of another version ({error!r})") from None
    return stored


def _first_difference(was: Any, now: Any) -> tuple[str, str]:
    """The first parts that differ, as text."""
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        key = next(key for key in was if was[key] != now[key])
        first, second = _first_difference(was[key], now[key])
        return f"{key} {first}", second
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return _first_difference(*next((a, b) for a, b in zip(was, now, strict=True) if a != b))
    return _shown(was)[:200], _shown(now)[:200]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
