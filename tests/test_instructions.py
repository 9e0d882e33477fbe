"""Verifiable instructions: the checks that read token by token agree with those that read the whole text."""

from __future__ import annotations

import collections
import json
import random
import re
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest

import dts
from dts.errors import UsageError
from dts.evaluation.finetuned.replies import text_values
from dts.evaluation.rewards.instructions import ANSWERS, INSTRUCTIONS, Instructions
from dts.evaluation.tasks import load_task
from dts.evaluation.tasks.asked import asked_instructions, prompt_instructions
from dts.evaluation.tasks.instructions import Options, made
from dts.evaluation.tasks.registry import read_task_file
from dts.rewards import CheckMonotone, Context, Finished
from dts.training.data import Row
from dts.training.rewards import check_prompts

DATA = Path(__file__).parents[1] / "configs" / "data"
PIECES = [
    *"abcst ,,.!?'\"\n\n-*<>[]()1", " ", "\t", "**", "***", "\n\n", "\n- ", "\n* ", " - ", "*\n", "[name]", "[a\nb]",
    "<<title>>", "<< >>", "<<a", "a>>", "P.S.", "p. s. x", "P.P.S", "P.P.", "SECTION 1", "Section ", "Section 2",
    "section 3", "apple", "Apple ", " apples", "APPLE", "pineapple", "river", "River.", " the end", "The End.",
    "S", '"', " \n ", *ANSWERS, "My answer is", "First", "first ", " HELLO ", "WORLD", "é", "ß", "İ", "ſ", "\u212a",
    "ǅ", "日本", "\u2028", "\x0b", "\r\n",
]  # fmt: skip
LISTS = [  # one of every kind, most of them twice
    [("keywords:existence", {"keywords": ["apple", "river"]}),
     ("keywords:forbidden_words", {"forbidden_words": ["apple", "first"]})],
    [("keywords:frequency", {"keyword": "apple", "frequency": 2, "relation": "at least"})],
    [("keywords:frequency", {"keyword": "aa", "frequency": 2, "relation": "less than"})],
    [("keywords:letter_frequency", {"letter": "s", "let_frequency": 4, "let_relation": "at least"})],
    [("keywords:letter_frequency", {"letter": "i", "let_frequency": 3, "let_relation": "less than"})],
    [("length_constraints:number_words", {"num_words": 6, "relation": "at least"})],
    [("length_constraints:number_words", {"num_words": 5, "relation": "less than"})],
    [("length_constraints:number_paragraphs", {"num_paragraphs": 1})],
    [("length_constraints:number_paragraphs", {"num_paragraphs": 2})],
    [("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "first"})],
    [("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"})],
    [("detectable_content:number_placeholders", {"num_placeholders": 1})],
    [("detectable_content:postscript", {"postscript_marker": "P.S."})],
    [("detectable_content:postscript", {"postscript_marker": "P.P.S"})],
    [("detectable_format:number_bullet_lists", {"num_bullets": 1})],
    [("detectable_format:number_bullet_lists", {"num_bullets": 2})],
    [("detectable_format:constrained_response", {})],
    [("detectable_format:number_highlighted_sections", {"num_highlights": 1})],
    [("detectable_format:number_highlighted_sections", {"num_highlights": 3})],
    [("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1})],
    [("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2})],
    [("detectable_format:title", {})],
    [("startend:end_checker", {"end_phrase": "The end"})],
    [("startend:quotation", {})],
    [("change_case:english_capital", {})],
    [("change_case:english_lowercase", {})],
    [("punctuation:no_comma", {})],
]  # fmt: skip


def texts(count: int, seed: int) -> list[list[str]]:
    """Pieces of random texts, most of them built from few kinds of pieces so that each instruction is met by some."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        some = rng.sample(PIECES, rng.randint(1, 8))
        drawn.append([rng.choice(some) for _ in range(rng.randint(0, 14))])
    return drawn


def slow(kind: str, text: str, given: dict) -> bool:
    """The same by one look at the whole text, from the paper's descriptions. Some kinds have no shorter form."""
    less = "less than" in given.values()
    counts = {
        "keywords:frequency": lambda: len(re.findall(given["keyword"], text, re.IGNORECASE)) - given["frequency"],
        "keywords:letter_frequency": lambda: (
            collections.Counter(text.lower())[given["letter"]] - given["let_frequency"]
        ),
        "length_constraints:number_words": lambda: len(re.findall(r"\w+", text)) - given["num_words"],
        "detectable_content:number_placeholders": lambda: (
            len(re.findall(r"\[.*?\]", text)) - given["num_placeholders"]
        ),
        "detectable_format:multiple_sections": lambda: (
            len(re.split(rf"\s?{given['section_spliter']}\s?\d+\s?", text)) - 1 - given["num_sections"]
        ),
        "punctuation:no_comma": lambda: -text.count(","),
        "change_case:english_capital": lambda: text.isupper() - 1,
        "change_case:english_lowercase": lambda: text.islower() - 1,
        "detectable_format:constrained_response": lambda: sum(answer in text for answer in ANSWERS) - 1,
        "startend:end_checker": lambda: (
            text.strip().strip('"').lower().endswith(given["end_phrase"].lower()) - 1
        ),
        "detectable_format:number_bullet_lists": lambda: -abs(
            sum(len(re.findall(p, text, re.MULTILINE)) for p in (r"^\s*\*[^\*].*$", r"^\s*-.*$")) - given["num_bullets"]
        ),
        "keywords:existence": lambda: all(word in text.lower() for word in given["keywords"]) - 1,
    }  # fmt: skip
    return bool(text.strip()) and (counts[kind]() < 0 if less else counts[kind]() >= 0)


HARDER = {  # judged by examples
    "keywords:forbidden_words", "length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word",
    "detectable_content:postscript", "detectable_format:number_highlighted_sections", "detectable_format:title",
    "startend:quotation",
}  # fmt: skip
SLOW = [one for group in LISTS for one in group if one[0] not in HARDER]


def test_every_kind_is_tested():
    assert {kind for group in LISTS for kind, _ in group} == set(INSTRUCTIONS)


@pytest.mark.parametrize("instruction", SLOW, ids=lambda one: "-".join(map(str, [one[0], *one[1].values()])))
def test_reading_agrees_with_one_look_at_the_whole_text(instruction):
    kind, given = instruction
    reward = Instructions([instruction])
    drawn = ["".join(pieces) for pieces in texts(400, 0)]
    answers = [reward.followed(text) for text in drawn]
    assert answers == [[slow(kind, text, given)] for text in drawn]
    assert 0 < sum(map(sum, answers)) < 400


@pytest.mark.parametrize(
    ("kind", "given", "met", "not_met"),
    [
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["a cats tale", "concat"],
         ["Cat", "a cat.", "x-cat"]),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a***b", "***a *** b***", "a***b**"],
         ["a", "a******b", "a***b***c", "***"]),
        ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
         ["a\n\nSo, b", "a\n\n'so' b", "a b\n\n so\n"], ["a\n\nsome", "so\n\na", "a\n\n\n\nso", "a\n\nso\n\nb"]),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a p.s. b", "P. S."], ["P.S", "PS."]),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* *b*", "**a** **b**", "*a***b**"],
         ["*a*", "**a**", "* *", "**a\n**", "*a\nb*"]),
        ("detectable_format:title", {}, ["<<a>>", "x << >>\n<<b>>", "<<a>> >>"], ["<<>>", "<< >>", "<a>", "<<a\n>>"]),
        ("startend:quotation", {}, ['"a"', ' "a" \n', '""'], ['"', '"a', 'a"', 'b "a"']),
    ],
)  # fmt: skip
def test_examples(kind, given, met, not_met):
    reward = Instructions([(kind, given)])
    assert [reward.followed(text) for text in met] == [[True]] * len(met)
    assert [reward.followed(text) for text in [*not_met, "", " \n"]] == [[False]] * (len(not_met) + 2)


