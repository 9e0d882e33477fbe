"""Supervised fine-tuning: TRL's `SFTTrainer` on the responses, with token ids as the decoder sees them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from dts.errors import UsageError
from dts.models.huggingface import HFModel
from dts.training.data import Row
from dts.training.health import Watch
from dts.training.parts import Parts

log = logging.getLogger(__name__)

IGNORED = -100  # label of a token without loss


def encode_rows(
    rows: Sequence[Row], model: Any, tokenizer: Any, max_length: int, completion_only_loss: bool = True
) -> list[dict[str, list[int]]]:
    """Ids and labels of prompt + response + EOS; a long response is cut, and only it has a loss unless asked otherwise.

    The prompt is encoded as `dts.decode` encodes it, so that the model is asked later what it was taught. Rows whose
    prompt fills `max_length` are left out, with a warning.
    """
    lm, examples = HFModel(model, tokenizer), []
    for row in rows:
        prompt = lm.encode(row.prompt)
        response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        response += [] if row.cut else [tokenizer.eos_token_id]
        ids = (prompt + response)[:max_length]
        if len(prompt) < max_length:
            silent = len(prompt) if completion_only_loss else 0
            examples.append({"input_ids": ids, "labels": [IGNORED] * silent + ids[silent:]})
    if not examples:
        raise UsageError(f"every prompt is longer than max_length={max_length}; raise max_length")
    if len(examples) < len(rows):
        log.warning("%d of %d rows left out: prompt of max_length=%d tokens or more",
                    len(rows) - len(examples), len(rows), max_length)  # fmt: skip
    return examples


def score_labels_only() -> None:
    """On a CPU too, tokens without a label do not go through the head: the loss is the same and prompts need no logits.
    TRL (1.16) leaves them out on GPUs only, because other accelerators would compile anew for every shape."""
    from trl.trainer import utils

    on_gpu = getattr(utils, "_use_triton", None)  # decides that, and nothing else in this module
    if on_gpu is not None and not hasattr(on_gpu, "with_cpu"):

        def compact(device: Any) -> bool:
            return device.type == "cpu" or bool(on_gpu(device))

        compact.with_cpu = True  # type: ignore[attr-defined]
        utils._use_triton = compact


def build_sft(parts: Parts, trainer: Callable[..., Any] | None = None) -> Any:
    """A ready trainer. trainer: another one than TRL's SFT trainer, of the same arguments."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    score_labels_only()
    config = parts.config
    examples = encode_rows(parts.rows, parts.model, parts.tokenizer, config.max_length, config.completion_only_loss)
    return (trainer or SFTTrainer)(
        model=parts.model,
        args=SFTConfig(**parts.arguments, max_length=None),
        train_dataset=Dataset.from_list(examples),
        processing_class=parts.tokenizer,
        peft_config=parts.lora,
        callbacks=[Watch(config.model)],
    )
