"""A judge at an endpoint: what it is asked, what its answers are worth, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import logging
import threading

import pytest
from endpoint import Reply, Stub, says

import dts
from dts.errors import RewardError, UsageError
from dts.rewards import Context, Finished
from dts.rewards.judge import PAIRWISE, SCALAR, parse_score, parse_winner
from dts.search import BestOfN

KEY = "sk-very-secret-123"


@pytest.fixture
def stub():
    made: list[Stub] = []

    def make(answer):
        made.append(Stub(answer))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


class Clock:
    """Time that passes while someone sleeps."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def judge(server, **options):
    clock = Clock()
    reward = dts.JudgeReward(server.url, "gpt-x", clock=clock, sleep=clock.sleep, **{"workers": 1, **options})
    return reward, clock


def asked(reward, *texts, prompt="Hi?"):
    state = reward.start(Context(prompt, (1, 2), lambda ids: f"ids {list(ids)}"))
    return reward.finish([state] * len(texts), [Finished((), text) for text in texts])


def length_score(question, number):
    return says(json.dumps({"score": min(len(question["reply"]), 10)}))


# What is asked, and what it is worth ----------------------------------------------------------------------------------


def test_a_score_is_asked_for_at_temperature_0(stub, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = stub(length_score)
    reward, _ = judge(server, key_env="JUDGE_KEY")
    assert asked(reward, "abc", "abcdefg", "abc") == [0.3, 0.7, 0.3]
    assert reward.calls == len(server.requests) == 2  # equal texts are one question
    assert reward.tokens == 14
    first = server.requests[0]
    assert first["path"] == "/v1/chat/completions" and first["headers"]["Authorization"] == f"Bearer {KEY}"
    assert first["body"]["temperature"] == 0 and first["body"]["model"] == "gpt-x"
    system, user = first["body"]["messages"]
    assert system == {"role": "system", "content": SCALAR}
    assert json.loads(user["content"]) == {"message": "Hi?", "reply": "abc"}
    assert reward.earned([None]) == [0.0] and reward.upper([None]) == [1.0]


def test_prompts_are_shown_as_they_are(stub):
    server = stub(length_score)
    reward, _ = judge(server, instruction="Rate.")
    messages = [{"role": "user", "content": "Hi?"}]
    asked(reward, "a", prompt=messages)
    asked(reward, "a", prompt=[1, 2])
    shown = [json.loads(request["body"]["messages"][1]["content"])["message"] for request in server.requests]
    assert shown == [messages, "ids [1, 2]"]
    assert server.requests[0]["body"]["messages"][0]["content"] == "Rate."
    assert "Authorization" not in server.requests[0]["headers"]


def test_a_pair_is_compared_in_both_orders(stub):
    def prefers(question, number):
        one, two = len(question["reply 1"]), len(question["reply 2"])
        return says(json.dumps({"winner": "1" if one > two else "2" if two > one else "tie"}))

    server = stub(prefers)
    reward, _ = judge(server, against=lambda prompt: prompt + "!")
    assert asked(reward, "longer", "a", "four", "Hi?!") == [1.0, 0.0, 0.5, 0.5]
    assert reward.calls == 6  # the other reply itself needs no question
    assert server.requests[0]["body"]["messages"][0]["content"] == PAIRWISE
    first_always, _ = judge(stub(lambda question, number: says('{"winner": "1"}')), against="other")
    assert asked(first_always, "text") == [0.5]  # a preference for a position is none for a text


def test_the_other_reply_is_asked_for_once_for_each_search_and_in_the_thread_of_the_search(stub):
    asked_in = []

    def other(prompt):
        asked_in.append(threading.current_thread())
        return prompt + "!"

    reward, _ = judge(stub(lambda question, number: says('{"winner": "tie"}')), against=other, workers=3)
    states = [reward.start(Context("Hi?", (1,), str))] * 3
    for texts in ("a", "b", "c"), ("d", "e", "f"):
        assert reward.finish(states, [Finished((), text) for text in texts]) == [0.5] * 3
    assert asked_in == [threading.current_thread()]


def test_a_search_takes_it_as_reward(stub, tiny_lm):
    server = stub(length_score)
    reward, _ = judge(server, workers=3)
    result = dts.decode(tiny_lm, "Once", reward=reward, method=BestOfN(4), max_new_tokens=5)
    assert {one.reward for one in result.completions} == {min(len(one.text), 10) / 10 for one in result.completions}
    assert reward.calls == len({one.text for one in result.completions})


@pytest.mark.parametrize(
    "answer",
    ["", "7", "good", '{"score": 11}', '{"score": -1}', '{"score": "7"}', '{"score": true}', '{"score": NaN}',
     '{"score": 7, "why": "x"}', '{"score": 1, "score": 9}', '[["score", 7]]', '{"score": {"score": 7}}', "{}",
     'Sure: {"score": 7}', '{"winner": "1"}', "[" * 100_000],
)  # fmt: skip
def test_only_the_json_asked_for_is_a_score(answer):
    with pytest.raises(ValueError):
        parse_score(answer)


def test_scores_and_winners_are_read():
    assert [parse_score(f' {{"score": {n}}} ') for n in (0, 10, 7.5)] == [0.0, 1.0, 0.75]
    assert [parse_winner(f'{{"winner": "{w}"}}') for w in ("1", "2", "tie")] == [1.0, 0.0, 0.5]
    for answer in ('{"winner": 1}', '{"winner": "3"}', '{"winner": ["1"]}', '{"score": 3}'):
        with pytest.raises(ValueError):
            parse_winner(answer)


def test_an_answer_that_cannot_be_read_is_an_error_and_not_kept(stub, tmp_path):
    server = stub(lambda question, number: says("Eight of ten." if number == 0 else '{"score": 8}'))
    reward, _ = judge(server, cache=tmp_path / "answers.db")
    with pytest.raises(
        RewardError, match=r"reward 'judge': the judge 'gpt-x' answered 'Eight of ten.', which is no JSON"
    ):
        asked(reward, "text")
    assert asked(reward, "text") == [0.8]


# Cache, budget, rate --------------------------------------------------------------------------------------------------


def test_answers_are_kept_on_disk(stub, tmp_path):
    server = stub(length_score)
    path = tmp_path / "deep" / "answers.db"
    first, _ = judge(server, cache=path)
    again, _ = judge(server, cache=path)  # two processes may hold it open
    assert asked(first, "abc", "a") == asked(again, "abc", "a") == [0.3, 0.1]
    assert (first.calls, again.calls, len(server.requests)) == (2, 0, 2)
    other, _ = judge(server, cache=path, instruction="Another question.")
    asked(other, "abc")
    assert other.calls == 1
    assert KEY.encode() not in path.read_bytes()


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "text.db").write_text("no database at all, but long enough to look like one" * 10)
    with pytest.raises(UsageError, match="cannot be used as a file of answers"):
        dts.JudgeReward("http://127.0.0.1:1/v1", "m", cache=tmp_path / "text.db")


