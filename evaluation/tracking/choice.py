"""Which tracker a command uses."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

from dts.errors import UsageError
from dts.evaluation.tracking.base import NullTracker, Tracker
from dts.evaluation.tracking.tensorboard import TensorBoardTracker
from dts.evaluation.tracking.wandb import WandbTracker

TRACKERS = ("wandb", "tensorboard", "none")


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
