"""Hugging Face causal language models as `dts.lm.LanguageModel`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dts.errors import UsageError, shown
from dts.lm import Batch
from dts.memory import free_bytes
from dts.models.batch import Room, TreeBatch
from dts.models.engines.loading import load_engine
from dts.models.engines.tails import EngineModel
from dts.models.forest import Forest, lane_length, lone
from dts.models.loading import check_arguments, load_pretrained
from dts.models.prefixes import Prefix, Segment
from dts.models.prompts import encode
from dts.models.registry import ENGINES, ModelSpec, resolve
from dts.models.rope import RopeLimit, context_length, rope_limits
from dts.models.selfcheck import refuse_unless_causal, state_bytes, tree_way
from dts.models.sessions import RecomputeSession, TreeSession, prefill
from dts.models.treecache import Place
from dts.models.view import ModelView, Way, core_of, entry_device
from dts.models.vocabulary import unknown_ids
from dts.rewards import Prompt

log = logging.getLogger(__name__)

PREFILL_CHUNK = 1024  # tokens per forward call; bounds the memory of long prompts


@overload
def load(source: str, /, *, model: str, tokenizer: Any, **engine_options: Any) -> EngineModel: ...


@overload
def load(
    source: str | Path | ModelSpec | tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    /,
    *,
    model: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    models_file: str | Path | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    allow_unknown_ids: bool = False,
    **engine_options: Any,
) -> HFModel: ...


def load(
    source: Any = None,
    /,
    *,
    model: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    models_file: str | Path | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    allow_unknown_ids: bool = False,
    **engine_options: Any,
) -> HFModel | EngineModel:
    """A language model to decode with.

    source, or model: a registry name, an entry of `models_file`, a hub id, a local folder (also of a LoRA adapter), or
    a pair (model, tokenizer) of Hugging Face objects. allow_unknown_ids: keep ids in p that the tokenizer does not
    know.
    The other options are those of `dts.models.loading.load_pretrained`.

    Or an engine (docs/large_models.md): "vllm:NAME" with the options of `vllm.LLM`, or a server's address with model=,
    its name there, tokenizer=, preset= ("vllm", "sglang" or "llama.cpp") and the options of
    `dts.models.engines.http.Server`; with segment= and top= of `dts.models.engines.tails.EngineModel`.

    Raises `UsageError` for an unknown name, `UnavailableError` where the weights cannot be had.
    """
    spec = _engine_spec(source if source is not None else model, models_file)
    if spec is not None:
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "quantization": quantization}
        given = {option: value for option, value in options.items() if value}
        if source is not None and model is not None:
            given["model"] = model
        if device is not None or device_map is not None or allow_unknown_ids:
            raise UsageError("an engine takes no device, device_map and allow_unknown_ids; it places its model itself")
        return load_engine(spec, {**given, **engine_options})
    if engine_options:
        raise UsageError(f"{next(iter(engine_options))}= is no option of a model; it may be one of an engine, such as "
                         "vllm:NAME or http://127.0.0.1:8000/v1")  # fmt: skip
    if source is not None and model is not None:
        raise UsageError(f"model={shown(model)} was given beside {shown(source)}; give one of them")
    model = model if source is None else source
    check_arguments(model, device, dtype, device_map, models_file, trust_remote_code, quantization)
    if isinstance(model, tuple):
        return HFModel(*model, allow_unknown_ids=allow_unknown_ids)
    spec = model if isinstance(model, ModelSpec) else resolve(str(model), models_file)
    loaded, tokenizer = load_pretrained(
        spec,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    return HFModel(loaded, tokenizer, spec.name, allow_unknown_ids=allow_unknown_ids)


def _engine_spec(source: Any, models_file: Any) -> ModelSpec | None:
    """What the name of an engine stands for; None for a model."""
    if isinstance(source, str) and (isinstance(models_file, (str, Path)) or source.startswith(ENGINES)):
        source = resolve(source, models_file)
    return source if isinstance(source, ModelSpec) and source.kind == "engine" else None


class HFModel:
    """A causal language model and its tokenizer.

    `model` and `tokenizer` are the plain Hugging Face objects. Nothing in them is ever changed, also not during a call:
    every session works on a `ModelView`, so threads may share them, and the model may be in training mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        *,
        allow_unknown_ids: bool = False,
    ) -> None:
        """allow_unknown_ids: whether ids that the tokenizer does not know (a padded head) are part of p."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise UsageError(
                f"{type(model).__name__} is an encoder-decoder model; only decoder-only (causal) models are supported"
            )
        self.model, self.tokenizer = model, tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._core = core_of(model)
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.context_length = context_length(text_config)
        self.eos_ids = _eos_ids(model, tokenizer)
        self._allow_unknown_ids = allow_unknown_ids
        self._lock = threading.Lock()  # of what is found out once, below
        self._problem: str | None = None  # why the tree cache cannot be used
        self._way = Way()
        self._state_bytes = 0  # of one recurrent state
        self._checked = self._knows_vocabulary = False
        self._unknown: torch.Tensor | None = None  # ids, ascending
        self._warned: set[str] = set()
        self._prefixes: WeakValueDictionary[tuple[int, ...], Prefix] = WeakValueDictionary()

    @property
    def decoder(self) -> Any:
        """The transformer without its head."""
        return self._core.base_model

    @property
    def device(self) -> torch.device:
        """Where token ids enter the model."""
        return entry_device(self._core)

    def view(self) -> ModelView:
        """The model as it is now, for one session: in eval mode, and with modules and configs of its own."""
        return ModelView(self.model, self._way)

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        return encode(self, prompt, chat_template_kwargs)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prefix(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> Prefix:
        """Prefill a prompt once for several calls: as long as the returned object lives, decoding the same prompt
        starts from it, and the prompt's tokens count as `usage.cached_tokens` instead of as forwarded. Holds nothing
        for a model that the tree cache cannot serve."""
        ids = tuple(self.encode(prompt, chat_template_kwargs))
        found = self._prefixes.get(ids)
        if found is None:
            served = self._tree_problem() is None
            made = self._prefill(self.view(), ids) if served else Prefix(ids, [], [], torch.empty(0))
            with self._lock:  # another thread may have been quicker, and its object is in use
                found = self._prefixes.setdefault(ids, made)
        return found

    def _prefill(self, view: ModelView, prompt_ids: Sequence[int]) -> Prefix:
        return prefill(view, prompt_ids, self.device, chunk=self._prefill_chunk(len(prompt_ids)))

    def _prefill_chunk(self, tokens: int) -> int:
        """Tokens per forward call; all of them where a first part would get the frequencies of short sequences."""
        whole = self._way.whole_prompts or any(limit.crossed(1, tokens) for limit in self._rope_limits())
        return max(tokens, 1) if whole else PREFILL_CHUNK

    def batch_limit(self, prompt_tokens: int, max_new_tokens: int, max_kv_bytes: int | None) -> int:
        """Lanes that fit into the bound, or into half of the device's free memory."""
        token = _kv_elements(self._core.config.get_text_config()) * self._core.dtype.itemsize
        free = max_kv_bytes if max_kv_bytes is not None else free_bytes(self.device) // 2
        self._tree_problem()  # finds out about states
        lane = token * max_new_tokens + 2 * self._state_bytes  # a call works on copies of them
        return max(1, (free - token * prompt_tokens - self._state_bytes) // lane)

    def open(
        self, prompt_ids: Sequence[int], *, batch_size: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> TreeSession | RecomputeSession:
        problem = self._tree_problem() or self._rope_problem(len(prompt_ids), max_new_tokens)
        if problem is not None:
            self._warn(problem)
            return RecomputeSession(self.view, prompt_ids, self.device, self.unknown_ids())
        kept = self.kept(prompt_ids)
        session = TreeSession(*self.alone(prompt_ids, batch_size, max_new_tokens, max_kv_bytes))
        usage = session.usage
        if kept is not None:
            usage.cached_tokens = len(prompt_ids)
        else:
            usage.forwarded_tokens = usage.unique_tokens = len(prompt_ids)
            usage.model_calls = -(-len(prompt_ids) // self._prefill_chunk(len(prompt_ids)))
        return session

    def alone(
        self, prompt_ids: Sequence[int], lanes: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> tuple[Forest, Segment, Place]:
        """A forest for this prompt only, which went through the model."""
        view = self.view()
        return lone(
            view,
            self.kept(prompt_ids) or self._prefill(view, prompt_ids),
            device=self.device,
            lanes=lanes,
            max_new_tokens=max_new_tokens,
            max_kv_bytes=max_kv_bytes,
            state_bytes=free_bytes(self.device) // 4,
            unknown=self.unknown_ids(),
        )

    def kept(self, prompt_ids: Sequence[int]) -> Prefix | None:
        """What `prefix` prefilled, while the caller holds it."""
        return self._prefixes.get(tuple(prompt_ids))

    def batch(self, *, prompts: int, width: int, max_new_tokens: int, max_kv_bytes: int | None = None) -> Batch | None:
        """Sessions of up to `prompts` prompts in one batch; None for a model that the tree cache cannot serve."""
        if self._tree_problem() is not None:
            return None
        token = _kv_elements(self._core.config.get_text_config()) * self._core.dtype.itemsize
        bound = max_kv_bytes if max_kv_bytes is not None else free_bytes(self.device) // 2
        room = Room(bound, token, prompts, width, lane_length(max_new_tokens), self._state_bytes)
        return TreeBatch(self, room, max_new_tokens)

    def grows_with_length(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether positions get other frequencies within these lengths, which neighbours in a batch would share."""
        return any(limit.crossed(1, prompt_tokens + max_new_tokens) for limit in self._rope_limits())

    def _tree_problem(self) -> str | None:
        """Why the tree cache cannot serve this architecture. Raises `UsageError` where nothing can."""
        with self._lock:
            if not self._checked:
                found = tree_way(self.view, self.vocab_size, self.device)
                if isinstance(found, Way):
                    self._way = found
                    self._state_bytes = state_bytes(self.view, self.vocab_size, self.device)
                else:
                    self._problem = found
                    refuse_unless_causal(self.view, self.vocab_size, self.device)
                self._checked = True
            return self._problem

    def _rope_limits(self) -> list[RopeLimit]:
        return rope_limits(self._core.config.get_text_config())

    def _rope_problem(self, prompt_tokens: int, max_new_tokens: int) -> str | None:
        """Why these lengths cannot be served: logits are read after up to max_new_tokens - 1 new tokens."""
        longest = prompt_tokens + max_new_tokens - 1
        return next((str(limit) for limit in self._rope_limits() if limit.crossed(prompt_tokens, longest)), None)

    def unknown_ids(self) -> torch.Tensor | None:
        """Ids of probability 0, found once for a model; None where there are none."""
        with self._lock:
            if not self._knows_vocabulary and not self._allow_unknown_ids:
                ids = [token for token in unknown_ids(self.tokenizer, self.vocab_size) if token not in self.eos_ids]
                self._unknown = torch.tensor(ids, device=self.device) if ids else None
                self._knows_vocabulary = True
            return self._unknown

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            log.warning(
                "%s: %s (%s) cannot use the tree cache; every prefix is recomputed from its first token, which is slow "
                "and counted in usage.recomputed_tokens", self.name, type(self._core).__name__, problem,
            )  # fmt: skip


def _kv_elements(config: Any) -> int:
    """Numbers that keys and values of one token take, about; for models without attention, those of a hidden state."""
    layers, hidden = (_most(config, name) or 1 for name in ("num_hidden_layers", "hidden_size"))
    heads = _most(config, "num_attention_heads")
    if not heads:
        return hidden
    kept = _most(config, "num_key_value_heads") or heads
    return 2 * layers * kept * (_most(config, "head_dim") or -(-hidden // heads))


def _most(config: Any, name: str) -> int:
    """A number of a config, which may be given layer by layer; 0 if there is none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # "may vary across layers", an error of a type that not every version has
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return max((int(number) for number in numbers if number is not None), default=0)


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a sequence, by the generation config and the tokenizer."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    return frozenset(int(token) for token in ids if token is not None)
