"""Workers of a Ray cluster do what one process would have done, whatever happens to them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import Calls, fake_backend, reward_failure
from test_resume import lines, no_pictures
from test_together import IdsTask, comparable, table_backend

from dts.errors import UnavailableError, UsageError
from dts.evaluation.cli import main
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.experiment.decode_job import run_job
from dts.evaluation.experiment.plan import prepare
from dts.evaluation.experiment.run import run
from dts.evaluation.records import Job
from dts.evaluation.run_folder import RunFolder, read_jsonl
from dts.evaluation.tasks.base import Example
from dts.evaluation.tracking.wandb import WandbTracker
from dts.rewards import Reward

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for processes that import what is in this folder
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'maxent-decoding[ray]'"
)


@pytest.fixture(autouse=True)
def _no_pictures() -> Iterator[None]:
    with no_pictures():
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this process, whatever else runs on the machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process (conftest): sums of other threads round differently
        ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=100_000_000, include_dashboard=False,
                 log_to_driver=False, logging_level="ERROR")  # fmt: skip
        yield
        ray.shutdown()


def only_run(folder: Path) -> Path:
    (path,) = folder.glob("x_*")
    return path


# -- whole runs --------------------------------------------------------------------------------------------------------

MANY = ["--models", "red", "teal", "--methods", "maxent", "greedy", "--seeds", "0", "7", "--num-samples", "6",
        "--num-rollouts", "4", "--max-tokens", "5", "--no-wandb", "--experiment-name", "x"]  # fmt: skip
IN_FLIGHT = 3
UNFINISHED = IN_FLIGHT + 1  # searches of one worker that stands still: in flight, and one that waits to be let in


@dataclass(frozen=True)
class DeadlyTask(IdsTask):
    """Once a worker has begun ten searches it kills itself in the midst of some, when all others are recorded, those of
    the other worker too; the first worker that gets there, and once. `folder` gets the process of each search that
    begins."""

    folder: Path = Path()

    def reward(self, example: Example) -> Reward:
        with (self.folder / "begun").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return IdsTask.reward(replace(self, fail=self._die), example)

    def _die(self) -> None:
        if self.begun().count(str(os.getpid())) < 10:
            return
        with contextlib.suppress(FileExistsError):
            (self.folder / "killed").touch(exist_ok=False)  # before it waits: two that waited would wait for each other
            while self._recorded() < len(self.begun()) - UNFINISHED:
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def _recorded(self) -> int:
        return sum(len(lines(path)) for path in self.folder.glob("x_*/samples.jsonl"))

    def begun(self) -> list[str]:
        return (self.folder / "begun").read_text().splitlines()


@needs_ray
def test_a_worker_killed_with_several_searches_in_flight_loses_nothing_that_is_finished(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model's numbers do not depend on neighbours, so the records are those of one job after another."""
    arguments = [*MANY, "--prompts-at-once", "1", "--output-dir", str(tmp_path / "local")]
    assert main(arguments, table_backend()) == 0
    whole = comparable(only_run(tmp_path / "local"))

    folder, jobs = tmp_path / "ray", 2 * 2 * 2 * 6
    folder.mkdir()
    task = DeadlyTask(folder=folder)
    arguments = [*MANY, "--prompts-at-once", str(IN_FLIGHT), "--engine", "ray", "--workers", "2"]
    assert main([*arguments, "--output-dir", str(folder)], table_backend(task)) == 0
    assert (folder / "killed").exists() and caplog.text.count("a worker died") == 1
    assert (
        2 <= len(task.begun()) - jobs <= UNFINISHED
    )  # in flight, and one that waits to be let in, begin again; no more
    assert len(whole["samples.jsonl"]) == jobs
    assert comparable(only_run(folder)) == whole


FAKE = ["--models", "red", "--methods", "maxent", "greedy", "--num-samples", "3", "--num-rollouts", "3",
        "--max-tokens", "5", "--prompts-at-once", "1", "--no-wandb", "--experiment-name", "x"]  # fmt: skip


@dataclass(frozen=True)
class StrangeTask(IdsTask):
    """Calls `strange` before the second example is scored."""

    strange: Callable[[], Any] = lambda: None

    def reward(self, example: Example) -> Reward:
        return IdsTask.reward(replace(self, fail=self.strange) if example.id == "ex-1" else self, example)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise reward_failure()


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    """What the command `FAKE` gives in one process."""
    assert main([*FAKE, "--output-dir", str(tmp_path / "whole")], table_backend()) == 0
    return comparable(only_run(tmp_path / "whole"))


def run_strange(strange: Callable[[], Any], folder: Path, *more: str) -> int:
    backend = table_backend(StrangeTask(strange=strange))
    return main([*FAKE, "--engine", "ray", "--workers", "1", "--output-dir", str(folder), *more], backend)


