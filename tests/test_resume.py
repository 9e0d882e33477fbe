"""Runs that are cut off and continued: nothing lost, nothing repeated, the same bytes in the end."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import COLORS, Calls, FakeSpec, FakeTask, RecordingTracker, fake_backend, raise_after

from dts.errors import UnavailableError
from dts.evaluation.cli import main
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.experiment.engines.local import run_jobs
from dts.evaluation.experiment.plan import prepare
from dts.evaluation.experiment.run import run
from dts.evaluation.records import Job
from dts.evaluation.run_folder import RunFolder, read_jsonl
from dts.evaluation.tasks.base import Example
from dts.evaluation.tracking.keys import TIME_KEYS
from dts.rewards import Context, Finished, Reward, TerminalReward

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--models", "red", "--num-samples", "3", "--num-rollouts", "3", "--methods", "maxent", "greedy"]


@contextlib.contextmanager
def no_pictures() -> Iterator[None]:
    """Drawing takes most of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
        patch.setattr("dts.evaluation.experiment.outputs.write_report", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def _no_pictures() -> Iterator[None]:
    with no_pictures():
        yield


# -- killed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BytesTask(FakeTask):
    """Rewards completions by their bytes, whatever they are. `begun` has the searches that asked for a reward."""

    begun: list[str] = field(default_factory=list, compare=False)

    def reward(self, example: Example) -> Reward:
        self.begun.append(example.id)

        def score(context: Context, finished: Sequence[Finished]) -> list[float]:
            self.fail()
            return [sum(done.text.encode()) % 101 / 100 for done in finished]

        return TerminalReward(score, "bytes")

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        return {"length": sum(map(len, texts.values())) / len(texts)}


def tiny_backend(task: FakeTask | None = None) -> Backend:
    """The real decoding on a random two-layer Llama."""
    from families import ByteTokenizer, random_model

    import dts
    from dts.models.huggingface import HFModel
    from dts.search import METHODS

    def load(spec: FakeSpec, config: ExperimentConfig) -> HFModel:
        return HFModel(random_model("llama"), ByteTokenizer(), spec.name)

    return replace(fake_backend(task or BytesTask()), methods=METHODS, load=load, decode=dts.decode)


@dataclass(frozen=True)
class Death:
    """A process kills itself at call number `count` of a place, and leaves how many searches it had begun."""

    place: str  # "score", in the midst of searches; "sync", between a job's rollouts and its sample
    count: int
    note: Path

    @contextlib.contextmanager
    def awaited(self) -> Iterator[BytesTask]:
        calls, sync = Calls(), RunFolder.sync

        def step() -> None:
            calls.scored += 1
            if calls.scored == self.count:
                self.note.write_text(str(len(task.begun)))
                os.kill(os.getpid(), signal.SIGKILL)

        def deadly(folder: RunFolder, name: str) -> None:
            sync(folder, name)
            if name == "rollouts":
                step()

        task = BytesTask(fail=step if self.place == "score" else lambda: None, count=9)
        with pytest.MonkeyPatch.context() as patch:
            if self.place == "sync":
                patch.setattr(RunFolder, "sync", deadly)
            yield task


def child(arguments: Sequence[str], log: Path, death: Death | None) -> None:
    """What a killed process does: the command line in a process of its own."""
    import torch

    import dts

    torch.set_num_threads(1)
    os.environ.pop("WANDB_SERVICE", None)  # a service that an earlier test began takes a killed run for one under way
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(log.open("a"))
        stack.enter_context(contextlib.redirect_stdout(stream))
        stack.enter_context(contextlib.redirect_stderr(stream))
        stack.enter_context(no_pictures())
        task = stack.enter_context(death.awaited()) if death is not None else BytesTask()
        code = main(arguments, replace(tiny_backend(task), decode_many=dts.decode_many))
    raise SystemExit(code)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts `main(arguments)` in a fresh process, forked from a server that has imported everything once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs the forkserver start method")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume", "families", "dts.search", "dts.models.huggingface", "dts.decoding"])
    log = tmp_path_factory.mktemp("log") / "log.txt"

    def started(*arguments: str, death: Death | None = None) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            process = context.Process(target=child, args=(arguments, log, death))
            process.start()
        return process

    return started


