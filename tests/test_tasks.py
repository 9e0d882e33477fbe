"""Tasks: prompts and rewards that cannot see the answer, fair scores, training rows that hold no test data."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
from families import ByteTokenizer, random_model
from task_data import CLASSES, SHARED, write_har, write_m4, write_weather

import dts
from dts.errors import UsageError
from dts.evaluation.data import load_series, load_weather, read_har_npz
from dts.evaluation.measures import metrics
from dts.evaluation.rewards import ClaimReward
from dts.evaluation.studies.forecast_reward import candidates, correlation
from dts.evaluation.tasks import TASKS, Example, load_task, oracle
from dts.evaluation.tasks.captions import facts, weather_facts
from dts.evaluation.tasks.digits import Digits, digits_alone
from dts.evaluation.tasks.registry import read_task_file
from dts.evaluation.tasks.sft import main, sft_rows
from dts.evaluation.tasks.task_file import choose
from dts.models.huggingface import HFModel
from dts.rewards import Context, Finished
from dts.search import MaxEnt

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
OTHERS = {"instructions", "humaneval", "coding", "json"}  # tests/test_instructions.py, tests/test_package_tasks.py
OLDER = [name for name in TASKS if name not in OTHERS and not name.startswith("reasoning")]
WRITERS = {"har": write_har, "har-zero": write_har, "weather-caption": write_weather, "keyword": lambda folder: None}


def local(name: str, folder: Path) -> Path | None:
    """A small local data set for a task; None for the task that brings its own."""
    return WRITERS.get(name, write_m4)(folder)


# Tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OLDER)
def test_every_listed_task_loads(tmp_path, name):
    task = load_task(name.upper(), data_dir=local(name, tmp_path))
    assert task.name == name
    assert read_task_file(name).version >= 1
    example = task.examples[0]
    assert example.prompt[-1]["role"] == "user"
    assert set(task.clusters) == {one.id for one in task.examples}
    reward = task.reward(example)
    assert reward.monotone and not oracle.is_oracle(reward)
    scores = task.score({e.id: "gibberish" for e in task.examples})
    assert scores["parse_failures"] == 1.0
    assert list(scores) == list(task.metrics)
    for row in task.baselines().values():
        assert row["parse_failures"] == 0.0
        assert all(map(math.isfinite, row.values()))


def test_a_task_file_of_ones_own(tmp_path):
    text = (Path(inspect.getfile(choose)).parent / "m4.yaml").read_text()
    own = tmp_path / "mine.yaml"
    own.write_text(text.replace("name: m4", "name: mine").replace("horizon_cap: 8", "horizon_cap: 2\n  spaced: true"))
    task = load_task(str(own), data_dir=write_m4(tmp_path / "data"))
    assert (task.name, task.examples[0].inputs.steps) == ("mine", 2)
    assert task.examples[0].prompt[-1]["content"].startswith("3 ")  # spaced digits
    assert task.score({"Q0": "3 0 0, 4 0 0"})["missing_steps"] == 0.0
    for old, new, message in [
        ("kind: forecast", "kind: magic", "kind 'magic' is none of har, forecast"),
        ("kind: forecast", "kinds: forecast", r"unknown keys \['kinds'\], missing keys \['kind'\]"),
        ("metrics:", "metrics: [", "cannot be read"),
    ]:
        own.write_text(text.replace(old, new))
        with pytest.raises(UsageError, match=message):
            load_task(str(own))
    with pytest.raises(UsageError, match=r"task file nowhere.yaml: cannot be read"):
        load_task("nowhere.yaml")


def test_unknown_names_and_sizes(tmp_path):
    with pytest.raises(UsageError, match="unknown dataset 'HARR': did you mean har"):
        load_task("HARR")
    write_m4(tmp_path)
    with pytest.raises(UsageError, match="num_samples must be at least 1, got 0"):
        load_task("m4", data_dir=tmp_path, num_samples=0)
    with pytest.raises(UsageError, match="num_samples=9: m4 has only 4 test examples"):
        load_task("m4", data_dir=tmp_path, num_samples=9)
    with pytest.raises(UsageError, match="no example has the id 'x'"):
        load_task("m4", data_dir=tmp_path).score({"x": ""})


def test_choice_is_balanced_seeded_and_nested():
    groups = ["a"] * 10 + ["b"] * 10 + ["c"] * 2
    six = choose(groups, 6, 0, "set")
    assert Counter(groups[i] for i in six) == {"a": 2, "b": 2, "c": 2}
    assert six == choose(groups, 6, 0, "set") != choose(groups, 6, 1, "set")
    assert choose(groups, 15, 0, "set")[:6] == six
    assert sorted(choose(groups, 22, 0, "set")) == choose(groups, None, 0, "set") == list(range(22))


def _prompts_and_rewards(task, texts):
    return {e.id: (e.prompt, [task.reward(e).score_text(text) for text in texts]) for e in task.examples}


def test_shuffled_test_labels_change_no_prompt_and_no_reward(tmp_path):
    texts = [f"Reason: x.\nAnswer: {label}" for label in CLASSES]
    labels = np.array(CLASSES * 15)
    shuffled = np.concatenate([labels[:30], np.random.default_rng(5).permutation(labels[30:])])
    before = load_task("har", data_dir=write_har(tmp_path / "a"))
    after = load_task("har", data_dir=write_har(tmp_path / "b", label=shuffled))
    assert before._references != after._references
    assert _prompts_and_rewards(before, texts) == _prompts_and_rewards(after, texts)


@pytest.mark.parametrize("name", ["m4", "m4-full", "m4-caption"])
def test_other_futures_change_no_prompt_and_no_reward(tmp_path, name):
    texts = ["300 400 500", "It is rising and seasonal", "nothing"]
    before = load_task(name, data_dir=write_m4(tmp_path / "a"))
    after = load_task(name, data_dir=write_m4(tmp_path / "b", ["1 2 3", "9 9 9", "5 6 7", "8 8 8"]))
    assert _prompts_and_rewards(before, texts) == _prompts_and_rewards(after, texts)


def test_other_captions_change_no_prompt_and_no_reward(tmp_path):
    texts = ["The temperature is rising.", "The humidity is very high.", "nothing"]
    before = load_task("weather-caption", data_dir=write_weather(tmp_path / "a"))
    after = load_task("weather-caption", data_dir=write_weather(tmp_path / "b", ["Something else."] * 6))
    assert _prompts_and_rewards(before, texts) == _prompts_and_rewards(after, texts)


def test_shuffled_test_labels_change_no_completion(tmp_path):
    """The whole way: data file, prompt, search with the task's reward, completion."""
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=0, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = random_model("llama")
    small = HFModel(type(model)(config).eval(), ByteTokenizer(), name="small")
    labels = np.array(CLASSES * 15)
    shuffled = np.concatenate([labels[:30], np.random.default_rng(5).permutation(labels[30:])])
    decoded = []
    for folder, chosen in ((tmp_path / "a", labels), (tmp_path / "b", shuffled)):
        task = load_task("har-zero", data_dir=write_har(folder, label=chosen))
        decoded.append([_completions(small, task, example) for example in task.examples[:3]])
    assert decoded[0] == decoded[1]
    for folder, futures in ((tmp_path / "c", None), (tmp_path / "d", ["1 2 3", "9 9 9", "5 6 7", "8 8 8"])):
        task = load_task("m4", data_dir=write_m4(folder, futures))
        decoded.append(_completions(small, task, task.examples[0]))
    assert decoded[2] == decoded[3]