@pytest.mark.parametrize("group", LISTS, ids=lambda group: group[0][0])
def test_token_by_token_gives_the_reward_of_the_whole_text_within_its_bounds(group):
    reward = Instructions(group)
    checked = dts.CheckMonotone(reward)
    for pieces in texts(60, 1):
        vocabulary = dict(enumerate(dict.fromkeys(pieces)))
        ids = [next(i for i, piece in vocabulary.items() if piece == one) for one in pieces]
        context = Context("p", (1,), lambda ids, v=vocabulary: "".join(v[i] for i in ids))
        state, bounds = checked.start(context), []
        for token in ids:
            (state,) = checked.extend([state], [token])
            bounds.append(reward.upper([state])[0])
            assert 0 <= reward.promise([state])[0] <= 1
        (value,) = checked.finish([state], [Finished(tuple(ids), "".join(pieces))])
        assert value == reward.score_text("".join(pieces))
        assert all(after <= before for before, after in pairwise(bounds))


@pytest.fixture(scope="module")
def checkers():
    """The checkers of lm-eval, whose import asks for a download, with English for every text's language."""
    langdetect, nltk = pytest.importorskip("langdetect"), pytest.importorskip("nltk")  # the missing one costs nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_, **__: True)
        patch.setattr(langdetect, "detect", lambda text: "en")
        yield pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT


