"""Engines over HTTP: three dialects, and servers that fail. No fault changes a search, and none is counted twice."""

from __future__ import annotations

import itertools
import re
import threading
import types
from dataclasses import asdict, replace

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")

from engine_server import EngineServer  # noqa: E402
from toys import Paid, fast_tokenizer  # noqa: E402

import dts  # noqa: E402
from dts.errors import EngineError  # noqa: E402
from dts.lm import Tail, TailRequest  # noqa: E402
from dts.models.engines.dialects import DIALECTS  # noqa: E402
from dts.models.engines.http import Server  # noqa: E402
from dts.models.engines.loading import Tokens  # noqa: E402
from dts.models.engines.steps import Stepwise  # noqa: E402
from dts.models.engines.tails import EngineModel  # noqa: E402
from dts.models.engines.vllm import InProcess  # noqa: E402
from dts.models.table import TableModel, random_logits  # noqa: E402
from dts.search import BestOfN, MaxEnt  # noqa: E402

WORDS = [b"Hello", b" a", b" b", b" c", b" d", b" e", b" f"]
LM = TableModel(random_logits(8, 1), 8, eos=0)
TOKENIZER = fast_tokenizer(WORDS)
KEY = "sk-secret-of-the-tests"


@pytest.fixture
def serve():
    """Starts servers that are stopped when the test ends."""
    started = []

    def start(*args, **options):
        started.append(EngineServer(*args, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def load(server, **options):
    return dts.load(server.url, **{"model": "m", "tokenizer": TOKENIZER, "top": 3, **options})


def direct(top=3, **options):
    return EngineModel(Stepwise(LM, max_new_tokens=64), Tokens(TOKENIZER), "direct", top=top, **options)


def searched(lm, **options):
    return dts.decode(lm, [1, 2], reward=Paid(2), method=MaxEnt(12, search="best"), max_new_tokens=5, **options)


def facts(result):
    """All that a fault could change."""
    return [(r.text, r.reward, r.tokens) for r in result.rollouts], result.usage.forwarded_tokens


def patient(server, dialect="vllm", **options):
    """A model of this server that waits without sleeping, and how long it was told to wait."""
    slept = []
    made = Server(server.url, DIALECTS[dialect], "m", top=3, sleep=slept.append, **options)
    return EngineModel(made, Tokens(TOKENIZER), "m", top=3), slept


@pytest.mark.parametrize("preset", list(DIALECTS))
def test_every_dialect_gives_the_search_that_the_same_tails_give_in_process(serve, preset):
    server = serve(LM, processed=preset == "sglang")
    result, wanted = searched(load(server, preset=preset), seed=3), searched(direct(), seed=3)
    assert [(r.text, r.reward) for r in result.rollouts] == [(r.text, r.reward) for r in wanted.rollouts]
    probabilities = [[c.logprob for c in one.completions] for one in (result, wanted)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-9)
    assert any(len(request["body"].get("logit_bias") or ()) for request in server.requests) or preset == "sglang"


@pytest.mark.parametrize("fault", [429, 500, 503, "cut"])
def test_a_request_that_failed_is_sent_again_and_counted_once(serve, fault):
    calm = searched(patient(serve(LM))[0])
    failing = serve(LM, lambda number, body: fault if number % 3 == 0 else None)
    lm, slept = patient(failing)
    result = searched(lm)
    assert facts(result) == facts(calm) and slept
    assert len(failing.requests) > result.usage.model_calls  # what failed was sent again


def test_a_server_that_hangs_is_asked_again(serve):
    lm, slept = patient(serve(LM, lambda number, body: "hang" if number == 1 else None), timeout=0.3)
    assert facts(searched(lm)) == facts(searched(patient(serve(LM))[0])) and len(slept) == 1


def test_a_server_that_stays_away_ends_the_run_with_one_line_after_the_wait():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    engine = Server("http://127.0.0.1:9/v1", DIALECTS["vllm"], "m", top=3, wait=20, clock=lambda: now[0], sleep=sleep)
    with pytest.raises(EngineError) as caught:
        EngineModel(engine, Tokens(TOKENIZER), "m", top=3).complete([TailRequest((1,), (), 1, 0, 3)])
    assert re.search(
        r"could not be reached \(ConnectError\), \d+ times in \d+ seconds; .* longer wait=", str(caught.value)
    )
    assert "\n" not in str(caught.value) and 5 < now[0] <= 20


def test_retry_after_is_waited_for_and_no_longer_than_the_limit(serve):
    from dts.models.engines.http import _seconds

    assert [_seconds({"Retry-After": text}) for text in ("7", "1e9", "nan", "soon", "-1")] == [7, 30, 0, 0, 0]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_says_what_the_server_said_without_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(LM, lambda number, body: status)
    with pytest.raises(dts.UnavailableError) as caught:
        load(server)
    assert f"status {status}" in str(caught.value) and "told to" in str(caught.value)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.requests) == 1 and server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": [{"text": "a"}], "usage": {}}, "without token ids and log-probabilities"),
        ({"choices": [{"token_ids": [1], "logprobs": None}], "usage": {}}, "without token ids"),
        ({"error": "no"}, "--max-logprobs"),
        (
            {"choices": [{"token_ids": [1, 99], "logprobs": {"token_logprobs": [-1, -1], "top_logprobs": [{}, {}]}}],
             "usage": {"prompt_tokens": 1}}, "99",
        ),
        (
            {"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1, -1], "top_logprobs": [{}, {}]}}],
             "usage": {"prompt_tokens": 1}}, "lists 1 log-probabilities",
        ),
    ],
)  # fmt: skip
def test_the_first_request_finds_out_what_a_server_lacks(serve, answer, said):
    with pytest.raises((dts.UnavailableError, dts.ModelError), match=said) as caught:
        load(serve(LM, lambda number, body: answer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("partial", [{3}, {1, 2, 3, 5}, set(range(1, 8))])
def test_llama_cpp_is_asked_again_for_the_rows_of_tokens_that_end_within_a_character(serve, partial):
    """Its server leaves them out. The search is that of the same tails, and the tokens of each request count."""
    server = serve(LM, partial=partial)
    result, wanted = searched(load(server, preset="llama.cpp"), seed=3), searched(direct(), seed=3)
    assert [(r.text, r.reward) for r in result.rollouts] == [(r.text, r.reward) for r in wanted.rollouts]
    probabilities = [[c.logprob for c in one.completions] for one in (result, wanted)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-9)
    rows = [r["body"]["n_probs"] for r in server.requests if r["body"]["logit_bias"] == [["a", 1000.0]]]
    assert 3 in rows and max(rows) > 8  # the row as it is listed; and all of it where the token is not listed
    assert result.usage.forwarded_tokens > searched(load(serve(LM), preset="llama.cpp"), seed=3).usage.forwarded_tokens


def test_a_row_of_llama_cpp_that_could_be_one_of_two_tokens_is_asked_for_again(serve):
    twice = TableModel(lambda prefix: np.array([-99.0, -99, -99, 9 - len(prefix), -99, 0, 0, 0]), 8, eos=0)
    lm = patient(serve(twice, partial={3}), "llama.cpp")[0]
    (tail,) = lm.complete([TailRequest((1,), (), 4, 0, 3)])
    (wanted,) = Stepwise(twice, max_new_tokens=4).complete([TailRequest((1,), (), 4, 0, 3)])
    assert tail.tokens == wanted.tokens == (3, 3, 3, 3)
    assert tail.computed == 8  # four tokens of the tail, and one for each row
    assert [row[3] for row in tail.rows] == pytest.approx([row[3] for row in wanted.rows])


@pytest.mark.parametrize("preset", ["llama.cpp", "sglang"])
def test_a_token_at_which_the_engine_ends_and_the_tokenizer_does_not_is_one_like_others(serve, preset, caplog):
    """A model file, or the engine, names more of them than Hugging Face's configuration. Once it says so."""
    server = serve(LM, ends={2}, processed=preset == "sglang")
    lm, wanted = load(server, preset=preset), direct()
    drawn = [dts.decode(one, [1, 2], reward=len, method=BestOfN(64), max_new_tokens=4) for one in (lm, wanted)]
    word = TOKENIZER.decode([2])
    beyond = [sum(word in r.text and not r.text.endswith(word) for r in result.rollouts) for result in drawn]
    assert min(beyond) > 5 and abs(beyond[0] - beyond[1]) < 20
    assert [record.args[1] for record in caplog.records if "searches continue after it" in record.message] == [2]


def test_a_request_that_sglang_gave_up_says_why(serve):
    gone = {"meta_info": {"finish_reason": {"type": "abort", "message": "paused"}, "output_token_logprobs": []}}
    with pytest.raises(dts.UnavailableError, match="SGLang gave the request up: paused"):
        load(serve(LM, lambda number, body: gone), preset="sglang")


@pytest.mark.parametrize(("options", "said"), [
    ({"room": 2}, "no room for all tokens after a prompt of 1; .* larger --ctx-size"),
    ({"settings": {"grammar": "root ::= [0-9]"}}, "start it without --grammar"),
    ({"settings": {"stop": ["User:"]}}, "start it without --reverse-prompt"),
    ({"settings": {"speculative.types": "ngram-simple"}}, "start it without --spec-type"),
])  # fmt: skip
def test_a_llama_cpp_server_that_draws_otherwise_or_has_no_room_says_which_option_to_change(serve, options, said):
    with pytest.raises(dts.UnavailableError, match=said) as caught:
        load(serve(LM, **options), preset="llama.cpp")
    assert "\n" not in str(caught.value)


def test_a_tail_that_just_fits_into_the_context_of_llama_cpp_is_taken_and_one_after_a_shift_is_not(serve):
    request = TailRequest((1, 2), (), 3, 7, 3)
    (wanted,) = Stepwise(LM, max_new_tokens=8).complete([request])
    (fits,) = patient(serve(LM, room=5), "llama.cpp")[0].complete([request])
    assert fits.tokens == wanted.tokens and len(fits.tokens) == 3
    shifted = {"tokens": [1, 2, 3], "tokens_evaluated": 2, "tokens_cached": 3, "truncated": True, "stop_type": "limit"}
    with pytest.raises(dts.UnavailableError, match="--ctx-size"):
        patient(serve(LM, lambda number, body: shifted), "llama.cpp")[0].complete([request])


def test_a_row_that_lists_too_few_tokens_is_refused_wherever_it_stands():
    class Drafting(Stepwise):
        def complete(self, requests):
            (tail,) = super().complete(requests)
            return [replace(tail, rows=(*tail.rows[:-1], {tail.tokens[-1]: 0.0}))]

    lm = EngineModel(Drafting(LM, max_new_tokens=4), Tokens(TOKENIZER), "drafting", top=3)
    with pytest.raises(dts.UnavailableError, match="lists 1 log-probabilities of a token, and top=3"):
        lm.complete([TailRequest((1, 2), (), 3, 7, 3)])


def test_a_server_that_ignores_the_bar_is_found_out(serve):
    def ignores(number, body):
        body.pop("logit_bias", None)

    certain = TableModel(lambda prefix: np.array([-9, 0, 9, 8, 7, 0, 0, 0.0]), 8, eos=0)
    with pytest.raises(dts.ModelError, match="barred"):
        load(serve(certain, ignores))


class CountedLikeTheServer:
    """Tails in process, with the tokens that the server says it computed: all but the drawn ones were cached."""

    max_top = 8

    def __init__(self):
        self._engine = Stepwise(LM, max_new_tokens=64)

    def complete(self, requests):
        return [replace(tail, computed=len(tail.tokens)) for tail in self._engine.complete(requests)]


def counted(result):
    """All of its usage that is no time."""
    return {name: value for name, value in asdict(result.usage).items() if "seconds" not in name}


@pytest.mark.parametrize("rollouts", [160, pytest.param(1000, marks=pytest.mark.minutes)])
def test_faults_change_no_rollout_and_no_count_of_many_at_once(serve, rollouts):
    """16 requests at once, of which every third fails in one of three ways: each search is that of an undisturbed
    engine, so none is mixed up with another."""
    together, faults = threading.Barrier(16), (429, 500, "cut")

    def fault(number, body):
        if number < 16:
            together.wait(60)
        return faults[number // 3 % 3] if number % 3 == 0 else None

    server = serve(LM, fault)
    lm, slept = patient(server, concurrency=16)
    prompts = [[1, 1 + i % 7, 1 + i // 7 % 7] for i in range(rollouts // 10)]
    options = {"reward": Paid(2), "method": BestOfN(10), "max_new_tokens": 6, "batch_size": 64, "width": 4, "seed": 1}
    found = list(dts.decode_many(lm, prompts, **options))
    calm = EngineModel(CountedLikeTheServer(), Tokens(TOKENIZER), "calm", top=3)
    wanted = list(dts.decode_many(calm, prompts, **options))
    assert [facts(one) for one in found] == [facts(one) for one in wanted]
    assert sum(len(one.rollouts) for one in found) == rollouts
    assert [counted(one) for one in found] == [counted(one) for one in wanted]
    asked = sum(one.usage.model_calls for one in found)
    assert len(server.requests) == asked + len(slept) and len(slept) == -(-len(server.requests) // 3)
    assert server.most_together == 16


def test_all_searches_of_a_run_feed_one_engine(serve):
    lm, sizes = load(serve(LM)), []
    complete = lm.engine.complete
    lm.engine.complete = lambda requests: sizes.append(len(requests)) or complete(requests)
    prompts = [[1], [1, 2], [3], [1, 4]]
    options = {"reward": Paid(2), "method": BestOfN(4), "max_new_tokens": 5}
    together = list(dts.decode_many(lm, prompts, batch_size=16, width=4, seed=1, **options))
    assert max(sizes) > 4
    for index, (prompt, one) in enumerate(zip(prompts, together, strict=True)):
        alone = dts.decode(direct(), prompt, batch_size=4, seed=1 + index, **options)
        assert [r.text for r in one.rollouts] == [r.text for r in alone.rollouts]


def fails(found):
    """The messages of what failed, by place."""
    return {place: str(one) for place, one in enumerate(found) if isinstance(one, Exception)}


def asked(count):
    return [TailRequest((1, 1 + i % 7), (), 2, i, 3) for i in range(count)]


def answers(prompt, status):
    """A fault that a prompt has."""
    return lambda number, body: status if body["prompt"] == prompt else None


@pytest.mark.parametrize("status", [400, 413, 422, {"choices": []}])
def test_what_a_server_says_of_one_request_leaves_the_others_alone(serve, status):
    server = serve(LM, answers([1, 2], status))
    engine = Server(server.url, DIALECTS["vllm"], "m", top=3)
    found, wanted = engine.complete(asked(20)), direct().engine.complete(asked(20))
    assert list(fails(found)) == [1, 8, 15]
    assert all(
        f"status {status}" in text or ("without token ids" in text and isinstance(status, dict))
        for text in fails(found).values()
    )
    drawn = [[(a.tokens, a.rows) for i, a in enumerate(one) if i % 7 != 1] for one in (found, wanted)]
    assert drawn[0] == drawn[1]
    assert len(server.requests) == 20


@pytest.mark.parametrize(("fault", "said"), [
    (500, r"answered with status 500, \d+ times in \d+ seconds, and answered other requests; look at this one"),
    ("hang", r"did not answer within 0\.201 seconds, \d+ times in \d+ seconds, and answered .* longer timeout="),
])  # fmt: skip
def test_a_request_that_a_server_which_answers_others_cannot_do_fails_alone(serve, fault, said):
    others, ticks, vllm = threading.Event(), itertools.count(), DIALECTS["vllm"]
    engine = Server(
        serve(LM, answers([1, 2], fault)).url, vllm, "m", top=3, timeout=0.2, wait=20, clock=lambda: next(ticks),
        sleep=lambda seconds: others.wait(60),
    )  # fmt: skip
    engine._dialect = types.SimpleNamespace(body=vllm.body, tail=lambda *got: others.set() or vllm.tail(*got))
    ((place, text),) = fails(engine.complete(asked(7))).items()
    assert place == 1 and re.search(said, text) and "\n" not in text


@pytest.mark.parametrize(("fault", "said"), [
    (401, "status 401"), (403, "status 403"), (404, "status 404"), (503, "status 503, 1 times"),
    ("cut", r"could not be reached \(RemoteProtocolError\)"), ("hang", r"did not answer within .* longer timeout="),
])  # fmt: skip
def test_a_server_that_answers_nobody_is_given_up_once_for_all_requests(serve, fault, said):
    """Hundreds of requests that wait for their turn do not try each for itself."""
    server = serve(LM, lambda number, body: fault)
    seconds = 0.1 if fault == "hang" else 60.0
    engine = Server(server.url, DIALECTS["vllm"], "m", top=3, concurrency=4, timeout=seconds, wait=1e-6)
    with pytest.raises(EngineError, match=said):
        engine.complete(asked(300))
    assert len(server.requests) <= 4


def test_a_longer_tail_has_more_time_and_nothing_else_has(serve):
    seconds = []
    engine = Server(serve(LM).url, DIALECTS["vllm"], "m", top=3)
    send = engine._send
    engine._send = lambda body, time: seconds.append((body["max_tokens"], time)) or send(body, time)
    engine.complete([TailRequest((1,), (), limit, 0, 3) for limit in (1, 32)])
    assert sorted(seconds) == [(1, 120 * (1 + 1 / 512)), (32, 127.5)]


def many(lm, prompts, **options):
    options = {"reward": Paid(2), "method": MaxEnt(5, search="best"), "max_new_tokens": 5, "width": 2, **options}
    return dts.decode_many(lm, prompts, batch_size=8, seed=1, **options)


@pytest.mark.parametrize("longest", [2, 4])
def test_a_prompt_that_the_engine_refuses_fails_alone(serve, longest):
    """When it is opened, and in the middle of its search."""
    prompts = [[1, 2], [2, 2], [1, 3], [2, 4], [1, 5]]
    fault = lambda number, body: 400 if body["prompt"][0] == 2 and len(body["prompt"]) >= longest else None  # noqa: E731
    refused = load(serve(LM, fault))
    found, calm = list(many(refused, prompts, errors="return")), list(many(load(serve(LM)), prompts))
    assert [(i, "status 400" in text, text[:8]) for i, text in fails(found).items()] == [
        (1, True, "prompt 1"), (3, True, "prompt 3"),
    ]  # fmt: skip
    assert [facts(found[i]) for i in (0, 2, 4)] == [facts(calm[i]) for i in (0, 2, 4)]
    results = many(refused, prompts)
    assert facts(next(results)) == facts(calm[0])
    with pytest.raises(dts.UnavailableError, match=r"prompt 1: engine at .* status 400"):
        next(results)


def test_a_server_that_is_gone_ends_all_searches_at_once(serve):
    """Not one after another, each with a wait. Here it stops where one search asks for an unlisted token."""
    server = serve(LM, lambda number, body: "die" if body.get("logit_bias") and number > 2 else None)
    lm = load(server, wait=1e-6, top=1)
    tries = []
    send = lm.engine._send
    lm.engine._send = lambda *args: tries.append(server.stopped) or send(*args)
    with pytest.raises(EngineError, match="could not be reached"):
        list(many(lm, [[1, 2], [1, 3], [1, 4], [1, 5]], errors="return", width=2))
    assert server.stopped and tries.count(True) <= 1


# ---- what a user may write ----


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("http://127.0.0.1:9/v1", {}, "needs model="),
        ("http://127.0.0.1:9/v1", {"model": "m"}, "tokenizer="),
        ("http://127.0.0.1:9/v1", {"preset": "other"}, "preset='other' is not known; give one of vllm, sglang, llama"),
        ("http://127.0.0.1:9/v1", {"patience": 3}, "patience= is no option of a server"),
        ("http://127.0.0.1:9/v1", {"segment": 0}, "segment=0"),
        ("http://127.0.0.1:9/v1", {"top": 0}, "top=0"),
        ("http://127.0.0.1:9/v1", {"concurrency": 0}, "concurrency=0"),
        ("http://127.0.0.1:9/v1", {"wait": -1}, "wait=-1"),
        ("http://127.0.0.1:9/v1", {"device": "cpu"}, "takes no device"),
        ("http://me:sk-secret@127.0.0.1:9/v1", {}, "no plain http"),
        ("http://me:sk-secret@127.0.0.1:9/v1", {"device": "cpu"}, "takes no device"),
        ("http://127.0.0.1:9/v1", {"tokenizer": 5, "model": "m"}, "tokenizer=5 is not allowed"),
        ("http://127.0.0.1:9/v1", {"preset": ["vllm"]}, "preset="),
        ("http://127.0.0.1:9/v1", {"key_env": 3}, "key_env=3 is not allowed"),
        ("smollm2-135m", {"model": "smollm2-360m"}, "model='smollm2-360m' was given beside 'smollm2-135m'"),
        ("smollm2-135m", {"segment": 8}, "segment= is no option of a model"),
    ],
)
def test_bad_options_are_named_before_any_request(source, options, said):
    full = {"model": "m", "tokenizer": TOKENIZER} if (options and "model" not in options) or "@" in source else {}
    if not source.startswith("http"):
        full = {}
    with pytest.raises(dts.UsageError, match=said) as caught:
        dts.load(source, **full, **options)
    assert "sk-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_loading_fails_at_once_where_no_server_answers():
    """The wait is for a server that goes away in the middle of a run."""
    with pytest.raises(
        dts.UnavailableError, match=r"127\.0\.0\.1:9 could not be reached \(ConnectError\); start it, or"
    ):
        dts.load("http://127.0.0.1:9/v1", model="m", tokenizer=TOKENIZER, wait=3600)


def test_a_tokenizer_of_the_hub_is_asked_for_once_and_never_where_the_hub_is_away(monkeypatch):
    def away(spec):
        raise dts.UnavailableError(f"{spec.source}: the hub cannot be reached")

    monkeypatch.setattr("dts.models.loading._reach_hub", away)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: pytest.fail("asked"))
    for source, options in (("http://127.0.0.1:9/v1", {"model": "m", "tokenizer": "no/such"}), ("vllm:no/such", {})):
        with pytest.raises(dts.UnavailableError, match="no/such: the hub cannot be reached"):
            dts.load(source, **options)


def test_a_long_timeout_does_not_use_up_the_wait(serve):
    """The wait begins when a request has failed, not when it was sent."""
    now = [0.0]

    def slow(number, body):
        now[0] += 600
        return 503 if number == 0 else None

    engine = Server(
        serve(LM, slow).url, DIALECTS["vllm"], "m", top=3, wait=60, clock=lambda: now[0], sleep=lambda s: None
    )
    assert len(engine.complete([TailRequest((1,), (), 1, 0, 3)])) == 1


def test_an_engine_can_be_an_entry_of_the_models_file(serve, tmp_path):
    from dts.evaluation.experiment.backend import check_model, load_model
    from dts.evaluation.experiment.config import ExperimentConfig
    from dts.models.registry import resolve

    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "models.yaml"
    file.write_text(f"mine: {{engine: '{serve(LM).url}', model: m, tokenizer: '{tmp_path}/tokenizer', top: 3}}")
    spec, config = resolve("mine", str(file)), ExperimentConfig()
    assert check_model(spec, [], config) is None
    lm = load_model(spec, config)
    assert (lm.name, lm.top) == ("mine", 3)
    assert [r.text for r in searched(lm).rollouts] == [r.text for r in searched(direct()).rollouts]
    assert dts.load("mine", models_file=file).name == "mine"


def test_an_entry_that_names_no_engine_is_refused(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text("mine: {engine: ftp://host}")
    with pytest.raises(dts.UsageError, match="engine is 'ftp://host'; give an address that begins with one of vllm:"):
        dts.load("mine", models_file=file)


def test_the_name_of_a_model_may_still_be_given_as_model():
    with pytest.raises(dts.UsageError, match="no-such-model"):
        dts.load(model="no-such-model")


def test_vllm_in_process_without_the_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(dts.UnavailableError, match="pip install vllm"):
        dts.load(f"vllm:{tmp_path}")


@pytest.mark.parametrize("options", [{}, {"unknown": 1}, {"model": "x"}])
def test_vllm_that_does_not_start_says_so_in_one_line(tmp_path, monkeypatch, options):
    def starts(model, *, max_logprobs, enable_prefix_caching, generation_config):
        raise RuntimeError("the engine\nfailed")

    fake = types.SimpleNamespace(LLM=starts, SamplingParams=dict)
    monkeypatch.setitem(__import__("sys").modules, "vllm", fake)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(dts.UnavailableError, match="did not start") as caught:
        dts.load(f"vllm:{tmp_path}", tokenizer=tmp_path, **options)
    assert "\n" not in str(caught.value)


class FakeLLM:
    """Answers token 1 to each prompt, and refuses the whole call where one is too long."""

    def __init__(self, model, **options):
        self.calls = []

    def generate(self, prompts, params, use_tqdm):
        self.calls.append(len(prompts))
        lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
        if max(lengths) > 90:
            raise RuntimeError("the engine is dead\nand more")
        if max(lengths) > 5:
            raise ValueError(f"The prompt of {max(lengths)} tokens is too long\nand more")
        row = {1: types.SimpleNamespace(logprob=-0.5)}
        drawn = types.SimpleNamespace(token_ids=[1], logprobs=[row])
        return [
            types.SimpleNamespace(outputs=[drawn], num_cached_tokens=1, prompt_token_ids=prompt["prompt_token_ids"])
            for prompt in prompts
        ]


def test_what_vllm_in_process_refuses_leaves_the_others_alone_and_its_death_ends_all(monkeypatch):
    fake = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(__import__("sys").modules, "vllm", fake)
    engine = InProcess("folder")
    found = engine.complete([TailRequest((1,) * (9 if i == 4 else 2), (), 1, i, 3) for i in range(8)])
    assert fails(found) == {4: "vLLM refused a request: The prompt of 9 tokens is too long"}
    assert [one.tokens for i, one in enumerate(found) if i != 4] == [(1,)] * 7
    assert engine.llm.calls == [8, 4, 4, 2, 1, 1, 2]
    with pytest.raises(EngineError, match=r"vLLM failed \(RuntimeError: the engine is dead\)"):
        engine.complete([TailRequest((1,) * 99, (), 1, 0, 3)])


def test_log_probabilities_that_are_none_are_refused_however_large():
    engine = types.SimpleNamespace(max_top=3, complete=lambda requests: [Tail((1,), ({1: 900.0, 2: -1.0},), 1)])
    with pytest.raises(dts.ModelError, match="sum to"):
        EngineModel(engine, Tokens(TOKENIZER), "m", top=3).complete([TailRequest((1,), (), 1, 0, 3)])


def test_a_tokenizer_in_a_folder_brings_the_eos_ids_of_its_generation_config(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert Tokens(str(tmp_path)).eos_ids == {0, 5} and Tokens(str(tmp_path)).vocab_size == len(WORDS) + 1