def _completions(lm, task, example):
    result = dts.decode(lm, example.prompt, reward=task.reward(example), method=MaxEnt(4), max_new_tokens=8, seed=1)
    return [(one.token_ids, one.reward) for one in result.completions]


def test_the_interface_cannot_carry_a_reference(tmp_path):
    assert [field.name for field in dataclasses.fields(Example)] == ["id", "prompt", "inputs"]
    assert [field.name for field in dataclasses.fields(Context)] == ["prompt", "prompt_ids", "decode"]
    assert [field.name for field in dataclasses.fields(Finished)] == ["token_ids", "text", "token_logprobs"]
    for name in OLDER:
        task = load_task(name, data_dir=local(name, tmp_path / name))
        assert list(inspect.signature(task.reward).parameters) == ["example"]
        expected = _prompts_and_rewards(task, ["Answer: sitting", "300 400 500"])
        task._references = None  # what only scoring may read
        assert _prompts_and_rewards(task, ["Answer: sitting", "300 400 500"]) == expected


def test_oracle_rewards_are_named_as_such(tmp_path):
    task = load_task("har", data_dir=write_har(tmp_path / "a"))
    example = task.examples[0]
    reward = oracle.oracle_reward(task, example, "oracle-accuracy")
    assert oracle.is_oracle(reward) and oracle.is_oracle(dts.weighted_sum([(reward, 1.0)]))
    right = task._references[example.id].replace("_", " ")
    done = [Finished((), f"Answer: {right}"), Finished((), "?")]
    assert reward.finish([None, None], done) == [1.0, 0.0]
    forecasts = load_task("m4", data_dir=write_m4(tmp_path / "b"))
    worst = oracle.oracle_reward(forecasts, forecasts.examples[0], "oracle-smape")
    assert worst.finish([None], [Finished((), "")]) == [-200.0]  # less is better, so it is negated
    with pytest.raises(UsageError, match="task 'har' has oracle-macro_f1, oracle-accuracy"):
        oracle.oracle_reward(task, example, "oracle-smape")