def test_no_more_requests_are_sent_than_allowed(stub):
    server = stub(lambda question, number: Reply(status=503) if number == 0 else length_score(question, number))
    reward, _ = judge(server, max_calls=3)
    assert asked(reward, "a", "ab") == [0.1, 0.2]
    assert asked(reward, "a") == [0.1]  # known
    with pytest.raises(RewardError, match="max_calls=3 requests have been sent; raise max_calls"):
        asked(reward, "abc")
    assert len(server.requests) == reward.calls == 3


def test_requests_keep_their_distance(stub):
    reward, clock = judge(stub(length_score), per_minute=30)
    asked(reward, "a", "b", "c")
    assert clock.slept == [2.0, 2.0]
    clock.now += 60
    asked(reward, "d")
    assert clock.slept == [2.0, 2.0]  # none is due after a pause


def test_the_rate_holds_for_requests_under_way_together(stub):
    everyone = threading.Barrier(3)  # passes only where three requests are at the endpoint at once

    def answer(question, number):
        everyone.wait(30)
        return length_score(question, number)

    reward, _ = judge(stub(answer), workers=3)
    assert asked(reward, "a", "ab", "abc") == [0.1, 0.2, 0.3]


# Faults ---------------------------------------------------------------------------------------------------------------


def hanging(released):
    return Reply(b"{}", hang=released)


@pytest.mark.parametrize("fault", ["429", "500", "529", "cut body", "hang up"])
def test_failures_that_pass_are_tried_again_after_longer_and_longer_waits(stub, fault):
    replies = {"429": Reply(status=429), "500": Reply(status=500), "529": Reply(status=529),
               "cut body": Reply(b'{"choices": [', cut=50), "hang up": Reply(b"", cut=9)}  # fmt: skip
    server = stub(lambda question, number: replies[fault] if number < 3 else says('{"score": 5}'))
    reward, clock = judge(server)
    assert asked(reward, "text") == [0.5]
    assert clock.slept == [1.0, 2.0, 4.0] and reward.calls == 4


