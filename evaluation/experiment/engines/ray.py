"""Does the jobs on a Ray cluster: one model replica per worker, as many jobs in one batch as the local engine has.

This process hands out blocks of jobs and records what comes back as soon as it comes, so the run folder is written in
one place and looks as if one process had done it. What a worker that dies has not finished is handed out again.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectLostError, RayActorError

from dts.errors import DTSError, UnavailableError, UsageError
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.experiment.decode_job import Outcome, run_job
from dts.evaluation.experiment.plan import Plan
from dts.evaluation.experiment.recorder import Recorder
from dts.evaluation.experiment.together import Together, at_once, blocks, share_a_batch
from dts.evaluation.records import Job

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # of workers over one job: then it is the job
PATIENCE = 30.0  # seconds without any worker before the user is told
_REMEDY = "start a cluster with ray start --head, or set RAY_ADDRESS=local for a Ray of this command's own"


def run_jobs(plan: Plan, jobs: Sequence[Job], backend: Backend, recorder: Recorder, workers: int | None = None) -> None:
    """Hands the records of every job to the recorder when it is finished. `workers`: see `divide`."""
    if not jobs:
        return
    recorder.note("starting Ray")
    with _connection():
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, share = divide(machines, plan.config, workers, len(jobs))
        crew = _Crew(plan, backend, share)
        try:
            recorder.note(f"starting {count} workers")
            for outcome in crew.work(jobs, count):
                recorder.note(f"{crew.size} workers, {outcome.job.model} {outcome.job.dataset} {outcome.job.method}")
                for record in outcome.rollouts:
                    recorder.show(record)
                recorder.take(outcome)
        finally:
            crew.dismiss()


def check_address() -> None:
    """Something answers at RAY_ADDRESS, where that names a machine: Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UnavailableError(f"RAY_ADDRESS {address} does not answer ({error}); {_REMEDY}") from None


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """The Ray this process is connected to, else the cluster of RAY_ADDRESS or of `ray start`, else one of its own."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        ray.init(include_dashboard=False, log_to_driver=logger.isEnabledFor(logging.INFO), logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        token = "; where the cluster wants a token, set RAY_AUTH_MODE=token" if "RAY_ADDRESS" in os.environ else ""
        raise UnavailableError(f"no connection to Ray ({_first_line(error)}{token}); {_REMEDY}") from error
    try:
        yield
    finally:
        ray.shutdown()


# -- machines ----------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """What one worker has of its machine. Ray gives it as many threads as CPUs, at least one."""

    cpus: float
    gpus: int


def divide(
    machines: Sequence[Mapping[str, float]], config: ExperimentConfig, workers: int | None, jobs: int
) -> tuple[int, Share]:
    """How many workers, and what each has, so that all of them find room.

    Where there are GPUs, one for each worker, or equal parts of the machines with `--device-map`; otherwise equal parts
    of the CPUs. Without `workers`: one for each GPU, or for each machine where workers have parts of machines.
    """
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    if any(gpus) and (config.device or "cuda").startswith("cuda"):
        if workers is not None and workers > sum(gpus):
            raise UsageError(f"--workers {workers} is not allowed: the cluster has {sum(gpus)} GPUs; give fewer")
        if config.device_map is None:
            return min(workers or sum(gpus), jobs), Share(0, 1)
        count = min(workers or sum(map(bool, gpus)), jobs)
        return count, Share(0, _largest_part(gpus, count))
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    if not any(cpus):
        raise UnavailableError("the Ray cluster has no CPUs to work on; add machines with ray start --address=...")
    count = min(workers or sum(map(bool, cpus)), jobs)
    if count <= sum(cpus):
        return count, Share(_largest_part(cpus, count), 0)
    on_one_cpu = math.ceil(count / sum(cpus))
    return count, Share(math.floor(1e4 / on_one_cpu) / 1e4, 0)  # Ray counts in parts of 1e-4


def _largest_part(sizes: Sequence[int], count: int) -> int:
    """The most that `count` equal parts of machines can have; none spans two machines."""
    return next(part for part in range(max(sizes), 0, -1) if sum(size // part for size in sizes) >= count)


# -- workers -----------------------------------------------------------------------------------------------------------


class Worker:
    """Lives in a process of its own and holds one model at a time."""

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self._plan, self._backend = plan, backend
        self._model: tuple[str, Any] | None = None

    def ready(self) -> None:
        """Returns once the process is there."""

    def do(self, block: Sequence[Job]) -> Iterator[Outcome | DTSError]:
        """The outcomes of a block's jobs as they finish. A reward or a model that fails is a value here, so that the
        driver can raise it as it is."""
        try:
            yield from self._outcomes(self._load(block[0].model), block)
        except DTSError as error:
            yield error

    def _outcomes(self, lm: Any, block: Sequence[Job]) -> Iterator[Outcome]:
        if not share_a_batch(lm, self._plan, block, self._backend):
            yield from (run_job(lm, self._plan, job, self._backend) for job in block)
            return
        together = Together(lm, self._plan, block, self._backend)
        try:
            yield from together
        except DTSError:
            yield from together.left()[0]
            raise

    def _load(self, name: str) -> Any:
        if self._model is None or self._model[0] != name:
            self._model = None  # its memory is for the next one
            self._model = name, self._backend.load(self._plan.models[name], self._plan.config)
        return self._model[1]


@dataclass(eq=False, slots=True)
class _Seat:
    """A worker as the driver sees it."""

    actor: Any
    model: str | None = None  # that it holds
    jobs: list[Job] = field(default_factory=list)  # of its block, unfinished; none while it starts or is idle


class _Crew:
    """The workers, and which jobs each of them has."""

    def __init__(self, plan: Plan, backend: Backend, share: Share) -> None:
        actor = ray.remote(Worker).options(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0)
        self._plan, self._backend = plan, backend
        self._shared = ray.put(plan), ray.put(backend)
        self._actor, self._share = actor, share
        self._busy: dict[Any, _Seat] = {}  # by the promise that it is ready, or by the stream of its outcomes
        self._idle: list[_Seat] = []
        self._deaths: collections.Counter[Job | None] = collections.Counter()

    @property
    def size(self) -> int:
        return len(self._busy) + len(self._idle)

    def work(self, jobs: Sequence[Job], count: int) -> Iterator[Outcome]:
        """The outcome of every job, as `count` workers finish them."""
        queue, left = _Queue(self._plan, jobs, self._backend), len(jobs)
        for _ in range(count):
            self._hire()
        while left:
            while self._idle and queue:
                self._hand_out(self._idle.pop(), queue)
            seat, result = self._next()
            if isinstance(result, Exception):
                self._bury(seat, result, queue.under_way(seat.jobs))
                queue.put_back(seat.jobs)
                if not self._idle:
                    self._hire()
                continue
            if result is None:
                self._deaths.pop(None, None)  # workers do start
                continue
            if not seat.jobs and queue:
                self._hand_out(self._idle.pop(), queue)  # it works while the outcome is recorded
            left -= 1
            yield result

    def dismiss(self) -> None:
        for seat in [*self._busy.values(), *self._idle]:
            ray.kill(seat.actor)

    def _hire(self) -> None:
        actor: Any = self._actor.remote(*self._shared)
        self._busy[actor.ready.remote()] = _Seat(actor)

    def _hand_out(self, seat: _Seat, queue: _Queue) -> None:
        others = self._busy.values()
        held = collections.Counter(other.model for other in others)
        without_work = 1 + len(self._idle) + sum(not other.jobs for other in others)
        seat.jobs = queue.take(seat.model, held, without_work, 1 + self.size)
        seat.model = seat.jobs[0].model
        self._busy[seat.actor.do.options(num_returns="streaming").remote(list(seat.jobs))] = seat

    def _next(self) -> tuple[_Seat, Outcome | Exception | None]:
        """What a worker has to say, and which: the outcome of a job, None where it has started, an exception where it
        died. What a job raised is raised here."""
        ready, _ = ray.wait(list(self._busy), timeout=PATIENCE)
        if not ready and not any(seat.jobs for seat in self._busy.values()):
            logger.warning("no worker has started yet: the cluster has no room for one with %g CPUs and %d GPUs",
                           *self._share)  # fmt: skip
        ready = ready or ray.wait(list(self._busy))[0]
        promise: Any = ready[0]
        seat = self._busy.pop(promise)
        try:
            result = ray.get(next(promise) if seat.jobs else promise)
        except (RayActorError, ObjectLostError) as error:
            return seat, error
        if isinstance(result, DTSError):
            raise result
        if result is not None:
            seat.jobs.remove(result.job)
        if seat.jobs:
            self._busy[promise] = seat  # last, so that the others are heard too
        else:
            self._idle.append(seat)
        return seat, result

    def _bury(self, seat: _Seat, error: Exception, under_way: Sequence[Job]) -> None:
        """Makes sure that it is dead, and raises where it was one death too many."""
        ray.kill(seat.actor)
        over: Sequence[Job | None] = under_way or [None]
        self._deaths.update(over)
        worst = max(over, key=self._deaths.__getitem__)
        what = " ".join(map(str, worst)) if worst else "starting, before any job"
        if self._deaths[worst] >= MAX_DEATHS:
            raise UnavailableError(
                f"{MAX_DEATHS} workers died over the same job: {what} ({_first_line(error)}); look for memory on the "
                "machines and for the same installation as here, then continue with --resume"
            )
        logger.warning("a worker died (%s%s); another takes over", what,
                       f" and {len(over) - 1} more" if len(over) > 1 else "")  # fmt: skip


class _Queue:
    """Blocks of jobs to hand out, those of one model together: changing a model costs a load."""

    def __init__(self, plan: Plan, jobs: Sequence[Job], backend: Backend) -> None:
        self._plan, self._backend = plan, backend
        by_model: dict[str, list[Job]] = {}
        for job in jobs:
            by_model.setdefault(job.model, []).append(job)
        self._blocks = {model: collections.deque(blocks(plan, own, backend)) for model, own in by_model.items()}

    def __bool__(self) -> bool:
        return any(self._blocks.values())

    def under_way(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """The unfinished jobs of a block that may have begun: jobs begin in order, and one waits for admission."""
        return jobs[: at_once(self._plan, jobs[0], self._backend) + 1] if jobs else ()

    def put_back(self, jobs: Sequence[Job]) -> None:
        """To be the next of their model. Those that were under way are handed out one by one, so that each has all the
        memory, and one that kills workers is found."""
        if not jobs:
            return
        own, begun = self._blocks[jobs[0].model], self.under_way(jobs)
        if len(begun) < len(jobs):
            own.appendleft(list(jobs[len(begun) :]))
        own.extendleft([job] for job in reversed(begun))

    def take(self, model: str | None, held: Mapping[str | None, int], without_work: int, workers: int) -> list[Job]:
        """The next jobs of `model`, or else of the model with most jobs per worker; `held` counts those at work.
        without_work: workers that have no jobs, this one included."""
        left = {name: sum(map(len, own)) for name, own in self._blocks.items() if own}
        if model not in left:
            model = max(left, key=lambda name: left[name] / (1 + held.get(name, 0)))
        own = self._blocks[str(model)]
        block = own.popleft()
        size = self._size(block, left[str(model)], without_work, workers)
        if size < len(block):
            own.appendleft(block[size:])
        return block[:size]

    def _size(self, block: Sequence[Job], left: int, without_work: int, workers: int) -> int:
        """How many jobs of a block to hand out: fewer towards the end, so that workers end together, but full batches
        if there are enough for all. left: jobs of the model."""
        batch = at_once(self._plan, block[0], self._backend)
        size = min(max(batch, left // workers), math.ceil(left / without_work), len(block))
        return len(block) if size >= batch > len(block) - size else size


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