def test_several_completions_become_one_answer(tmp_path):
    har = load_task("har", data_dir=write_har(tmp_path / "a"))
    texts = ["Answer: walking", "Answer: sitting", "nothing", "so, answer: Sitting"]
    assert har.answer(har.combine(har.examples[0], texts, [0.5, 0.3, 9.0, 0.3])) == "sitting"
    assert har.answer(har.combine(har.examples[0], ["?"], [1.0])) is None
    m4 = load_task("m4", data_dir=write_m4(tmp_path / "b"))
    example = m4.examples[0]
    texts = ["300 400 500", "310 410", "900 900 900", "none"]
    assert m4.combine(example, texts, [0.4, 0.4, 0.2, 5.0]) == "310 410 500"
    assert m4.combine(example, ["300 400 500"], [1.0]) == "300 400 500"
    assert m4.combine(example, ["300", "?"], [1.0, 1.0]) == "300"  # the steps that no text gives stay missing
    assert m4.combine(example, [], []) == m4.combine(example, ["?"], [1.0]) == ""
    assert m4.score({example.id: ""})["smape"] == 200.0


def test_har_scores_and_baselines(tmp_path):
    task = load_task("har", data_dir=write_har(tmp_path))
    right = {name: f"Reason: r.\nAnswer: {label.replace('_', ' ')}" for name, label in task._references.items()}
    assert task.score(right) == {"macro_f1": 1.0, "accuracy": 1.0, "kappa": 1.0, "parse_failures": 0.0}
    half = {name: text if i % 3 else "?" for i, (name, text) in enumerate(right.items())}
    assert task.score(half)["accuracy"] == pytest.approx(2 / 3)  # every third is unparsed, and wrong
    assert task.score(half)["parse_failures"] == pytest.approx(1 / 3)
    assert task.baselines()["majority class"]["accuracy"] == pytest.approx(1 / 3)
    assert task.baselines()["verifier alone"]["accuracy"] > 0.8  # the classes differ in strength
    for example in task.examples:
        assert sum(task.probabilities(example.inputs).values()) == pytest.approx(1)


def test_m4_round_trip_and_missing_steps(tmp_path):
    task = load_task("m4", data_dir=write_m4(tmp_path))
    scales = {example.id: example.inputs.scale for example in task.examples}
    exact = {name: scales[name].text(future) for name, future in task._references.items()}
    assert task.score(exact)["smape"] < 0.2  # what is left is rounding
    empty = task.score(dict.fromkeys(exact, "no numbers"))
    assert empty["smape"] == 200.0
    assert empty["missing_steps"] == empty["parse_failures"] == 1.0
    cut = task.score({name: text[: len("123 123")] for name, text in exact.items()})
    assert cut["smape"] == pytest.approx(200 / 3, abs=0.2)  # one of three steps is missing
    assert (cut["parse_failures"], cut["missing_steps"]) == (0.0, pytest.approx(1 / 3))
    assert task.baselines()["naive2"]["owa"] == 1.0
    assert task.baselines()["seasonal naive"]["seasonal_naive_share"] == 1.0
    first, past = task.examples[0].id, task.examples[0].inputs
    repeated = past.scale.text(metrics.seasonal_naive(past.history, past.steps, past.season))
    assert task.details({first: repeated})[first]["is_seasonal_naive"]
    half = {first: repeated, task.examples[1].id: "001 002 003"}
    assert task.score(half)["seasonal_naive_share"] == 0.5


