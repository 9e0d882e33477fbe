"""The search as a model of lm-evaluation-harness, by its own command and on a local task."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from training_models import tiny_pair

import dts
from dts.doors.harness import SearchLM, decoding_of
from dts.doors.harness_command import HOME, register
from dts.search import MaxEnt

QUESTIONS = ["ab cd", "ef gh ij", "a b c d", "zyx", "kl mn op", "the end"]
GENERATE = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}, {metric: chrf}]
"""
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 1
doc_to_choice: [" ab", " cde", " z"]
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model, and tasks whose answers are what it writes greedily for half of the questions."""
    home = tmp_path_factory.mktemp("harness")
    model, tokenizer = tiny_pair()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    rows = []
    for index, question in enumerate(QUESTIONS):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True).split("e")[0]
        rows.append(json.dumps({"question": question, "answer": text if index % 2 else "another"}))
    (home / "data.jsonl").write_text("\n".join(rows))
    (home / "tasks").mkdir()
    for name, task in (("words", GENERATE), ("choose", CHOOSE), ("rolling", ROLLING)):
        (home / "tasks" / f"{name}.yaml").write_text(task.replace("DATA", str(home / "data.jsonl")))
    (home / "rewards.py").write_text("def many_a(text):\n    return float(text.count('a'))\n")
    return home


def evaluate(folder, model, arguments="", **options):
    """(scores by task, answers of the generation task), without the harness's own thousands of tasks."""
    found = simple_evaluate(
        model, f"pretrained={folder / 'model'}{arguments}", tasks=["words", "choose", "rolling"], device="cpu",
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False), **options,
    )  # fmt: skip
    return found["results"], [sample["resps"][0][0] for sample in found["samples"]["words"]]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_greedy_gets_exactly_the_score_of_the_harness_own_model(folder):
    register()
    scores, answers = evaluate(folder, "hf")
    assert evaluate(folder, "dts", ",method=greedy") == (scores, answers)
    assert scores["words"]["exact_match,none"] == 0.5 and len(set(answers)) > 1
    assert scores["rolling"]["word_perplexity,none"] > 1


@pytest.mark.minutes
def test_a_search_finds_what_a_reward_from_a_file_likes_and_takes_chat_templates(folder):
    register()
    more = f",method=maxent-star,rollouts=8,reward_file={folder / 'rewards.py'}:many_a"
    chat = {"batch_size": 4, "apply_chat_template": True}
    greedy, found = (evaluate(folder, "dts", given, **chat)[1] for given in (",method=greedy", more))
    assert "".join(found).count("a") > "".join(greedy).count("a")
    assert greedy == evaluate(folder, "hf", "", **chat)[1]
    assert greedy != evaluate(folder, "hf")[1]  # the template counts


def test_the_entry_point_that_newer_harnesses_read_leads_to_the_model():
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    described = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert described["project"]["entry-points"]["lm_eval.models"] == {"dts": HOME}
    assert EntryPoint("dts", HOME, "lm_eval.models").load() is SearchLM


@pytest.mark.minutes
def test_the_commands_in_processes_of_their_own_print_the_same_scores(folder, tmp_path):
    scores = []
    for command, given in (
        (["lm_eval", "--model", "hf"], ""),
        (["dts", "lm-eval", "--model", "dts"], ",method=greedy"),
    ):
        run = [
            sys.executable, "-m", *command, "--model_args", f"pretrained={folder / 'model'}{given}", "--tasks",
            "words,choose,rolling", "--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "3",
            "--output_path", str(tmp_path / command[-1]),
        ]  # fmt: skip
        done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path / "hf")})
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(next((tmp_path / command[-1]).rglob("results_*.json")).read_text())["results"])
    assert scores[0] == scores[1] and set(scores[0]) == {"words", "choose", "rolling"}


def test_each_request_gets_what_decode_gives_alone(folder):
    model = SearchLM(str(folder / "model"), method="maxent", rollouts=6, reward_file=f"{folder}/rewards.py:many_a",
                     seed=3, batch_size=2, device="cpu")  # fmt: skip
    given = [{"until": ["e"], "max_gen_toks": 8 + index % 2, "temperature": 0.7} for index in range(4)]
    requests = [
        Instance("generate_until", {}, (question, arguments), index)
        for index, (question, arguments) in enumerate(zip(QUESTIONS, given, strict=False))
    ]
    lm = dts.load((model.model, model.tokenizer))
    alone = [
        dts.decode(
            lm, QUESTIONS[i], method=MaxEnt(6, reward_scale=4.0), reward=lambda text: float(text.count("a")),
            batch_size=4, seed=3 + i, max_new_tokens=8 + i % 2, temperature=0.7, stop=["e", "<eos>"],
        ).best.text
        for i in range(4)
    ]  # fmt: skip
    assert model.generate_until(requests, disable_tqdm=True) == alone


def test_long_prompts_are_cut_on_the_left_as_the_harness_does(folder):
    model = SearchLM(str(folder / "model"), method="greedy", device="cpu", max_length=20)
    assert model._prompt("abcdefghij", 12) == model.tok_encode("cdefghij")
    assert model._prompt("abc", 12) == "abc"


def test_generation_arguments_become_those_of_decode():
    assert decoding_of({"until": "x", "do_sample": False, "temperature": 0.0}, 256, "<eos>") == {
        "max_new_tokens": 256, "stop": ["x", "<eos>"],
    }  # fmt: skip
    assert decoding_of({"max_tokens": 5, "do_sample": True, "temperature": 0.6, "top_p": 0.9}, 256, "") == {
        "max_new_tokens": 5, "stop": [], "temperature": 0.6, "top_p": 0.9,
    }  # fmt: skip
    with pytest.raises(dts.UsageError, match="num_beams=4 of the task"):
        decoding_of({"num_beams": 4}, 256, "<eos>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "maxent-sta"}, "method=maxent-sta is not known: did you mean maxent-star"),
        ({"rollouts": 0}, "rollouts=0"),
        (
            {"method": "best-of-n", "reward_scale": 8},
            "reward_scale=8 has no effect with method=best-of-n; leave it",
        ),
        ({"method": "greedy", "rollouts": 4}, "rollouts=4 has no effect with method=greedy"),
        ({"method": "particle-filter", "order": "target"}, "order='target' has no effect with method=particle-filter"),
        ({"reward": "prose", "reward_file": "x.py:f"}, "give one of them"),
        ({"reward_file": "nowhere.py:f"}, "reward_file=nowhere.py:f cannot be imported"),
        ({"width": 0}, "width=0"),
    ],
)
def test_bad_model_arguments_are_refused_before_the_model_is_loaded(arguments, message):
    with pytest.raises(dts.UsageError, match=message):
        SearchLM("nowhere", **arguments)
