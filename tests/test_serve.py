"""The OpenAI-compatible server, with the real client: answers, streams, errors, load, and clients that hang up."""

import asyncio
import gc
import json
import math
import queue
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import httpx
import openai
from serving import Gate, serving
from test_docs import blocks, run
from training_models import tiny_pair

import dts
from dts.doors.answers import tokens_of
from dts.doors.app import Service, build_app
from dts.doors.bodies import CompletionBody, Limits, asked_for, parsed
from dts.doors.serve import build_parser, hosts_of, key_from, limits_of, rewards_of, service_of
from dts.doors.worker import Job, Stopped, Worker
from dts.results import Rollout
from dts.search import BestOfN, Greedy, MaxEnt, Sampling
from dts.tree import Tree

MESSAGES = [{"role": "user", "content": "ab cd"}]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if quiet %}quiet {% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def many_a(text):
    return float(text.count("a"))


def fails(text):
    raise ValueError("secret of the operator")


@pytest.fixture(scope="module")
def lm():
    model, tokenizer = tiny_pair()
    tokenizer.chat_template = TEMPLATE
    return dts.load((model, tokenizer))


@pytest.fixture(scope="module")
def address(lm):
    with serving(lm, {"many_a": many_a, "fails": fails}) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_chat_answer_is_what_decode_finds(client, lm):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=5, max_tokens=9, n=2, logprobs=True,
        extra_body={"reward": "many_a", "method": "maxent-star", "rollouts": 6, "reward_scale": 2.0},
    )  # fmt: skip
    alone = dts.decode(lm, MESSAGES, reward=many_a, method=MaxEnt(6, reward_scale=2.0, search="best"), seed=5,
                       max_new_tokens=9)  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == [one.text for one in alone.completions[:2]]
    assert [choice.reward for choice in answer.choices] == [one.reward for one in alone.completions[:2]]
    best = alone.best
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == best.text
    assert [token.logprob for token in tokens] == list(best.token_logprobs[: len(tokens)])
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.dts["rollouts"] == 6 and answer.dts["forwarded_tokens"] == alone.usage.forwarded_tokens


def test_the_default_reward_search_and_its_size(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4,
                                            extra_body={"reward": "many_a"})  # fmt: skip
    assert answer.dts["method"] == MaxEnt(16, search="best").name and answer.dts["rollouts"] <= 16


def test_a_plain_request_is_answered_by_independent_draws(client, lm):
    answer = client.completions.create(model="tiny", prompt="ab", n=4, seed=1, max_tokens=2, temperature=0.3)
    alone = dts.decode(lm, "ab", method=Sampling(4), seed=1, max_new_tokens=2, temperature=0.3)
    assert [choice.text for choice in answer.choices] == [rollout.text for rollout in alone.rollouts]
    assert len({choice.text for choice in answer.choices}) < 4  # equal draws are kept


def test_temperature_0_is_greedy(client, lm):
    answer = client.completions.create(model="tiny", prompt="ab", temperature=0, max_tokens=8)
    assert answer.choices[0].text == dts.decode(lm, "ab", method=Greedy(), max_new_tokens=8).best.text


def test_the_temperature_of_a_greedy_text_is_that_of_its_log_probabilities(client, lm):
    for temperature, given in ((0, {}), (0.5, {"temperature": 0.5})):
        answer = client.completions.create(model="tiny", prompt="ab", temperature=temperature, max_tokens=4, logprobs=0,
                                           extra_body={"method": "greedy"})  # fmt: skip
        alone = dts.decode(lm, "ab", method=Greedy(), max_new_tokens=4, **given).best
        tokens = answer.choices[0].logprobs.token_logprobs
        assert tokens == list(alone.token_logprobs[: len(tokens)])