def test_m4_horizon_cap_and_full_horizon(tmp_path):
    long = " ".join(["150"] * 12)
    write_m4(tmp_path, [long] * 4)
    with gzip.open(tmp_path / "m4_subset.csv.gz", "rt") as file:
        text = file.read().replace("Quarterly,4,3,", "Quarterly,4,12,")
    (tmp_path / "m4_subset.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert load_task("m4", data_dir=tmp_path).examples[0].inputs.steps == 8
    assert load_task("m4-full", data_dir=tmp_path).examples[0].inputs.steps == 12


def test_series_without_test_values_are_left_out_or_refused(tmp_path):
    assert len(load_task("m4", data_dir=write_m4(tmp_path, ["", "1 2 3", "1 2 3", "1 2 3"])).examples) == 3
    with pytest.raises(UsageError, match="no series in the data has values to score against"):
        load_task("m4", data_dir=write_m4(tmp_path, [""] * 4))


def test_validation_forecasts_training_values_and_never_sees_the_test_values(tmp_path):
    file = str(Path(__file__).parents[1] / "configs/tasks/m4_validation.yaml")
    whole = load_task("m4-full", data_dir=write_m4(tmp_path / "a"))
    held = load_task(file, data_dir=tmp_path / "a")
    other = load_task(file, data_dir=write_m4(tmp_path / "b", ["9 9 9"] * 4))
    for example in whole.examples:
        history, steps = example.inputs.history, example.inputs.steps
        past = next(one.inputs for one in held.examples if one.id == example.id)
        np.testing.assert_array_equal(past.history, history[:-steps])
        np.testing.assert_array_equal(held._references[example.id], history[-steps:])
        np.testing.assert_array_equal(other._references[example.id], history[-steps:])
    assert [e.prompt for e in held.examples] == [e.prompt for e in other.examples]
    write_m4(tmp_path / "c")
    short = (tmp_path / "c" / "m4_subset.csv.gz").read_bytes()
    text = gzip.decompress(short).decode().replace("Quarterly,4,3,", "Quarterly,30,3,")
    (tmp_path / "c" / "m4_subset.csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UsageError, match="no series in the data has values to score against"):
        load_task(file, data_dir=tmp_path / "c")


def test_digits_have_a_fixed_width_and_invert():
    digits = Digits(3, 250, 750)
    history = np.array([10.0, 20.0, 15.0])
    scale = digits.fit(history)
    assert scale.text(np.array([10.0, 20.0, 15.0, -1000.0, 1000.0])) == "250 750 500 000 999"
    np.testing.assert_allclose(scale.values([250, 750, 500]), history[[0, 1, 2]])
    assert digits.fit(np.full(5, 7.0)).text(np.full(2, 7.0)) == "500 500"
    with pytest.raises(UsageError, match="low < high"):
        Digits(2, 250, 750)


def test_spaced_digits_for_tokenizers_that_merge_them():
    assert digits_alone(lambda text: list(text.encode()))
    assert not digits_alone(lambda text: text.split())
    scale = Digits(3, 250, 750, spaced=True).fit(np.array([10.0, 20.0]))
    assert scale.text(np.array([10.0, 20.0])) == "2 5 0, 7 5 0"
    assert scale.digits.parser(2).find(scale.text(np.array([10.0, 20.0]))) == [250, 750]


def test_facts_of_clear_series():
    steps = np.arange(40.0)
    rising = {"trend": "rising", "volatility": "low", "range": "middle", "peak": "late", "trough": "early"}
    assert facts(steps, 1) == rising
    assert facts(-steps, 1) == {**rising, "trend": "falling", "peak": "early", "trough": "late"}
    wave = facts(np.sin(steps * np.pi / 2), 4)
    assert (wave["trend"], wave["volatility"], wave["season"]) == ("stable", "high", "yes")
    assert facts(np.ones(40), 4) == {"trend": "stable", "volatility": "low", "season": "no"}


def test_facts_of_clear_weather():
    readings = {
        "temperature_c": [3, 3, 2, 1],
        "humidity_pct": [95] * 4,
        "pressure_mbar": [1009] * 4,
        "wind_kmh": [30] * 4,
    }
    truth = weather_facts({name: np.array(values, float) for name, values in readings.items()})
    assert truth == {"temperature": "falling", "pressure": "low", "humidity": "very humid", "wind": "moderate"}
    options = read_task_file("weather-caption").options
    reward = ClaimReward(options["vocabulary"], truth, options["subjects"])
    said = (
        "The temperature will drop slightly. There is a Moderate Breeze from SW. The atmospheric shows Low Pressure. "
    )
    assert reward.score_text(said + "The humidity is very high.") == 1.0
    assert reward.score_text(said + "The humidity is high.") == 0.75


@needs_shared
def test_captions_of_the_weather_set_are_understood():
    """Their writers had only a summary of the readings, so the claims need not be right; but they must be found."""
    task = load_task("weather-caption", data_dir=SHARED)
    rows = task.baselines()
    assert rows["references"]["claims"] > 0.9
    assert rows["template"]["faithfulness"] == 1.0 > rows["references"]["faithfulness"] > 0.5


def test_keyword_scores_at_known_points():
    task = load_task("keyword", num_samples=2)
    first, second = task.examples
    words = first.inputs
    scores = task.score({first.id: f"The {words[0].upper()} is here.", second.id: " ".join(second.inputs)})
    assert scores["coverage"] == pytest.approx((1 / len(words) + 1) / 2)
    assert scores["all_words"] == 0.5
    assert all(word in first.prompt[-1]["content"] for word in words)
    items = read_task_file("keyword").options["items"]
    assert len(items) >= 20 and all(len(set(item["words"])) >= 3 for item in items)
    with pytest.raises(UsageError, match="brings its own prompts"):
        load_task("keyword", data_dir="somewhere")


# Training rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OLDER if name != "keyword"])
def test_training_rows_have_the_prompts_of_the_task(tmp_path, name):
    folder = WRITERS[name](tmp_path) if name in WRITERS else write_m4(tmp_path, points=120)
    task, rows = load_task(name, data_dir=folder), list(sft_rows(name, folder))
    assert rows == list(sft_rows(name, folder)) and rows
    roles = [message["role"] for message in task.examples[0].prompt]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == [*roles, "assistant"]
        assert row["messages"][0] == task.examples[0].prompt[0]  # the same system message
    prompts = {json.dumps(example.prompt) for example in task.examples}
    assert not prompts & {json.dumps(row["messages"][:-1]) for row in rows}


def test_no_test_window_is_in_the_training_rows(tmp_path):
    before = list(sft_rows("har", write_har(tmp_path / "a")))
    arrays = dict(np.load(tmp_path / "a" / "har_windows.npz"))
    arrays["acc"][30:] = np.random.default_rng(9).normal(size=arrays["acc"][30:].shape)
    arrays["label"][30:] = "sitting"
    assert list(sft_rows("har", write_har(tmp_path / "b", **arrays))) == before
    labels = [row["messages"][-1]["content"].rpartition("Answer: ")[2] for row in before]
    assert Counter(labels) == {"walking": 10, "walking upstairs": 10, "sitting": 10}


@pytest.mark.parametrize("name", ["m4", "m4-full"])
def test_no_test_value_is_in_the_training_rows(tmp_path, name):
    rows = list(sft_rows(name, write_m4(tmp_path / "a")))
    assert list(sft_rows(name, write_m4(tmp_path / "b", ["1 2 3"] * 4))) == rows
    assert len(rows) == 4 * 8
    # The answer is what really followed: this series repeats after 4 steps, with a slope of 1.
    task = load_task(name, data_dir=tmp_path / "a")
    options = read_task_file(name).options
    history, digits = task.examples[0].inputs.history, Digits(options["width"], options["low"], options["high"])
    found = [
        cut
        for cut in range(2, 38)
        if digits.fit(history[:cut][-48:]).text(history[cut : cut + 3]) == rows[0]["messages"][-1]["content"]
    ]
    assert found and found[-1] + 3 <= len(history)


def test_no_reference_caption_is_in_the_training_rows(tmp_path):
    rows = list(sft_rows("weather-caption", write_weather(tmp_path / "a")))
    assert list(sft_rows("weather-caption", write_weather(tmp_path / "b", ["Zebra."] * 6))) == rows
    assert len(rows) == 2  # 2014 and 2015


@needs_shared
def test_training_rows_of_the_shared_data():
    windows = read_har_npz(SHARED / "har_windows.npz")
    assert len(list(sft_rows("har-zero", SHARED))) == windows.split.count("train") == 360
    assert len(list(sft_rows("weather-caption", SHARED))) == sum(row.id < "2016" for row in load_weather(SHARED))
    assert len(list(sft_rows("m4", SHARED))) <= 8 * len(load_series(SHARED))


def test_training_rows_from_the_command_line(tmp_path, caplog):
    output = tmp_path / "out" / "har.jsonl"
    assert main(["har", "--data-dir", str(write_har(tmp_path / "data")), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == list(sft_rows("har", tmp_path / "data"))
    assert main(["keyword", "--output", str(output)]) == 2
    assert "task 'keyword' has no training data" in caplog.text


# Prompts and the reward on real data -------------------------------------------------------------------------------


HOMES = {
    "har": [None, "har_windows.npz", "har_gyro_windows.npz"],
    "har-zero": [None, "har_windows.npz", "har_gyro_windows.npz"],
    "weather-caption": ["weather_captions.jsonl.gz"],
    "keyword": [None],
}


@pytest.mark.parametrize("name", OLDER)
def test_prompts_and_answers_fit_a_small_model(packaged, smollm, name):
    """400 tokens of the default model's own tokenizer, chat template included; good answers fit max_tokens."""
    for home in HOMES.get(name, [None, "m4_subset.csv.gz", "m3_subset.csv.gz"]):
        if home is not None and not (SHARED / home).is_file():
            continue
        source = None if home is None else SHARED / home
        task = load_task(name, data_dir=source)
        prompts = [example.prompt for example in task.examples[:100]]
        texts = smollm.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        assert max(map(len, smollm.tokenizer(texts, add_special_tokens=False)["input_ids"])) <= 400
        if name != "keyword":
            answers = [row["messages"][-1]["content"] for row in itertools.islice(sft_rows(name, source), 200)]
            longest = max(map(len, smollm.tokenizer(answers, add_special_tokens=False)["input_ids"]))
            assert longest + 1 <= task.max_tokens  # and the end of the sequence


def test_each_digit_is_a_token_of_the_default_model(smollm):
    assert digits_alone(lambda text: smollm.tokenizer(text, add_special_tokens=False)["input_ids"])
    file = read_task_file("m4-full")
    text = " ".join(["123456"[: file.options["width"]]] * 48)
    needed = len(smollm.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert needed == 48 * (file.options["width"] + 1) - 1 < file.max_tokens  # an hourly forecast, and its end


@needs_shared
@pytest.mark.parametrize(("name", "least"), [("m4-full", 0.85), ("m4", 0.8)])
def test_the_forecast_reward_ranks_better_forecasts_higher(name, least):
    """Spearman's correlation of reward and -sMAPE over a pool of candidates, averaged over 40 hourly series."""
    task = load_task(name, data_dir=SHARED)
    generator = np.random.default_rng(0)
    ranks = []
    for example in [e for e in task.examples if task.groups[e.id] == "Hourly"][:40]:
        ranks.append(correlation(task, example, candidates(example.inputs, generator)))
        flat = example.inputs.scale.text(np.repeat(example.inputs.history[-1], example.inputs.steps))
        assert task.reward(example).score_text(flat) < 0.95
    assert np.mean(ranks) > least
