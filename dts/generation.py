"""`generate`: tree search inside `model.generate(..., custom_generate=dts.generate)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dts.constraints.constraint import Constraint
from dts.decoding import decode
from dts.errors import UsageError, shown
from dts.lm import LanguageModel
from dts.processors import MODULE, copied, is_stateless, members, name_of
from dts.results import Result
from dts.rewards import Reward
from dts.settings import LARGEST, check_whole

if TYPE_CHECKING:
    from dts.search import Method

# Every field of `GenerationConfig` is in one of three tables. A field in none of them is refused where it is set.

# Fields that `generate` turns into the logits processors, the length, the ids or the number of rows that come here.
HONOURED = frozenset(
    ["max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p",
     "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty",
     "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits",
     "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
     "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config", "num_return_sequences",
     "return_dict_in_generate", "pad_token_id", "eos_token_id"]
)  # fmt: skip
# Fields that change no result of a search, and why.
_CACHE = "the search has a key/value cache of its own"
_OTHER = "it belongs to a decoding of another kind, which has a field of its own that is refused"
IRRELEVANT = {
    **dict.fromkeys(["use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"],
                    _CACHE),
    **dict.fromkeys(["compile_config", "disable_compile", "low_memory", "continuous_batching_config"],
                    "it changes speed and memory of transformers' own loops only"),
    **dict.fromkeys(["early_stopping", "length_penalty", "is_assistant", "num_assistant_tokens",
                     "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
                     "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"],
                    _OTHER),
    "bos_token_id": "the prompt is given",
    "decoder_start_token_id": "for encoder-decoder models",
    "transformers_version": "a record of how the file was written",
}  # fmt: skip
_BEAMS = "choose dts.search.Beam as method"
_SECOND = "the search has no second model or draft"
_LOOK = "look at the result of dts.decode"
# Fields that a search cannot honour: values that say nothing, and what to do instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "constraints": ((), "give constraint= instead, one of dts.constraints"),
    "force_words_ids": ((), "give a reward or a logits processor"),
    "max_time": ((), "MaxTimeCriteria ends a sequence, not a search: use dts.decode(budget=dts.Budget(seconds=...))"),
    "stop_strings": ((), "give stop= instead"),
    "token_healing": ((False,), "end the prompt at a token's end"),
    "guidance_scale": ((1,), _SECOND),
    "penalty_alpha": ((0,), "choose a method of dts.search"),
    "dola_layers": ((), "choose a method of dts.search"),
    "use_mtp": ((False,), _SECOND),
    "prompt_lookup_num_tokens": ((), _SECOND),
    "assistant_early_exit": ((), _SECOND),
    "output_scores": ((False,), _LOOK),
    "output_logits": ((False,), _LOOK),
    "output_attentions": ((False,), _LOOK),
    "output_hidden_states": ((False,), _LOOK),
}

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# Arguments of the forward pass that `generate` adds by itself, or that are looked at below.
EXPECTED = frozenset(["attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
                      "cache_position"])  # fmt: skip
# Processors whose answer for a row depends on which row of the batch it is.
BY_ROW = frozenset(["RepetitionPenaltyLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
                    "EncoderNoRepeatNGramLogitsProcessor", "PrefixConstrainedLogitsProcessor"])  # fmt: skip


def generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    lm: LanguageModel | None = None,
    method: Method | None = None,
    reward: Reward | Callable[..., Any] | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    require_eos: bool = False,
    constraint: Constraint | None = None,
    constraint_mode: str | None = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A decoding loop for Hugging Face `generate`:

        lm = dts.load((model, tokenizer))
        model.generate(**inputs, max_new_tokens=48, do_sample=True, custom_generate=dts.generate,
                       lm=lm, method=MaxEnt(32), reward=my_function)

    input_ids: [B, L], left-padded where the attention mask [B, L] is 0. The logits processors that `generate` prepared
    (temperature, top-k, top-p, minimal length, those of the caller) define p, and each sees the padding as `generate`
    shows it. With do_sample=False `generate` prepares no temperature, top-k and top-p. `eos_token_id` of the arguments
    or the configuration ends sequences. stop, require_eos, constraint, constraint_mode: as of
    `dts.decode`.

    Returns [B, longest], prompts included, padded on the right; with `num_return_sequences=k` the k best distinct
    completions of each prompt, the last one repeated where fewer were found; with `return_dict_in_generate=True` an
    object that holds them as `sequences`.

    Raises `UsageError` for an argument of `generate` or a field of its configuration that a search cannot honour.
    """
    lm, method = _required(model, lm, method)
    _check_rows(input_ids)
    _check_config(model, generation_config)
    _check_lists(logits_processor=logits_processor, stopping_criteria=stopping_criteria)
    _check_arguments(input_ids, model_kwargs)
    max_length, eos_ids = _ends(lm, generation_config, stopping_criteria)
    mask = model_kwargs.get("attention_mask")  # not a named parameter: `generate` would pass it twice
    copies = generation_config.num_return_sequences or 1  # `generate` has repeated each prompt this often
    sequences: list[list[int]] = []
    for row in range(0, len(input_ids), copies):
        keep = slice(None) if mask is None else mask[row].bool()
        prompt = input_ids[row][keep].tolist()
        result: Result = decode(
            _Ending(lm, eos_ids), prompt, method=method, reward=reward, seed=seed, stop=stop, require_eos=require_eos,
            constraint=constraint, constraint_mode=constraint_mode, max_new_tokens=max_length - input_ids.shape[1],
            logits_processor=_as_shown(logits_processor or (), input_ids, row, len(prompt)) or None,
        )  # fmt: skip
        best = [result.best, *result.completions[1:]][:copies]
        best += best[-1:] * (copies - len(best))
        sequences += [[*input_ids[row].tolist(), *completion.token_ids] for completion in best]
    found = _padded(sequences, _pad_id(generation_config, eos_ids), input_ids)
    return _as_output(found) if generation_config.return_dict_in_generate else found


