"""Hugging Face causal language models as `dts.lm.LanguageModel`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dts.errors import UsageError
from dts.lm import PROMPT_SLOT
from dts.models.attention import ATTENTION
from dts.models.loading import check_arguments, load_pretrained
from dts.models.prompts import encode
from dts.models.registry import ModelSpec, resolve
from dts.models.sessions import RecomputeSession, TreeSession, full_logits
from dts.models.treecache import Prefix
from dts.rewards import Prompt

log = logging.getLogger(__name__)

PREFILL_CHUNK = 1024  # tokens per forward call; bounds the memory of long prompts
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the self-check, absolute, in logits
LOW_PRECISION_TOLERANCE = 0.25


def load(
    model: str | Path | ModelSpec | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    models_file: str | Path | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> HFModel:
    """A language model to decode with.

    model: a registry name, an entry of `models_file`, a hub id, a local folder (also of a LoRA adapter), or a pair
    (model, tokenizer) of Hugging Face objects. The other options are those of `dts.models.loading.load_pretrained`.

    Raises `UsageError` for an unknown name, `UnavailableError` where the weights cannot be had.
    """
    check_arguments(model, device, dtype, device_map, models_file, trust_remote_code, quantization)
    if isinstance(model, tuple):
        return HFModel(*model)
    spec = model if isinstance(model, ModelSpec) else resolve(str(model), models_file)
    loaded, tokenizer = load_pretrained(
        spec,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    return HFModel(loaded, tokenizer, spec.name)


class HFModel:
    """A causal language model and its tokenizer.

    `model` and `tokenizer` are the plain Hugging Face objects; nothing in them is changed between calls.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UsageError(
                f"{type(model).__name__} is an encoder-decoder model; only decoder-only (causal) models are supported"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._core = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside a LoRA wrapper
        self.decoder = self._core.base_model  # the transformer without its head
        configs = {id(module.config): module.config for module in self._core.modules() if hasattr(module, "config")}
        self._configs = list(configs.values())  # attention modules read their implementation's name from these
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.context_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.eos_ids = _eos_ids(model, tokenizer)
        self._tree_shaped: bool | None = None  # not checked yet
        self._prefixes: WeakValueDictionary[tuple[int, ...], Prefix] = WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        """Where token ids enter the model."""
        device: torch.device = self._core.get_input_embeddings().weight.device
        return device

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        return encode(self, prompt, chat_template_kwargs)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prefix(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> Prefix:
        """Prefill a prompt once for several calls: as long as the returned object lives, decoding the same prompt
        starts from it, and the prompt's tokens count as `usage.cached_tokens` instead of as forwarded."""
        ids = tuple(self.encode(prompt, chat_template_kwargs))
        found = self._prefixes.get(ids)
        if found is None:
            found = self._prefixes[ids] = self._prefill(ids)
        return found

    @torch.inference_mode()
    def _prefill(self, prompt_ids: Sequence[int]) -> Prefix:
        cache = DynamicCache()
        hidden = torch.empty(0)
        for start in range(0, len(prompt_ids), PREFILL_CHUNK):
            chunk = torch.tensor([list(prompt_ids[start : start + PREFILL_CHUNK])], device=self.device)
            hidden = self.decoder(input_ids=chunk, past_key_values=cache, use_cache=True).last_hidden_state[0, -1]
        keys = [layer.keys[0].contiguous() for layer in cache.layers]
        return Prefix(tuple(prompt_ids), keys, [layer.values[0].contiguous() for layer in cache.layers], hidden)

    def batch_limit(self, prompt_tokens: int, max_new_tokens: int, max_kv_bytes: int | None) -> int:
        """Lanes that fit into the bound, or into half of the device's free memory."""
        config = self._core.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * dim * self._core.dtype.itemsize
        free = max_kv_bytes if max_kv_bytes is not None else _free_bytes(self.device) // 2
        return max(1, (free - token * prompt_tokens) // (token * max_new_tokens))

    def open(
        self, prompt_ids: Sequence[int], *, batch_size: int, max_new_tokens: int, max_kv_bytes: int | None = None
    ) -> TreeSession | RecomputeSession:
        if self._tree_shaped is None:
            self._tree_shaped = self._check_tree_cache()
        if not self._tree_shaped:
            return RecomputeSession(self, prompt_ids)
        kept = self._prefixes.get(tuple(prompt_ids))
        session = TreeSession(
            self,
            kept or self._prefill(prompt_ids),
            lanes=batch_size,
            max_new_tokens=max_new_tokens,
            max_kv_bytes=max_kv_bytes,
        )
        usage = session.usage
        if kept is not None:
            usage.cached_tokens = len(prompt_ids)
        else:
            usage.forwarded_tokens = usage.unique_tokens = len(prompt_ids)
            usage.model_calls = -(-len(prompt_ids) // PREFILL_CHUNK)
        return session

    @torch.inference_mode()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] from the decoder's last hidden states [B, H]."""
        config = self._core.config.get_text_config()
        logits: torch.Tensor = self._core.get_output_embeddings()(hidden)
        # The two factors and the cap that families put behind their head; the self-check would show another one.
        factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1)
        logits = logits if factor == 1 else logits * factor
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @contextlib.contextmanager
    def tree_attention(self) -> Iterator[None]:
        """The model's attention reads a `TreeCache` inside this context."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation

    def _check_tree_cache(self) -> bool:
        """Whether this architecture gives through the tree cache the logits that it gives without any cache."""
        if not getattr(self._core, "_supports_attention_backend", False) or getattr(self._core, "_is_stateful", False):
            reason = "its attention cannot be given another cache"
        else:
            ids = [i % self.vocab_size for i in range(1, 8)]
            prompt, branches = ids[:3], (ids[3:5], ids[5:])
            tree = TreeSession(self, self._prefill(prompt), lanes=2, max_new_tokens=3)
            slots = tree.extend([PROMPT_SLOT] * 2, [branch[0] for branch in branches])
            slots = tree.extend(slots, [branch[1] for branch in branches])
            direct = torch.cat([full_logits(self, [*prompt, *branch]) for branch in branches])
            error = (tree.logits(slots).float() - direct.float()).abs().max().item()
            # A trained model's logits reach 30 and more, and rounding errors grow with them.
            size = max(1.0, direct.abs().max().item() / 10)
            if error <= size * TOLERANCE.get(direct.dtype, LOW_PRECISION_TOLERANCE):
                return True
            reason = f"its logits differ by {error:.3g}"
        log.warning(
            "%s: %s (%s) cannot use the tree cache; every prefix is recomputed from its first token, which is slow "
            "and counted in usage.recomputed_tokens", self.name, type(self._core).__name__, reason,
        )  # fmt: skip
        return False


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a sequence, by the generation config and the tokenizer."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    return frozenset(int(token) for token in ids if token is not None)