@needs_ray
def test_a_job_that_kills_three_workers_is_found_among_its_neighbours_and_can_be_done_here(
    cluster: None, tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_strange(kill_myself, tmp_path, "--prompts-at-once", "3") == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "3 workers died over the same job: red har 0 1 maxent" in error and "--resume" in error
    assert [r["sample"] for r in read_jsonl(only_run(tmp_path) / "samples.jsonl")] == [0]  # what came before it
    assert main(["--resume", str(only_run(tmp_path)), "--engine", "local"], table_backend()) == 0
    assert comparable(only_run(tmp_path)) == whole


@needs_ray
def test_a_reward_that_fails_on_a_worker_is_the_same_error_and_the_cluster_goes_on(
    cluster: None, tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_strange(fail, tmp_path) == 1
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {reward_failure()}"
    assert main(["--resume", str(only_run(tmp_path))], table_backend()) == 0  # with the folder's engine
    assert comparable(only_run(tmp_path)) == whole


def interrupted(folder: str) -> None:
    """A command with a Ray of its own, whose second example never ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would we

    def strange() -> None:
        (Path(folder) / "pid").write_text(str(os.getpid()))
        threading.Event().wait()

    with no_pictures():
        sys.exit(run_strange(strange, Path(folder)))


@needs_ray
def test_ctrl_c_stops_the_workers_and_leaves_a_folder_to_resume(tmp_path: Path, whole: dict[str, Any]) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", f"import test_ray; test_ray.interrupted({str(tmp_path)!r})"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    pid, samples = tmp_path / "pid", "x_*/samples.jsonl"
    while not pid.exists() or not pid.read_text() or not any(len(lines(p)) == 2 for p in tmp_path.glob(samples)):
        with pytest.raises(subprocess.TimeoutExpired):  # it is still running
            process.wait(0.02)
    worker = psutil.Process(int(pid.read_text()))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert process.returncode == 130 and "continue with --resume" in errors, errors
    assert "Traceback" not in errors
    worker.wait(60)
    assert len(read_jsonl(only_run(tmp_path) / "samples.jsonl")) == 2
    assert main(["--resume", str(only_run(tmp_path)), "--engine", "local"], table_backend()) == 0
    assert comparable(only_run(tmp_path)) == whole


# -- the command line --------------------------------------------------------------------------------------------------


def test_without_ray_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    calls = Calls()
    assert main([*FAKE, "--engine", "ray", "--output-dir", str(tmp_path)], fake_backend(calls=calls)) == 2
    assert "pip install 'maxent-decoding[ray]'" in capsys.readouterr().err
    assert calls.loaded == [] and list(tmp_path.iterdir()) == []


@needs_ray
def test_a_cluster_that_does_not_answer_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        assert main([*FAKE, "--engine", "ray", "--output-dir", str(tmp_path)], fake_backend()) == 2
    error = capsys.readouterr().err
    assert f"{os.environ['RAY_ADDRESS']} does not answer" in error and "RAY_ADDRESS=local" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers 2 has no use with --engine local; add --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers 0 is not allowed: it must be an integer >= 1"),
        (["--engine", "spark"], "--engine 'spark' is not allowed: it must be one of local, ray"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAKE, *options], fake_backend()) == 2
    assert message in capsys.readouterr().err


# -- machines and order ------------------------------------------------------------------------------------------------

EIGHT = {"CPU": 8.0}
GPUS = {"CPU": 64.0, "GPU": 8.0}


@needs_ray
@pytest.mark.parametrize(
    ("machines", "options", "workers", "expected"),
    [
        ([EIGHT], {}, None, (1, (8, 0))),
        ([EIGHT], {}, 3, (3, (2, 0))),
        ([EIGHT, EIGHT], {}, None, (2, (8, 0))),
        ([EIGHT, EIGHT], {}, 3, (3, (4, 0))),  # 5 would leave the third without room
        ([EIGHT, {}], {}, 16, (16, (0.5, 0))),
        ([{"CPU": 2.0}], {}, 12, (12, (0.1666, 0))),
        ([GPUS, GPUS], {}, None, (16, (0, 1))),
        ([GPUS, EIGHT], {}, 4, (4, (0, 1))),
        ([GPUS, GPUS], {"device": "cpu"}, None, (2, (64, 0))),
        ([GPUS, GPUS], {"device_map": "auto"}, None, (2, (0, 8))),
        ([GPUS, GPUS, EIGHT], {"device_map": "auto"}, 4, (4, (0, 4))),
        ([GPUS, GPUS], {"device_map": "auto"}, 3, (3, (0, 4))),
        ([GPUS] * 4, {}, None, (20, (0, 1))),  # no more workers than jobs
    ],
)
def test_workers_find_room(machines: Any, options: dict[str, str], workers: int | None, expected: Any) -> None:
    from dts.evaluation.experiment.engines.ray import divide

    assert divide(machines, ExperimentConfig(**options), workers, 20) == expected
    count, (cpus, gpus) = expected
    room = sum(int(m.get("GPU", 0) // gpus) if gpus else int(m.get("CPU", 0) / cpus + 1e-9) for m in machines)
    assert room >= count


@needs_ray
def test_more_workers_than_gpus_are_refused() -> None:
    from dts.evaluation.experiment.engines.ray import divide

    with pytest.raises(UsageError, match="--workers 9 is not allowed: the cluster has 8 GPUs"):
        divide([GPUS], ExperimentConfig(), 9, 20)
    with pytest.raises(UnavailableError, match="no CPUs"):
        divide([{}], ExperimentConfig(), None, 20)


def queue_of(**config: Any) -> Any:
    """The jobs of a run, as they wait for workers."""
    from dts.evaluation.experiment.engines.ray import _Queue

    backend = table_backend()
    plan = prepare(ExperimentConfig(methods=("maxent",), **config), backend)
    return _Queue(plan, plan.jobs(), backend)


@needs_ray
def test_workers_keep_their_models() -> None:
    queue = queue_of(models=("red", "teal"), num_samples=4, prompts_at_once=1)
    first, second = queue.take(None, {}, 2, 2), queue.take(None, {"red": 1}, 1, 2)
    assert (first[0].model, second[0].model) == ("red", "teal")  # two idle workers load one model each
    reds = [queue.take("red", {"teal": 1}, 1, 2) for _ in range(3)]
    assert [[job.sample for job in block] for block in [first, *reds]] == [[0], [1], [2], [3]]  # as in the plan
    queue.put_back(reds[1])
    assert queue.take("red", {"teal": 1}, 1, 2) == reds[1]
    assert queue.take("red", {"teal": 1}, 1, 2)[0].model == "teal" and queue
    assert [queue.take("teal", {}, 1, 2)[0].sample for _ in range(2)] == [2, 3] and not queue


@needs_ray
@pytest.mark.parametrize(
    ("jobs", "idle", "expected"),
    [
        (40, [2, 1, 1, 1, 1], [20, 12, 4, 4]),  # two workers, batches of 4, in blocks of 32 at most
        (6, [2, 1], [3, 3]),  # a part for each
        (9, [1, 1], [4, 5]),  # no batch for the last one alone
        (3, [1], [3]),
    ],
)
def test_workers_get_full_batches_and_end_together(jobs: int, idle: list[int], expected: list[int]) -> None:
    queue, found = queue_of(models=("red",), num_samples=jobs, prompts_at_once=4), []
    for without_work in idle:
        if queue:
            found.append(queue.take("red", {}, without_work, 2))
    assert [job.sample for block in found for job in block] == list(range(jobs))
    assert [len(block) for block in found] == expected


@needs_ray
def test_jobs_that_were_under_way_when_a_worker_died_are_handed_out_one_by_one() -> None:
    queue = queue_of(models=("red",), num_samples=8, prompts_at_once=3)
    block = queue.take("red", {}, 1, 1)
    assert len(block) == 8 and not queue
    unfinished = block[1:]
    assert queue.under_way(unfinished) == block[1:5]  # three in flight, and one that waits to be let in
    queue.put_back(unfinished)
    assert [len(queue.take("red", {}, 1, 1)) for _ in range(5)] == [1, 1, 1, 1, 3] and not queue
    queue.put_back([])  # of a worker that died while it started
    assert not queue and queue.under_way([]) == ()


def test_wandb_runs_of_two_models_can_be_open_at_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb_file import offline_runs

    config = ExperimentConfig(models=("red", "teal"), num_samples=2, num_rollouts=3, methods=("maxent",))
    plan, folder = prepare(config, fake_backend()), RunFolder.create(tmp_path, "x")

    def by_turns(plan: Any, jobs: Sequence[Job], backend: Backend, recorder: Any) -> None:
        for job in sorted(jobs, key=lambda job: job.sample):
            outcome = run_job(plan.models[job.model], plan, job, backend)
            for record in outcome.rollouts:
                recorder.rollout(record)
            recorder.finish(outcome)

    run(plan, folder, WandbTracker(folder.path, "offline", "x"), fake_backend(), by_turns)
    rollouts = read_jsonl(folder.path / "rollouts.jsonl")
    runs = {one.config["model"]: one for one in offline_runs(folder.path)}
    assert sorted(runs) == ["red", "teal"]
    for model, one in runs.items():
        assert one.exit_code == 0 and len(one.history) == 2 * 3
        logged = [row["rollout_reward"] for row in one.history]
        assert logged == [r["rollout_reward"] for r in rollouts if r["model"] == model]