def test_several_prompts_as_text_or_ids_answer_in_order(client, lm):
    ids = lm.encode("cd ef")
    texts = client.completions.create(model="tiny", prompt=["ab", "cd ef"], seed=3, max_tokens=6, logprobs=0)
    assert [choice.index for choice in texts.choices] == [0, 1]
    alone = [dts.decode(lm, prompt, method=Sampling(1), seed=3 + i, max_new_tokens=6).best
             for i, prompt in enumerate(["ab", "cd ef"])]  # fmt: skip
    assert [choice.text for choice in texts.choices] == [one.text for one in alone]
    assert texts.choices[1].logprobs.text_offset[-1] <= len(alone[1].text)
    given = client.completions.create(model="tiny", prompt=ids, seed=4, max_tokens=6)
    assert given.choices[0].text == alone[1].text


def test_a_stop_ends_the_text_before_it(client, lm):
    free = dts.decode(lm, "ab", method=Greedy(), max_new_tokens=20).best.text
    stop = free[5:7]
    answer = client.completions.create(model="tiny", prompt="ab", temperature=0, max_tokens=20, stop=[stop], logprobs=0)
    choice = answer.choices[0]
    assert choice.text == free[: free.index(stop)] and choice.finish_reason == "stop"
    assert "".join(choice.logprobs.tokens) == choice.text