# -- what is refused ---------------------------------------------------------------------------------------------------


def _required(model: Any, lm: LanguageModel | None, method: Method | None) -> tuple[LanguageModel, Method]:
    if lm is None or method is None:
        missing = "lm=dts.load((model, tokenizer))" if lm is None else "method=, one of dts.search such as MaxEnt(32)"
        raise UsageError(f"dts.generate needs {missing}, given to model.generate")
    own = getattr(lm, "model", None)
    if own is None or not (_inside(model, own) or _inside(own, model)):
        raise UsageError(f"lm={shown(getattr(lm, 'name', lm))} holds another model than the one that generates")
    return lm, method


def _inside(part: Any, whole: Any) -> bool:
    return part is whole or (isinstance(whole, torch.nn.Module) and any(part is one for one in whole.modules()))


def _check_rows(input_ids: Any) -> None:
    shape = list(getattr(input_ids, "shape", ()))
    if not isinstance(input_ids, torch.Tensor) or len(shape) != 2 or not shape[0] or input_ids.dtype not in INTEGERS:
        raise UsageError(f"input_ids ({type(input_ids).__name__}) of shape {shape}: give a tensor [B, L] of token ids")


def _check_config(model: Any, config: Any) -> None:
    """Raise `UsageError` for a field that is set and cannot be honoured."""
    if not hasattr(config, "num_return_sequences") or not hasattr(config, "max_length"):
        raise UsageError(f"generation_config={shown(config)} is not allowed; give a GenerationConfig")
    if config.pad_token_id is not None:
        check_whole("pad_token_id", config.pad_token_id, -LARGEST, allowed="a token id")
    if config.num_return_sequences is not None:
        check_whole("num_return_sequences", config.num_return_sequences, 1, allowed="a whole number >= 1")
    if not isinstance(config.return_dict_in_generate, (bool, type(None))):
        raise UsageError("return_dict_in_generate is neither True nor False")
    own = getattr(model, "generation_config", None)
    for field, value in vars(config).items():
        if field.startswith("_") or value is None or field in HONOURED or field in IRRELEVANT:
            continue
        silent, instead = REFUSED.get(field, ((), "this version of dts does not know it"))
        # A file on the hub may hold entries that transformers does not know either.
        unknown_entry = not hasattr(type(config)(), field) and repr(getattr(own, field, None)) == repr(value)
        says_nothing = isinstance(value, (bool, int, float)) and value in silent
        if not says_nothing and not unknown_entry:
            raise UsageError(f"{field}={shown(value)} is not supported by dts.generate; {instead}")


def _check_lists(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, (list, tuple)):
            raise UsageError(f"{name}={shown(value)} is not allowed; give a list, such as generate makes of it")


def _check_arguments(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> None:
    for name, value in {**_not_passed_on(), **model_kwargs}.items():
        if name not in EXPECTED and value is not None and value is not False:
            kind = type(value).__name__
            raise UsageError(f"{name} ({kind}) is not supported by dts.generate, which would ignore it; leave it out")
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape):
        raise UsageError(f"attention_mask of shape {getattr(mask, 'shape', None)}: give {list(input_ids.shape)}")
    if positions is not None:
        kept = (torch.ones_like(input_ids) if mask is None else mask).bool()
        usual = kept.long().cumsum(-1) - 1
        if getattr(positions, "shape", None) != usual.shape or not torch.equal(
            positions[kept], usual[kept].to(positions)
        ):
            raise UsageError("position_ids other than those that count the tokens are not supported; leave them out")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length()):
        raise UsageError(
            "past_key_values is not supported by dts.generate; keep the prompt's cache by lm.prefix(prompt)"
        )


