"""Experiments on a server: one that stops in mid-run, and one that refuses a prompt."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from engine_server import EngineServer, Fault
from fakes import FakeTask
from test_resume import no_pictures, without_times
from toys import Paid, fast_tokenizer

from dts.evaluation.cli import main
from dts.evaluation.experiment.backend import Backend, default_backend
from dts.evaluation.run_folder import read_jsonl
from dts.evaluation.tasks.base import Example
from dts.models.table import TableModel, random_logits
from dts.rewards import Reward

LM = TableModel(random_logits(8, 1), 8, eos=0)
SAMPLES, ROLLOUTS, METHODS = 6, 5, ("maxent-star", "best-of-n")


@dataclass(frozen=True)
class IdsTask(FakeTask):
    """Prompts of ids, whose texts are paid for a token."""

    @property
    def examples(self) -> Sequence[Example]:
        return [Example(f"ex-{i}", (1, 1 + i), i) for i in range(SAMPLES)]

    def reward(self, example: Example) -> Reward:
        return Paid(2)

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        return {"accuracy": sum(map(len, texts.values())) / len(texts)} if texts else {}


@pytest.fixture(autouse=True)
def _no_pictures() -> Iterator[None]:
    with no_pictures():
        yield


def backend() -> Backend:
    return replace(default_backend(), load_task=lambda name, **_: IdsTask())


def models_file(folder: Path, port: int) -> Path:
    fast_tokenizer([b"Hello", *(f" {letter}".encode() for letter in "abcdef")]).save_pretrained(folder / "tokenizer")
    file = folder / "models.yaml"
    file.write_text(
        f"mine: {{engine: 'http://127.0.0.1:{port}/v1', model: m, tokenizer: '{folder}/tokenizer', top: 3, wait: 0.01}}"
    )
    return file


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., tuple[int, int]]]:
    """Runs a command against a server with a fault, which has stopped afterwards. Returns the exit code and the
    requests. All servers of a test have one port, which a socket keeps from other processes between them."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))

    def started(fault: Fault, *arguments: str) -> tuple[int, int]:
        server = EngineServer(LM, fault, port=keeper.getsockname()[1])
        command = ["--models", "mine", "--models-file", str(models_file(tmp_path, server.server_port)), "--methods",
                   *METHODS, "--num-rollouts", str(ROLLOUTS), "--max-tokens", "6", "--rollout-batch", "2",
                   "--prompts-at-once", "3", "--tracker", "none", "--quiet", "--output-dir", str(tmp_path)]  # fmt: skip
        try:
            code = main([*(command if "--resume" not in arguments else ()), *arguments], backend())
            return code, len(server.requests)
        finally:
            server.stop()

    with keeper:
        yield started


def records(folder: Path) -> dict[str, list[str]]:
    """Without times, and in an order that does not depend on which search ended first."""
    return {
        name: sorted(json.dumps(without_times(dict(one))) for one in read_jsonl(folder / f"{name}.jsonl"))
        for name in ("samples", "rollouts")
    }


def calm(number: int, body: Any) -> None:
    """No fault."""


def dies_at(count: int) -> Fault:
    return lambda number, body: "die" if number == count else None


def test_a_run_continues_when_its_server_is_back_and_its_records_are_those_of_an_undisturbed_one(
    run: Callable[..., tuple[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, requests = run(calm, "--experiment-name", "whole")
    assert code == 0 and requests > 60
    (whole,) = tmp_path.glob("whole_*")
    code, _ = run(dies_at(requests // 4), "--experiment-name", "broken")
    (broken,) = tmp_path.glob("broken_*")
    finished = [len(read_jsonl(broken / "samples.jsonl"))]
    for moment in (3, requests // 3):  # a server that dies soon, and one that lets some searches finish
        assert code == 1
        first, last = capsys.readouterr().err.strip().splitlines()[-2:]
        assert f"continue with --resume {broken}" in first
        assert last.startswith("error: engine at 127.0.0.1:") and "could not be reached" in last
        code, _ = run(dies_at(moment), "--resume", str(broken))
        finished.append(len(read_jsonl(broken / "samples.jsonl")))
    assert 0 < finished[0] == finished[1] < finished[2] < SAMPLES * len(METHODS)
    assert run(calm, "--resume", str(broken))[0] == 0
    found = records(broken)
    assert found == records(whole)
    assert len(found["rollouts"]) == SAMPLES * len(METHODS) * ROLLOUTS == len(set(found["rollouts"]))


def test_a_prompt_that_the_engine_refuses_is_named_when_the_searches_beside_it_have_finished(
    run: Callable[..., tuple[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a reward fails: no further sample begins, and the run can be continued."""

    def refuses(number: int, body: Any) -> int | None:
        return 400 if body["prompt"][:2] == [1, 2] and len(body["prompt"]) > 3 else None

    assert run(refuses, "--experiment-name", "refused")[0] == 1
    (refused,) = tmp_path.glob("refused_*")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: mine FAKE 0 1 maxent-star: engine at ") and "status 400" in last
    done = {sample["id"] for sample in read_jsonl(refused / "samples.jsonl")}
    assert {"ex-0", "ex-2"} <= done and not done & {"ex-1", f"ex-{SAMPLES - 1}"}
    assert run(calm, "--resume", str(refused))[0] == 0
    assert len(read_jsonl(refused / "samples.jsonl")) == SAMPLES * len(METHODS)
