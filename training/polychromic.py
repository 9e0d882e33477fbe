"""Polychromic fine-tuning: supervised fine-tuning plus the score-function gradient of the samples' diversity."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dts.errors import UnavailableError
from dts.models.huggingface import HFModel
from dts.training.config import PolychromicSettings
from dts.training.diversity import DISTANCES, GATES, distance_matrix, gate_values, named, unique_words
from dts.training.estimator import diversity, pairwise_advantages, score_function_loss
from dts.training.health import Meter
from dts.training.parts import Parts
from dts.training.sampling import Group, decoder_of, draw_samples, in_eval_mode, stream
from dts.training.sft import IGNORED, build_sft

try:
    from trl import SFTTrainer
except ImportError as error:
    raise UnavailableError(f"training needs trl ({error}); run: pip install 'maxent-decoding[train]'") from error


def sequence_log_probs(
    model: Any, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]], temperature: float = 1.0
) -> torch.Tensor:
    """log pi(y | prompt) of each completion, [n], with gradients."""
    device = next(model.parameters()).device
    sequences = [torch.tensor([*prompt_ids, *completion]) for completion in completions]
    ids = pad_sequence(sequences, batch_first=True).to(device)  # [n, P + T]
    mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True).to(device)
    width = ids.shape[1] - len(prompt_ids)  # T
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    steps = (logits.float() / temperature).log_softmax(-1).gather(-1, ids[:, -width:, None])[..., 0]  # [n, T]
    return (steps * mask[:, -width:]).sum(-1)


class PolychromicTrainer(SFTTrainer):
    """The quality loss is SFT's. The diversity term adds to the gradient and not to the printed loss, as its own value
    means nothing; `combined_loss` is quality - weight * diversity."""

    def __init__(self, *arguments: Any, polychromic: PolychromicSettings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._settings = polychromic
        self._distance = named(polychromic.distance, DISTANCES, "polychromic.distance")
        self._gate = named(polychromic.gate, GATES, "polychromic.gate")
        self._meter = Meter()
        self._lm: HFModel | None = None
        self._pass = (-1, 0)  # optimizer step, passes made in it

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        prompts = _prompts(inputs["input_ids"], inputs["labels"])[: self._settings.prompts]
        quality = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # With a token count given, `Trainer` leaves it to the loss to average over the passes of a step.
        passes = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        surrogate = self._diversity_term(model, prompts) / passes
        self._meter.add("quality_loss", quality.item() * passes / self.current_gradient_accumulation_steps)
        return quality if self._settings.weight == 0 else quality + (surrogate - surrogate.detach())

    def _diversity_term(self, model: Any, prompts: Sequence[list[int]]) -> torch.Tensor:
        """The surrogate's mean over prompts, and the figures of the samples."""
        settings, terms = self._settings, []
        for index, group in enumerate(self._draw(prompts)):
            distances = distance_matrix(group.texts, self._distance)
            gates = gate_values(group.texts, self._gate)
            self._meter.observe("diversity_score", diversity(distances, gates).item())
            self._meter.observe("avg_unique_words", unique_words(group.texts))
            self._meter.observe("gate", gates.mean().item())
            self._meter.add("sampled_tokens", group.forwarded_tokens)
            if settings.weight > 0:
                log_probs = self._log_probs(model, prompts[index], group)
                terms.append(score_function_loss(log_probs, pairwise_advantages(distances, gates), settings.weight))
        return torch.stack(terms).mean() if terms else torch.zeros(())

    def _draw(self, prompts: Sequence[list[int]]) -> list[Group]:
        step = self.state.global_step
        self._pass = (step, self._pass[1] + 1 if self._pass[0] == step else 0)
        key = (self.args.seed, step, self._pass[1], self.args.process_index)
        settings = self._settings
        self._lm = self._lm or decoder_of(self)
        with self._meter.timed("draw"), in_eval_mode(self._lm.model):
            return [
                draw_samples(
                    self._lm, prompt, settings.n_samples, max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature, seed=stream(*key, index),
                )
                for index, prompt in enumerate(prompts)
            ]  # fmt: skip

    def _log_probs(self, model: Any, prompt: list[int], group: Group) -> torch.Tensor:
        model.eval()  # the samples came from the model without dropout, and so must the gradient of their probability
        try:
            return sequence_log_probs(model, prompt, group.token_ids, self._settings.temperature)
        finally:
            model.train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        figures = self._meter.take()
        if figures:
            figures["combined_loss"] = figures["quality_loss"] - self._settings.weight * figures["diversity_score"]
        super().log({**logs, **figures}, start_time)


def _prompts(input_ids: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
    """The tokens before each row's first label."""
    starts = (labels != IGNORED).int().argmax(-1).tolist()
    return [row[:start].tolist() for row, start in zip(input_ids, starts, strict=True)]


def build_polychromic(parts: Parts) -> Any:
    """A ready trainer."""
    return build_sft(parts, functools.partial(PolychromicTrainer, polychromic=parts.config.polychromic))