def test_an_endpoint_that_hangs_is_asked_again(stub):
    released = threading.Event()
    server = stub(lambda question, number: hanging(released) if number == 0 else says('{"score": 5}'))
    reward, clock = judge(server, timeout=0.2)
    try:
        assert asked(reward, "text") == [0.5]
    finally:
        released.set()
    assert clock.slept == [1.0]


def test_it_waits_as_long_as_the_endpoint_asks(stub):
    headers = [{"Retry-After": "17"}, {"Retry-After": "1e9"}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"},
               {"Retry-After": "nan"}, {"Retry-After": "-5"}]  # fmt: skip
    server = stub(lambda question, number: Reply(status=429, headers=headers[number]) if number < 5
                  else says('{"score": 5}'))  # fmt: skip
    reward, clock = judge(server)
    assert asked(reward, "text") == [0.5]
    assert clock.slept == [17.0, 60.0, 4.0, 8.0, 16.0]


def test_after_the_last_try_the_failure_is_an_error(stub):
    server = stub(lambda question, number: Reply(status=500))
    reward, clock = judge(server, retries=2)
    with pytest.raises(RewardError, match=r"judge at 127.0.0.1:\d+ answered with status 500, 3 times; check url"):
        asked(reward, "text")
    assert clock.slept == [1.0, 2.0]
    nobody = dts.JudgeReward("http://127.0.0.1:1/v1", "m", retries=0)
    with pytest.raises(RewardError, match=r"could not be reached \(ConnectionRefusedError\), 1 times"):
        asked(nobody, "text")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(b"<html>"), "answered with something else than JSON"),
        (Reply(b'{"choices": []}'), r"gave JSON without choices\[0\].message.content"),
        (Reply(b"[]"), "gave JSON without"),
        (Reply(b'{"choices": [{"message": {"content": null}}]}'), "gave JSON without"),
        (Reply(b'{"error": "model not found"}', status=404), "answered with status 404"),
        (Reply(b"{}", status=401), "answered with status 401"),
        (Reply(status=302, headers={"Location": "/elsewhere"}), "answered with status 302"),
    ],
)
def test_other_failures_are_errors_at_once(stub, reply, message):
    server = stub(lambda question, number: reply)
    reward, clock = judge(server)
    with pytest.raises(RewardError, match=message):
        asked(reward, "text")
    assert clock.slept == [] and len(server.requests) == 1


def test_an_endpoint_that_counts_no_tokens_is_fine(stub):
    for usage in (b"", b', "usage": null', b', "usage": {"total_tokens": "x"}', b', "usage": []'):
        body = b'{"choices": [{"message": {"content": "{\\"score\\": 5}"}}]' + usage + b"}"
        reward, _ = judge(stub(lambda question, number, body=body: Reply(body)))
        assert asked(reward, "text") == [0.5] and reward.tokens == 0


def test_loopback_goes_through_no_proxy(stub, monkeypatch):
    proxy = stub(lambda question, number: Reply(status=502))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    reward, _ = judge(stub(length_score), retries=0)
    assert asked(reward, "a") == [0.1] and proxy.requests == []


def test_the_key_is_in_no_message_and_no_log(stub, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    server = stub(lambda question, number: Reply(f'{{"error": "bad key {KEY}"}}'.encode(), status=401))
    reward, _ = judge(server)
    for key in (KEY, KEY + "\n", KEY + "\u20ac"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(RewardError) as caught:
            asked(reward, "text")
        error: BaseException | None = caught.value
        while error is not None:
            assert KEY not in str(error) and (
                error.__suppress_context__ or error.__context__ is None or error.__cause__
            )
            error = error.__cause__
    assert KEY not in caplog.text and KEY not in repr(reward) + repr(vars(reward))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "url is no plain"),
        ({"url": "https://me:secret@host/v1"}, "url is no plain"),
        ({"url": "https://host/v1?key=secret"}, "url is no plain"),
        ({"url": "https://:secret@host/v1"}, "url is no plain"),
        ({"url": "https://host:secret/v1"}, "url is no plain"),
        ({"url": "https://[secret/v1"}, "url is no plain"),
        ({"retries": -1}, "retries=-1 is not allowed"),
        ({"timeout": 0}, "timeout=0 is not allowed"),
        ({"workers": 0}, "workers=0 is not allowed"),
        ({"max_calls": 0}, "max_calls=0 is not allowed"),
        ({"per_minute": 0}, "per_minute=0 is not allowed"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        dts.JudgeReward(**{"url": "https://host/v1", "model": "m", **options})
    assert "secret" not in str(caught.value)