def test_chat_template_variables_system_prompts_and_continued_messages_reach_the_template(client, lm):
    messages = [{"role": "system", "content": "be"}, *MESSAGES, {"role": "assistant", "content": "gh"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=5,
                                            extra_body={"chat_template_kwargs": {"quiet": True}})  # fmt: skip
    alone = dts.decode(lm, messages, method=Greedy(), max_new_tokens=5, chat_template_kwargs={"quiet": True})
    assert answer.choices[0].message.content == alone.best.text
    assert answer.usage.prompt_tokens == len(lm.encode(messages, {"quiet": True}))


def test_a_length_that_is_not_given_is_what_the_context_leaves(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert answer.usage.total_tokens <= 256


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_gives_the_same_text_and_ends_with_usage(client, chat):
    given = {"model": "tiny", "seed": 2, "max_tokens": 7, "n": 2, "extra_body": {"reward": "many_a", "rollouts": 4}}
    create = client.chat.completions.create if chat else client.completions.create
    given |= {"messages": MESSAGES} if chat else {"prompt": "ab cd"}
    whole = create(**given)
    chunks = list(create(**given, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        pieces = [(part.delta.content if chat else part.text) or "" for part in parts]
        assert "".join(pieces) == (choice.message.content if chat else choice.text)
        assert len(pieces) > 2 and parts[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_stream_tells_the_best_so_far_in_comments_before_the_text(address):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 7, "seed": 2, "reward": "many_a", "rollouts": 5,
            "method": "best-of-n", "stream": True}  # fmt: skip
    lines = [line for line in httpx.post(f"{address}/v1/chat/completions", json=body).text.split("\n\n") if line]
    comments = [json.loads(line[2:]) for line in lines if line.startswith(": ")]
    assert [comment["rollout"] for comment in comments] == list(range(5))
    assert lines[4].startswith(": ") and lines[5].startswith("data: ") and lines[-1] == "data: [DONE]"
    rewards = [comment["reward"] for comment in comments]
    assert rewards == sorted(rewards)
    assert [many_a(comment["best_so_far"]) for comment in comments] == rewards


def test_models_are_listed_and_found_by_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").rewards == ["fails", "many_a"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_the_example_of_the_page_prints_texts_with_their_rewards(address, capsys):
    code = blocks("docs/doors.md")[0].replace("http://127.0.0.1:8000", address).replace('"friendly"', '"many_a"')
    run(code.replace("smollm2-135m", "tiny"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and float(lines[0].split()[0]) >= float(lines[1].split()[0]) and "rollouts" in lines[2]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": "polite"}, "reward='polite' is not known: many_a, fails"),
        ({"reward": "os:system"}, "is not known"),
        ({"method": "magic"}, "method=magic is not known"),
        ({"n": 99}, "n=99 is not allowed; give a whole number from 1 to 16"),
        ({"max_tokens": 5000}, "max_tokens=5000"),
        ({"max_tokens": 1000}, "exceeds the context"),
        ({"rollouts": 10_000}, "rollouts=10000"),
        ({"temperature": 0, "reward": "many_a"}, "temperature=0"),
        ({"tools": [{"type": "function"}]}, "tools="),
        ({"logit_bias": {"5": 1}}, "logit_bias="),
        ({"presence_penalty": 1}, "presence_penalty=1 is not supported"),
        ({"reward_file": "x.py"}, "'reward_file' is not an argument"),
        ({"power": 2, "method": "best-of-n"}, "power=2.0 has no effect"),
        ({"reward_scale": 8, "method": "best-of-n"}, "reward_scale=8.0 has no effect with method=best-of-n; leave it"),
        ({"reward_scale": 4, "method": "self-consistency"}, "reward_scale=4.0 has no effect"),
        ({"rollouts": 3, "method": "greedy"}, "rollouts=3 has no effect with method=greedy"),
        ({"power": 2}, "power=2.0 has no effect without a search"),
        ({"rollouts": 3}, "rollouts=3 has no effect without a search"),
        ({"method": "greedy", "order": "target"}, "order='target' has no effect"),
        ({"messages": [{"role": "user", "content": 5}]}, "content=5 is not allowed"),
        ({"messages": []}, "messages is empty"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template cannot be set"),
        ({"n": "2"}, "n: Input should be a valid integer"),
        ({"model": "other"}, "there is no model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(address, given, message):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **given}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert reply.status_code == (404 if "model" in given else 400)
    error = reply.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_arguments_that_say_nothing_are_taken(client):
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1, user="me", store=False,
                                   presence_penalty=0, response_format={"type": "text"}, tools=[])  # fmt: skip


def test_a_reward_that_fails_is_a_server_error_without_its_reason(client):
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="the reward failed") as caught:
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, stream=stream,
                                                extra_body={"reward": "fails"}))  # fmt: skip
        assert "secret" not in str(caught.value)


def test_a_reward_that_would_end_the_process_ends_its_request_alone(lm):
    def leaves(text):
        raise SystemExit("secret of the operator")

    body = {"model": "tiny", "prompt": "ab", "max_tokens": 1}
    with serving(lm, {"leaves": leaves}) as (address, _):
        gone = httpx.post(f"{address}/v1/completions", json={**body, "reward": "leaves"}, timeout=30)
        assert gone.status_code == 500 and "secret" not in gone.text
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=30).status_code == 200


def test_a_key_is_asked_for_and_a_large_body_is_refused(lm):
    with serving(lm, {}, limits=Limits(body_bytes=300), key="kéy") as (address, _):
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 1}
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": "kéy".encode()}):
            reply = httpx.post(f"{address}/v1/completions", json=body, headers=header)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer kéy".encode()}
        assert httpx.post(f"{address}/v1/completions", json=body, headers=right).status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 401
        large = {**body, "prompt": "a" * 400}
        assert httpx.post(f"{address}/v1/completions", json=large, headers=right).status_code == 413
        assert httpx.get(f"{address}/nowhere", headers=right).json()["error"]["message"] == "Not Found"
        assert httpx.get(f"{address}/v1/completions", headers=right).status_code == 405


def spoiled(rng):
    """A body that is broken in one of many ways, or a random mix of values that mostly makes no sense."""
    good = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    text = json.dumps(good).encode()
    values = [None, True, -1, 0, 1.5, 1e308, 10**30, "", "a", "\x00", [], [[]], {}, {"a": 1}, [1, "a"], "é" * 50]
    kind = rng.randrange(7)
    if kind == 0:
        return text[: rng.randrange(len(text))]
    if kind == 1:
        place = rng.randrange(len(text))
        return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    if kind == 2:
        return rng.choice([b"", b"null", b"[]", b"{}", b"NaN", b'"a"', b"[" * 20_000, b'{"a":' * 20_000, b"\xff\xfe",
                           b'{"model": "\\ud800", "messages": [], "n": 1}', b'{"model": 1e999}', b"1" * 5000,
                           b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'])  # fmt: skip
    names = ["messages", "model", "n", "seed", "stop", "temperature", "top_p", "max_tokens", "stream", "logprobs",
             "stream_options", "reward", "method", "rollouts", "reward_scale", "power", "order", "top_k", "tools",
             "chat_template_kwargs", "max_completion_tokens", "prompt", "response_format", "other"]  # fmt: skip
    changed = {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 4))}
    if kind == 3:
        changed = {"messages": [{"role": rng.choice(values), "content": rng.choice(values)}]}
    return json.dumps({**good, **changed}).encode()


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.minutes)])
def test_malformed_requests_give_no_server_error(address, caplog, count):
    rng, statuses = random.Random(0), {}
    with httpx.Client(base_url=address, headers={"Content-Type": "application/json"}) as plain:
        for number in range(count):
            path = "/v1/completions" if number % 2 else "/v1/chat/completions"
            reply = plain.post(path, content=spoiled(rng))
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            if reply.status_code != 200:
                assert reply.json()["error"]["message"] and "Traceback" not in reply.text
    assert set(statuses) <= {200, 400, 404} and statuses[400] > 0.6 * count
    assert not [record for record in caplog.records if record.exc_info]