def lines(path: Path) -> list[bytes]:
    """Complete lines, of a file that another process writes."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def half_done(folder: Path) -> bool:
    """Whether the last rollout belongs to a job that is not finished."""
    rollouts, samples = (lines(folder / f"{name}.jsonl") for name in ("rollouts", "samples"))
    return bool(rollouts) and (not samples or Job.of(json.loads(rollouts[-1])) != Job.of(json.loads(samples[-1])))


def kill_when(process: Any, folder: Callable[[], Path | None], count: int) -> None:
    """SIGKILL once `count` rollouts are on the disk, the last of them of an unfinished job. The process is stopped for
    the look, so that what was seen is what it is killed in."""
    while True:
        process.join(0.002)
        assert process.exitcode is None, "the run ended before it could be killed"
        path = folder()
        if path is None or len(lines(path / "rollouts.jsonl")) < count or not half_done(path):
            continue
        os.kill(process.pid, signal.SIGSTOP)
        if half_done(path):
            assert main(["--resume", str(path)], tiny_backend()) == 2  # stopped, it still holds the folder
            process.kill()
            process.join()
            return
        os.kill(process.pid, signal.SIGCONT)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        timeless = (key for key in value if key not in TIME_KEYS and not key.endswith("/time"))
        return {key: without_times(value[key]) for key in timeless}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, list[str]]:
    """Every file of records as text, without the figures that are times."""
    found = {}
    beside = folder.parent / f"wandb_experiments_{'_'.join(folder.name.rsplit('_', 2)[-2:])}.json"
    for path in [*sorted(folder.rglob("*.json*")), beside]:
        parts = lines(path) if path.suffix == ".jsonl" else [path.read_bytes()]
        name = "beside" if path == beside else str(path.relative_to(folder))
        found[name] = [json.dumps(without_times(json.loads(part))) for part in parts]
    return found


def test_five_kills_and_resumes_end_like_an_uninterrupted_run(
    start: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--models", "red", "--methods", "maxent", "greedy", "--seeds", "0", "7", "--num-samples", "9",
               "--num-rollouts", "4", "--rollout-batch", "1", "--prompts-at-once", "1", "--max-tokens", "12",
               "--save-trees", "2", "--no-wandb", "--output-dir", str(tmp_path)]  # fmt: skip
    jobs, rollouts = 2 * 9 * 2, 2 * 9 * (4 + 1)
    whole = start(*command, "--experiment-name", "x")
    whole.join()
    assert whole.exitcode == 0
    (straight,) = tmp_path.glob("x_*")

    moments = sorted(random.Random(5).sample(range(2, rollouts - 10), 5))
    process = start(*command, "--experiment-name", "x")

    def folder() -> Path | None:
        return next((path for path in tmp_path.glob("x_*") if path != straight), None)

    kill_when(process, folder, moments[0])
    broken = folder()
    assert broken is not None
    for moment in moments[1:]:
        before = lines(broken / "samples.jsonl")
        process = start("--resume", str(broken))
        kill_when(process, lambda: broken, max(moment, len(lines(broken / "rollouts.jsonl")) + 1))
        assert lines(broken / "samples.jsonl")[: len(before)] == before  # bytes that are there stay
    last = start("--resume", str(broken))
    last.join()
    assert last.exitcode == 0
    assert "in use by another process" in capsys.readouterr().err

    done = [Job.of(sample) for sample in read_jsonl(broken / "samples.jsonl")]
    assert len(done) == jobs == len(set(done)) and len(read_jsonl(broken / "rollouts.jsonl")) == rollouts
    first, second = contents(straight), contents(broken)
    assert len(first["samples.jsonl"]) == jobs and len([name for name in first if name.startswith("trees")]) == 8
    assert first == second
    assert (straight / "config.json").read_bytes() == (broken / "config.json").read_bytes()


def unordered(folder: Path) -> dict[str, list[str]]:
    """What does not depend on the output folder and on neighbours in a batch: these round log p, spare a call for the
    prompt and decide which search finishes first."""
    found = {}
    for name, parts in contents(folder).items():
        values = [json.loads(part) for part in parts if not name.startswith("trees")]
        for one in values:
            one.get("config", {}).pop("output_dir", None)
        found[name] = sorted(map(json.dumps, map(without_rounded, values)))
    return found


def without_rounded(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(without_rounded, value))
    if not isinstance(value, dict):
        return value
    left_out = {"logprob", "logprob_per_token", "shares", "model_calls"}
    return {key: without_rounded(one) for key, one in value.items() if key not in left_out}


@pytest.mark.parametrize("place", ["score", "sync"])
def test_a_run_with_several_searches_in_flight_is_killed_five_times_and_resumed_without_loss(
    start: Callable[..., Any], tmp_path: Path, place: str
) -> None:
    command = ["--models", "red", "--methods", "maxent", "greedy", "--seeds", "0", "7", "--num-samples", "9",
               "--num-rollouts", "4", "--rollout-batch", "1", "--prompts-at-once", "4", "--max-tokens", "12",
               "--save-trees", "2", "--no-wandb", "--experiment-name", "x"]  # fmt: skip
    whole = start(*command, "--output-dir", str(tmp_path / "whole"))
    whole.join()
    assert whole.exitcode == 0
    broken, samples, in_flight = None, list[bytes](), list[int]()
    for count in random.Random(5).sample(range(6, 20) if place == "score" else range(1, 6), 5):
        death = Death(place, count, tmp_path / "begun")
        arguments = ["--resume", str(broken)] if broken else [*command, "--output-dir", str(tmp_path / "broken")]
        process = start(*arguments, death=death)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (broken,) = (tmp_path / "broken").glob("x_*")
        before, samples = samples, lines(broken / "samples.jsonl")
        assert samples[: len(before)] == before  # bytes that are there stay
        in_flight.append(int(death.note.read_text()) - (len(samples) - len(before)))  # begun, and not finished
        finished = {Job.of(json.loads(line)) for line in samples}
        unfinished = {Job.of(json.loads(line)) for line in lines(broken / "rollouts.jsonl")} - finished
        assert bool(unfinished) == (place == "sync")
    assert min(in_flight) >= 1 and max(in_flight) >= 3
    assert 0 < len(samples) < 36 and broken is not None
    last = start("--resume", str(broken))
    last.join()
    assert last.exitcode == 0
    (straight,) = (tmp_path / "whole").glob("x_*")
    first, second = unordered(straight), unordered(broken)
    assert len(first["samples.jsonl"]) == 36 and len(first["rollouts.jsonl"]) == 90
    assert first == second


def test_a_killed_run_and_its_resumed_one_are_one_wandb_run(start: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb_file import offline_runs, set_aside

    command = ["--models", "red", "--methods", "maxent", "--seeds", "0", "7", "--num-samples", "3",
               "--num-rollouts", "8", "--rollout-batch", "1", "--prompts-at-once", "1", "--max-tokens", "12",
               "--wandb-mode", "offline", "--output-dir", str(tmp_path)]  # fmt: skip
    kill_when(start(*command), lambda: next(tmp_path.glob("*/"), None), 10)
    (folder,) = tmp_path.glob("*/")
    set_aside(folder)
    last = start("--resume", str(folder), "--wandb-mode", "offline")
    last.join()
    assert last.exitcode == 0
    killed, *whole = offline_runs(folder)
    assert killed.exit_code is None and "partial" not in killed.summary
    assert [run.config["seed"] for run in whole] == [0, 7] and whole[0].id == killed.id != whole[1].id
    assert [len(run.history) for run in whole] == [24, 24] and all(run.summary["partial"] is False for run in whole)


# -- cut off in this process -------------------------------------------------------------------------------------------


@dataclass
class Cut:
    """A run folder that was interrupted, and what an uninterrupted one holds."""

    folder: Path
    whole: dict[str, list[str]]

    def resume(self, *more: str, backend: Backend | None = None) -> int:
        return main(["--resume", str(self.folder), *more], backend or fake_backend())


@pytest.fixture
def cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cut:
    """Cut off after 6 of 12 rollouts, in the second sample's first method."""
    arguments = [*SIZES, "--no-wandb", "--output-dir", str(tmp_path), "--experiment-name", "x"]
    assert main(arguments, fake_backend()) == 0
    (straight,) = tmp_path.glob("x_*")
    assert main(arguments, fake_backend(FakeTask(fail=raise_after(Calls(), 6, KeyboardInterrupt())))) == 130
    (broken,) = (path for path in tmp_path.glob("x_*") if path != straight)
    assert len(lines(broken / "samples.jsonl")) == 2 and len(lines(broken / "rollouts.jsonl")) == 6
    capsys.readouterr()
    return Cut(broken, contents(straight))


