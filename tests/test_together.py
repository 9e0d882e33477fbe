"""Jobs that share a batch: the records of one job after another, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import Calls, FakeTask, fake_backend, raise_after
from test_resume import contents, lines, no_pictures, tiny_backend

import dts
from dts.evaluation.cli import main
from dts.evaluation.experiment.backend import Backend
from dts.evaluation.experiment.config import ExperimentConfig
from dts.evaluation.experiment.plan import prepare
from dts.evaluation.experiment.together import ROUNDS, SharedClock, Together, alone, at_once, blocks
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.tasks.base import Example
from dts.models.table import TableModel, random_logits
from dts.results import Usage
from dts.rewards import Context, Finished, Reward, TerminalReward
from dts.search import METHODS


@pytest.fixture(autouse=True)
def _no_pictures() -> Any:
    with no_pictures():
        yield


@dataclass(frozen=True)
class IdsTask(FakeTask):
    """Prompts of token ids, which begin alike; rewards a completion by its length."""

    @property
    def examples(self) -> Sequence[Example]:
        return [Example(f"ex-{i}", [1, 2, *[3] * (i % 3), 1 + i % 4], i) for i in range(self.count)]  # type: ignore[list-item]

    def reward(self, example: Example) -> Reward:
        def score(context: Context, finished: Sequence[Finished]) -> list[float]:
            self.fail()
            return [len(done.text) / 10 + (example.inputs == 2 and len(done.text) > 4) for done in finished]

        return TerminalReward(score, "length")

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        return {"length": sum(map(len, texts.values())) / len(texts)}


def table_backend(task: IdsTask | None = None) -> Backend:
    """The real searches on a model whose numbers do not depend on neighbours."""
    lm = TableModel(random_logits(5, 3), 5, eos=0)
    return replace(
        fake_backend(task or IdsTask()),
        methods=METHODS,
        check_model=lambda spec, examples, config: [4] * len(examples),
        load=lambda spec, config: lm,
        decode=dts.decode,
        decode_many=dts.decode_many,
    )


COMMAND = ["--models", "red", "--methods", "maxent", "best-of-n", "greedy", "--seeds", "0", "7", "--num-samples", "7",
           "--num-rollouts", "6", "--max-tokens", "5", "--save-trees", "3", "--no-wandb", "--quiet",
           "--experiment-name", "x"]  # fmt: skip


def run_folder(parent: Path, *more: str, backend: Backend | None = None, code: int = 0) -> Path:
    assert main([*COMMAND, "--output-dir", str(parent), *more], backend or table_backend()) == code
    (folder,) = parent.glob("x_*")
    return folder


def comparable(folder: Path) -> dict[str, list[str]]:
    """Every file of records without times, the order of lines and the options that must not matter."""
    found = {}
    for name, parts in contents(folder).items():
        values = [json.loads(part) for part in parts]
        for value in values:
            if "config" in value:
                for key in ("engine", "workers", "prompts_at_once", "output_dir"):
                    del value["config"][key]
        found[name] = sorted(map(json.dumps, values))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    with no_pictures():
        return comparable(run_folder(tmp_path_factory.mktemp("alone"), "--prompts-at-once", "1"))


@pytest.mark.parametrize("more", [[], ["--prompts-at-once", "3"], ["--prompts-at-once", "3", "--rollout-batch", "4"]])
def test_records_are_those_of_one_job_after_another(
    tmp_path: Path, whole: dict[str, list[str]], more: list[str]
) -> None:
    folder = run_folder(tmp_path / "many", *more)
    if "--rollout-batch" in more:
        whole = comparable(run_folder(tmp_path / "alone", "--rollout-batch", "4", "--prompts-at-once", "1"))
    assert len(whole["samples.jsonl"]) == 2 * 7 * 3
    assert comparable(folder) == whole


def test_a_beginning_that_prompts_share_is_charged_to_each(tmp_path: Path) -> None:
    """On the tree cache it goes through the model once; log p may differ by rounding."""
    command = ["--models", "red", "--methods", "maxent", "--num-samples", "4", "--num-rollouts", "4", "--max-tokens",
               "6", "--save-trees", "0", "--no-wandb", "--quiet", "--experiment-name", "x", "--rollout-batch",
               "2"]  # fmt: skip
    found = []
    for count in ("1", "4"):
        backend = replace(tiny_backend(), decode_many=dts.decode_many)
        assert main([*command, "--prompts-at-once", count, "--output-dir", str(tmp_path / count)], backend) == 0
        (folder,) = (tmp_path / count).glob("x_*")
        records = sorted(read_jsonl(folder / "samples.jsonl"), key=lambda record: record["sample"])
        rollouts = sorted(read_jsonl(folder / "rollouts.jsonl"), key=lambda r: (r["sample"], r["rollout_idx"]))
        found.append((records, [{**record, "time": 0} for record in rollouts]))
    (alone_samples, alone_rollouts), (samples, rollouts) = found
    assert rollouts == alone_rollouts
    for one, other in zip(samples, alone_samples, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert one["shares"] == pytest.approx(other["shares"], abs=1e-4)
        assert one["cached_tokens"] == 0
        rounded = ("logprob", "logprob_per_token", "shares", "time", "reward_seconds")
        assert {**one, **dict.fromkeys(rounded)} == {**other, **dict.fromkeys(rounded)}


def test_a_job_that_fails_leaves_those_under_way_to_finish_and_is_repeated_on_resume(
    tmp_path: Path, whole: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    task = IdsTask(fail=raise_after(Calls(), 20, ZeroDivisionError("no")))
    folder = run_folder(tmp_path, "--prompts-at-once", "4", backend=table_backend(task), code=1)
    error = capsys.readouterr().err
    assert re.search(r"error: red har \d+ \d+ maxent: .*ZeroDivisionError: no", error)
    done = read_jsonl(folder / "samples.jsonl")
    assert 3 <= len(done) < 42
    assert main(["--resume", str(folder), "--no-wandb", "--quiet"], table_backend()) == 0
    assert comparable(folder) == whole


@dataclass(frozen=True)
class HalfTask(IdsTask):
    """Cannot make the reward of one example."""

    without: str = "ex-0"

    def reward(self, example: Example) -> Reward:
        if example.id == self.without:
            raise KeyError("no reference")
        return super().reward(example)


@pytest.mark.parametrize("sample", [0, 5])
@pytest.mark.parametrize("count", ["1", "4"])
def test_a_reward_that_cannot_be_made_names_its_job_and_those_under_way_finish(
    tmp_path: Path, whole: dict[str, list[str]], sample: int, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = table_backend(HalfTask(without=f"ex-{sample}"))
    folder = run_folder(tmp_path, "--prompts-at-once", count, backend=backend, code=1)
    message = f"red har 0 {sample} maxent: the reward of example 'ex-{sample}' cannot be made: KeyError: 'no reference'"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    done = map(json.loads, lines(folder / "samples.jsonl"))
    assert sorted(one["sample"] for one in done if one["method"] == "maxent") == list(range(sample))
    assert main(["--resume", str(folder), "--no-wandb", "--quiet"], table_backend()) == 0
    assert comparable(folder) == whole


def test_ctrl_c_keeps_what_is_finished_and_shows_rollouts_of_the_rest(
    tmp_path: Path, whole: dict[str, list[str]]
) -> None:
    task = IdsTask(fail=raise_after(Calls(), 60, KeyboardInterrupt()))
    folder = run_folder(tmp_path, "--prompts-at-once", "4", backend=table_backend(task), code=130)
    before = (folder / "samples.jsonl").read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    assert before and summary["partial"] is True
    assert summary["rollouts"] == len(read_jsonl(folder / "rollouts.jsonl"))
    assert main(["--resume", str(folder), "--no-wandb", "--quiet", "--prompts-at-once", "2"], table_backend()) == 0
    assert (folder / "samples.jsonl").read_bytes().startswith(before)
    assert comparable(folder) == whole


def test_many_prompts_are_killed_and_resumed_without_loss(tmp_path: Path) -> None:
    """60 jobs; the process is cut off by what no handler sees: a file that ends in the midst of a line."""
    more = ["--num-samples", "20", "--seeds", "0", "--prompts-at-once", "6"]
    straight = run_folder(tmp_path / "whole", *more)
    cut = run_folder(tmp_path / "cut", *more)
    for name, kept in (("samples", 23), ("rollouts", 23 * 4)):
        path = cut / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        if name == "rollouts":  # of the finished jobs, and some of one that is not
            kept = sum(json.loads(line)["rollouts"] for line in (cut / "samples.jsonl").read_bytes().splitlines()) + 2
        path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:30] if name == "rollouts" else b""))
    (cut / "tracked.jsonl").unlink()
    assert main(["--resume", str(cut), "--no-wandb", "--quiet"], table_backend()) == 0
    assert comparable(cut) == comparable(straight)


def config(**changes: Any) -> ExperimentConfig:
    given = {"models": ("red",), "methods": ("maxent", "greedy"), "num_samples": 40, "num_rollouts": 16, **changes}
    return ExperimentConfig(**given)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (16, 64)),  # 64 paths: MaxEnt(16) is 4 wide
        ({"rollout_batch": 8}, (8, 8)),
        ({"rollout_batch": 100}, (1, 1)),
        ({"prompts_at_once": 5}, (5, 5)),
        ({"max_kv_bytes": 10**9}, (1, 1)),
        ({"max_kv_bytes": 10**9, "prompts_at_once": 3}, (3, 3)),
    ],
)
def test_how_many_share_a_batch(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    backend = table_backend()
    plan = prepare(config(**changes), backend)
    assert tuple(at_once(plan, job, backend) for job in plan.jobs()[:2]) == expected
    assert {at_once(plan, job, replace(backend, decode_many=None)) for job in plan.jobs()} == {1}


def test_blocks_hold_every_job_once_and_let_methods_take_turns() -> None:
    backend = table_backend()
    plan = prepare(config(prompts_at_once=2, seeds=(0, 1)), backend)
    found = list(blocks(plan, plan.jobs(), backend))
    assert sorted(job for block in found for job in block) == sorted(plan.jobs())
    assert all(len({(job.dataset, job.method) for job in block}) == 1 for block in found)
    assert [block[0].method for block in found] == ["maxent", "greedy"] * 5 and len(found[0]) == 2 * ROUNDS
    one = list(blocks(plan, plan.jobs(), replace(backend, decode_many=None)))
    assert [job for block in one for job in block] == plan.jobs()


def test_each_moment_is_divided_equally_among_the_searches_under_way() -> None:
    times = iter([0.0, 1.0, 4.0, 10.0, 12.0])
    clock = SharedClock(lambda: next(times))
    clock.start(0)  # at 1
    clock.start(1)  # at 4
    assert clock.stop(0) == 3 + 6 / 2  # at 10
    assert clock.stop(1) == 6 / 2 + 2  # at 12; together the 11 seconds since the first began


def test_the_seconds_of_a_search_do_not_begin_while_it_waits_to_be_let_in() -> None:
    """Six searches of equal length, two at once. Time is the number of the model's calls."""
    calls = itertools.count()
    table = random_logits(5, 3)
    now = 0

    def logits(ids: tuple[int, ...]) -> Any:
        nonlocal now
        now = next(calls) + 1
        return table(ids)

    backend, lm = table_backend(IdsTask()), TableModel(logits, 5)
    plan = prepare(config(methods=("greedy",), num_samples=6, max_tokens=5, prompts_at_once=2), backend)
    block = Together(lm, plan, plan.jobs(), backend, _clock=SharedClock(lambda: float(now)))
    seconds = [outcome.sample["time"] for outcome in block]
    assert seconds == [now / 6] * 6 and now >= 6 * 5


def test_what_came_from_the_batch_counts_as_forwarded() -> None:
    found = alone(Usage(prompt_tokens=9, cached_tokens=4, forwarded_tokens=25, unique_tokens=25, seconds=9.0), 2.0)
    assert (found.cached_tokens, found.forwarded_tokens, found.unique_tokens, found.seconds) == (0, 29, 29, 2.0)


def test_a_prompt_that_begins_like_a_neighbours_ends_where_it_ends_alone(tiny_lm: Any) -> None:
    """A budget counts what a search would have sent; else neighbours would decide what it finds."""
    prompts = ["the same beginning a", "the same beginning b"]
    options = {
        "method": METHODS["maxent"](50, 2.0),
        "reward": len,
        "max_new_tokens": 6,
        "budget": dts.Budget(tokens=60),
    }
    many = list(dts.decode_many(tiny_lm, prompts, width=2, batch_size=4, **options))
    one_by_one = [dts.decode(tiny_lm, p, batch_size=2, seed=i, **options) for i, p in enumerate(prompts)]
    assert many[1].usage.cached_tokens > 0
    assert [len(r.rollouts) for r in many] == [len(r.rollouts) for r in one_by_one]
