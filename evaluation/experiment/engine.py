"""Where jobs are done: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

import functools
import importlib.util

from dts.errors import UnavailableError
from dts.evaluation.experiment.recorder import Engine


def find_engine(name: str, workers: int | None = None) -> Engine:
    """The engine called `name`; `workers` is for "ray". Raises `UnavailableError` where there is no Ray, or nobody at
    RAY_ADDRESS."""
    if name == "local":
        from dts.evaluation.experiment.engines.local import run_jobs

        return run_jobs
    if importlib.util.find_spec("ray") is None:
        raise UnavailableError("--engine ray needs Ray; run: pip install 'maxent-decoding[ray]'")
    from dts.evaluation.experiment.engines import ray

    ray.check_address()
    return functools.partial(ray.run_jobs, workers=workers)
