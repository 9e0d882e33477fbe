"""What the outcome runs rest on: rewards that read their task off the prompt, data without overlap, and checks as
measures of a comparison."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from families import ByteTokenizer, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import dts
from dts.evaluation.finetuned import generations
from dts.evaluation.finetuned.cli import run_script
from dts.evaluation.finetuned.compare import CompareSettings, compare_models
from dts.evaluation.finetuned.replies import Item, Reply, Yardstick, read_items, sample_replies, text_values
from dts.evaluation.finetuned.report import markdown
from dts.evaluation.rewards import Keywords
from dts.evaluation.rewards.prompted import asked_words, prompt_keywords, prose
from dts.evaluation.tasks import load_task
from dts.models.huggingface import HFModel
from dts.rewards import CheckMonotone, Context, Finished, Reward, as_reward
from dts.training.cli import read_config
from dts.training.coding import problems
from dts.training.config import from_mapping
from dts.training.rewards import find_reward

CONFIGS = Path("configs")
PROMPT = [{"role": "user", "content": "Write about a pet. Use the words: cat, dog."}]


def decode(ids):
    return "".join(map(chr, ids))


# Rewards -------------------------------------------------------------------------------------------------------------


def test_words_are_read_off_text_and_chat_prompts():
    assert asked_words(PROMPT) == asked_words(PROMPT[0]["content"]) == ["cat", "dog"]
    for prompt in ("Write about a pet.", [], [1, 2]):
        with pytest.raises(dts.UsageError, match="asks for no words; write for example"):
            asked_words(prompt)


@settings(max_examples=100, deadline=None)
@given(text=st.text("catdog ,.", max_size=40))
def test_prompt_keywords_are_the_keywords_of_the_prompt_and_monotone(text):
    own, same = CheckMonotone(prompt_keywords), Keywords(["cat", "dog"])
    state = own.start(Context(PROMPT, (), decode))
    for character in text:
        state = own.extend([state], [ord(character)])[0]
    assert own.finish([state], [Finished(tuple(map(ord, text)), text)]) == [same.score_text(text)]
    assert text_values(prompt_keywords, PROMPT, [text, "cat dog"]) == [same.score_text(text), 1.0]


def test_a_list_of_words_is_no_prose():
    assert prose("A cat and a dog sat on the mat.") == 1
    assert prose("Cat, dog.") == prose("cat dog") == prose("") == 0
    assert prose("a cat and a dog sat on the mat") == 0  # no end of a sentence


# Data ----------------------------------------------------------------------------------------------------------------


def _prompts(name):
    lines = (CONFIGS / "data" / f"keywords_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_no_word_or_subject_of_a_part_is_in_another():
    parts = {name: _prompts(name) for name in ("train", "validation", "test")}
    assert {name: len(prompts) for name, prompts in parts.items()} == {"train": 64, "validation": 12, "test": 40}
    words = {
        name: {word.rstrip("s").rstrip("e") for prompt in prompts for word in asked_words(prompt)}
        for name, prompts in parts.items()
    }
    subjects = {
        name: {re.search(r"Write about (.*)\. Use", prompt[-1]["content"])[1] for prompt in prompts}
        for name, prompts in parts.items()
    }
    for a, b in combinations(parts, 2):
        assert not words[a] & words[b]
        assert not subjects[a] & subjects[b]


def test_the_tasks_own_prompts_are_in_the_test_part():
    task = [example.prompt for example in load_task("keyword").examples]
    assert all(prompt in _prompts("test") for prompt in task)


@pytest.mark.parametrize("file", sorted((CONFIGS / "experiments").glob("*keywords*.yaml")), ids=lambda f: f.stem)
def test_the_configs_name_a_reward_that_exists(file):
    config = from_mapping(read_config(file))
    assert isinstance(find_reward(config.reward, []), Reward)
    assert config.data == ("configs/data/keywords_train.jsonl",)


# Checks --------------------------------------------------------------------------------------------------------------


def test_checks_decide_success_together_with_validity():
    texts = [
        "The cat and the dog are at home.",
        "cat, dog",
        "A cat is in the house, and it is happy.",
        "cat dog cat cat cat",
    ]
    yardstick = Yardstick(None, None, 0.0, (prompt_keywords, as_reward(prose)))
    found = yardstick.measure(Item(PROMPT, (), "0"), [Reply(text, 1, False) for text in texts])
    assert found["prompt_keywords"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert (found["prose"], found["pass@1"]) == (0.5, 0.25)
    assert yardstick.predicate == "the reply is valid, and prompt_keywords and prose give it 1"


def test_the_coding_task_is_compared_on_problems_that_no_training_saw():
    trained = {json.dumps(problem.prompt) for problem in problems("train")}
    assert not trained & {json.dumps(item.prompt) for item in read_items("coding", None, 0)[0]}
    assert len(read_items("coding-all", None, 0)[0]) == len(problems())


def test_prompts_without_replies_are_compared_by_checks(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}. Use the words: a, b."}) + "\n" for i in range(6)))
    with pytest.raises(dts.UsageError, match="the row has no response"):
        read_items(str(file), 6, 0)
    name = "dts.evaluation.rewards.prompted:prompt_keywords"
    chosen = CompareSettings(test_data=str(file), samples=2, max_tokens=4, checks=(name,))
    lm = HFModel(random_model("llama", 0), ByteTokenizer(), name="tiny")
    arms = {"baseline": [lm], "other": [lm]}
    summary = compare_models(arms, chosen, tmp_path / "out")
    contrast = summary["contrasts"]["other vs baseline"]["prompt_keywords"]
    assert (contrast["value"], contrast["p"]) == (0.0, 1.0)
    assert "p_holm" in contrast
    assert "| prompt_keywords | " in markdown(summary)


@pytest.mark.parametrize("given", ["other", "other=", "=a", "other=a,", "baseline=a"])
def test_a_model_without_name_or_folder_is_refused(given, capsys):
    assert run_script(["--baseline-lora", "demo", "--model", given, "--test-data", "coding"]) == 2
    assert f"--model {given} is not allowed; give a new name and folders" in capsys.readouterr().err


def rounded(replies):
    """Their log-probabilities to 4 digits: fewer prompts in a batch add in another order."""
    return {
        name: [[[dataclasses.replace(one, logprob=round(one.logprob, 4)) for one in item] for item in seed]
               for seed in seeds]
        for name, seeds in replies.items()
    }  # fmt: skip


def test_a_cut_comparison_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    items = [Item([{"role": "user", "content": f"{i}?"}], (), str(i)) for i in range(4)]
    settings = {"samples": 2, "max_tokens": 5, "temperature": 1.0, "seed": 3}
    lm = HFModel(random_model("llama", 0), ByteTokenizer(), name="tiny")
    other = HFModel(random_model("llama", 1), ByteTokenizer(), name="other")
    models = {"baseline": [lm], "other": [other, lm]}
    whole = generations.sample_models(models, items, tmp_path / "whole", **settings)
    lines = (tmp_path / "whole" / generations.FILE).read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / generations.FILE).write_text("".join(lines[:6]) + lines[6][:-20])
    drawn = []

    def counted(lm, items, which, **given):
        drawn.extend(which)
        return sample_replies(lm, items, which, **given)

    monkeypatch.setattr(generations, "sample_replies", counted)
    assert rounded(generations.sample_models(models, items, cut, **settings, resume=True)) == rounded(whole)
    assert drawn == [2, 3]  # the third model is the first one's source
    kept = (cut / generations.FILE).read_text().splitlines()
    assert set(kept[:6]) == {line.strip() for line in lines[:6]} and len(kept) == 8
    drawn.clear()
    generations.sample_models(models, items, cut, **{**settings, "seed": 4}, resume=True)
    assert len(drawn) == 12  # replies of another seed are none of ours