# -- load --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [24, pytest.param(100, marks=pytest.mark.minutes)])
def test_requests_eight_at_once_answer_as_they_do_alone_and_nothing_is_kept(client, count):
    def asked(number):
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"{'ab cd ef'[: 1 + number % 7]}"}], seed=number,
            max_tokens=4 + number % 3, extra_body={"reward": "many_a", "rollouts": 4},
        ).choices[0].message.content  # fmt: skip

    def trees():
        gc.collect()
        return sum(type(thing) is Tree for thing in gc.get_objects())

    before = trees()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(asked, range(count)))
    assert together[::9] == [asked(number) for number in range(0, count, 9)]
    assert len(set(together)) > count / 2
    assert trees() <= before + 1


def submitted(worker):
    """A queue of the jobs that the worker is given from here on."""
    jobs, submit = queue.Queue(), worker.submit

    def noted(job):
        submit(job)
        jobs.put(job)

    worker.submit = noted
    return jobs


def test_more_waiting_requests_than_allowed_get_429(lm):
    gate = Gate()
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, "reward": "gate", "method": "best-of-n", "rollouts": 1}
    with (
        serving(lm, {"gate": gate}, limits=Limits(waiting=1, seconds=600)) as (address, worker),
        ThreadPoolExecutor() as pool,
    ):

        def post():
            return httpx.post(f"{address}/v1/completions", json=body, timeout=60)

        jobs = submitted(worker)
        first = pool.submit(post)
        assert gate.reached.wait(60)
        second = pool.submit(post)
        jobs.get(timeout=60), jobs.get(timeout=60)  # one is under way, one waits
        third = post()
        gate.open.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert third.status_code == 429 and third.json()["error"]["code"] == "too_many_requests"
    assert third.headers["Retry-After"] == "1"


def test_the_time_limit_ends_a_search_with_what_it_has_or_says_that_there_is_nothing(lm):
    with serving(lm, {"many_a": many_a}, limits=Limits(seconds=1e-9)) as (address, _):
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, "reward": "many_a"}
        reply = httpx.post(f"{address}/v1/completions", json=body)
        assert reply.status_code == 503 and "time limit" in reply.json()["error"]["message"]


def test_a_completion_without_a_length_keeps_to_a_lower_limit(lm):
    body = parsed(CompletionBody, b'{"model": "tiny", "prompt": "ab"}')
    assert asked_for(body, {}, Limits()).new_tokens == 16
    assert asked_for(body, {}, Limits(new_tokens=5)).new_tokens == 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_search(lm, stream):
    gate = Gate()
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "reward": "gate", "rollouts": 10_000,
            "method": "best-of-n", "stream": stream}  # fmt: skip
    with serving(lm, {"gate": gate}, limits=Limits(rollouts=10_000, seconds=600)) as (address, worker):
        jobs = submitted(worker)
        with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
            connection.sendall(post_of(body))
            assert gate.reached.wait(60)
            job = jobs.get(timeout=60)
            assert not job.stopped.is_set()
        assert job.stopped.wait(60)
        gate.open.set()
        assert job.ended.wait(60)
    assert gate.texts < 10_000