def test_resuming_finishes_what_ctrl_c_left(cut: Cut) -> None:
    calls = Calls()
    assert cut.resume(backend=fake_backend(FakeTask(fail=raise_after(calls, -1, KeyboardInterrupt())))) == 0
    assert contents(cut.folder) == cut.whole
    assert calls.scored == 12 - 4  # the two unfinished rollouts are done again, the finished ones are not


def test_resuming_a_finished_run_only_writes_what_is_missing(cut: Cut) -> None:
    assert cut.resume() == 0
    (cut.folder / "summary.json").unlink()
    (cut.folder / "tracked.jsonl").unlink()
    calls = Calls()
    assert cut.resume(backend=fake_backend(calls=calls)) == 0
    assert calls.loaded == [] and contents(cut.folder) == cut.whole


@pytest.mark.parametrize("name", ["samples", "rollouts", "tracked"])
@pytest.mark.parametrize("rest", [b'{"model": "red", "dat', b"{", '{"text": "é'.encode()[:-1]])
def test_a_cut_line_is_taken_out(cut: Cut, name: str, rest: bytes) -> None:
    with (cut.folder / f"{name}.jsonl").open("ab") as stream:
        stream.write(rest)
    assert cut.resume() == 0
    assert contents(cut.folder) == cut.whole


