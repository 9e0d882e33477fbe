"""Rewards that another model gives: a classifier or reward model of Hugging Face, or a language model's likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dts.errors import UsageError
from dts.rewards import Context, Finished, TerminalReward


class ClassifierReward(TerminalReward):
    """Score of a sequence-classification model: the probability of `label`, or a reward model's raw output.

    `label` is a name or an index of the model's labels; None takes the single output of a reward model as it is.
    `with_prompt` puts the prompt before the completion, by the tokenizer's chat template where the prompt is messages.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: str | int | None,
        *,
        with_prompt: bool = False,
        batch_size: int = 16,
        name: str = "classifier",
    ) -> None:
        super().__init__(self._score, name)
        self._model, self._tokenizer = model.eval(), tokenizer
        self._index = _label_index(model.config, label)
        self._with_prompt, self._batch_size = with_prompt, batch_size
        self._bounds = (-math.inf, math.inf) if self._index is None else (0.0, 1.0)
        self.monotone = self._index is not None  # a probability is never below the 0 that is earned before the end

    def earned(self, states: Sequence[Context]) -> list[float]:
        return [self._bounds[0]] * len(states)

    def upper(self, states: Sequence[Context]) -> list[float]:
        return [self._bounds[1]] * len(states)

    def _score(self, context: Context, finished: Sequence[Finished]) -> list[float]:
        texts = [self._text(context, done.text) for done in finished]
        scores: list[float] = []
        for start in range(0, len(texts), self._batch_size):
            scores += self._batch(texts[start : start + self._batch_size])
        return scores

    def _text(self, context: Context, completion: str) -> str:
        if not self._with_prompt:
            return completion
        if isinstance(context.prompt, str):
            return context.prompt + completion
        messages = [message for message in context.prompt if isinstance(message, dict)]
        if not messages:
            raise UsageError(f"reward {self.name!r} has with_prompt=True, which needs a prompt of text or messages")
        answer = {"role": "assistant", "content": completion}
        return str(self._tokenizer.apply_chat_template([*messages, answer], tokenize=False))

    def _batch(self, texts: list[str]) -> list[float]:
        import torch

        limit = getattr(self._model.config, "max_position_embeddings", None)
        inputs = self._tokenizer(
            texts, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._model.device)).logits.double()  # [texts, labels]
        if self._index is None:
            return [float(value) for value in logits[:, 0]]
        chances = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
        return [float(value) for value in chances[:, self._index]]


def _label_index(config: Any, label: str | int | None) -> int | None:
    names = {int(index): str(name) for index, name in config.id2label.items()}
    if label is None:
        if len(names) != 1:
            raise UsageError(f"label=None takes the output of a reward model; this model has {len(names)} labels: "
                             f"give one of {', '.join(names.values())}")  # fmt: skip
        return None
    found = [index for index, name in names.items() if label in (index, name)]
    if not found:
        raise UsageError(f"label={label!r} is none of the model's labels {', '.join(names.values())}")
    return found[0]


class LikelihoodReward(TerminalReward):
    """Mean log-probability per token, in nats, that a language model gives to the completion after the prompt.

    At most 0; -perplexity's logarithm. `lm` comes from `dts.load` and may be another model than the one that decodes,
    with its own tokenizer. An empty completion has the log-probability of ending at once.
    """

    def __init__(self, lm: Any, *, batch_size: int = 8, name: str = "likelihood") -> None:
        super().__init__(self._score, name)
        self._lm, self._batch_size = lm, batch_size

    def upper(self, states: Sequence[Context]) -> list[float]:
        return [0.0] * len(states)

    def _score(self, context: Context, finished: Sequence[Finished]) -> list[float]:
        prompt = list(context.prompt_ids) if self._decodes(context) else self._lm.encode(context.prompt)
        rows = [self._ids(context, done) for done in finished]
        scores: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            scores += self._batch(prompt, rows[start : start + self._batch_size])
        return scores

    def _decodes(self, context: Context) -> bool:
        return bool(context.decode == self._lm.decode)

    def _ids(self, context: Context, done: Finished) -> list[int]:
        if self._decodes(context):
            return list(done.token_ids)  # the very tokens, not another way to write the same text
        encoded = self._lm.tokenizer(done.text, add_special_tokens=False)["input_ids"]
        return list(encoded) or [min(self._lm.eos_ids)]

    def _batch(self, prompt: list[int], rows: list[list[int]]) -> list[float]:
        import torch

        model, longest = self._lm.model, max(map(len, rows))
        ids = torch.tensor([[*prompt, *row, *([0] * (longest - len(row)))] for row in rows], device=model.device)
        # Padding follows the text, where causal attention never looks.
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
        chosen = logits.double().log_softmax(dim=-1).gather(2, ids[:, len(prompt) :, None])[..., 0]  # [rows, longest]
        return [float(chosen[index, : len(row)].mean()) if row else 0.0 for index, row in enumerate(rows)]
