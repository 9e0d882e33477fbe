"""Tasks: data that load or say where they are wrong, prompts and rewards that cannot see the answer, fair scores."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import inspect
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dts.errors import UnavailableError, UsageError
from dts.evaluation import data, metrics
from dts.evaluation.tasks import TASKS, Example, load_task
from dts.evaluation.tasks.m4 import Digits, facts
from dts.evaluation.tasks.registry import choose, read_task_file
from dts.fetch import cached

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
CLASSES = ("walking", "walking_upstairs", "sitting")


@pytest.fixture(scope="session")
def packaged():
    """The packaged data; skips where they were not fetched."""
    try:
        return cached("basic-motions"), cached("m4-mini")
    except UnavailableError as error:
        pytest.skip(str(error))


def write_har(folder: Path, **changes) -> Path:
    """A small set in the format of har_windows.npz: 30 training and 15 test windows."""
    generator = np.random.default_rng(0)
    labels = np.array(CLASSES * 15)
    strength = np.array([CLASSES.index(label) for label in labels])[:, None, None] + 0.1
    arrays = {
        "acc": (strength * generator.normal(size=(45, 64, 3))).astype(np.float32),
        "label": labels,
        "subject": np.repeat(np.arange(9), 5),
        "split": np.array(["train"] * 30 + ["test"] * 15),
        "sampling_hz": np.float64(50),
    }
    folder.mkdir(exist_ok=True)
    np.savez(folder / "har_windows.npz", **{**arrays, **changes})
    return folder


def write_m4(folder: Path, futures: list[str] | None = None, **changes: str) -> Path:
    """Four series in the format of m4_subset.csv.gz; `changes` apply to the second row."""
    folder.mkdir(exist_ok=True)
    names = ["id", "frequency", "seasonal_period", "horizon", "n_train", "train", "test"]
    with gzip.open(folder / "m4_subset.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for number in range(4):
            train = 100 + 10 * number + 20 * np.sin(np.arange(40) * np.pi / 2) + np.arange(40)
            row = [
                "Quarterly",
                "4",
                "3",
                "40",
                " ".join(f"{x:.2f}" for x in train),
                (futures or ["140 150 160"] * 4)[number],
            ]
            row = dict(zip(names, [f"Q{number}", *row], strict=True))
            writer.writerow({**row, **changes} if number == 1 else row)
    return folder


# Data ------------------------------------------------------------------------------------------------------------


@needs_shared
def test_shared_files_load():
    windows = data.read_har_npz(SHARED / "har_windows.npz")
    assert windows.signals.shape == (720, 128, 3)
    assert Counter(windows.split) == {"train": 360, "test": 360}
    gyro = data.read_har_npz(SHARED / "har_gyro_windows.npz")
    assert gyro.signals.shape == (440, 128, 6)
    both = {s for s, part in zip(gyro.subjects, gyro.split, strict=True) if part == "test"}
    assert not both & {s for s, part in zip(gyro.subjects, gyro.split, strict=True) if part == "train"}
    series = data.read_m4_csv(SHARED / "m4_subset.csv.gz")
    assert Counter(one.frequency for one in series)["Hourly"] == 248
    assert sum(not len(one.future) for one in series) == 3  # the Monthly rows have no test
    assert len(data.read_m4_csv(SHARED / "m3_subset.csv.gz")) == 824


def test_packaged_data_load(packaged):
    windows = data.read_basic_motions(packaged[0])
    assert windows.signals.shape == (80, 100, 6)
    assert windows.classes == ("Standing", "Running", "Walking", "Badminton")
    assert Counter(zip(windows.split, windows.labels, strict=True))["test", "Walking"] == 10
    assert windows.signals[0, :3, 0].tolist() == [0.079106, 0.079106, -0.903497]
    series = data.read_m4_mini(packaged[1])
    assert Counter(one.frequency for one in series) == dict.fromkeys(data.M4_HORIZON, 4)
    assert all(len(one.future) == one.horizon == data.M4_HORIZON[one.frequency] for one in series)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"train": "1 2 x"}, "line 3, train: value 3 is 'x'"),
        ({"train": "1 2 nan"}, "line 3, train: value 3 is 'nan'"),
        ({"n_train": "39"}, "line 3: train has 40 values"),
        ({"test": "1 2"}, "line 3: test has 2 values, horizon says 3"),
        ({"horizon": "0"}, "line 3: horizon must be a whole number above 0"),
        ({"id": "Q0"}, "line 3: id 'Q0' appears twice"),
        ({"id": " "}, "line 3: the id is empty"),
    ],
)
def test_malformed_m4_row_is_named(tmp_path, change, where):
    with pytest.raises(UsageError, match="m4_subset.csv.gz, " + where):
        load_task("m4", data_dir=write_m4(tmp_path, **change))


def test_m4_without_its_columns(tmp_path):
    (tmp_path / "m4_subset.csv").write_text("id,train\nY1,1 2\n")
    with pytest.raises(UsageError, match="line 1: lacks the columns frequency"):
        load_task("m4", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"acc": np.full((45, 64, 3), np.nan)}, "row 0: the window holds NaN"),
        ({"label": np.array([""] * 45)}, "row 0: the label is empty"),
        ({"split": np.array(["train"] * 44 + ["dev"])}, "row 44: split must be train or test"),
        ({"split": np.array(["train"] * 45)}, "needs windows of both splits"),
        ({"subject": np.arange(3)}, "subject has shape"),
        ({"label": np.array([{}] * 45, dtype=object)}, "without pickled objects"),
    ],
)
def test_malformed_window_is_named(tmp_path, change, where):
    with pytest.raises(UsageError, match=f"har_windows.npz.*{where}"):
        load_task("har", data_dir=write_har(tmp_path, **change))


def test_malformed_motion_line_is_named(tmp_path):
    head = "@classLabel true Standing Walking\n@data\n"
    good = ":".join([",".join(["1.0"] * 100)] * 6) + ":Standing\n"
    for bad, where in [
        (good.replace("1.0", "one", 1), "line 4: value 1 is 'one'"),
        (good.replace("1.0,", "", 1), "line 4: expected 6 channels of 100 samples"),
        (good.replace("Standing", "Flying"), "line 4: label 'Flying' is none of Standing, Walking"),
    ]:
        (tmp_path / "BasicMotions_TRAIN.ts").write_text(head + good + bad)
        with pytest.raises(UsageError, match=f"BasicMotions_TRAIN.ts, {where}"):
            data.read_basic_motions(tmp_path)


def test_missing_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load_task("har", data_dir=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no har_windows.npz.*leave the option out"):
        load_task("har", data_dir=tmp_path)
    (tmp_path / "har_windows.npz").write_text("not a zip file")
    with pytest.raises(UsageError, match=r"har_windows.npz: not a readable npz"):
        load_task("har", data_dir=tmp_path)


# Tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_listed_task_loads(tmp_path, name):
    task = load_task(name.upper(), data_dir=write_har(tmp_path) if name == "har" else write_m4(tmp_path))
    assert task.name == name
    assert read_task_file(name).version >= 1
    example = task.examples[0]
    assert example.prompt[-1]["role"] == "user"
    reward = task.reward(example)
    assert reward.monotone
    scores = task.score({e.id: "gibberish" for e in task.examples})
    assert scores["parse_failures"] == 1.0
    assert list(scores) == list(read_task_file(name).metrics)
    for row in task.baselines().values():
        assert row["parse_failures"] == 0.0
        assert all(map(math.isfinite, row.values()))


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


def test_the_interface_cannot_carry_a_reference(tmp_path):
    assert [field.name for field in dataclasses.fields(Example)] == ["id", "prompt", "inputs"]
    for name, folder in [("har", write_har(tmp_path / "a")), ("m4", write_m4(tmp_path / "b"))]:
        task = load_task(name, data_dir=folder)
        assert list(inspect.signature(task.reward).parameters) == ["example"]
        expected = _prompts_and_rewards(task, ["Answer: sitting", "300 400 500"])
        task._references = None  # what only scoring may read
        assert _prompts_and_rewards(task, ["Answer: sitting", "300 400 500"]) == expected


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
    past = task.examples[0].inputs
    repeated = past.scale.text(metrics.seasonal_naive(past.history, past.steps, past.season))
    assert task.details({task.examples[0].id: repeated})[task.examples[0].id]["is_seasonal_naive"]


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
    with pytest.raises(UsageError, match="no series in the data has test values"):
        load_task("m4", data_dir=write_m4(tmp_path, [""] * 4))


def test_digits_have_a_fixed_width_and_invert():
    digits = Digits(3, 250, 750)
    history = np.array([10.0, 20.0, 15.0])
    scale = digits.fit(history)
    assert scale.text(np.array([10.0, 20.0, 15.0, -1000.0, 1000.0])) == "250 750 500 000 999"
    np.testing.assert_allclose(scale.values([250, 750, 500]), history[[0, 1, 2]])
    assert digits.fit(np.full(5, 7.0)).text(np.full(2, 7.0)) == "500 500"
    with pytest.raises(UsageError, match="low < high"):
        Digits(2, 250, 750)


def test_facts_of_clear_series():
    steps = np.arange(40.0)
    assert facts(steps, 1) == {"trend": "rising", "volatility": "low"}
    assert facts(-steps, 1)["trend"] == "falling"
    assert facts(np.sin(steps * np.pi / 2), 4) == {"trend": "stable", "volatility": "high", "season": "yes"}
    assert facts(np.ones(40), 4) == {"trend": "stable", "volatility": "low", "season": "no"}


def test_prompts_fit_a_small_model(packaged, smollm):
    """400 tokens of the default model's own tokenizer, chat template included."""
    homes = {"har": [None, "har_windows.npz", "har_gyro_windows.npz"], "m4": [None, "m4_subset.csv.gz"]}
    for name in TASKS:
        for home in homes["har" if name == "har" else "m4"]:
            if home is not None and not (SHARED / home).is_file():
                continue
            task = load_task(name, data_dir=None if home is None else SHARED / home)
            prompts = [example.prompt for example in task.examples]
            texts = smollm.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            assert max(map(len, smollm.tokenizer(texts, add_special_tokens=False)["input_ids"])) <= 400