def _not_passed_on() -> dict[str, Any]:
    """Arguments of `generate` that it does not hand to a loop like this one: read from its frame."""
    names = ("streamer", "assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus")
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals:
            return {name: frame.f_locals.get(name) for name in names}
        frame = frame.f_back
    return {}


# -- ends --------------------------------------------------------------------------------------------------------------


class _Ending:
    """A language model whose sequences end with other ids."""

    def __init__(self, lm: LanguageModel, eos_ids: frozenset[int]) -> None:
        self._lm, self.eos_ids = lm, eos_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)


def _ends(lm: LanguageModel, config: Any, criteria: Any) -> tuple[int, frozenset[int]]:
    """The greatest length with the prompt, and the ids that end a sequence: the configuration's, else the model's."""
    lengths, eos = [config.max_length], _ids(config.eos_token_id)
    for criterion in criteria or ():
        kind = type(criterion).__name__
        if kind == "MaxLengthCriteria":
            lengths.append(criterion.max_length)
        elif kind == "EosTokenCriteria":
            eos |= _ids(criterion.eos_token_id)
        else:
            raise UsageError(
                f"stopping criterion {kind} is not supported by dts.generate; give stop= or use dts.decode"
            )
    known = [length for length in lengths if isinstance(length, int) and not isinstance(length, bool)]
    if len(known) < len(lengths):
        raise UsageError(
            f"max_length={shown(config.max_length)} is not allowed; give a whole number, or max_new_tokens"
        )
    return min(known), (eos if config.eos_token_id is not None or eos else lm.eos_ids)


def _ids(value: Any) -> frozenset[int]:
    """An id, several, or a tensor of them. Negative ones, which `generate` allows, end nothing."""
    values: Any = value.flatten().tolist() if isinstance(value, torch.Tensor) else members(value)
    values = () if value is None else values
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        raise UsageError(f"eos_token_id={shown(value)} is not allowed; give a token id or a list of them")
    return frozenset(one for one in values if one >= 0)


# -- processors --------------------------------------------------------------------------------------------------------


def _as_shown(processors: Any, input_ids: torch.Tensor, row: int, prompt: int) -> list[Any]:
    """The processors for one row, made to see what `generate` shows them: padding, and all rows of the batch."""
    if len(input_ids) == 1 and prompt == input_ids.shape[1]:
        return list(processors)
    return [_Shown(processor, input_ids, row, prompt) for processor in processors]


class _Shown:
    """A processor that gets one row's ids after the row's padding, as that row of the batch."""

    def __init__(self, processor: Any, input_ids: torch.Tensor, row: int, prompt: int) -> None:
        kind = type(processor)
        self._processor, self._input_ids, self._row, self._prompt = processor, input_ids, row, prompt
        self._alone = kind.__module__ == MODULE and kind.__name__ not in BY_ROW and is_stateless(processor)
        self.stateless, self.__name__ = is_stateless(processor), name_of(processor)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shown:
        return _Shown(copied(self._processor), self._input_ids, self._row, self._prompt)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> Any:
        start = self._input_ids[self._row : self._row + 1].to(ids.device)
        ids = torch.cat([start, ids[:, self._prompt :]], dim=1)
        if self._alone:
            return self._processor(ids, logits)
        rows = len(self._input_ids)
        answer = self._processor(ids.repeat(rows, 1), logits.repeat(rows, 1))
        return answer[self._row : self._row + 1] if isinstance(answer, torch.Tensor) else answer


# -- output ------------------------------------------------------------------------------------------------------------


def _pad_id(config: Any, eos_ids: frozenset[int]) -> int:
    pad, eos = config.pad_token_id, config.eos_token_id
    if pad is not None:
        return int(pad)
    first = next(iter(eos), None) if isinstance(eos, (list, tuple)) else eos
    return int(first) if first is not None else min(eos_ids, default=0)


def _padded(sequences: Sequence[Sequence[int]], pad: int, like: torch.Tensor) -> torch.Tensor:
    longest = max(map(len, sequences), default=0)
    rows = [[*sequence, *[pad] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=like.device)


def _as_output(sequences: torch.Tensor) -> Any:
    from transformers.generation import GenerateDecoderOnlyOutput  # slow to import

    return GenerateDecoderOnlyOutput(sequences=sequences)
