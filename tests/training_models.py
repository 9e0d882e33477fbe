"""A tiny random Llama with a tokenizer of single characters that can be saved, and settings of short runs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from dts.training.config import TrainConfig, from_mapping

WORDS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]
CHARACTERS = " abcdefghijklmnopqrstuvwxyz:\n"


def tiny_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Id 0 is EOS and padding, 1 unknown."""
    vocab = {name: i for i, name in enumerate(["<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def tiny_pair(characters: str = CHARACTERS, seed: int = 0):
    """(model, tokenizer), the same at every call."""
    tokenizer = tiny_tokenizer(characters)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    return model.eval(), tokenizer


def saved_pair(folder: Path) -> str:
    """The tiny model as a folder, so that adapters can name it."""
    for part in tiny_pair():
        part.save_pretrained(folder)
    return str(folder)


def tiny_config(base: str, folder: Path) -> Callable[..., TrainConfig]:
    """config(method, name, **changes): a run of six steps on `WORDS` with a checkpoint every second one."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {w}", "response": f"{w} ok {w}"}) + "\n" for w in WORDS))
    common = {
        "model": base, "data": str(data), "output": str(folder / "out"), "max_steps": 6, "save_steps": 2,
        "batch_size": 2, "accumulation": 2, "learning_rate": 2e-2, "schedule": "linear",
        "warmup_ratio": 0.0,
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        "polychromic": {"weight": 2.0, "n_samples": 3, "max_new_tokens": 5, "gate": "none", "distance": "jaccard"},
        "grpo": {"max_completion_length": 5, "n_generations": 4, "search_rollouts": 6},
        "distill": {"max_new_tokens": 5, "rollouts": 6, "reward_scale": 2.0},
    }  # fmt: skip

    def build(method: str, name: str | None = None, **changes) -> TrainConfig:
        return from_mapping(common, {"method": method, "name": name or method}, changes)

    return build


def share_of_a(text: str) -> float:
    return text.count("a") + text.count("e") + 0.1 * len(text)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has learnt."""
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt


def drop(file: Path, key: str) -> None:
    """Leave a key out of a JSON file."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings[key]
    file.write_text(json.dumps(settings), encoding="utf-8")