@pytest.mark.parametrize("damage", [b"{", b'"text"', b"\0\0\0\0", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["samples", "rollouts"])
def test_a_damaged_line_is_named_and_nothing_is_touched(
    cut: Cut, name: str, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut.folder / f"{name}.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [lines(path)[0], damage, *lines(path)[2:]]))
    before = {file: file.read_bytes() for file in cut.folder.iterdir() if file.is_file()}
    assert cut.resume() == 2
    err = capsys.readouterr().err
    assert f"{name}.jsonl, line 2 is damaged" in err and err.count("\n") == 1
    assert before == {file: file.read_bytes() for file in cut.folder.iterdir() if file.is_file()}


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("samples", lambda old: [*old, old[0]], "holds a sample 2 times: red har 0 0 maxent"),
        ("samples", lambda old: [old[0].replace(b'"sample": 0', b'"sample": 9')], "does not name: red har 0 9 maxent"),
        ("rollouts", lambda old: old[1:], "holds 2 of the 3 rollouts of red har 0 0 maxent"),
        ("rollouts", lambda old: [b"{}", *old], "lacks the key 'model'"),
    ],
)
def test_records_that_contradict_each_other_are_refused(
    cut: Cut, name: str, change: Callable[[list[bytes]], list[bytes]], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut.folder / f"{name}.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in change(lines(path))))
    assert cut.resume() == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num-samples", "4"], "--num-samples is 3 there and 4 here"),
        (["--seeds", "0", "1"], "--seeds is 0 there and 0 1 here"),
        (["--methods", "greedy", "maxent"], "--methods is maxent greedy there and greedy maxent here"),
        (["--models", "teal"], "--models is red there and teal here"),
        (["--max-kv-bytes", "1GiB"], "--max-kv-bytes is None there and 1073741824 here"),
        (["--output-dir", "elsewhere"], "elsewhere here"),
    ],
)
def test_a_changed_config_is_refused_with_the_difference(
    cut: Cut, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (cut.folder / "rollouts.jsonl").read_bytes()
    assert cut.resume(*options) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
    assert (cut.folder / "rollouts.jsonl").read_bytes() == before


def test_options_that_change_nothing_are_accepted(cut: Cut) -> None:
    assert cut.resume(*SIZES, "--dataset", "HAR", "--tracker", "none", "--quiet") == 0
    assert contents(cut.folder) == cut.whole  # the tracker of a later process does not get into the records


@pytest.mark.parametrize(("more", "code"), [([], 0), (["--max-kv-bytes", "1MiB"], 2)])
def test_the_number_of_prompts_at_once_may_change_unless_they_divide_a_bound_on_memory(
    tmp_path: Path, more: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a search recomputes depends on the memory that it has."""
    assert main([*SIZES, *more, "--prompts-at-once", "2", "--no-wandb", "--output-dir", str(tmp_path)],
                fake_backend()) == 0  # fmt: skip
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert main(["--resume", str(folder), "--prompts-at-once", "3"], fake_backend()) == code
    assert ("--prompts-at-once is 2 there and 3 here" in capsys.readouterr().err) == (code == 2)
    assert main(["--resume", str(folder), "--prompts-at-once", "2"], fake_backend()) == 0


def test_changed_models_and_data_are_refused(cut: Cut, capsys: pytest.CaptureFixture[str]) -> None:
    backend = fake_backend()
    moved = replace(backend, resolve=lambda name, file: replace(backend.resolve(name, file), source="elsewhere/fake"))
    assert cut.resume(backend=moved) == 2
    assert "models have changed since: source nowhere/fake then, elsewhere/fake now" in capsys.readouterr().err

    def other_prompts(name: str, **options: Any) -> Any:
        task = backend.load_task(name, **options)
        examples = [replace(e, prompt=[{"role": "user", "content": "another"}]) for e in task.examples]
        return type("Other", (FakeTask,), {"examples": examples})(count=3, name=task.name)

    assert cut.resume(backend=replace(backend, load_task=other_prompts)) == 2
    assert "datasets have changed since: prompts " in capsys.readouterr().err


def test_other_versions_are_a_warning(cut: Cut, caplog: pytest.LogCaptureFixture) -> None:
    path = cut.folder / "config.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    assert cut.resume() == 0
    assert "versions have changed since this run began (torch 0." in caplog.text
    assert contents(cut.folder)["samples.jsonl"] == cut.whole["samples.jsonl"]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"config": {}}'])
def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["--resume", str(tmp_path)], fake_backend()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --resume {tmp_path}: {tmp_path / 'config.json'}") and err.count("\n") == 1


def test_one_process_at_a_time(cut: Cut, capsys: pytest.CaptureFixture[str]) -> None:
    held = RunFolder(cut.folder)
    assert cut.resume() == 2
    assert f"{cut.folder} is in use by another process" in capsys.readouterr().err
    held.close()
    assert cut.resume() == 0


# -- tracked -----------------------------------------------------------------------------------------------------------

GRID = ExperimentConfig(models=tuple(COLORS), seeds=(0, 1), methods=("maxent",), num_samples=2, num_rollouts=3)


def interrupted(path: Path, rollouts: int) -> Path:
    """The folder of a run of 2 x 2 tracker runs of 6 rollouts each, cut off after so many rollouts."""
    backend = fake_backend(FakeTask(fail=raise_after(Calls(), rollouts, KeyboardInterrupt())))
    folder, tracker = RunFolder.create(path, "x"), RecordingTracker()
    with pytest.raises(KeyboardInterrupt):
        run(prepare(GRID, backend), folder, tracker, backend, run_jobs)
    assert [one.complete for one in tracker.runs][-1] is False
    return folder.path


def resumed(path: Path) -> RecordingTracker:
    tracker = RecordingTracker()
    run(prepare(GRID, fake_backend()), RunFolder(path), tracker, fake_backend(), run_jobs)
    return tracker


def test_tracker_runs_that_were_cut_off_are_made_anew_and_complete(tmp_path: Path) -> None:
    path = interrupted(tmp_path, 6 + 3 + 1)  # red's second seed has a finished and an unfinished sample
    tracker = resumed(path)
    assert [one.unit for one in tracker.runs] == [("red", "har", 1), ("teal", "har", 0), ("teal", "har", 1)]
    for one in tracker.runs:
        own = [r for r in read_jsonl(path / "rollouts.jsonl") if (r["model"], r["dataset"], r["seed"]) == one.unit]
        assert one.rollouts == own and len(own) == 6 and len(one.samples) == 2 and one.complete is True


def test_a_tracker_run_whose_end_was_not_recorded_is_made_anew(tmp_path: Path) -> None:
    path = interrupted(tmp_path, 7)
    (path / "tracked.jsonl").write_text("")  # killed between the last sample and the end of its tracker run
    tracker = resumed(path)
    assert [one.unit for one in tracker.runs][:2] == [("red", "har", 0), ("red", "har", 1)]
    assert len(tracker.runs) == 4 and all(one.complete and len(one.rollouts) == 6 for one in tracker.runs)


def test_wandb_has_one_step_per_rollout_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb_file import offline_runs, set_aside

    task = FakeTask(fail=raise_after(Calls(), 6, KeyboardInterrupt()))
    arguments = [*SIZES, "--wandb-mode", "offline", "--quiet", "--output-dir", str(tmp_path)]
    assert main(arguments, fake_backend(task)) == 130
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    set_aside(folder)
    assert main(["--resume", str(folder)], fake_backend()) == 0
    first, second = offline_runs(folder)
    assert first.id == second.id
    assert (first.exit_code, first.summary["partial"]) == (1, True)
    assert (second.exit_code, second.summary["partial"]) == (0, False)
    rows = [r["rollout_reward"] for r in second.history if "rollout_reward" in r]
    assert rows == [r["rollout_reward"] for r in read_jsonl(folder / "rollouts.jsonl") if r["method"] == "maxent"]
    assert len(second.history) == 3 * (3 + 1)


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    """Else the next line, which finds room, would be glued to it."""
    resource = pytest.importorskip("resource")
    folder = RunFolder(tmp_path)
    folder.append("samples", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(UnavailableError, match="took a part of a line"):
            folder.append("samples", {"text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.append("samples", {"b": 2})
    folder.close()
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"a": 1}, {"b": 2}]


def test_a_full_disk_is_one_line_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    folder.append("samples", {"a": 1})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UnavailableError, match=r"samples.jsonl cannot be written .No space left on device.*--resume"):
        folder.sync("samples")
    folder.close()