@pytest.mark.parametrize("group", LISTS, ids=lambda group: group[0][0])
def test_2000_texts_are_judged_as_by_lm_eval(checkers, group):
    drawn = ["".join(pieces) for pieces in texts(2000, 2)]
    for kind, given in group:
        checker = checkers[kind](kind)
        checker.build_description(**given)
        expected = [bool(text.strip()) and bool(checker.check_following(text)) for text in drawn]
        reward = Instructions([(kind, given)])
        assert [reward.followed(text) for text in drawn] == [[want] for want in expected]
        assert 0 < sum(expected) < 2000


# The task -----------------------------------------------------------------------------------------------------------


def test_the_task_makes_200_different_prompts_with_three_instructions_each():
    task = load_task("instructions")
    assert len({json.dumps(example.prompt) for example in task.examples}) == 200
    for example in task.examples:
        assert len(example.inputs) == 3 == len({kind for kind, _ in example.inputs})
        assert task.reward(example).monotone
    used = {kind for example in task.examples for kind, _ in example.inputs}
    assert used == set(INSTRUCTIONS)
    again = load_task("instructions", num_samples=5)
    assert [example.prompt for example in again.examples] == [
        next(e.prompt for e in task.examples if e.id == one.id) for one in again.examples
    ]


def test_what_the_prompt_asks_for_is_what_is_checked():
    task = load_task("instructions")
    for example in task.examples:
        words = example.prompt[-1]["content"]
        for _, given in example.inputs:
            for value in given.values():
                for one in value if isinstance(value, list) else [value]:
                    assert one in ("at least", 2, "Section") or str(one) in words, (given, words)


def test_the_task_scores_share_and_all():
    task = load_task("instructions", num_samples=2)
    first, second = task.examples
    scores = task.score({first.id: "", second.id: "..."})
    assert scores["all_followed"] == 0.0 and 0 <= scores["followed"] < 1
    assert list(scores) == list(task.metrics)
    with pytest.raises(UsageError, match="brings its own prompts"):
        load_task("instructions", data_dir="somewhere")


def test_more_instructions_than_there_are_groups_are_one_clear_line(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        (resources.files("dts.evaluation.tasks") / "instructions.yaml").read_text().replace("at_once: 3", "at_once: 9")
    )
    with pytest.raises(UsageError, match=r"own\.yaml: its options or its prompt do not fit kind 'instructions'"):
        load_task(str(own))


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ([], "give at least one"),
        ([("length", {})], "instruction 'length' is not known; choose from keywords:existence"),
        (
            [("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "most"})],
            "give 'at least' or 'less than'",
        ),
        (
            [("keywords:frequency", {"keyword": "a"})],
            "'keywords:frequency' does not take the arguments {'keyword': 'a'}",
        ),
        ([("keywords:letter_frequency", {"letter": 1, "let_frequency": 1, "let_relation": "at least"})], "IFEval"),
        ([("detectable_content:postscript", {"postscript_marker": "PS"})], r"give P\.S\. or P\.P\.S"),
        ([("startend:end_checker", {"end_phrase": ' "" '})], "give some words"),
    ],
)
def test_instructions_that_are_none(instructions, message):
    with pytest.raises(UsageError, match=message):
        Instructions(instructions)


# -- as a training reward ----------------------------------------------------------------------------------------------


def test_prompts_to_train_on_are_the_templates_own_and_none_of_the_tasks():
    file = read_task_file("instructions")
    options = Options(**file.options)
    parts = {"train": range(200, 264), "validation": range(264, 276), "test": range(24)}
    for name, numbers in parts.items():
        rows = (DATA / f"instructions_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        examples = [made(file, options, number) for number in numbers]
        assert [json.loads(row)["prompt"] for row in rows] == [example.prompt for example in examples]
        assert [asked_instructions(example.prompt) for example in examples] == [example.inputs for example in examples]
    own = {example.prompt[-1]["content"] for example in load_task("instructions").examples}
    assert not own & {made(file, options, number).prompt[-1]["content"] for number in range(200, 276)}


def test_the_training_reward_is_the_tasks_own_of_the_same_prompt():
    task = load_task("instructions", num_samples=12)
    for text in ("", "<<A note>> my dog, *at* *home*. That is all.", "P.S. [a] [b] ***"):
        found = [text_values(CheckMonotone(prompt_instructions), one.prompt, [text])[0] for one in task.examples]
        assert found == [task.reward(one).score_text(text) for one in task.examples]
    assert len(set(found)) > 1
    strange = Row([{"role": "user", "content": "Write."}], None, None, None, "f:1")
    with pytest.raises(UsageError, match=r"prompt 'Write\.' is none of the task's; take those of configs"):
        check_prompts(prompt_instructions, [strange], "grpo.reward")
