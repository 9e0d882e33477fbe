"""The six parts: known values, bounds, and how TRL and a search see them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dts
from dts.training import engagement as engagement_module
from dts.training import heuristic_reward as hr
from dts.training.data import Row, read_rows

pytest.importorskip("vaderSentiment")

POST = "The council will close the old bridge over the river for repairs until spring"
SAMPLE = [POST, "I hope the bridge opens again before spring, we need it!", "😡😡 !!!!! ????", "", "ok"]


def row(reply: str, engagement: float | None, group: str = "g") -> Row:
    return Row([{"role": "user", "content": POST}], reply, engagement, group, "x:1")


def liked_rows() -> list[Row]:
    """Replies with the word 'bridge' are liked, others are not."""
    return [row(f"the bridge matters number {i}", 3.0) for i in range(15)] + [
        row(f"nothing to say number {i}", 0.0) for i in range(15)
    ]


@pytest.mark.parametrize(("words", "value"), [(0, 0), (2, 0), (5, 0.5), (8, 1), (40, 1), (60, 0.5), (80, 0), (200, 0)])
def test_length_is_a_trapezoid(words, value):
    assert hr.length([POST], ["w " * words]) == [pytest.approx(value)]


def test_sentiment_is_vaders():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["I love this", "the bridge is closed", "this is horrible and sad"]
    found = hr.sentiment([""] * 3, texts)
    expected = [(1 + SentimentIntensityAnalyzer().polarity_scores(text)["compound"]) / 2 for text in texts]
    assert found == expected
    assert found[0] > found[1] == 0.5 > found[2]


def test_diversity_is_the_mean_distance_to_the_others_of_the_prompt():
    replies = ["a b", "a b", "c d", "a b"]
    # The first three answer p: distances 0 and 1 for each "a b", 1 and 1 for "c d". The last stands alone.
    assert hr.diversity(["p", "p", "p", "q"], replies) == [0.5, 0.5, 1.0, hr.NEUTRAL]


def test_punctuation_likes_plain_text():
    plain, loud, marks, tags, none = hr.punctuation(
        [""] * 5, ["A plain remark, nothing more.", "A PLAIN REMARK, NOTHING MORE.", "so?!?! what!!! now... why??",
                   "#a #b @c http://d words", "?!"])  # fmt: skip
    assert plain == 1.0
    assert loud == pytest.approx(0.75)
    assert max(marks, tags) < 0.9
    assert none == 0.0


@pytest.mark.parametrize("rows", [(), tuple(liked_rows())], ids=["unfitted", "fitted"])
def test_relevance_prefers_the_topic_and_gives_copies_nothing(rows):
    relevance = hr.Relevance(rows)
    on, off, copy = relevance([POST] * 3, ["I will miss the old bridge", "my cat sleeps all day", POST])
    assert on > off >= 0
    assert copy == 0.0


def test_relevance_is_a_tfidf_cosine():
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = liked_rows()
    vectors = TfidfVectorizer(sublinear_tf=True).fit([t for r in rows for t in (POST, r.response)])
    left, right = vectors.transform([POST, "bridge over water"]).toarray()
    assert hr.Relevance(rows)([POST], ["bridge over water"]) == [pytest.approx(float(left @ right))]


def test_fitted_engagement_learns_and_the_proxy_is_called_one():
    fitted, plain = hr.heuristic_reward(liked_rows()), hr.heuristic_reward()
    assert set(fitted.scorers) == set(hr.PARTS)
    assert "engagement" not in plain.scorers
    assert "engagement_proxy" in plain.scorers
    liked, ignored = fitted.parts([POST] * 2, ["the bridge matters", "nothing to say"])["engagement"]
    assert liked > 0.5 > ignored
    assert hr.engagement_proxy([""] * 2, ["ok", "Why do you think my bridge is old?"]) == [0.0, 1.0]


def test_engagement_is_relative_to_the_group():
    rows = [row("same words", 9.0, "loved"), row("same words", 7.0, "loved"), row("same words", 1.0, "ignored")]
    assert engagement_module.above_group_mean(rows).tolist() == [1.0, -1.0, 0.0]


def test_engagement_model_survives_saving(tmp_path):
    model = engagement_module.fit_engagement(liked_rows())
    model.save(tmp_path)
    again = engagement_module.load_engagement(tmp_path)
    assert np.allclose(again.predict(SAMPLE), model.predict(SAMPLE), atol=0)
    assert again.score(SAMPLE) == model.score(SAMPLE)
    (tmp_path / engagement_module.FILE).write_text("{}")
    with pytest.raises(dts.UsageError, match="cannot be read"):
        engagement_module.load_engagement(tmp_path)


def test_too_few_rows_cannot_be_fitted():
    with pytest.raises(dts.UsageError, match="at least 20 rows"):
        engagement_module.fit_engagement([row("a", 1.0)] * 30)  # engagement never differs
    assert "engagement_proxy" in hr.heuristic_reward([row("a", 1.0), row("b", 2.0)]).scorers


def test_reward_is_the_weighted_mean_of_its_parts():
    reward = hr.heuristic_reward(liked_rows())
    parts = reward.parts([POST] * 5, SAMPLE)
    expected = [sum(hr.WEIGHTS[name] * parts[name][i] for name in hr.PARTS) for i in range(5)]
    assert sum(hr.WEIGHTS.values()) == pytest.approx(1)
    assert reward([POST] * 5, SAMPLE) == pytest.approx(expected)
    only = hr.heuristic_reward(weights={**dict.fromkeys(hr.PARTS, 0.0), "length": 2.0})
    assert only([POST] * 5, SAMPLE) == parts["length"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), max_size=4))
def test_every_part_of_any_text_lies_in_the_unit_interval(pairs):
    prompts, replies = [p for p, _ in pairs], [r for _, r in pairs]
    for name, values in hr.heuristic_reward().parts(prompts, replies).items():
        assert len(values) == len(pairs)
        assert all(0 <= value <= 1 for value in values), name


def test_trl_form_with_chat_messages_logs_every_part():
    reward, logged = hr.heuristic_reward(liked_rows()), {}
    chats = [[{"role": "assistant", "content": text}] for text in SAMPLE]
    prompts = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": POST}]] * 5
    found = reward(prompts=prompts, completions=chats, completion_ids=[[1]] * 5, likes=[0] * 5,
                   log_metric=logged.__setitem__)  # fmt: skip
    assert found == reward([POST] * 5, SAMPLE)
    assert logged == {f"reward_parts/{name}": pytest.approx(np.mean(values))
                      for name, values in reward.parts([POST] * 5, SAMPLE).items()}  # fmt: skip
    assert reward.__name__ == "heuristic"
    assert reward.part("length").__name__ == "length"
    assert reward.part("length")([POST], ["w " * 5]) == [pytest.approx(0.5)]
    with pytest.raises(dts.UsageError, match="unknown"):
        reward.part("charm")


def test_search_form_does_not_depend_on_company(tiny_lm):
    from dts.search import BestOfN

    reward = hr.heuristic_reward().for_search()
    assert "diversity" not in reward.scorers
    alone = [reward([POST], [text])[0] for text in SAMPLE]
    assert reward([POST] * 5, SAMPLE) == pytest.approx(alone)
    assert dts.as_reward(reward).name == "heuristic"
    result = dts.decode(tiny_lm, POST, reward=reward, method=BestOfN(3), max_new_tokens=6)
    assert [c.reward for c in result.completions] == pytest.approx(
        [reward([POST], [c.text])[0] for c in result.completions]
    )


@pytest.mark.parametrize("weights", [{"charm": 1.0}, {"length": -1.0}, dict.fromkeys(hr.PARTS, 0.0)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(dts.UsageError, match="weights"):
        hr.heuristic_reward(weights=weights)


def test_fifty_real_replies(shared_data):
    rows = read_rows(shared_data / "tweet_replies.jsonl.gz")[:50]
    reward = hr.heuristic_reward(rows)
    values = reward([r.prompt for r in rows], [r.response for r in rows])
    assert json.dumps(values)
    assert 0.2 < min(values) < max(values) < 0.9
    assert len(set(values)) > 45


def test_the_documents_code_runs():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "heuristic_reward" in code]
    names: dict = {}
    exec(compile(code, "docs", "exec"), names)  # our own page
    question, bare = names["reward"]([names["post"]] * 2, ["How long will the repairs take, do you know?", "ok"])
    assert question > bare
