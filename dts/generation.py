"""`generate`: tree search behind `model.generate(..., custom_generate=dts.generate)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dts.decoding import decode
from dts.errors import UsageError
from dts.lm import LanguageModel
from dts.results import Result
from dts.rewards import Reward

if TYPE_CHECKING:
    from dts.search import Method

ENDS_WE_KNOW = {"MaxLengthCriteria", "EosTokenCriteria"}  # the search ends sequences at both by itself


def generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    lm: LanguageModel,
    method: Method,
    reward: Reward | Callable[..., Any] | None = None,
    seed: int = 0,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor:
    """A decoding loop for Hugging Face `generate`:

        lm = dts.load((model, tokenizer))
        model.generate(**inputs, max_new_tokens=48, do_sample=True, custom_generate=dts.generate,
                       lm=lm, method=MaxEnt(32), reward=my_function)

    input_ids: [B, L], left-padded where the attention mask [B, L] is 0. The logits processors that `generate` prepared
    (temperature, top-k, top-p, minimal length, those of the caller) define p. Returns [B, longest], prompts included,
    padded on the right; with `num_return_sequences=k` the k best distinct completions of each prompt, the last one
    repeated where fewer were found.
    """
    for criterion in stopping_criteria or ():
        if type(criterion).__name__ not in ENDS_WE_KNOW:
            raise UsageError(
                f"stopping criterion {type(criterion).__name__} is not supported by dts.generate; "
                "use dts.decode(stop=...)"
            )
    mask = model_kwargs.get("attention_mask")  # not a named parameter: `generate` would pass it twice
    copies = generation_config.num_return_sequences or 1  # `generate` has repeated each prompt this often
    sequences: list[list[int]] = []
    for row in range(0, len(input_ids), copies):
        keep = slice(None) if mask is None else mask[row].bool()
        prompt = input_ids[row][keep].tolist()
        result: Result = decode(
            lm,
            prompt,
            method=method,
            reward=reward,
            seed=seed,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            logits_processor=logits_processor if logits_processor else None,
        )
        best = [result.best, *result.completions[1:]][:copies]
        best += best[-1:] * (copies - len(best))
        sequences += [[*input_ids[row].tolist(), *completion.token_ids] for completion in best]
    pad = generation_config.pad_token_id
    pad = int(pad) if pad is not None else min(lm.eos_ids, default=0)
    longest = max(map(len, sequences))
    return torch.tensor([s + [pad] * (longest - len(s)) for s in sequences], device=input_ids.device)