def post_of(body):
    """A request as bytes, for clients that hang up."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_hung_up_leaves_the_queue_at_once(lm, stream):
    gate = Gate()
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, "reward": "gate", "method": "best-of-n", "rollouts": 1}
    with (
        serving(lm, {"gate": gate}, limits=Limits(waiting=1, seconds=600)) as (address, worker),
        ThreadPoolExecutor() as pool,
    ):
        jobs = submitted(worker)
        first = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=60)
        assert gate.reached.wait(60)
        jobs.get(timeout=60)
        with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
            connection.sendall(post_of({**body, "stream": stream}))
            waits = jobs.get(timeout=60)
        assert waits.ended.wait(60)  # the model is still busy
        second = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=60)
        assert jobs.get(timeout=60) is not waits  # there is a place in the queue
        gate.open.set()
        assert first.result().status_code == second.result().status_code == 200
    assert gate.texts == 2  # none for the client that left


class Telling:
    """A worker that tells of a rollout as soon as it has a job."""

    def __init__(self, lm):
        self.lm, self.jobs = lm, []

    def submit(self, job):
        self.jobs.append(job)
        job.tell(Rollout(0, 1.0, 1.0, 3, 0.1, 3, 2, 0, 2, "text"))

    def stop(self, job):
        job.stopped.set()


def test_a_stream_whose_client_is_gone_before_the_first_event_is_sent_stops_its_search(lm):
    worker = Telling(lm)
    app = build_app(Service(worker, "tiny"))
    body = json.dumps({"model": "tiny", "prompt": "ab", "stream": True}).encode()
    told = iter([{"type": "http.request", "body": body}, None])

    async def receive():  # hangs up between the first rollout and the first event
        if (message := next(told, {"type": "http.disconnect"})) is None:
            await asyncio.Event().wait()
        return message

    async def send(message):  # into a connection that takes nothing at the moment
        await asyncio.Event().wait()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "query_string": b"",
        "path": "/v1/completions", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert worker.jobs[0].stopped.is_set()


# -- one batch ---------------------------------------------------------------------------------------------------------


def told_by(worker, body, rewards):
    """Submits a request; returns where its results are put."""
    told = queue.Queue()
    asked = asked_for(parsed(CompletionBody, json.dumps({"model": "tiny", **body}).encode()), rewards, Limits())
    worker.submit(Job(asked, math.inf, lambda what: told.put(what) if not isinstance(what, Rollout) else None))
    return told


def test_requests_that_wait_join_one_batch_and_get_what_they_get_alone(lm):
    gate, together = Gate(), []
    worker = Worker(lm, waiting=9, new_tokens=40, together=3)

    def many_b(text):
        together.append(len(worker._under_way))
        return float(text.count("b"))

    bodies = [
        {"prompt": "ab", "seed": 1, "max_tokens": 12, "reward": "many_b", "rollouts": 8},
        {"prompt": "cd ef", "seed": 2, "max_tokens": 5, "temperature": 0.7, "n": 3},
        {"prompt": "ab c", "seed": 3, "max_tokens": 9, "reward": "many_b", "method": "best-of-n", "stop": ["e"]},
        {"prompt": ["gh", "ab"], "seed": 4, "max_tokens": 7, "top_k": 3, "reward": "many_b", "method": "mcts"},
        {"prompt": "xyz", "temperature": 0, "max_tokens": 30},
        {"prompt": "ab", "seed": 6, "max_tokens": 8, "method": "particle-filter", "reward": "many_b"},
    ]
    rewards = {"gate": gate, "many_b": many_b}
    first = told_by(worker, {"prompt": "ab", "max_tokens": 2, "reward": "gate", "rollouts": 1}, rewards)
    assert gate.reached.wait(60)
    waiting = [told_by(worker, body, rewards) for body in bodies]
    gate.open.set()
    assert isinstance(first.get(timeout=60), list)
    found = [told.get(timeout=60) for told in waiting]
    worker.close()
    assert max(together) == 3  # the limit
    for body, results in zip(bodies, found, strict=True):
        asked = asked_for(parsed(CompletionBody, json.dumps({"model": "tiny", **body}).encode()), rewards, Limits())
        for index, (prompt, result) in enumerate(zip(asked.prompts, results, strict=True)):
            alone = dts.decode(lm, prompt, method=asked.method, reward=asked.reward, seed=asked.seed + index,
                               max_new_tokens=asked.new_tokens, **asked.decoding)  # fmt: skip
            assert [one.token_ids for one in result.completions] == [one.token_ids for one in alone.completions]
            assert [rollout.text for rollout in result.rollouts] == [rollout.text for rollout in alone.rollouts]
            for one, other in zip(result.completions, alone.completions, strict=True):
                assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)


def test_one_at_a_time_gives_the_same_to_the_last_bit(lm):
    gate, worker = Gate(), Worker(lm, waiting=9, new_tokens=40, together=1)
    first = told_by(worker, {"prompt": "abc", "max_tokens": 2, "reward": "gate", "rollouts": 1}, {"gate": gate})
    assert gate.reached.wait(60)
    others = [told_by(worker, {"prompt": "abc de", "seed": 3, "n": 3, "max_tokens": 9}, {}) for _ in range(2)]
    gate.open.set()
    assert isinstance(first.get(timeout=60), list)
    alone = dts.decode(lm, "abc de", method=Sampling(3), seed=3, max_new_tokens=9)
    for told in others:
        (result,) = told.get(timeout=60)
        assert result.completions == alone.completions and not result.usage.cached_tokens
    worker.close()


class Own(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, Own])
def test_a_request_that_fails_in_a_batch_ends_alone(lm, error):
    def fails(text):
        raise error("secret of the operator")

    gate, worker = Gate(), Worker(lm, waiting=9, new_tokens=40)
    rewards = {"gate": gate, "many_a": many_a, "fails": fails}
    first = told_by(worker, {"prompt": "ab", "max_tokens": 2, "reward": "gate", "rollouts": 1}, rewards)
    assert gate.reached.wait(60)
    waiting = [
        told_by(worker, {"prompt": ["ab", "cd", "ef"], "max_tokens": 3, "reward": "fails"}, rewards),
        told_by(worker, {"prompt": "a" * 300, "max_tokens": 3}, rewards),
        told_by(worker, {"prompt": "ab", "max_tokens": 9, "reward": "many_a", "rollouts": 4}, rewards),
    ]
    gate.open.set()
    failed, long, good = (told.get(timeout=60) for told in waiting)
    assert isinstance(failed, dts.RewardError) and "decode_many" not in str(failed)
    assert error.__name__ in str(failed)
    assert isinstance(long, dts.UsageError) and str(long).startswith("prompt of 300 tokens")
    assert isinstance(good, list) and isinstance(first.get(timeout=60), list)
    assert isinstance(told_by(worker, {"prompt": "ab", "max_tokens": 2}, rewards).get(timeout=60), list)
    worker.close()
    assert all(told.empty() for told in waiting)  # each was told once


@pytest.mark.parametrize("called", ["start", "extend", "earned", "upper", "promise", "finish"])
def test_whatever_a_reward_object_does_not_survive_is_an_error_of_its_request(lm, called):
    def leave(*_):
        raise SystemExit

    reward = type("Leaving", (dts.Reward,), {"name": "leaving", "monotone": True, called: leave})()
    worker = Worker(lm, waiting=9, new_tokens=4)
    told = told_by(worker, {"prompt": "ab", "max_tokens": 3, "reward": "leaving"}, {"leaving": reward})
    failed = told.get(timeout=60)
    worker.close()
    assert isinstance(failed, dts.RewardError) and str(failed) == "reward 'leaving' raised SystemExit: "


def test_a_reward_that_takes_too_long_holds_up_the_others_once(lm):
    gate, worker = Gate(), Worker(lm, waiting=9, new_tokens=40, reward_seconds=0.05)
    slow = told_by(worker, {"prompt": "ab", "max_tokens": 6, "reward": "gate"}, {"gate": gate})
    other = told_by(worker, {"prompt": "ab", "max_tokens": 6}, {})
    failed = slow.get(timeout=60)
    assert isinstance(failed, dts.RewardError) and "took longer than" in str(failed)
    assert gate.texts == 1  # it was not asked again
    assert isinstance(other.get(timeout=60), list)
    gate.open.set()
    worker.close()


def test_a_server_that_closes_stops_its_search_and_tells_those_that_wait(lm):
    gate = Gate()
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "reward": "gate", "rollouts": 64, "method": "best-of-n"}
    asked, told = asked_for(parsed(CompletionBody, json.dumps(body).encode()), {"gate": gate}, Limits()), queue.Queue()
    worker = Worker(lm, waiting=4, new_tokens=30)
    for _ in range(2):
        worker.submit(Job(asked, math.inf, lambda what: told.put(what) if not isinstance(what, Rollout) else None))
    assert gate.reached.wait(60)
    gate.open.set()
    worker.close()
    ends = [told.get(timeout=60) for _ in range(2)]
    assert all(isinstance(end, (list, Stopped, dts.UnavailableError)) for end in ends)
    assert not worker._thread.is_alive()


# -- the command -------------------------------------------------------------------------------------------------------


def test_rewards_are_the_public_functions_of_the_file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "from os import system\nimport dts\nfrom dts import Reward\n_hidden = len\n"
        "def polite(text):\n    return 1.0\ndef _private(text):\n    return 0.0\n"
        "both = dts.clip(dts.as_reward(polite), 0.0, 2.0)\n"
    )
    assert set(rewards_of(path)) == {"polite", "both"}
    path.write_text("from os import system\n")
    with pytest.raises(dts.UsageError, match="defines no public function"):
        rewards_of(path)
    path.write_text("1 / 0")
    with pytest.raises(dts.UsageError, match="ZeroDivisionError"):
        rewards_of(path)


def test_options_become_limits_and_bad_ones_are_refused():
    assert limits_of(build_parser().parse_args([])) == Limits()
    with pytest.raises(dts.UsageError, match="the limit of seconds is 0"):
        limits_of(build_parser().parse_args(["--max-seconds", "0"]))
    with pytest.raises(dts.UsageError, match="--port=70000"):
        service_of(build_parser().parse_args(["--port", "70000", "--model", "nowhere"]))
    with pytest.raises(dts.UsageError, match="reward timeout inf is not allowed"):
        service_of(build_parser().parse_args(["--reward-timeout", "inf", "--model", "nowhere"]))


def test_a_page_that_points_its_name_at_this_machine_is_refused(address):
    wanted = {
        "evil.example": 403,
        "[::1": 403,
        "evil_1.example": 403,
        "127.0.0.1.evil.example:80": 403,
        "LOCALHOST:1": 200,
        "[::1]:1": 200,
    }
    for host, status in wanted.items():
        assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status
    assert hosts_of("0.0.0.0") is None and "127.0.0.2" in hosts_of("127.0.0.2")


def test_a_key_is_optional_and_a_server_without_one_beyond_this_machine_is_warned_of(caplog):
    assert key_from(" a ", "0.0.0.0") == "a" and not caplog.records
    assert key_from(None, "127.0.0.1") is None and key_from(None, "::1") is None and not caplog.records
    assert key_from(None, "0.0.0.0") is None and "everyone who reaches 0.0.0.0" in caplog.text
    with pytest.raises(dts.UsageError, match="DTS_SERVE_KEY is empty"):
        key_from(" ", "127.0.0.1")


def test_tokens_of_a_text_join_to_it(tiny_lm):
    for seed in range(5):
        for one in dts.decode(tiny_lm, "a", method=BestOfN(4), max_new_tokens=30, seed=seed, stop=["e"]).completions:
            assert "".join(token.text for token in tokens_of(one, tiny_lm.decode)) == one.text
