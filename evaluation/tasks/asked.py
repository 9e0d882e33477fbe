"""The instructions of a prompt as a reward for training, where one reward serves many prompts."""

from __future__ import annotations

from functools import cache

from dts.errors import UsageError
from dts.evaluation.rewards.instructions import Instructions
from dts.evaluation.rewards.prompted import Prompted, last_message
from dts.evaluation.tasks.instructions import Instruction, Options, made
from dts.evaluation.tasks.registry import read_task_file
from dts.rewards import Prompt

KNOWN = 300  # prompts of the template: the task's own are the first 200, and configs/data has others to train on


@cache
def _known() -> dict[str, list[Instruction]]:
    file = read_task_file("instructions")
    options = Options(**file.options)
    examples = [made(file, options, number) for number in range(KNOWN)]
    return {last_message(example.prompt): list(example.inputs) for example in examples}


def asked_instructions(prompt: Prompt) -> list[Instruction]:
    """The instructions of a prompt that the task's template has made. Raises `UsageError` for another one."""
    text = last_message(prompt)
    if text not in _known():
        raise UsageError(
            f"prompt {text[:60]!r} is none of the task's; take those of configs/data/instructions_train.jsonl"
        )
    return _known()[text]


# The share of the instructions in the prompt that the text follows:
# `grpo.reward: dts.evaluation.tasks.asked:prompt_instructions`.
prompt_instructions = Prompted("prompt_instructions", lambda prompt: Instructions(asked_instructions(prompt)))
