"""How long a step of GRPO takes: TRL's own generation and loss, and this library's, on the same model and prompt.

    python benchmarks/train_step.py --rounds 3

A step is one group of `--completions` completions of a prompt of `--prompt` tokens. `TRL` is its trainer as it comes,
with `model.generate`. `groups: sample` has the same trainer and loss, and draws from the tree cache, which prefills the
prompt once for the group. `groups: tree` with as many roots as completions is the same plain group, and its prompt goes
through the loss once, too. The end of the text is a token that is hardly ever drawn, so that all train on the same
number of tokens. The arms take turns; each trains two steps, and the second is timed, in CPU seconds of one thread.
Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import dts
from dts.models.loading import load_pretrained
from dts.training.adapters import load_for_training
from dts.training.config import TrainConfig, from_mapping
from dts.training.run import train

ARMS = ("TRL", "groups: sample", "groups: tree")
ROWS = "rows.jsonl"
NEVER = "<|endoftext|>"  # SmolLM2-Instruct ends its turns with another token
STORY = "The old bridge over the river was closed for repairs, and nobody in the village knew for how long. "


class Clock(TrainerCallback):  # type: ignore[misc]
    """CPU seconds from the end of a step to the end of the next: draws, rewards, loss and update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def few_vowels(text: str) -> float:
    """A reward that costs no time: 1 less the share of vowels."""
    return 1.0 - sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def settings(arm: str, options: argparse.Namespace, folder: Path) -> TrainConfig:
    """Of a run of two steps, one group each."""
    groups = arm.removeprefix("groups: ") if arm != "TRL" else "sample"
    return from_mapping({
        "name": groups, "method": "grpo", "model": options.model, "data": str(folder / ROWS), "max_steps": 2,
        "batch_size": options.completions, "max_length": options.prompt + options.tokens,
        "learning_rate": 1e-5, "accumulation": 1,
        "grpo": {"groups": groups, "n_generations": options.completions, "max_completion_length": options.tokens,
                 "tree_roots": options.completions, "temperature": 1.0, "kl_coeff": 0.1},
    })  # fmt: skip


def timed(arm: str, options: argparse.Namespace, folder: Path) -> float:
    """CPU seconds of the second step."""
    config, clock = settings(arm, options, folder), Clock()
    model, tokenizer = load_pretrained(options.model)
    tokenizer.eos_token = NEVER
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if arm == "TRL":
        plain(config, model, tokenizer, folder, clock)
    else:
        config = replace(config, output=str(folder))
        train(config, model=(model, tokenizer), reward=few_vowels, callbacks=[clock], overwrite=True)
    return clock.seconds[-1]


def plain(config: TrainConfig, model: Any, tokenizer: Any, folder: Path, clock: Clock) -> None:
    """The same run as a script of TRL's users has it."""
    own, _, lora = load_for_training(config, (model, tokenizer))
    grpo = config.grpo
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=config.max_steps, learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size, gradient_accumulation_steps=1,
        num_generations=grpo.n_generations, beta=grpo.kl_coeff,
        max_completion_length=grpo.max_completion_length, temperature=grpo.temperature, top_k=0, use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_dropout=True, disable_tqdm=True, report_to="none",
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [few_vowels(one[0]["content"]) for one in completions]

    GRPOTrainer(
        model=own, reward_funcs=[reward], args=arguments, processing_class=tokenizer, peft_config=lora,
        train_dataset=Dataset.from_list(rows), callbacks=[clock],
    ).train()  # fmt: skip


def write_rows(options: argparse.Namespace, folder: Path) -> None:
    """Two prompts of at most `--prompt` tokens, less than a sentence short of it."""
    lm = dts.load(options.model)
    prompts = []
    for opening in ("Continue. ", "Tell more. "):
        content = opening
        while len(lm.encode([{"role": "user", "content": content + STORY}])) <= options.prompt:
            content += STORY
        prompts.append({"prompt": [{"role": "user", "content": content}]})
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of the prompt")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is not allowed; give 1 or more")
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(options, folder)
        for index in range(options.rounds):
            for arm in ARMS:
                seconds[arm].append(timed(arm, options, folder))
            print(f"round {index + 1}: " + ", ".join(f"{arm} {seconds[arm][-1]:.1f} s" for arm in ARMS), flush=True)
    for arm in ARMS[1:]:
        ratios = [trl / own for trl, own in zip(seconds["TRL"], seconds[arm], strict=True)]
        rounds = f"rounds {min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{arm}: {statistics.median(ratios):.2f} times as fast as TRL ({rounds})")


if __name__ == "__main__":
    main()
