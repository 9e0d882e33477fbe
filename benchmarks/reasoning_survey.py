"""Which puzzles of reasoning-gym suit a small model: the share that greedy decoding answers right.

    python benchmarks/reasoning_survey.py --model smollm2-135m --questions 30

A task between 2 % and 60 % can tell methods apart. One line a data set, with Wilson's 95 % interval; nothing here was
chosen by what a search does.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from scipy.stats import binomtest

import dts
from dts.evaluation.tasks.reasoning import ReasoningTask
from dts.evaluation.tasks.task_file import TaskFile
from dts.search import Greedy

LIST = {"'": "", "[": "", "]": "", ".0": ""}
ASKED: dict[str, tuple[list[str], str]] = {  # data sets whose own questions are long: what they say, and a short form
    "number_sorting": (["original_numbers", "direction"], "Sort in {direction} order: {original_numbers}"),
    "word_sorting": (["transformed_words", "direction"], "Sort these words in {direction} order: {transformed_words}"),
    "palindrome_generation": (["letters"], "Make a palindrome of all these letters: {letters}"),
    "countdown": (["numbers", "target"], "Make {target} from the numbers {numbers}, with + - * and /."),
    "puzzle24": (["numbers"], "Make 24 from the numbers {numbers}, with + - * and /."),
    "word_sequence_reversal": (["words"], "Reverse this list of words: {words}"),
    "prime_factorization": (["number"], "{question}"),
    "fraction_simplification": (["numerator", "denominator"], "{question}"),
    "spell_backward": (["word"], "{question}"),
}
DATASETS: dict[str, tuple[dict[str, Any], int]] = {  # settings that make it easy, and tokens of an answer
    "number_sorting": (
        {"min_numbers": 3, "max_numbers": 4, "min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99},
        20,
    ),
    "word_sorting": ({"min_words": 3, "max_words": 4}, 24),
    "palindrome_generation": ({"min_length": 3, "max_length": 5}, 10),
    "prime_factorization": ({"min_value": 4, "max_value": 99}, 16),
    "countdown": (
        {"min_numbers": 2, "max_numbers": 3, "min_value": 1, "max_value": 10, "min_target": 3, "max_target": 40},
        16,
    ),
    "puzzle24": ({}, 16),
    "fraction_simplification": (
        {"min_value": 1, "max_value": 9, "min_factor": 2, "max_factor": 4, "styles": ("plain",)},
        8,
    ),
    "spell_backward": ({"min_word_len": 3, "max_word_len": 4}, 8),
    "letter_counting": ({"min_words": 3, "max_words": 5}, 5),
    "chain_sum": ({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, 6),
    "products": ({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, 8),
    "gcd": ({"min_value": 2, "max_value": 60}, 8),
    "lcm": ({"min_value": 2, "max_value": 12}, 6),
    "number_sequence": ({"max_complexity": 1}, 6),
    "leg_counting": ({"min_animals": 2, "max_animals": 2, "max_instances": 3}, 6),
    "count_bits": ({"min_n": 1, "max_n": 500}, 5),
    "syllogism": ({}, 4),
    "family_relationships": ({}, 6),
    "basic_arithmetic": ({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}, 8),
    "caesar_cipher": ({"min_words": 1, "max_words": 1, "max_rotation": 3}, 10),
    "word_sequence_reversal": ({"min_words": 3, "max_words": 4}, 24),
    "decimal_chain_sum": (
        {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 1,
            "min_decimal_places": 1,
            "max_decimal_places": 1,
        },
        8,
    ),
}


def solved(lm: Any, name: str, questions: int) -> str:
    """The share of questions that greedy decoding answers right, with its interval."""
    config, tokens = DATASETS[name]
    keys, prompt = ASKED.get(name, ([], "{question}"))
    file = TaskFile(
        name, 1, "reasoning", "You answer with one line and nothing else.", prompt, tokens, {"solved": "max"},
        stop=("\n",), options={"dataset": name, "config": config, "keys": keys, "size": questions,
                               "show": LIST if name == "number_sorting" else {}},
    )  # fmt: skip
    task = ReasoningTask(file, None, 0)
    results = dts.decode_many(
        lm, [example.prompt for example in task.examples], method=Greedy(), width=1, batch_size=questions,
        max_new_tokens=tokens, stop=task.stop,
    )  # fmt: skip
    share = task.score({e.id: result.best.text for e, result in zip(task.examples, results, strict=True)})["solved"]
    interval = binomtest(round(share * questions), questions).proportion_ci(method="wilson")
    return f"{share:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    options = parser.parse_args()
    if options.questions < 1:
        parser.error("--questions must be 1 or more")
    torch.set_num_threads(1)
    try:
        lm = dts.load(options.model)
        for name in options.datasets:
            print(f"{name}: {solved(lm, name, options.questions)}", flush=True)
    except dts.DTSError as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
